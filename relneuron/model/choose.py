"""Multiple-choice questions, answered by how likely each option is as a whole text.

The `ablate` stage asks so with --choose. A row is a prompt with one of its options behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from relneuron.artifact.files import RelneuronError, fold
from relneuron.model.ask import Asker
from relneuron.model.converse import Step
from relneuron.model.questions import Questions
from relneuron.texts.tokens import continuations


@dataclass(frozen=True)
class Options:
    """The options of prompts as rows of tokens, those of one prompt one behind the other.

    ids      of each row the prompt's tokens and the option's, without the last one
    wanted   the tokens of the option, all of which are predicted
    starts   where the rows of each prompt begin, and the end of them all
    """

    ids: list[list[int]] = field(default_factory=list)
    wanted: list[list[int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])

    def rows_of(self, prompt: int) -> range:
        return range(self.starts[prompt], self.starts[prompt + 1])


def encode_options(tokenizer: Any, model: Any, questions: Questions) -> Options:
    """How prompts go on with each of their options, as `tokens.continuations` says.

    Prompt and option are tokenised as one text, and what is behind the prompt's tokens is the
    option's (as in EleutherAI's lm-evaluation-harness). Raises RelneuronError for a prompt without
    options, with pictures, or whose right answer is none of them, for an option without a token,
    and for one that does not fit the context.
    """
    prompts, found = questions.prompts, Options()
    for p in prompts:
        wrong = (
            (bool(p.images), "is about a picture", "leave out --choose"),
            (len(p.options) < 2, "has no options to choose from", "give each prompt `options`"),
            (not right_places(p.options, p.objects), f"has no option {p.right!r}", "add it"),
        )
        for is_so, cause, fix in wrong:
            if is_so:
                raise RelneuronError(f"--choose: prompt {p.id} {cause}", fix)
    asked = [(row, name) for row, p in enumerate(prompts) for name in p.options]
    texts = [questions.texts[row] for row, _ in asked]
    languages = [prompts[row].language for row, _ in asked]
    made = continuations(tokenizer, texts, [name for _, name in asked], languages)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    vocabulary = model.get_input_embeddings().num_embeddings
    for (row, name), one in zip(asked, made, strict=True):
        tokens = [*one.spaces, *one.tokens]
        n_tokens = len(questions.ids[row]) + len(tokens)
        if not one.tokens or max(tokens) >= vocabulary or n_tokens - 1 > (context or n_tokens):
            raise RelneuronError(
                f"prompt {prompts[row].id}: with its option {name!r} it has {n_tokens} tokens, "
                f"{len(one.tokens)} of the option; the model has a context of {context} and "
                f"{vocabulary} tokens",
                "give shorter prompts, and options that the tokenizer knows",
            )
        found.ids.append([*questions.ids[row], *tokens[:-1]])
        found.wanted.append(tokens)
    for p in prompts:
        found.starts.append(found.starts[-1] + len(p.options))
    return found


def right_places(options: Sequence[str], objects: Sequence[str]) -> list[int]:
    """Which of the options are right answers, as `artifact.files.fold` has both."""
    right = {fold(name) for name in objects}
    return [place for place, name in enumerate(options) if fold(name) in right]


def choose(likelihoods: Sequence[float], options: Sequence[str], *, normalised: bool) -> int:
    """The option of the greatest log-likelihood, or of the greatest one a character; the first.

    The field calls the two `acc` and `acc_norm` (EleutherAI's lm-evaluation-harness).
    """
    scores = [
        value / len(name.strip()) if normalised else value
        for value, name in zip(likelihoods, options, strict=True)
    ]
    return scores.index(max(scores))


class Chooser(Asker):
    """Reads options behind their prompts."""

    @torch.no_grad()
    def likelihoods(
        self, options: Options, rows: Sequence[int], before_step: Callable[[Step], None]
    ) -> list[float]:
        """log p of all tokens of each row's option behind its prompt, summed, in nats."""
        wanted = [options.wanted[row] for row in rows]
        tokens, mask = self.pad([options.ids[row] for row in rows])
        targets, inside = self.pad(wanted)
        n = targets.shape[1]
        # The option's last token is not read.
        n_answer = inside.sum(1, keepdim=True) - 1
        before_step(Step(torch.arange(len(rows), device=self.device), mask, n_answer, n))
        logits = self._forward(tokens, mask, n).logits[:, -n:].float()
        nll = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        summed: list[float] = torch.where(inside == 1, -nll.double(), 0.0).sum(1).tolist()
        return summed
