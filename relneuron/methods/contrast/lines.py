"""What two models read of each prompt, and which of its tokens are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron.ablation.continuer import Continuer
from relneuron.ablation.options import GenerateOptions
from relneuron.methods.contrast.options import ContrastOptions
from relneuron.model.batches import pad
from relneuron.model.pair import Pair, Rows
from relneuron.model.questions import Questions

# Which columns of a prompt of n tokens and what follows it, m in all, are compared. The authors
# cut the completion's own activations out (`positions` own); their formula runs over the positions
# that predict them, so that the last token of the prompt is among them and the last one is not.
_COLUMNS: dict[tuple[str, str], Callable[[int, int], range]] = {
    ("completion", "own"): lambda n, m: range(n, m),
    ("completion", "predicting"): lambda n, m: range(n - 1, m - 1),
    ("prompt", "own"): lambda n, m: range(n),
    ("last", "own"): lambda n, m: range(n - 1, n),
}


def compared(n_prompt: int, n_all: int, options: ContrastOptions) -> range:
    """The columns of a line that are compared."""
    positions = options.positions if options.tokens == "completion" else "own"
    return _COLUMNS[options.tokens, positions](n_prompt, n_all)


@dataclass(frozen=True)
class Lines:
    """The prompts as both models read them, and the group of each."""

    pair: Pair
    questions: Questions
    groups: list[str]
    group_of: list[int]
    options: ContrastOptions

    def length(self, row: int) -> int:
        """How many tokens the line of a prompt has at most."""
        n_new = self.options.max_new_tokens if self.options.tokens == "completion" else 0
        return self.questions.length(row) + n_new

    def read(self, rows: Sequence[int]) -> tuple[Rows, Tensor, int]:
        """Inputs of a batch, padded on the left; (B, T) int32 groups, -1 = not compared; n_tokens.

        Completions end before the end of text, which is no token of theirs.
        """
        prompts = [self.questions.ids[row] for row in rows]
        whole = [[*a, *b] for a, b in zip(prompts, self._written(rows), strict=True)]
        ids, mask = pad(whole, torch.device("cpu"))
        groups = np.full(ids.shape, -1, np.int32)
        for place, (row, prompt, line) in enumerate(zip(rows, prompts, whole, strict=True)):
            columns = compared(len(prompt), len(line), self.options)
            first = ids.shape[1] - len(line)
            groups[place, first + columns.start : first + columns.stop] = self.group_of[row]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return (ids, mask, positions), torch.from_numpy(groups), sum(map(len, whole))

    def _written(self, rows: Sequence[int]) -> list[list[int]]:
        """What one of the models writes after each prompt, greedily; nothing unless it is asked."""
        if self.options.tokens != "completion":
            return [[] for _ in rows]
        with self.pair.only(self.options.completion_by) as model:
            return self._continuer(model).write(self.questions, rows)

    def _continuer(self, model: Any) -> Continuer:
        n_new = self.options.max_new_tokens
        greedy = GenerateOptions(max_new_tokens=n_new, repetition_penalty=1.0, stop=())
        return Continuer(model, self.pair.tokenizer, greedy)
