"""How `ablate` has its prompts answered: by greedy tokens, or by how likely their options are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from relneuron.ablation.evaluate import Ask, Evaluator
from relneuron.ablation.options import AblateOptions
from relneuron.ablation.pictured import alone
from relneuron.ablation.said import PackedRows, Row, Said
from relneuron.artifact.files import fold
from relneuron.model.ask import Asker
from relneuron.model.choose import Chooser, choose, encode_options, right_places
from relneuron.model.converse import Step
from relneuron.model.mlps.shape import Part
from relneuron.model.questions import N_ANSWER_TOKENS, Questions, begins_with, is_correct
from relneuron.model.spared import find_spared, may_share


class Greedy:
    """Greedy tokens: two of them, or as many as `options.generate` says."""

    def __init__(
        self, asker: Asker, questions: Questions, options: AblateOptions, mlps: Sequence[Part]
    ) -> None:
        self.questions, self.options = questions, options
        self._n_tokens = options.generate or N_ANSWER_TOKENS
        self._forced = options.generate is None and asker.forces_exactly(questions)
        self._asker = asker
        self.described = f"{self._n_tokens} greedy tokens"
        self.described += ", teacher-forced" if self._forced else ""
        # Rows of one prompt stand together whether or not what they share is computed once: every
        # process plans the same batches.
        self._by_prompt = self._forced and bool(mlps) and may_share(asker.model, mlps)
        if mlps and not any(prompt.images for prompt in questions.prompts):
            asker.spared = find_spared(asker.model, mlps, max(questions.ids, key=len))
        # Under most conditions a prompt's answer is one that was given before.
        self._is_right: dict[tuple[str, str], bool] = {}

    def n_rows(self, rows: Sequence[Row]) -> int:
        return len(rows)

    def is_right(self, said: str, name: str) -> bool:
        key = (said, name)
        if key not in self._is_right:
            self._is_right[key] = self._gives(said, name)
        return self._is_right[key]

    def _gives(self, said: str, name: str) -> bool:
        if self.options.generate is not None:
            return begins_with(said, name)
        prefix = self.options.accept_object_prefix
        return is_correct(said, name, accept_object_prefix=prefix)

    def answers(
        self, evaluator: Evaluator, rows: Sequence[Row], advance: Callable[[int], object]
    ) -> Said:
        """Of each row what is said, log p of a right answer, which one, any option chosen."""
        lengths = [len(ids) + 1 for ids in self.questions.ids]
        beside = alone(self.questions)
        return evaluator.run(
            "answers",
            rows,
            lengths,
            self._ask,
            advance,
            self.options.positions,
            beside,
            self._by_prompt,
        )

    def _ask(self, rows: list[int], mark: Callable[[Step], None]) -> list[Any]:
        if self._forced:
            answers = self._asker.ask_forced(self.questions, rows, mark)
        else:
            answers = self._asker.ask(self.questions, rows, mark, self._n_tokens)
        found = [answers.predictions, answers.logprobs, answers.which]
        # Of prompts without options there is no more to say.
        found += [answers.choices] if self.questions.options else []
        return list(zip(*found, strict=True))


class Choosing:
    """The option of the greatest log-likelihood, as a whole or by its characters.

    The log-probability of an answer is that of the right option as a whole, of several the most
    probable one's.
    """

    def __init__(self, asker: Asker, questions: Questions, options: AblateOptions) -> None:
        self.prompts, self.positions = questions.prompts, options.positions
        self._is_normalised = options.choose == "acc_norm"
        self._chooser = Chooser(asker.model, asker.tokenizer)
        self._options = encode_options(asker.tokenizer, asker.model, questions)
        self.described = "the option of the greatest log-likelihood"
        self.described += " a character" if self._is_normalised else ""

    def n_rows(self, rows: Sequence[Row]) -> int:
        return sum(len(self._options.rows_of(row.prompt)) for row in rows)

    def is_right(self, said: str, name: str) -> bool:
        return fold(said) == fold(name)

    def answers(
        self, evaluator: Evaluator, rows: Sequence[Row], advance: Callable[[int], object]
    ) -> Said:
        """Of each row what is said, log p of a right answer, which one, any option chosen."""
        lengths = [len(ids) for ids in self._options.ids]
        asked = PackedRows(
            Row(row.condition, k) for row in rows for k in self._options.rows_of(row.prompt)
        )
        ask: Ask = partial(self._chooser.likelihoods, self._options)
        found = evaluator.run("options", asked, lengths, ask, advance, self.positions)
        answers = (
            self._answer(
                row.prompt,
                [found[Row(row.condition, k)] for k in self._options.rows_of(row.prompt)],
            )
            for row in rows
        )
        return Said(([row] for row in rows), ([answer] for answer in answers))

    def _answer(self, prompt: int, likelihoods: list[float]) -> tuple[Any, ...]:
        p = self.prompts[prompt]
        chosen = choose(likelihoods, p.options, normalised=self._is_normalised)
        best = max(right_places(p.options, p.objects), key=likelihoods.__getitem__)
        which = [fold(name) for name in p.objects].index(fold(p.options[best]))
        return p.options[chosen], likelihoods[best], which, chosen


def asking(
    asker: Asker, questions: Questions, options: AblateOptions, mlps: Sequence[Part] = ()
) -> Greedy | Choosing:
    """The way to answer that the options ask for; without `mlps` nothing is shared by rows."""
    if options.choose:
        return Choosing(asker, questions, options)
    return Greedy(asker, questions, options, mlps)
