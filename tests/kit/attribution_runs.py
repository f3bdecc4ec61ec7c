"""A model with a tokenizer of words, sentences whose answers it partly knows, their attribution.

The tests of `attribute` and of what reads its files share it; attributed.py has the models.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from relneuron.methods.gains.attribute import attribute
from relneuron.methods.gains.options import AttributeOptions
from tests.kit.attributed import VOCABULARY, attributed_model
from tests.kit.files import read_rows

TYPES = ("capital", "color", "number")
# The answer is the model's choice of this rank; those of the last are not known to it.
RANKS = (1, 1, 2, 1, 3, 1, 30, 1, 2, 60, 1, 1)
LENGTHS = (5, 3, 7, 4, 1, 6, 5, 2, 7, 3, 4, 6)
OPTIONS = AttributeOptions(batch_tokens=20, query_units=4, top=40, random_seeds=2)


def word_tokenizer() -> Any:
    """One token a word: w0 ... w89, as many as the model has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0")


class Attributed:
    """A tiny model of a family, and a table of twelve sentences of three types."""

    def __init__(
        self, family: str, folder: Path, *, ranks: Sequence[int] = RANKS, model: Any = None
    ) -> None:
        self.family, self.folder = family, folder
        self.model, self.tokenizer = model or attributed_model(family), word_tokenizer()
        generator = torch.Generator().manual_seed(5)
        self.ids = [
            torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS
        ]
        self.types = [TYPES[i % len(TYPES)] for i in range(len(self.ids))]
        self.targets = [
            int(self.logits(line).argsort(descending=True)[rank - 1])
            for line, rank in zip(self.ids, ranks, strict=True)
        ]
        self.names = [f"s{i}" for i in range(len(self.ids))]
        self.path = folder / "facts.csv"
        with self.path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["id", "prompt", "answer", "type"])
            for name, line, target, kind in zip(
                self.names, self.ids, self.targets, self.types, strict=True
            ):
                table.writerow([name, " ".join(f"w{i}" for i in line), f"w{target}", kind])

    @cached_property
    def scores(self) -> dict[tuple[str, ...], list[dict[str, str]]]:
        """The rows of out/attributions.csv by sentence and kind."""
        return rows_by(self.folder / "out" / "attributions.csv", "id", "kind")

    @torch.no_grad()
    def logits(self, ids: Sequence[int], model: Any = None) -> torch.Tensor:
        """(V,) at the last position, one sentence alone."""
        out: torch.Tensor = (model or self.model)(torch.tensor([ids])).logits[0, -1]
        return out

    def known(self) -> list[bool]:
        """The keep rule, in words: top ten, and above the type's other answers."""
        found = []
        for line, target, kind in zip(self.ids, self.targets, self.types, strict=True):
            logits = self.logits(line)
            pairs = zip(self.targets, self.types, strict=True)
            others = [t for t, k in pairs if k == kind and t != target]
            top = logits.argsort(descending=True)[:10].tolist()
            found.append(target in top and all(logits[target] > logits[o] for o in others))
        return found

    def attribute(
        self,
        output: Path,
        options: AttributeOptions = OPTIONS,
        path: Path | None = None,
        **more: Any,
    ) -> Path:
        more = {"quiet": True, **more}
        attribute("m", self.model, self.tokenizer, path or self.path, output, options, **more)
        return output


def rows_by(path: Path, *names: str) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """The rows of a csv by the cells of some columns, in the file's order."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in read_rows(path):
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}
