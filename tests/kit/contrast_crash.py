"""Ends `relneuron contrast` at every step of every file that it writes, and lets it go on.

The tests of methods/contrast run it; by hand: python -m tests.kit.contrast_crash FOLDER kill full
As count_crash.py, whose faults these are.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import typer

import relneuron.methods.contrast.contrast  # before the forks, which need it
import relneuron.model.pair
from relneuron.artifact.contrast import NAME, Contrast
from relneuron.cli import main as cli
from relneuron.methods.contrast.counter import PairCounter
from tests.conftest import tiny_model
from tests.kit.count_crash import EVERY, Study, check_checkpoint, every_step, run_ranks
from tests.kit.pairs import Words, moved, write_prompts


class Contrasts(Study):
    """A pair of models and prompts of numbers."""

    command = ("contrast", "a", "b")
    counter = PairCounter
    result = NAME

    def __init__(self, folder: Path, n_prompts: int, *words: str) -> None:
        torch.set_num_threads(1)
        folder.mkdir(parents=True)
        self.folder, self.log = folder, folder / "batches"
        prompts = write_prompts(folder / "p.jsonl", n_prompts)
        asked = ["--max-new-tokens", "3", "--batch-tokens", "34", "--quiet"]
        self.words = [str(prompts), *asked, "--checkpoint-batches", str(EVERY), *words]
        model = tiny_model("llama")
        pair = relneuron.model.pair.pair_of(model, moved(model), Words())
        relneuron.model.pair.load_pair = lambda *_, **__: pair


def ranks(study: Study) -> list[str]:
    """By several processes, also one after the other: sums are added in another order."""
    whole, done = Contrast.read(study.whole() / NAME), list[str]()
    n_batches = study.batches()
    for sizes in ((2,), (3,), (1, 2), (2, 1)):
        output = study.folder / "-".join(map(str, sizes))
        for size in sizes[:-1]:
            assert run_ranks(study, output, size, stop=6) == [130] * size, study.said()
            check_checkpoint(output)
            assert (output / "contrast.checkpoint").exists() and not (output / NAME).exists()
        assert run_ranks(study, output, sizes[-1]) == [0] * sizes[-1], study.said()
        found = Contrast.read(output / NAME)
        assert found.groups == whole.groups and found.tokens.tolist() == whole.tokens.tolist()
        for name, array in whole.arrays.items():
            if name.startswith("sum"):
                assert np.allclose(found.arrays[name], array, rtol=1e-12, atol=1e-15), name
            else:
                assert np.array_equal(found.arrays[name], array), name
        assert study.batches() == n_batches  # none twice: what was asked to stop saves
        done.append(output.name)
    return done


def main(words: Sequence[str] | None = None) -> None:
    folder, *what = words or sys.argv[1:]
    cli.app = typer.main.get_command(cli.app)  # type: ignore[assignment]  # once for all runs
    found: dict[str, object] = {}
    for each in what:
        place = Path(folder) / each
        if each == "ranks":
            found[each] = ranks(Contrasts(place, 70))
        else:
            found[each] = every_step(Contrasts(place, 14), kills=each == "kill")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
