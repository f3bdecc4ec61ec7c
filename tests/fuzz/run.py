"""Mutated files and odd arguments: every command ends well, or says in two lines what is wrong.

    python -m tests.fuzz --runs 10000 --seed 0             files and command lines
    python -m tests.fuzz --seed 0 --only report --runs 500
    python -m tests.fuzz --seed 0 --run 123                one of them, with all that it said
    python -m tests.fuzz --seed 0 --runs 500 --quick       as the tests do; --run with it, too

Everything is drawn from the seed and a run's number, so a fault is named by both. A run copies
real artifacts (world.py), mutates one file (mutations.py) and runs a command that reads
it in a fork (child.py), or runs a command line of odd arguments (lines.py). What must hold
says `judge`.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # no thread may be there before a fork

import torch

from tests.fuzz.cases import CASES, SLOW
from tests.fuzz.child import Ended, import_all, run_forked, warm_up
from tests.fuzz.lines import CLI, Line, draw_line
from tests.fuzz.mutations import Mutated, mutate
from tests.fuzz.world import make_world

ROOM_BYTES = 64 << 20  # of memory, beside what the whole file needs and twice the mutated one
TOKEN_BYTES = 210  # of memory, which tokenizers takes for each byte of "xxx..." in a user's file
CLI_SHARE = 0.2  # of runs that are command lines
GENERIC = "run again with --debug"
PLACE = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())

Files = dict[str, str]  # of a folder: names, and digests or what else is there


@dataclass(frozen=True)
class Run:
    """One run: what was mutated, the command, how it ended, and what is to be said of it.

    outcome   refused, same (as of the whole file), other (valid input, but another), usage, done;
              or a fault: see `judge`
    """

    number: int
    case: str
    words: tuple[str, ...]
    mutated: Mutated | None
    ended: Ended
    outcome: str
    changed: Files = field(default_factory=dict)

    @property
    def is_fault(self) -> bool:
        return self.outcome.startswith("FAULT")

    @property
    def kind(self) -> str:
        """What kind of file it is about."""
        return Path(self.mutated.path).name if self.mutated else CLI

    @property
    def signature(self) -> tuple[str, ...]:
        """What runs of one fault have in common: numbers and quoted parts do not count."""
        said = [x for x in self.ended.err.splitlines() if x.startswith(("error:", "Error:"))]
        line = said[0] if said else (self.ended.err.strip().splitlines() or ["nothing said"])[-1]
        plain = re.sub(r"'[^']*'|\"[^\"]*\"|-?\d[\d.e+]*", "_", line)[:90]
        return self.outcome, Path(self.kind).suffix, self.case, plain

    def text(self, *, whole: bool = False) -> str:
        words = shlex.join(word if len(word) < 200 else f"{word[:60]}..." for word in self.words)
        how = f"exit code {self.ended.code}, {self.ended.peak_bytes >> 20:,} MiB"
        lines = [f"run {self.number}: {self.outcome}, {how}"]
        if self.mutated:
            m = self.mutated
            lines.append(f"  {m.path}: {m.mutation} ({m.size:,} bytes), digest {m.mode}")
        lines.append(f"  relneuron {words}")
        said = self.ended.err.splitlines()
        lines += [f"  | {line}" for line in (said if whole else [x[:300] for x in said[-4:]])]
        if whole:
            lines += [f"  : {line}" for line in self.ended.out.splitlines()]
        lines += [f"  wrote {name}: {what}" for name, what in sorted(self.changed.items())]
        return "\n".join(lines)


class Fuzzer:
    """Runs by number in one folder of its own; artifacts are those of `world`."""

    def __init__(
        self, world: Path, folder: Path, seed: int, only: str = "", quick: bool = False
    ) -> None:
        self.world, self.root, self.seed = world, folder / "runs" / "run", seed
        self.quick = quick
        self.names = [name for name in CASES if only in name]
        self.files = sorted({Path(f).name for name in self.names for f in _files(name)})
        self.share = CLI_SHARE if not only else float(only == CLI)
        if any(Path(f).name == only for name in CASES for f in _files(name)):
            self.names, self.files = list(CASES), [only]
        self._whole: dict[str, tuple[Files, int]] = {}

    def run(self, number: int) -> Run:
        rng = Random(f"{self.seed}:{number}")
        if rng.random() < self.share:
            return self._run_line(number, draw_line(rng))
        case, path = self._draw(rng)
        while self.quick and case in SLOW and rng.random() < 0.9:
            case, path = self._draw(rng)
        return self._run_file(rng, number, case, path)

    def _draw(self, rng: Random) -> tuple[str, str]:
        """A case and a file that it reads; each name of a file is as likely as another."""
        kind = rng.choice(self.files)
        readers = [(n, f) for n in self.names for f in _files(n) if Path(f).name == kind]
        return rng.choice(readers)

    def _run_file(self, rng: Random, number: int, name: str, path: str) -> Run:
        case, words = CASES[name], tuple(shlex.split(CASES[name].words))
        self._prepare(words, path)
        mutated = mutate(rng, self.root, path, guarded=path in case.guarded, quick=self.quick)
        ended, changed = self._call(words)
        outcome = judge(ended, changed, mutated, lambda: self.whole(name))
        return Run(number, name, words, mutated, ended, outcome, changed if ended.code else {})

    def _run_line(self, number: int, line: Line) -> Run:
        self._prepare(line.parts, "model/")  # it may be written to
        ended, changed = self._call(line.words)
        outcome = judge_line(ended, changed)
        return Run(number, line.words[0], line.words, None, ended, outcome)

    def whole(self, name: str) -> tuple[Files, int]:
        """What a case writes and needs when nothing is mutated."""
        if name not in self._whole:
            words = shlex.split(CASES[name].words)
            self._prepare(words, "")
            ended, changed = self._call(words)
            assert ended.code == 0, f"{name}: {ended.err}"
            self._whole[name] = changed, ended.peak_bytes
        return self._whole[name]

    def _prepare(self, words: Sequence[str], mutated: str) -> None:
        """A fresh folder with the parts of the world that a command line names."""
        shutil.rmtree(self.root.parent, ignore_errors=True)
        self.root.mkdir(parents=True)
        parts = {word.rpartition("=")[2].split("/")[0] for word in words}
        parts |= {part.partition(":")[0] for part in parts}  # FILE.csv:COLUMN
        for part in sorted(parts & set(os.listdir(self.world))):  # noqa: PTH208
            source, target = self.world / part, self.root / part
            if part == "model" and not mutated.startswith("model/"):
                target.symlink_to(source)
            elif source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copyfile(source, target)

    def _call(self, words: Sequence[str]) -> tuple[Ended, Files]:
        """How it ended, and the files that it wrote, changed or removed."""
        before = listing(self.root)
        ended = run_forked(words, self.root)
        after = listing(self.root)
        names = before.keys() | after.keys()
        changed = {n: after.get(n, "gone") for n in names if before.get(n) != after.get(n)}
        beside = [p for p in self.root.parent.iterdir() if not p.name.startswith(self.root.name)]
        for path in beside:
            changed[f"../{path.name}"] = "beside the folder"
        return ended, changed


def _files(case: str) -> tuple[str, ...]:
    return CASES[case].guarded + CASES[case].given


def listing(root: Path) -> Files:
    """Digests of all files below a folder but locks; links as they are, and not followed."""
    found, prefix = {}, len(str(root)) + 1
    for folder, _, names in os.walk(root):
        for name in names:
            path = f"{folder}/{name}"
            if os.path.islink(path):  # noqa: PTH114  (a Path takes ten times as long)
                found[path[prefix:]] = f"link to {os.readlink(path)}"  # noqa: PTH115
            elif name != ".lock":
                with open(path, "rb") as file:  # noqa: PTH123
                    found[path[prefix:]] = hashlib.sha256(file.read()).hexdigest()[:16]
    return found


# --- what must hold --------------------------------------------------------------------------


def judge(
    ended: Ended, changed: Files, mutated: Mutated, whole: Callable[[], tuple[Files, int]]
) -> str:
    """The outcome of a run with a mutated file: refused, same or other, or a fault.

    - It ends with 0, 1 or 2, without a traceback, and within the memory it may take.
    - Refused: the last two lines are `error:` and `fix:`, name the file (or its folder, or an
      option), are not the generic ones, and no file was written.
    - Done: what was written is the same as of the whole file; or, if no digest guards the file,
      something else. `whole` is what is written then, and the memory that it takes.
    """
    fault = crash(ended)
    if fault:
        return fault
    a_byte = 2 + TOKEN_BYTES * (mutated.mode == "none")
    most = a_byte * mutated.size + ROOM_BYTES
    if ended.peak_bytes > most and ended.peak_bytes > most + whole()[1]:
        return f"FAULT memory: more than {most >> 20} MiB beside"
    if ended.code:
        return refusal(ended, changed, _names(mutated.path))
    if _without(mutated.path, changed) == _without(mutated.path, whole()[0]):
        return "same"
    if mutated.mode == "left" and not mutated.is_place:
        return "FAULT silent: a changed file was read, and the output is another one"
    return "other"


def _without(name: str, files: Files) -> Files:
    return {key: value for key, value in files.items() if key != name}


def _names(path: str) -> str:
    """A pattern of what may be named: the file, its folder, an option."""
    file = Path(path)
    return "|".join((re.escape(file.name), rf"\b{re.escape(str(file.parent))}\b", r"--[a-z]"))


def crash(ended: Ended) -> str:
    if ended.code == -14:
        return "FAULT time: not done after a minute"
    if ended.code < 0:
        return f"FAULT signal {-ended.code}"
    if "Traceback" in ended.err + ended.out:
        return "FAULT traceback"
    return "" if ended.code in (0, 1, 2) else f"FAULT exit code {ended.code}"


def refusal(ended: Ended, changed: Files, names: str) -> str:
    """What is wrong with the way a file was refused, if anything."""
    lines = ended.err.splitlines()
    two = [line[:7] for line in lines[-2:]]
    if two != ["error: ", "fix:   "] or any(x.startswith(("error:", "fix:")) for x in lines[:-2]):
        return "FAULT form: not one line of error and one of fix"
    if GENERIC in lines[-1]:
        return "FAULT raw exception"
    if not re.search(names, " ".join(lines[-2:])):
        return "FAULT unnamed: the file is not named"
    if changed:
        return "FAULT left: refused, and files were written"
    return "refused"


def judge_line(ended: Ended, changed: Files) -> str:
    """The outcome of odd arguments: done, usage (said by typer), refused, or a fault."""
    fault = crash(ended)
    if fault or ended.code == 0:
        return fault or "done"
    lines = ended.err.splitlines()
    if lines and lines[-1].startswith("Error: ") and lines[0].startswith("Usage: "):
        return "usage" if not changed else "FAULT left: refused, and files were written"
    return refusal(ended, changed, "")


# --- many runs -------------------------------------------------------------------------------


@contextmanager
def prepared(world: Path | None = None) -> Iterator[tuple[Path, Path]]:
    """(world, folder for runs); the world is made if it is not there."""
    torch.set_num_threads(1)
    import_all()
    with tempfile.TemporaryDirectory(dir=PLACE, prefix="fuzz-") as name:
        folder = Path(name)
        world = world or folder / "world"
        if not world.exists():
            _forked(
                lambda: make_world(world, lambda words, act: run_forked(words, world, act).code)
            )
        warm_up(world / "model")
        yield world, folder


def _forked(work: object) -> None:
    """Do something in a process of its own, so that this one stays without threads."""
    process = multiprocessing.get_context("fork").Process(target=work)  # type: ignore[arg-type]
    process.start()
    process.join()
    assert process.exitcode == 0, "the artifacts could not be made"


def fuzz(
    world: Path,
    folder: Path,
    numbers: Sequence[int],
    seed: int,
    *,
    only: str = "",
    quick: bool = False,
    jobs: int = 1,
) -> Iterator[Run]:
    """The runs of some numbers, in their order."""
    if jobs == 1:
        fuzzer = Fuzzer(world, folder, seed, only, quick)
        yield from map(fuzzer.run, numbers)
        return
    with multiprocessing.get_context("fork").Pool(
        jobs, _begin, (world, folder, seed, only, quick)
    ) as pool:
        yield from pool.imap(_one, numbers)


def _begin(world: Path, folder: Path, *asked: Any) -> None:
    global _fuzzer
    own = folder / str(os.getpid())
    own.mkdir()
    _fuzzer = Fuzzer(world, own, *asked)


def _one(number: int) -> Run:
    return _fuzzer.run(number)


def summary(runs: Sequence[Run]) -> str:
    """Counts by kind of file and outcome."""
    outcomes = sorted({run.outcome.partition(":")[0] for run in runs})
    counts = Counter((run.kind, run.outcome.partition(":")[0]) for run in runs)
    lines = []
    for kind in sorted({run.kind for run in runs}):
        cells = [f"{counts[kind, o]} {o}" for o in outcomes if counts[kind, o]]
        lines.append(f"{kind}: {', '.join(cells)}")
    total = Counter(run.outcome.partition(":")[0] for run in runs)
    return "\n".join([*lines, f"all: {', '.join(f'{n} {o}' for o, n in sorted(total.items()))}"])


def distinct(runs: Sequence[Run]) -> list[tuple[Run, int]]:
    """The first run of each fault, and how many runs have it; the most frequent ones first."""
    found: dict[tuple[str, ...], Run] = {}
    counts = Counter(run.signature for run in runs if run.is_fault)
    for run in runs:
        if run.is_fault:
            found.setdefault(run.signature, run)
    return [(found[signature], n) for signature, n in counts.most_common()]


def findings(runs: Sequence[Run], seed: int, only: str = "", quick: bool = False) -> str:
    """The summary, and each distinct fault with the command that shows it."""
    again = (
        f"python -m tests.fuzz --seed {seed}"
        + " --quick" * quick
        + f" --only {shlex.quote(only)}" * bool(only)
    )
    faults = [
        f"{n} runs, first {run.text()}\n  {again} --run {run.number}" for run, n in distinct(runs)
    ]
    return "\n\n".join([summary(runs), *faults]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begin", type=int, default=0, help="number of the first run")
    parser.add_argument("--run", type=int, help="only the run of this number, with all it says")
    parser.add_argument("--only", default="", help=f"a file's name, part of a case's, or {CLI}")
    parser.add_argument("--quick", action="store_true", help="less of what takes seconds")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--world", type=Path, help="folder that keeps the artifacts")
    parser.add_argument("--found", type=Path, help="write the distinct faults here")
    asked = parser.parse_args()
    last = asked.begin + asked.runs
    numbers = range(asked.begin, last) if asked.run is None else [asked.run]
    runs: list[Run] = []
    said = partial(findings, runs, asked.seed, asked.only, asked.quick)
    with prepared(asked.world) as (world, folder):
        how: dict[str, Any] = {"only": asked.only, "quick": asked.quick, "jobs": asked.jobs}
        for run in fuzz(world, folder, numbers, asked.seed, **how):
            runs.append(run)
            if asked.run is not None:
                print(run.text(whole=True))
            if asked.found and len(runs) % 100 == 0:
                asked.found.write_text(said(), errors="replace")
    if asked.found:
        asked.found.write_text(said(), errors="replace")
    if asked.run is None:
        print(said())
    sys.exit(any(run.is_fault for run in runs))
