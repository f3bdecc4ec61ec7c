"""Ask a model its prompts: the greedy answer of two tokens, and its correctness.

The `record` and `ablate` stages call it, so both ask in exactly the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.model.batches import (
    Budget,
    is_out_of_memory,
    largest,
    pad,
    plan_batches,
    positions_of,
    takes_keep,
)
from relneuron.model.converse import Step, go_through
from relneuron.model.layers import input_device
from relneuron.model.questions import N_ANSWER_TOKENS, Questions
from relneuron.model.spared import Spared
from relneuron.texts.tokens import CHARACTER_BYTES, CUT, whole_text


def cache_of(out: Any) -> dict[str, Any]:
    """The cache that a forward left, as the keyword argument by which the next one takes it.

    A model's output calls it as its forward does: `cache` from transformers 5.24 on,
    `past_key_values` before and in code of a model's own. Raises RelneuronError if there is none.
    """
    name = "cache" if "cache" in out else "past_key_values"
    if not hasattr(out, name):
        raise RelneuronError(
            f"the model's forward gives a {type(out).__name__} without a cache of keys and values",
            "give a causal language model that transformers' generate() runs with a cache",
        )
    return {name: getattr(out, name)}


@dataclass(frozen=True)
class Answers:
    """Per prompt of a batch: the text of the greedy tokens, log p of the object's first token.

    A space that is a token of its own before it counts with it, as in tokenizers that join the
    two. Of several right objects it is the most probable one's, `which` in their order. `choices`:
    of a prompt's options the most probable one, -1 without options.
    """

    predictions: list[str]
    logprobs: list[float]  # nats
    which: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)


def _answers(
    predictions: list[str], questions: Questions, rows: Sequence[int], scores: list[list[float]]
) -> Answers:
    """Of the scores of `Questions.asked_of`, those of the objects and those of the options."""
    n = [len(questions.starts_of(row)) for row in rows]
    right = [line[:k] for line, k in zip(scores, n, strict=True)]
    options = [line[k:] for line, k in zip(scores, n, strict=True)]
    choices = [line.index(max(line)) if line else -1 for line in options]
    return Answers(predictions, *_best(right), choices)


def _best(scores: Sequence[Sequence[float]]) -> tuple[list[float], list[int]]:
    """The largest score of each row, and which one it is; of equal ones the first."""
    which = [row.index(max(row)) for row in scores]
    return [row[k] for row, k in zip(scores, which, strict=True)], which


def ignore(step: Step) -> None:
    """Marks nothing."""


class Asker:
    """Asks a model batches of prompts: left padding, explicit positions, KV cache."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device = input_device(model)
        self._takes_keep = takes_keep(model)
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = {token for token in [*ends, tokenizer.eos_token_id] if token is not None}
        self._texts: dict[tuple[int, ...], str] = {}
        self.spared: Spared | None = None  # where nothing is recorded

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """`batches.pad` on the model's device."""
        return pad(ids, self.device)

    def _forward(
        self, tokens: Tensor, mask: Tensor, n_logits: int, cache: Mapping[str, Any] | None = None
    ) -> Any:
        """Logits of the last `n_logits` columns, or of all of them (0); `cache` by `cache_of`."""
        return self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions_of(mask)[:, -tokens.shape[1] :],
            use_cache=n_logits > 0,
            **(cache or {}),
            **({"logits_to_keep": n_logits} if self._takes_keep else {}),
        )

    def _begin(self, rows: Sequence[int], tokens: Tensor, mask: Tensor, n_logits: int) -> Any:
        """`_forward` of whole prompts, the questions' `rows`, without what can be spared."""
        spared, n = self.spared, tokens.shape[1]
        with spared.of(rows, n, n_logits) if spared else nullcontext(slice(None)) as some:
            return self._forward(tokens[some], mask[some], n_logits)

    @torch.no_grad()
    def ask(
        self,
        questions: Questions,
        rows: Sequence[int],
        before_step: Callable[[Step], None] = ignore,
        n_tokens: int = N_ANSWER_TOKENS,
    ) -> Answers:
        """Greedy decoding of `n_tokens`, argmax over float32 logits, ending at EOS.

        An answer that is only a part of one character's bytes by then goes on until it is whole.
        Rows of a prompt with pictures must be of that prompt alone.
        """
        if questions.has_pictures(rows[0]):
            return self._ask_pictured(questions, rows, before_step, n_tokens)
        tokens, mask = self.pad([questions.ids[row] for row in rows])
        everyone = torch.arange(len(rows), device=self.device)
        inputs, entering, cache = tokens, mask, None
        chosen: list[Tensor] = []
        scores: list[list[float]] = []
        made: list[list[int]] = []
        for number in range(n_tokens + CHARACTER_BYTES - 1):
            before_step(Step(everyone, entering, min(number, 1), 1))
            out = (
                self._forward(inputs, mask, 1, cache)
                if number
                else self._begin(rows, inputs, mask, 1)
            )
            logits = out.logits[:, -1].float()
            if number == 0:
                scores = self._firsts(logits, [questions.asked_of(row) for row in rows])
            chosen.append(largest(logits))
            if number >= n_tokens - 1:
                lines = torch.stack(chosen, 1).tolist()
                made = [self._first_tokens(line, n_tokens) for line in lines]
                if not any(map(self._is_cut, made)):
                    break
            cache, inputs = cache_of(out), chosen[-1][:, None]
            entering = torch.ones_like(inputs)
            mask = torch.cat([mask, entering], 1)
        self._add_after_spaces(scores, questions, rows, before_step)
        return _answers([self._text(answer) for answer in made], questions, rows, scores)

    def _ask_pictured(
        self,
        questions: Questions,
        rows: Sequence[int],
        before_step: Callable[[Step], None],
        n_tokens: int,
    ) -> Answers:
        """`ask` of one prompt with pictures, in so many rows."""
        starts, inputs = questions.asked_of(rows[0]), questions.inputs(rows[0])
        scores: list[list[float]] = []
        chosen: list[Tensor] = []
        made: list[list[int]] = []

        def choose(number: int, logits: Tensor) -> Tensor | None:
            if number == 0:
                scores[:] = self._firsts(logits, [starts] * len(rows))
            chosen.append(largest(logits))
            if number >= n_tokens - 1:
                lines = torch.stack(chosen, 1).tolist()
                made[:] = [self._first_tokens(line, n_tokens) for line in lines]
                if not any(map(self._is_cut, made)):
                    return None
            return chosen[-1]

        most = n_tokens + CHARACTER_BYTES - 1
        go_through(self.model, inputs, len(rows), most, choose, before_step)
        for k, start in enumerate(starts):

            def follow(number: int, logits: Tensor, start: Any = start, k: int = k) -> Any:
                wanted = [start[number]] * len(rows)
                for row, more in zip(scores, self._logprobs(logits, wanted), strict=True):
                    row[k] += more if number else 0.0
                return None if number == len(start) - 1 else logits.new_tensor(wanted).long()

            if len(start) > 1:
                go_through(self.model, inputs, len(rows), len(start), follow, before_step)
        return _answers([self._text(answer) for answer in made], questions, rows, scores)

    def _add_after_spaces(
        self,
        scores: list[list[float]],
        questions: Questions,
        rows: Sequence[int],
        before_step: Callable[[Step], None],
    ) -> None:
        """Add log p of what follows a start's first space, where it has spaces."""
        starts = [
            (i, k, start)
            for i, row in enumerate(rows)
            for k, start in enumerate(questions.asked_of(row))
        ]
        for n in sorted({len(start) - 1 for _, _, start in starts} - {0}):
            some = [one for one in starts if len(one[2]) == n + 1]
            tokens, mask = self.pad(
                [[*questions.ids[rows[i]], *start[:-1]] for i, _, start in some]
            )
            places = torch.tensor([i for i, _, _ in some], device=self.device)
            before_step(Step(places, mask, n, n))
            logits = self._forward(tokens, mask, n).logits[:, -n:].float()
            for column in range(n):
                more = self._logprobs(
                    logits[:, column], [start[column + 1] for _, _, start in some]
                )
                for (i, k, _), value in zip(some, more, strict=True):
                    scores[i][k] += value

    def most_probable(self, questions: Questions, batch_tokens: int) -> list[int]:
        """Of each prompt, which of its right objects has the most probable first token."""
        which = [0] * len(questions.prompts)
        several = [row for row in range(len(which)) if len({*questions.starts_of(row)}) > 1]
        budget = Budget(batch_tokens)

        def ask(rows: list[int]) -> list[int]:
            return self.ask(questions, rows, n_tokens=1).which

        for batch in plan_batches(questions, batch_tokens, several):
            for row, k in zip(batch, budget.run(batch, questions.length, ask), strict=True):
                which[row] = k
        return which

    @torch.no_grad()
    def ask_forced(
        self,
        questions: Questions,
        rows: Sequence[int],
        before_step: Callable[[Step], None] = ignore,
    ) -> Answers:
        """The answers of `ask`, mostly from one forward: the object's first token is put in.

        A space of its own in front of that is put in, in place of it. Where greedy decoding
        chooses what was put in, the argmax after it is what greedy decoding chooses next. Only the
        other rows take a second step; the forced token is masked out of it.
        """
        wanted = [questions.put_in(row) for row in rows]
        tokens, mask = self.pad(
            [[*questions.ids[row], first] for row, first in zip(rows, wanted, strict=True)]
        )
        everyone = torch.arange(len(rows), device=self.device)
        before_step(Step(everyone, mask, 1, 2))
        out = self._begin(rows, tokens, mask, 2)
        logits = out.logits[:, -2:].float()
        starts = [questions.asked_of(row) for row in rows]
        scores = self._firsts(logits[:, 0], starts)
        for i, k in ((i, k) for i, some in enumerate(starts) for k in range(len(some))):
            if len(starts[i][k]) > 1:
                scores[i][k] += self._logprobs(logits[i : i + 1, 1], starts[i][k][1:])[0]
        chosen = largest(logits)
        firsts = chosen[:, 0].tolist()
        open_rows = [
            i
            for i, (first, forced) in enumerate(zip(firsts, wanted, strict=True))
            if first != forced and first not in self._ends
        ]
        if open_rows:
            places = torch.tensor(open_rows, device=self.device)
            cache = cache_of(out)
            (state,) = cache.values()
            state.batch_select_indices(places)
            inputs, mask = chosen[places, :1], mask[places]
            mask[:, -1] = 0
            before_step(Step(places, torch.ones_like(inputs), 1, 1))
            step = self._forward(inputs, torch.cat([mask, torch.ones_like(inputs)], 1), 1, cache)
            chosen[places, 1] = largest(step.logits[:, -1].float())
        made = chosen.tolist()
        predictions = [self._text(answer) for answer in made]
        again = [i for i, answer in enumerate(made) if self._is_cut(answer)]
        if again:
            places = torch.tensor(again, device=self.device)

            def mark(step: Step) -> None:
                before_step(replace(step, rows=places[step.rows]))

            asked = Questions(questions.prompts, questions.ids, questions.answers)
            for i, said in zip(
                again, self.ask(asked, [rows[i] for i in again], mark).predictions, strict=True
            ):
                predictions[i] = said
        return _answers(predictions, questions, rows, scores)

    def forces_exactly(self, questions: Questions) -> bool:
        """Whether `ask_forced` may stand for `ask` on this model and these prompts.

        It must give the same predictions on eight of them, and no prompt may reach the end of a
        sliding window: there the forced token takes up a place. No answer has two spaces before it,
        or another one than that which is put in. None is about a picture.
        """
        if any(prompt.images for prompt in questions.prompts):
            return False
        for row in range(len(questions.starts)):
            spaces = {start[:-1] for start in questions.asked_of(row)} - {()}
            if not spaces <= {(questions.put_in(row),)}:
                return False
        order = sorted(range(len(questions.ids)), key=lambda row: len(questions.ids[row]))
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if window and len(questions.ids[order[-1]]) + N_ANSWER_TOKENS + 1 > window:
            return False
        tried = order[:: max(1, len(order) // 8)][:7] + order[-1:]
        # Of a token and the one after it greedy decoding chooses at most one, so every row takes
        # the second step once.
        vocabulary = self.model.get_input_embeddings().num_embeddings
        moved = [(answer + 1) % vocabulary for answer in questions.answers]
        others = Questions(questions.prompts, questions.ids, moved)
        try:
            greedy = self.ask(questions, tried).predictions
            return all(self.ask_forced(q, tried).predictions == greedy for q in (questions, others))
        except (AttributeError, NotImplementedError, TypeError):  # a cache of another kind
            return False
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False

    @torch.no_grad()
    def read(
        self,
        questions: Questions,
        rows: Sequence[int],
        before_step: Callable[[Step], None] = ignore,
    ) -> None:
        """One forward over the prompts, for what `before_step` marks in it."""
        tokens, mask = self.pad([questions.ids[row] for row in rows])
        before_step(Step(torch.arange(len(rows), device=self.device), mask, 0, 1))
        self._forward(tokens, mask, 1)

    @torch.no_grad()
    def score(
        self,
        questions: Questions,
        rows: Sequence[int],
        before_step: Callable[[Step], None] = ignore,
    ) -> list[float]:
        """-log p of each prompt's own tokens after its first one, summed, in nats."""
        tokens, mask = self.pad([questions.ids[row] for row in rows])
        before_step(Step(torch.arange(len(rows), device=self.device), mask, 0, tokens.shape[1]))
        logits = self._forward(tokens, mask, 0).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        summed: list[float] = torch.where(mask[:, :-1] == 1, nll.double(), 0.0).sum(1).tolist()
        return summed

    def _logprobs(self, logits: Tensor, tokens: Sequence[int]) -> list[float]:
        """log p of one token a row of logits (b, V)."""
        wanted = torch.tensor(tokens, device=self.device)
        picked: list[float] = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].tolist()
        return picked

    def _firsts(self, logits: Tensor, starts: Sequence[list[tuple[int, ...]]]) -> list[list[float]]:
        """log p of the first token of every start of each row of logits (b, V)."""
        most = max(map(len, starts))
        # Rows with fewer starts repeat their first one.
        repeated = [some + some[:1] * (most - len(some)) for some in starts]
        firsts = [[start[0] for start in some] for some in repeated]
        wanted = torch.tensor(firsts, device=self.device)
        picked = logits.log_softmax(-1).gather(1, wanted).tolist()
        return [line[: len(some)] for line, some in zip(picked, starts, strict=True)]

    def _first_tokens(self, made: list[int], n: int) -> list[int]:
        """The first `n` tokens, or as many as make a whole character."""
        while n < len(made) and self._is_cut(made[:n]):
            n += 1
        return made[:n]

    def _is_cut(self, answer: list[int]) -> bool:
        """Whether nothing is said yet but a part of a character."""
        is_open = not self._text(answer) and self._ends.isdisjoint(answer)
        return is_open and CUT in self._decoded(answer)

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _text(self, answer: list[int]) -> str:
        key = tuple(answer)
        if not self._ends.isdisjoint(key):
            key = key[: next(i for i, token in enumerate(key) if token in self._ends)]
        if key not in self._texts:
            self._texts[key] = whole_text(self._decoded, key).strip()
        return self._texts[key]
