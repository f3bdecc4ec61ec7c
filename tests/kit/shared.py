"""Stages that several processes share, as torchrun starts them: whole, killed, refused.

study/test_shared.py runs it, by hand:
    python -m tests.kit.shared FOLDER MODEL FACTS quick|stages|others|run|shards|two N
As stage_crash.py, whose stages these are: of one process this one does the work, of several its
forks, which begin warm.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import random
import re
import shutil
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
import relneuron.ablation.harness.tasks
import relneuron.ablation.nll
import relneuron.methods.contrast.probe
import relneuron.methods.gradients.attribute
import relneuron.methods.responses.record
import relneuron.model.classifier  # whose tokenizers are its own
import relneuron.model.load
import relneuron.model.meeting
import relneuron.study.run
from relneuron.ablation.outputs import Generated, lines_bytes
from relneuron.artifact.files import csv_bytes
from relneuron.artifact.journal import Journal
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.parts import ROWS
from relneuron.artifact.prompts import read_prompts
from relneuron.cli import main as cli
from relneuron.cli.errors import end
from relneuron.model.pair import pair_of
from relneuron.study.contrast import Plan, contrast_study
from tests.kit.count_crash import code_of, free_port, join, run_here
from tests.kit.speakers import classifier_folder
from tests.kit.stage_crash import QUICK, Study, files_of
from tests.kit.tasks import write_tasks

SMALL = ("--batch-tokens", 64, "--quiet")  # tokens of a batch: many batches
# In their order; those of one process make what the others read.
STAGES = ("prompts", "record", "identify", "ablate", "generate", "nll", "attribute", "ig")
STAGES = (*STAGES, "relevance")
OTHERS = ("prompts", "record", "identify", "look", "probe", "effect", "eval")
ALONE = ("prompts", "identify")
WHOLE = ("look",)  # stages of which no machine does a part
KEPT = ("--responses", "memory")
RUN = ("--eva", 8, "--random-seeds", 1, "--analyses", "concepts,gain,perplexity")


class Shared(Study):
    """Commands of one process or of several, each a fork."""

    def words(self, stage: str, place: Path) -> list[str]:
        """The command of a stage, in many small batches."""
        model, prompts, neurons = self.model, place / "prompts.jsonl", place / "neurons.json"
        texts = {name: self.folder / f"{name}.txt" for name in "ab"}
        for name, text in texts.items():
            if not text.exists():
                text.write_text(f"Person{ord(name)} eats plum. He lives in Oslo.\n" * 40)
        found: dict[str, list[Any]] = {
            "record": [model, prompts, "-o", place],
            "ablate": [model, neurons, prompts, "-o", place / "effects.csv", "--random-seeds", 1],
            "generate": [model, prompts, "-o", place / "said.jsonl", "--neurons", neurons],
            "nll": [
                model,
                neurons,
                *(f"{n}={t}" for n, t in texts.items()),
                "-o",
                place,
                "--window",
                16,
            ],
            "attribute": [model, prompts, "-o", place],
            "ig": [model, prompts, "-o", place, "--method", "ig", "--steps", 2],
            "relevance": [model, prompts, "-o", place, "--method", "relevance"],
            "run": [model, "--facts", self.facts, "-o", place, *QUICK[:-1], *RUN],
            "once": [model, prompts, "-o", place, "--identify", *KEPT, *QUICK[:-1]],
            "dropped": [model, "--facts", self.facts, "-o", place, *QUICK[:-1], *RUN],
            "look": [place, "-o", place / "look.html", "--cards", 6],
            "probe": [model, prompts, "-o", place, "--folds", 2, "--random-seeds", 1],
            "effect": [self.folder / "said.jsonl", "-o", place / "effect.csv", "--label", 1],
            "eval": [model, "-o", place, "--neurons", neurons, "--off", "lives_in", "--limit", 3],
        }
        if stage not in found:
            return super().words(stage, place)
        found["generate"] += ["--off", "lives_in", "--max-new-tokens", 2]
        found["nll"] += ["--windows", 4, "--workers", 1]
        found["probe"] += ["--neurons", self.folder / "inner.json"]
        found["probe"] += ["--labels", f"{self.folder / 'labels.csv'}:cost"]
        found["effect"] += ["--cost", self.folder / "judge"]
        found["eval"] += ["--tasks", "tiny_choice,tiny_text", "--random-seeds", 2, "--quiet"]
        found["eval"] += ["--include-path", self.folder / "tasks", "--log-samples"]
        if stage == "eval":
            return [str(word) for word in (stage, *found[stage])]
        found["dropped"] += ["--drop-responses", *KEPT]
        name = {"once": "record", "dropped": "run"}.get(stage, stage)
        name = "attribute" if stage in ("ig", "relevance") else name
        return [str(word) for word in (name, *found[stage], *SMALL)]

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


def write_beside(folder: Path, prompts: Path) -> None:
    """What probe, effect and eval read beside a study."""
    sets = {"inner": [(layer, "gate", i, 1.0) for layer in range(2) for i in range(3)]}
    shape = {"layers": 2, "width": 48, "hidden": 32}
    NeuronFile({"id": "m", **shape}, "contrast", sets, {}).write(folder / "inner.json")
    ids = [json.loads(line)["id"] for line in prompts.read_text().splitlines()]
    rows = [(one, number % 3 - 1) for number, one in enumerate(ids)]
    (folder / "labels.csv").write_bytes(csv_bytes(("id", "cost"), rows))
    rng = random.Random(0)
    said = [
        Generated(mask, "", str(n), "a", " ".join(rng.choices("abcd", k=1 + n % 6)), 1, "length")
        for mask in ("clean", "donor", "some")
        for n in range(60)
    ]
    (folder / "said.jsonl").write_bytes(lines_bytes(said))
    classifier_folder(folder / "judge")
    write_tasks(folder / "tasks", 3)


def is_shared(stage: str, what: str) -> bool:
    """Whether several processes, or machines, do the stage, of which one makes what others read."""
    is_made = stage in ALONE or (stage == "record" and "other" in what)
    return not is_made and not (stage in WHOLE and "shards" in what)


def load_once(model: Path) -> None:
    """One model and one tokenizer for all forks."""
    torch.set_num_threads(1)
    cli.app = typer.main.get_command(cli.app)  # type: ignore[assignment]
    loaded = relneuron.model.load.load_model(str(model), device="cpu")
    tokenizer = relneuron.model.load.load_tokenizer(str(model))
    relneuron.model.load.load_model = lambda *_, **__: loaded
    relneuron.model.load.load_tokenizer = lambda *_, **__: tokenizer


def whole(study: Shared, stage: str, base: Path, sizes: Sequence[int]) -> Path:
    """The folder of one process's run, which any number of them makes, too."""
    for size in (1, *sizes):
        place = study.folder / f"{stage} {size}"
        shutil.copytree(base, place)
        words = study.words(stage, place)
        by = [run_here(words, study.folder / "said")] if size == 1 else study.ranks(words, size)
        assert by == [0] * size, study.said()
        expected = files_of(study.folder / f"{stage} 1")
        found = files_of(place)
        wrong = [n for n in {*found, *expected} if found.get(n) != expected.get(n)]
        assert not wrong, (stage, size, wrong)
    return study.folder / f"{stage} 1"


def at_work(
    folder: Path, on_block: Callable[[int, int], object] = lambda rank, number: time.sleep(0.01)
) -> Callable[[int], object]:
    """What has blocks be safe at once, and `on_block(rank, how many it has done)` come before each.

    `folder` hears who has met the others, and of each block who has done it.
    """

    def act(rank: int) -> None:
        add, meet = Journal.add, relneuron.model.meeting.meet
        did = os.open(folder / f"did {rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def slow(journal: Journal, key: str, value: object) -> None:
            on_block(rank, os.fstat(did).st_size)
            add(journal, key, value)
            os.write(did, b".")

        def noted(*asked: Any) -> Any:
            store = meet(*asked)
            (folder / f"met {rank}").touch()
            return store

        Journal.SAVE_EVERY_S, Journal.add = 0.0, slow  # type: ignore[method-assign]
        relneuron.model.meeting.PATIENCE_S = 0.3
        relneuron.model.meeting.meet = noted

    return act


def codes_within(pids: Sequence[int], seconds: float) -> list[int]:
    """The exit codes of processes that end soon, 128 + its number if a signal ended one."""
    until, codes = time.monotonic() + seconds, dict[int, int]()
    while len(codes) < len(pids):
        assert time.monotonic() < until, f"{len(pids) - len(codes)} of {len(pids)} do not end"
        for pid in {*pids} - {*codes}:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                codes[pid] = code if code >= 0 else 128 - code
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def killed(study: Shared, stage: str, base: Path, n: int, sizes: Sequence[int] = (2, 3, 4)) -> int:
    """SIGKILL any process at a random moment, until `n` were at work: all end. How many were.

    Others, in another number, go on, and whoever comes to the end leaves the bytes of one process.
    """
    relneuron.model.meeting.LINGER_S = 0.5  # who says what is not looked at
    rng = random.Random(stage)
    expected = files_of(whole(study, stage, base, ()))
    place = study.folder / f"{stage} killed"
    n_hit, took = 0, 0.5
    for tries in range(5 * n, -1, -1):
        if not place.exists():
            shutil.copytree(base, place)
        met = fresh(study.folder / "met")
        pids = study.begin(study.words(stage, place), rng.choice(sizes), at_work(met))
        while len([*met.glob("met *")]) < len(pids):
            time.sleep(0.01)
        began, is_last = time.monotonic(), n_hit == n or not tries
        if not is_last:
            time.sleep(rng.uniform(0, took))
            os.kill(rng.choice(pids), signal.SIGKILL)
        codes = codes_within(pids, 60)
        n_hit += 128 + signal.SIGKILL in codes
        found = files_of(place)
        is_done = all(code == 0 for code in codes) or "exists" in study.said()
        assert is_done or not is_last, (codes, study.said())
        if is_done:
            wrong = [n for n in {*found, *expected} if found.get(n) != expected.get(n)]
            assert not wrong, (stage, n_hit, wrong)
            shutil.rmtree(place)
            took = time.monotonic() - began
        if is_last:
            break
    return n_hit


def shards(study: Shared, stage: str, base: Path) -> int:
    """Two machines that share nothing, one of them killed, and `merge`: the bytes of one."""
    expected = files_of(whole(study, stage, base, ()))
    noted = fresh(study.folder / "noted")
    places = [study.folder / f"{stage} part {number}" for number in (1, 2)]
    for number, place in enumerate(places, 1):
        shutil.copytree(base, place)
        words = [*study.words(stage, place), "--shard", f"{number}/2"]
        if number == 2:  # by three processes, which all do some blocks and end
            act = at_work(noted, lambda rank, n: os._exit(9) if n == 1 else None)
            assert sum(study.ranks(words, 3, act)), study.said()
        assert study.ranks(words, number) == [0] * number, study.said()
        assert study.said().count(f"part {number}/2 is done -> {place}") == 1, study.said()
        new = {re.sub(r"\.\d$", "", name) for name in files_of(place)} - {*files_of(base)}
        new = {name for name in new if not (stage == "eval" and name.startswith("samples/"))}
        assert new <= left(stage) | {"prompts.jsonl"}, new
    output = study.folder / f"{stage} merged"
    shutil.copytree(base, output)
    assert study.ranks(["merge", *map(str, places), "-o", str(output)], 1) == [0], study.said()
    n = int(re.findall(r": (\d+) batches of 2 parts", study.said())[0])

    def never(rank: int, number: int) -> None:
        raise AssertionError("a batch was done again")

    act = at_work(noted, never) if stage != "attribute" else lambda rank: None  # it compares
    assert study.ranks(study.words(stage, output), 1, act) == [0], study.said()
    found = files_of(output)
    wrong = [n for n in {*found, *expected} if found.get(n) != expected.get(n)]
    assert not wrong, (stage, wrong)
    return n


def two_models(study: Shared, base: Path) -> int:
    """The study of two models by one process and by several, which may be killed and go on."""
    model = relneuron.model.load.load_model("")
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter)
    tokenizer = relneuron.model.load.load_tokenizer("")
    pair = pair_of(model, other, tokenizer, tokenizer, names=("a", "b"))
    prompts = read_prompts(base / "prompts.jsonl")
    asked = [prompt for prompt in prompts if prompt.split == "eva"]
    plan = Plan(prompts[:30], asked[:12], "likes_fruit", f"{__name__}:cost", [], sizes=(5, 10))

    def by(size: int, place: Path, act: Callable[[int], object] = lambda rank: None) -> list[int]:
        def study_pair(rank: int) -> None:
            act(rank)
            try:
                contrast_study(pair, plan, place, quiet=True)
            except BaseException as error:
                end(error)  # as the command line does
            os._exit(0)

        return codes_within(study.begin([], size, study_pair), 120)

    contrast_study(pair, plan, study.folder / "two 1", quiet=True)
    for size in (2, 4):
        assert by(size, study.folder / f"two {size}") == [0] * size, study.said()
    expected = files_of(study.folder / "two 1")
    place, noted = study.folder / "two killed", fresh(study.folder / "noted")

    def die(rank: int, number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    relneuron.model.meeting.LINGER_S = 0.5
    assert 128 + signal.SIGKILL in by(2, place, at_work(noted, die)), study.said()
    assert by(3, place) == [0, 0, 0], study.said()
    for name in ("two 2", "two 4", "two killed"):
        found = files_of(study.folder / name)
        wrong = [n for n in {*found, *expected} if found.get(n) != expected.get(n)]
        assert not wrong, (name, wrong)
    return 3


def cost(prompt: str, output: str) -> float:
    """What `two_models` takes for the cost of an answer."""
    return float(len(output) % 5)


def left(stage: str) -> set[str]:
    """What a part of a stage is: its journal, and the file whose rows that notes."""
    name = {"generate": "said.jsonl", "ig": "attribute_ig", "relevance": "attribute_relevance"}
    name["effect"] = "effect.csv"
    journal = f"{name.get(stage, stage)}.journal"
    return {journal, ROWS.get(journal, journal)}


def fresh(folder: Path) -> Path:
    """An empty folder, where there may have been one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def shares(study: Shared, base: Path) -> list[int]:
    """Two processes, one of them slow: how many blocks each did."""
    place, noted = study.folder / "slow", fresh(study.folder / "noted")
    shutil.copytree(base, place)

    def wait(rank: int, number: int) -> None:
        time.sleep(0.1 * rank)

    codes = study.ranks(study.words("record", place), 2, at_work(noted, wait))
    assert codes == [0, 0], study.said()
    assert study.said().count("->") == 1  # one process speaks
    assert files_of(place) == files_of(study.folder / "record 1")
    return [(noted / f"did {rank}").stat().st_size for rank in range(2)]


def ends(study: Shared, base: Path) -> None:
    """What is refused, or fails in one process, ends all, with one message; then it goes on."""
    place = study.folder / "ends"
    shutil.copytree(base, place)
    words = study.words("record", place)

    def refused(codes: list[int], cause: str, fix: str, *asked: Any) -> None:
        assert study.ranks(*asked) == codes, study.said()
        lines = study.said().splitlines()
        assert len(lines) == 2 and cause in lines[0] and fix in lines[1], lines

    (place / "validated.csv").write_text("mine")
    refused([2, 2], "validated.csv exists", "--force", words, 2)
    (place / "validated.csv").unlink()
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused([1, 1, 1], "another process is writing to", "wait for it", words, 3)
    identify = study.words("identify", place)  # done by the first process alone
    refused([2, 2], "validated.csv does not exist", "relneuron record", identify, 2)
    assert files_of(place) == files_of(base)
    shutil.rmtree(place)
    place.mkdir()
    assert study.ranks(study.words("prompts", place), 3) == [0, 0, 0], study.said()
    assert study.said().count("->") == 1 and files_of(place) == files_of(base)

    def fail(rank: int, number: int) -> None:
        if rank and number == 2:
            raise MemoryError

    noted = fresh(study.folder / "noted")
    asked = (words, 3, at_work(noted, fail))
    refused([1, 1, 1], "MemoryError", "--debug", *asked)
    assert (place / "record.journal").exists() and (place / "record.journal.1").exists()
    assert study.ranks(words, 2) == [0, 0], study.said()
    assert files_of(place) == files_of(study.folder / "record 1")


def main(*words: str) -> None:
    folder, model, facts = map(Path, words[:3])
    what, n = words[3], int(words[4])
    load_once(model)
    study, base = Shared(folder, model, facts), fresh(folder / "empty")
    found: Any = {}
    if what == "quick":
        base = whole(study, "prompts", base, ())
        whole(study, "record", base, (2,))
        found = shares(study, base)
        ends(study, base)
    if what == "two":
        found = two_models(study, whole(study, "prompts", base, ()))
    known = {"stages": STAGES, "others": OTHERS, "run": ("run",)}
    known |= {"shards": STAGES, "other shards": OTHERS, "kept": ("prompts", "once", "dropped")}
    for stage in known.get(what, ()):
        found[stage] = 0
        if not is_shared(stage, what):
            whole(study, stage, base, ())
        elif "shards" in what:
            found[stage] = shards(study, stage, base)
        elif n:
            found[stage] = killed(study, stage, base, n)
        else:
            whole(study, stage, base, (2, 3, 4))
            found[stage] = 3
        base = folder / f"{stage} 1"
        if stage == "once":
            base = folder / "empty"
        if stage == "prompts":
            write_beside(folder, base / "prompts.jsonl")
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
