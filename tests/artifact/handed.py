"""Folders that the stages wrote, for tests of what happens to files between two stages."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

from relneuron.ablation.options import ANALYSES, NllOptions
from relneuron.artifact.manifest import Manifest
from relneuron.methods.contrast.contrast import contrast
from relneuron.methods.contrast.options import ContrastOptions, ProbeOptions
from relneuron.methods.contrast.probe import probe
from relneuron.methods.counts.count import count
from relneuron.methods.gains.attribute import attribute
from relneuron.methods.gains.options import AttributeOptions
from relneuron.model.pair import pair_of
from relneuron.study.look import open_cards
from relneuron.study.settings import LookOptions, RunOptions
from relneuron.texts.options import CountOptions
from relneuron.texts.sources import parse_sources
from tests.kit.pairs import moved

OPTIONS = RunOptions(
    eva=8, top=40, random_seeds=1, batch_tokens=256, permutations=9, bootstrap=9, analyses=ANALYSES
)
KINDS = ("ffn_layer", "ffn_neuron")
ATTRIBUTED = AttributeOptions(kinds=KINDS, top=5, random_seeds=1, batch_tokens=200)
NLL = NllOptions(window=16, windows=3)


def attributed(loaded: tuple[Any, Any], prompts: Path, folder: Path, **more: Any) -> None:
    attribute("m", *loaded, prompts, folder, ATTRIBUTED, quiet=True, **more)


def counted(loaded: tuple[Any, Any], corpus: list[str], folder: Path, **changes: Any) -> None:
    options = CountOptions(window=16, moments=True, **changes)
    count("m", *loaded, parse_sources(corpus), folder, options, quiet=True)


def probed(loaded: tuple[Any, Any], root: Path, folder: Path, **asked: Any) -> object:
    """A probe of every second prompt of the study, or what `asked` says."""
    prompts = root / "study" / "prompts.jsonl"
    learned = {"neurons": root / "counts" / "neurons.json", "of_set": "a", "top": 3, "folds": 2}
    learned |= {"labels": f"{root / 'labels.csv'}:y", "random_seeds": 0}
    options = ProbeOptions(**(asked or learned))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the set has fewer neurons, say
        return probe("m", *loaded, prompts, folder, options, quiet=True)


def looked(loaded: tuple[Any, Any], folder: Path) -> object:
    """A card of a folder's best neuron, and the sets; nothing is written."""
    cards, sets = open_cards(*loaded, folder, LookOptions(examples=2))
    Manifest(folder)
    return cards.cards(sets.best(1)), sets.csv()


def contrasted(loaded: tuple[Any, Any], prompts: Path, folder: Path) -> None:
    """The model beside one whose weights are moved a little."""
    model, tokenizer = loaded
    options = ContrastOptions(tokens="last")
    contrast(pair_of(model, moved(model), tokenizer), prompts, folder, options, quiet=True)


def flip(path: Path, rng: random.Random, end: int | None = None) -> None:
    """One bit of a file, anywhere (before `end`)."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data) if end is None else end)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
