"""What is asked of a model for each sentence: which tokens, how many at once, and in what words.

`attribute.py` makes an `Asking` and asks it batch by batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.prompts import Prompt
from relneuron.methods.gradients.options import GradientOptions, IgOptions, RelevanceOptions
from relneuron.model.batches import Budget
from relneuron.model.gradients.ig import Integrator, likeliest
from relneuron.model.gradients.reference import alphas
from relneuron.model.gradients.relevance import relevance
from relneuron.model.gradients.sites import Sites, sees_padding
from relneuron.model.targets import Targets

# What helps where one sentence does not fit.
ALONE = "use a smaller --batch-tokens, shorter prompts, or a device with more memory"


def end_of_text(tokenizer: Any) -> int:
    """The token that stands for others in a baseline."""
    token = getattr(tokenizer, "eos_token_id", None)
    if token is None:
        raise RelneuronError(
            "the tokenizer has no end of text to replace tokens with", "use --baseline zero", 2
        )
    return int(token)


def asked_lengths(
    model: Any, prompts: Sequence[Prompt], targets: Targets, options: GradientOptions
) -> list[int]:
    """The tokens of each sentence when it is longest; refuses those beyond the context."""
    lengths = [len(line) for line in targets.ids]
    if not (isinstance(options, IgOptions) and options.asks_all):
        return lengths
    lengths = [n + len(own) - 1 for n, own in zip(lengths, targets.tokens, strict=True)]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    head = model.get_output_embeddings()
    n_logits = None if head is None else int(head.weight.shape[0])
    for prompt, n, own in zip(prompts, lengths, targets.tokens, strict=True):
        if context is not None and n > context:
            raise RelneuronError(
                f"prompt {prompt.id} has {n} tokens with its answer, the model's context {context}",
                "shorten or remove it, or use --answer first",
            )
        if n_logits is not None and max(own) >= n_logits:
            raise RelneuronError(
                f"prompt {prompt.id}: its answer has the token {max(own)}, the model predicts "
                f"{n_logits} tokens",
                "give a model and a tokenizer that belong together",
            )
    return lengths


@dataclass
class Asking:
    """The sentences, and what is asked of a model for each."""

    sites: Sites
    prompts: Sequence[Prompt]
    targets: Targets
    options: GradientOptions
    budget: Budget
    replaced: int | None

    def __post_init__(self) -> None:
        self.pads = not sees_padding(self.sites.model)
        self.integrator: Integrator | None = None
        if isinstance(self.options, IgOptions):
            points = alphas(self.options.schedule, self.options.steps)
            self.integrator = Integrator(self.sites, points, replaced=self.replaced)
        if self.options.target == "prediction":
            self.goals = [[token] for token in self._predicted(self.targets.ids)]
        elif isinstance(self.options, IgOptions) and self.options.asks_all:
            self.goals = [list(own) for own in self.targets.tokens]
        else:
            self.goals = [[token] for token in self.targets.targets]

    def _predicted(self, ids: Sequence[Sequence[int]]) -> list[int]:
        """The model's most probable next tokens, in batches of the budget."""
        found = [0] * len(ids)
        rows = sorted(range(len(ids)), key=lambda row: len(ids[row]))

        def ask(some: list[int]) -> list[int]:
            return likeliest(self.sites, [ids[row] for row in some], self.pads)

        best = self.budget.run(rows, lambda row: len(ids[row]), ask)
        for row, token in zip(rows, best, strict=True):
            found[row] = token
        return found

    def columns(self, row: int, length: int) -> int:
        """What a sentence takes of a batch: its tokens, and its rows on the staircase."""
        own = length if self.integrator is None else self.integrator.columns(length)
        return own * len(self.goals[row])

    def ask(self, rows: list[int]) -> list[dict[str, Any]]:
        """The scores of some sentences, and what stands beside them, by the names of the file."""
        if self.integrator is None:
            return self._relevance(rows)
        asked = self._questions(rows)
        found = self.integrator(
            [ids for _, ids, _ in asked], [goal for _, _, goal in asked], self.budget.tokens
        )
        names = ("ig", "probability", "probability_at_baseline")
        said: list[dict[str, Any]] = []
        for row in rows:
            own = [k for k, (whose, _, _) in enumerate(asked) if whose == row]
            parts = [tensor[own].numpy().sum(0) for tensor in found]
            if isinstance(self.options, IgOptions) and self.options.answer == "mean":
                parts = [part / len(own) for part in parts]
            said.append(dict(zip(names, parts, strict=True)))
        return said

    def _relevance(self, rows: list[int]) -> list[dict[str, Any]]:
        assert isinstance(self.options, RelevanceOptions), "ig has an integrator"
        found = relevance(
            self.sites,
            [self.targets.ids[row] for row in rows],
            [self.goals[row][0] for row in rows],
            of=self.options.of,
            rules=self.options.rules,
            pads=self.pads,
        )
        pairs = zip(found.relevance.numpy(), found.value.numpy(), strict=True)
        return [{"relevance": scores, "value": value} for scores, value in pairs]

    def _questions(self, rows: list[int]) -> list[tuple[int, list[int], int]]:
        """(sentence, token ids, target) for each token of each answer."""
        heads = {row: list(self.targets.ids[row]) for row in rows}
        asked = [(row, list(heads[row]), self.goals[row][0]) for row in rows]
        by_answer = isinstance(self.options, IgOptions) and self.options.extend == "answer"
        for k in range(1, max(len(self.goals[row]) for row in rows)):
            left = [row for row in rows if len(self.goals[row]) > k]
            if by_answer:
                more = [self.goals[row][k - 1] for row in left]
            else:
                more = likeliest(self.sites, [heads[row] for row in left], self.pads)
            for row, token in zip(left, more, strict=True):
                heads[row].append(token)
                asked.append((row, list(heads[row]), self.goals[row][k]))
        return asked

    # --- in words --------------------------------------------------------------------------

    def precision(self, dtype: str) -> str:
        """What the probability, or the logit, was computed in."""
        if self.options.precision == "float64":
            return "float64"
        return "float32" if dtype == "float32" else f"float32, of a model that computes in {dtype}"

    def how(self, dtype: str) -> str:
        kind = "gradient x activation"
        if self.integrator is not None:
            by = "one prefill" if self.integrator.staircase else "layer by layer"
            kind = f"integrated gradients, {by}"
        return f"{kind}, in {self.precision(dtype)}"

    def notices(self, dtype: str) -> list[str]:
        """What a reader of the results must know of how they came about."""
        found = []
        if self.integrator is not None and self.integrator.why_not:
            why = self.integrator.why_not
            found.append(f"integrated layer by layer and step by step, not from one prefill: {why}")
        if dtype != "float32" and self.options.precision == "model":
            found.append(
                f"probabilities and gradients are of a model that computes in {dtype}; "
                "--precision float64 or --dtype float32 has them without its rounding"
            )
        return found
