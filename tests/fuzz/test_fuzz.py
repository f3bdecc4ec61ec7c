"""No mutated file and no odd command line ends a command in a traceback, a signal or half a file.

Five hundred runs of tests/fuzz; its run.py says what must hold. By hand, as many as one likes:
    python -m tests.fuzz --runs 10000 --jobs 2
It is a process of its own: what it forks must have no threads of other tests.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from relneuron.artifact.files import RelneuronError, sha256
from relneuron.artifact.manifest import Manifest, checked
from tests.conftest import ROOT
from tests.fuzz.mutations import mutate
from tests.fuzz.run import Ended, Mutated, crash, judge, judge_line, listing

REFUSED = "a warning\nerror: a/b.csv is no table\nfix:   make it again\n"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_mutated_file_and_no_odd_argument_ends_badly() -> None:
    words = ["-m", "tests.fuzz", "--runs", "500", "--seed", "1", "--quick"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


# --- what the fuzzer finds ---------------------------------------------------------------------


def ended(code: int, err: str = "", peak_bytes: int = 0) -> Ended:
    return Ended(code, "", err, peak_bytes, 0.0)


def judged(found: Ended, mode: str = "left", changed: dict[str, str] | None = None) -> str:
    mutated = Mutated("a/b.csv", mode, "flip_bit", 10)
    return judge(found, changed or {}, mutated, lambda: ({"out": "1"}, 0)).partition(":")[0]


@pytest.mark.parametrize(
    ("err", "outcome"),
    [
        (REFUSED, "refused"),
        (REFUSED.replace("b.csv", "c.csv"), "refused"),  # its folder
        (REFUSED.replace("a/b.csv", "it"), "FAULT unnamed"),
        (REFUSED.replace("a/b.csv", "--sizes"), "refused"),
        (REFUSED.replace("make it again", "run again with --debug to see"), "FAULT raw exception"),
        (REFUSED + "more\n", "FAULT form"),
        ("error: x\n" + REFUSED, "FAULT form"),
        ("", "FAULT form"),
        ("Traceback (most recent call last):\n" + REFUSED, "FAULT traceback"),
    ],
)
def test_a_refusal_is_two_lines_that_name_the_file(err: str, outcome: str) -> None:
    assert judged(ended(1, err)) == outcome


def test_a_refusal_leaves_no_file() -> None:
    assert judged(ended(1, REFUSED), changed={"out": "1"}) == "FAULT left"


@pytest.mark.parametrize(
    ("mode", "out", "outcome"),
    [("left", "1", "same"), ("left", "2", "FAULT silent"), ("bare", "2", "other")],
)
def test_what_a_digest_guards_is_read_as_it_was_or_refused(
    mode: str, out: str, outcome: str
) -> None:
    assert judged(ended(0), mode, {"out": out}) == outcome


def test_signals_time_memory_and_other_exit_codes_are_faults() -> None:
    assert crash(ended(-11)) == "FAULT signal 11"
    assert crash(ended(-14)).startswith("FAULT time")
    assert crash(ended(70)) == "FAULT exit code 70"
    assert judged(ended(1, REFUSED, peak_bytes=1 << 30)) == "FAULT memory"


def test_an_odd_command_line_may_be_a_usage_error() -> None:
    usage = "Usage: relneuron run\nTry help\n\nError: Invalid value for '--top'\n"
    assert judge_line(ended(2, usage), {}) == "usage"
    assert judge_line(ended(2, usage), {"x": "1"}).startswith("FAULT left")
    assert judge_line(ended(2, "Invalid value\n"), {}).startswith("FAULT form")
    assert judge_line(ended(0), {"x": "1"}) == "done"


def write_study(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.csv").write_text("id,correct\nx,1\ny,0\n")
    manifest = Manifest(folder)
    manifest.finish("prompts", {}, [folder / "a.csv"], reads=[])
    return folder / "a.csv"


def test_mutations_are_drawn_from_the_seed_and_digests_follow_the_mode(tmp_path: Path) -> None:
    modes = set()
    for number in range(60):
        found = []
        for folder in (tmp_path / f"{number}.a", tmp_path / f"{number}.b"):
            path = write_study(folder)
            whole = sha256(path)
            mutated = mutate(random.Random(number), folder, "a.csv", guarded=True)
            found.append((mutated, listing(folder)))
        assert found[0] == found[1]
        if mutated.is_place or sha256(path) == whole:
            continue
        modes.add(mutated.mode)
        assert (folder / "manifest.json").exists() == (mutated.mode != "bare")
        if mutated.mode == "left":
            with pytest.raises(RelneuronError, match="its digest differs"):
                checked(path)
        else:
            assert checked(path) == path
    assert modes == {"left", "refreshed", "bare"}


def test_a_manifest_is_signed_anew_or_not_signed(tmp_path: Path) -> None:
    signed = 0
    for number in range(80):
        folder = tmp_path / str(number)
        path = write_study(folder).with_name("manifest.json")
        mutated = mutate(random.Random(number), folder, path.name, guarded=True)
        if mutated.mutation == "json_tree" and mutated.mode == "refreshed":
            signed += "digest" in json.loads(path.read_bytes())
            try:
                Manifest(folder)
            except RelneuronError as error:
                assert "its digest differs" not in error.cause
    assert signed > 3
