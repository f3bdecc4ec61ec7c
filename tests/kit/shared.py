"""Stages that several processes share, as torchrun starts them: whole, killed, refused.

study/test_shared.py runs it, by hand:
    python -m tests.kit.shared FOLDER MODEL FACTS STAGE...
As stage_crash.py, whose stages these are: every process is a fork of one that imported torch.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import typer

import relneuron.ablation.ablate
import relneuron.ablation.generate
import relneuron.ablation.nll
import relneuron.methods.gradients.attribute
import relneuron.methods.responses.record
import relneuron.model.load
import relneuron.study.run
from relneuron.artifact.journal import Journal
from relneuron.cli import main as cli
from tests.kit.count_crash import code_of, free_port, join
from tests.kit.stage_crash import Study, files_of

SMALL = ("--batch-tokens", 64, "--quiet")  # tokens of a batch: many batches
FIRST = ("prompts", "identify")  # commands of one process, for what follows


class Shared(Study):
    """Commands of one process or of several, each a fork."""

    def words(self, stage: str, place: Path) -> list[str]:
        model, prompts, neurons = self.model, place / "prompts.jsonl", place / "neurons.json"
        found: dict[str, list[Any]] = {
            "record": ["record", model, prompts, "-o", place, *SMALL],
            "ablate": ["ablate", model, neurons, prompts, "-o", place / "effects.csv", *SMALL],
        }
        if stage in found:
            return [str(word) for word in found[stage]]
        return super().words(stage, place)

    def start(self, words: Sequence[str], before: Callable[[], object]) -> int:
        """Begin a command; the process id."""
        pid = os.fork()
        if pid:
            return pid
        code = 99
        try:
            # Appended to: several processes say their lines in one file.
            said = os.open(self.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            before()
            sys.argv = ["relneuron", *words]
            cli.main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def begin(
        self, words: Sequence[str], size: int, act: Callable[[int], object] = lambda rank: None
    ) -> list[int]:
        """Begin a command in `size` processes, in each of which `act` comes first; their ids."""
        (self.folder / "said").unlink(missing_ok=True)
        port, pids = free_port(), []
        for rank in range(size):

            def before(rank: int = rank) -> None:
                if size > 1:
                    join(rank, size, port)
                act(rank)

            pids.append(self.start(words, before))
        return pids

    def ranks(
        self, words: Sequence[str], size: int, act: Callable[[int], object] = lambda rank: None
    ) -> list[int]:
        """A whole command in `size` processes; their exit codes."""
        return [code_of(pid) for pid in self.begin(words, size, act)]


def load_once(model: Path) -> None:
    """One model and one tokenizer for all forks."""
    torch.set_num_threads(1)
    cli.app = typer.main.get_command(cli.app)  # type: ignore[assignment]
    loaded = relneuron.model.load.load_model(str(model), device="cpu")
    tokenizer = relneuron.model.load.load_tokenizer(str(model))
    relneuron.model.load.load_model = lambda *_, **__: loaded
    relneuron.model.load.load_tokenizer = lambda *_, **__: tokenizer


def main(*words: str) -> None:
    folder, model, facts = map(Path, words[:3])
    load_once(model)
    study = Shared(folder, model, facts)
    place = folder / "one"
    for stage in ("prompts", "record"):
        assert study.ranks(study.words(stage, place), 1) == [0], study.said()
    base = files_of(place)
    for size in (2, 3, 4):
        place = folder / str(size)
        assert study.ranks(study.words("prompts", place), 1) == [0], study.said()
        t = time.time()
        codes = study.ranks(study.words("record", place), size)
        print(size, codes, time.time() - t, study.said())
        assert files_of(place) == base, files_of(place).keys()


if __name__ == "__main__":
    main(*sys.argv[1:])
