"""Ends commands at every step of every file that they write, and runs them again.

artifact/test_stage_crash.py runs it, by hand:
    python -m tests.kit.stage_crash FOLDER MODEL FACTS STAGE...
As count_crash.py, whose faults these are: every run that is disturbed is a fork of this process.
"""

from __future__ import annotations

import copy
import fcntl
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer

import relneuron.ablation.expertise
import relneuron.methods.gains.attribute  # before the forks, which need them
import relneuron.methods.gains.rank
import relneuron.methods.gradients.edit
import relneuron.model.load
import relneuron.report.page
from relneuron.cli import main as cli
from tests.kit.count_crash import KILLED, Faults, code_of, run_here

QUICK = ("--noise", 0, "--permutations", 0, "--bootstrap", 0, "--quiet")
ASKED = ("--random-seeds", 1, "--quiet")
IG = ("--steps", 2, "--splits", "eva", "--quiet")
# In their order, with the steps between two kills: a file has six, so five meets each kind.
# 0: not killed here (methods/gains/test_attribute_resume.py does it), but made for the next one.
STAGES = {"prompts": 1, "record": 5, "identify": 5, "ablate": 5, "report": 5, "export": 5}
STAGES |= {"attribute": 0, "gains": 5, "edit": 5, "ig": 0, "facts": 5}


@dataclass
class Study:
    """A folder at work; `place` stands for it in the words of a command."""

    folder: Path
    model: Path
    facts: Path

    def words(self, stage: str, place: Path) -> list[str]:
        """The command of a stage, without --force."""
        prompts, neurons = place / "prompts.jsonl", place / "neurons.json"
        effects = place / "effects.csv"
        beside = [self.folder / "gains" / name for name in ("gain.json", "prompts.jsonl")]
        found: dict[str, list[Any]] = {
            "prompts": ["prompts", self.facts, "-o", prompts, "--eva", 8],
            "record": ["record", self.model, prompts, "-o", place, "--quiet"],
            "identify": ["identify", place, "-o", neurons, "--top", 20, *QUICK],
            "ablate": ["ablate", self.model, neurons, prompts, "-o", effects, *ASKED],
            "report": ["report", place, "-o", place / "report.html"],
            "export": ["export", place, "-o", place / "export"],
            "attribute": ["attribute", self.model, prompts, "-o", place, "--quiet"],
            "gains": ["identify", place, "-o", place / "gain.json", "--method", "logprob_gain"],
            "ig": ["attribute", self.model, prompts, "-o", place, "--method", "ig", *IG],
            "facts": ["identify", place, "-o", place / "kn.json", "--method", "knowledge_neurons"],
            # What is edited has paths of its own in the command that the manifest keeps.
            "edit": ["edit", self.model, *beside, "-o", place / "edited", "--sets", "lives_in"],
        }
        found["edit"] += ["--quiet"]
        return [str(word) for word in found[stage]]

    def run(self, words: Sequence[str], before: Callable[[], object] = lambda: None) -> int:
        """A command in a fork; its exit code."""
        (self.folder / "said").unlink(missing_ok=True)
        return code_of(self.start(words, before))

    def start(self, words: Sequence[str], before: Callable[[], object]) -> int:
        """Begin a command in a fork; its process id."""
        pid = os.fork()
        if pid:
            return pid
        code = 99
        try:
            # Appended to: several processes may say their lines in one file.
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

    def said(self) -> str:
        return (self.folder / "said").read_text()


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but the lock, which stays."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def check_refused(study: Study, stage: str, base: Path) -> None:
    """While another process writes to its folder, a stage is refused in two lines."""
    place = study.folder / "held"
    shutil.copytree(base, place)
    held = place / {"export": "export", "edit": "edited"}.get(stage, "")
    held.mkdir(exist_ok=True)
    with (held / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert study.run(study.words(stage, place)) == 1, (stage, study.said())
    cause, _ = study.said().splitlines()[-2:]
    assert cause == f"error: another process is writing to {held}", (stage, study.said())
    assert files_of(place) == files_of(base), stage
    shutil.rmtree(place)


def killed(study: Study, stage: str, base: Path, stride: int) -> tuple[int, Path]:
    """Kill the stage at every `stride`-th step; how often, and the folder of an undisturbed run.

    The same command then ends with the bytes of an undisturbed run and no other file. One that was
    killed behind its last file is finished: the command says that it exists.
    """
    whole = study.folder / stage
    shutil.copytree(base, whole)
    assert run_here(study.words(stage, whole), study.folder / "said") == 0, study.said()
    expected = files_of(whole)
    assert not [name for name in expected if name.endswith((".tmp", ".journal", ".unfinished"))]
    for at in itertools.count(1, stride) if stride else ():
        place = study.folder / "work"
        shutil.copytree(base, place)
        code = study.run(
            study.words(stage, place),
            lambda at=at: Faults(at, lambda: os._exit(KILLED), kills=True),
        )
        assert code in (0, KILLED), study.said()
        if code == KILLED:
            again = study.run(study.words(stage, place))
            is_done = again == 2 and " exists\n" in study.said()
            assert again == 0 or is_done, (stage, at, study.said())
        found = files_of(place)
        wrong = [n for n in {*found, *expected} if found.get(n) != expected.get(n)]
        assert not wrong, (stage, at, wrong)
        shutil.rmtree(place)
        if code == 0:
            return (at - 1) // stride, whole
    return 0, whole


def main(*words: str) -> None:
    torch.set_num_threads(1)
    folder, model, facts = map(Path, words)
    cli.app = typer.main.get_command(cli.app)  # type: ignore[assignment]  # once for all runs
    loaded = relneuron.model.load.load_model(str(model), device="cpu")
    tokenizer = relneuron.model.load.load_tokenizer(str(model))
    relneuron.model.load.load_model = lambda *_, **__: copy.deepcopy(loaded)  # one edits its own
    relneuron.model.load.load_tokenizer = lambda *_, **__: tokenizer
    # What is killed is the writing of a page, not its making.
    relneuron.report.page.render = lambda page: "<html>"
    make = relneuron.report.page.make_page

    def make_page(*args: Any) -> Any:
        page = make(*args)
        return replace(page, tables=dict(list(page.tables.items())[:2]))

    relneuron.report.page.make_page = make_page
    study, base = Study(folder, model, facts), folder / "empty"
    base.mkdir()
    found: dict[str, int] = {}
    for stage, stride in STAGES.items():
        check_refused(study, stage, base)
        found[stage], base = killed(study, stage, base, stride)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:4])
