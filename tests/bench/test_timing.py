"""`relneuron bench`: wrong contestants are refused, ratios are right, rows and plot are written.

Sizes are tiny and clocks are fake where a number is checked; bench/ holds the suites themselves.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from relneuron.artifact.files import RelneuronError
from relneuron.bench import machine as machines
from relneuron.bench import timing as bench
from relneuron.bench.case import Case, Contestant
from relneuron.bench.suite import CONTESTANTS
from relneuron.cli import main as cli
from tests.conftest import ROOT

TINY = Case(dtype="bfloat16", T=48, F=65)


def fake(name: str, ms: list[float], variant: str = "count", n_bytes: int = 100) -> Contestant:
    """A contestant whose calls take the given milliseconds, again and again."""
    calls = iter(range(10**9))
    return Contestant(
        name, variant, lambda _: ms[next(calls) % len(ms)], lambda: None, n_bytes, n_bytes
    )


def fake_timer(run: Callable[[int], Any], n_calls: int) -> list[float]:
    return [run(number) for number in range(n_calls)]


def run_fakes(*contestants: Contestant) -> dict[str, bench.Row]:
    rows = bench.run_case(
        TINY, timer=fake_timer, effort=bench.Effort(5, 10), contestants=contestants
    )
    return {row.contestant: row for row in rows}


def test_ratios_and_shares() -> None:
    rows = run_fakes(
        fake("relneuron", [2.0]),
        fake("triad", [1.0], "ceiling", 100),
        fake("copy", [1.0], "ceiling", 50),
        fake("peer", [6.0]),
        fake("slow", [60.0]),
    )
    ours = rows["relneuron"]
    assert (ours.median_ms, ours.min_ms, ours.ratio, ours.n_rounds) == (2.0, 2.0, 1.0, 5)
    assert ours.GB_s == pytest.approx(100 / 2e-3 / 1e9)
    assert ours.share_triad == 0.5  # the same bytes in twice the time
    assert ours.share_copy == 1.0  # twice the bytes in twice the time
    assert (rows["peer"].ratio, rows["triad"].ratio) == (3.0, 0.5)
    assert (rows["slow"].ratio, rows["slow"].n_rounds) == (30.0, 2)


def test_a_ratio_is_taken_within_rounds() -> None:
    """A machine that slows down by half in the middle changes no ratio."""
    ours = [[1.0], [1.0], [2.0], [2.0], [2.0]]
    assert bench.ratio(ours, [[3.0], [3.0], [6.0], [6.0], [6.0]]) == 3.0
    assert bench.ratio(ours, [[3.0], [3.0]]) == 3.0


def test_a_variant_may_have_a_base_of_its_own() -> None:
    """As average precision on one thread, which is compared with relneuron on one thread."""
    rows = bench.run_case(
        TINY,
        timer=fake_timer,
        effort=bench.Effort(5, 10),
        contestants=[
            fake("relneuron", [2.0], "ap"),
            fake("batched torch", [3.0], "ap"),
            replace(fake("relneuron", [4.0], "ap, 1 thread"), is_base=True),
            fake("sklearn loop", [40.0], "ap, 1 thread"),
        ],
    )
    assert [row.ratio for row in rows] == [1.0, 1.5, 1.0, 10.0]
    assert list(bench.summary(rows)) == [
        ("best batched sort", "batched torch", 1.5),
        ("scikit-learn, a call a column, both on one thread", "sklearn loop", 10.0),
    ]


def test_everybody_has_a_turn_in_every_round() -> None:
    turns: list[str] = []

    def contestant(name: str) -> Contestant:
        made = fake(name, [10.0])
        return replace(made, run=lambda number: (turns.append(name), 10.0)[1])

    names = ["a", "b", "c"]
    bench.measure([contestant(name) for name in names], fake_timer, bench.Effort(20, 10))
    rounds = [turns[6:][start : start + 6] for start in range(0, 120, 6)]  # two calls a turn
    assert all(sorted(turn) == ["a", "a", "b", "b", "c", "c"] for turn in rounds)
    assert len({"".join(turn) for turn in rounds}) > 1


def spoiled(name: str, spoil: Callable[[torch.Tensor, torch.Tensor], None]) -> bench.Row:
    """The row of a contestant whose result `spoil` changes behind its back."""
    from relneuron.bench import suite as bench_suite

    made = bench_suite._Bench(TINY, "cpu", 1)
    made.add_ours("count", masks=False, moments=False, responses=False)

    def wrong(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, count: Any) -> None:
        bench_suite.peers.index_add(gate, up, out, count, made.ids)
        spoil(out, count)

    made.add_counting("count", name, wrong, moved=3)
    rows = bench.run_case(TINY, effort=bench.Effort(1, 1), contestants=made.contestants)
    return rows[1]


def test_a_wrong_contestant_is_refused_and_not_timed() -> None:
    right = spoiled("right", lambda out, count: None)
    assert (right.correct, right.note) == (1, "")
    assert right.median_ms is not None

    counts = spoiled("counts", lambda out, count: count[3, 4].add_(1))
    assert (counts.correct, counts.median_ms, counts.ratio) == (0, None, None)
    assert "1 of 780 counts differ" in counts.note
    h = spoiled("h", lambda out, count: out[7, 8].add_(0.5))
    assert (h.correct, h.median_ms) == (0, None)
    assert "1 of 3120 elements are inaccurate" in h.note

    def fail(out: torch.Tensor, count: torch.Tensor) -> None:
        raise RuntimeError("no compiler\nsecond line")

    assert spoiled("fails", fail).note == "fails: RuntimeError: no compiler"


def test_a_wrong_relneuron_is_an_error() -> None:
    def wrong() -> None:
        raise AssertionError("h is wrong")

    with pytest.raises(RelneuronError, match="relneuron itself is wrong here: wrong: h is wrong"):
        run_fakes(replace(fake("relneuron", [1.0]), check=wrong), fake("peer", [1.0]))
    base = replace(fake("relneuron", [1.0], "ap, 1 thread"), check=wrong, is_base=True)
    with pytest.raises(RelneuronError, match="relneuron itself is wrong here: wrong: h is wrong"):
        run_fakes(fake("relneuron", [1.0], "ap"), base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["sorted", "mixed"])
def test_every_eager_contestant_is_right(dtype: str, layout: str) -> None:
    case = replace(TINY, dtype=dtype, layout=layout)
    contestants = CONTESTANTS["swiglu_stats"](case, "cpu", 2, False)
    with torch.no_grad():
        assert [c.name for c in contestants if bench._verdict(c) != (True, "")] == []
    names = {(c.variant, c.name) for c in contestants}
    assert len(names) == len(contestants)
    assert ("count", "eager segments") in names or layout == "mixed"


@pytest.fixture
def relneuron(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["relneuron", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "100")
        try:
            cli.main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_command_prints_a_table_and_writes_rows_and_a_plot(
    relneuron: Any, tmp_path: Path
) -> None:
    words = ["bench", "--quick", "--no-compile", "--dtype", "float32", "-o", tmp_path]
    code, out, err = relneuron(*words)
    assert code == 0, err
    assert "swiglu_stats float32 T=64 F=352 G=12 sorted" in out
    assert "eager index_add tuned" in out
    assert "best eager counting per relation: " in out
    assert "sklearn loop" in out
    machine = machines.machine("cpu")
    assert {path.name for path in tmp_path.glob("[!.]*")} == {f"{machine}.csv", f"{machine}.png"}
    assert (tmp_path / f"{machine}.png").read_bytes().startswith(b"\x89PNG\r\n")
    with (tmp_path / f"{machine}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == bench.COLUMNS
    ours = rows[0]
    assert (ours["variant"], ours["contestant"], ours["ratio"]) == ("count", "relneuron", "1")
    assert int(ours["bytes"]) == 3 * 64 * 352 * 4
    for row in rows:
        if row["note"].endswith("is not installed"):
            assert (row["correct"], row["median_ms"]) == ("", "")
            continue
        assert row["correct"] == "1"
        assert float(row["GB_s"]) == pytest.approx(
            int(row["bytes"]) / float(row["median_ms"]) / 1e6, rel=1e-4
        )
    # Once more: the file is a history.
    code, _, err = relneuron(*words[:3], "average_precision", "-o", tmp_path)
    assert code == 0, err
    with (tmp_path / f"{machine}.csv").open(newline="") as file:
        n_ranking = sum(row["op"] == "average_precision" for row in rows)
        assert len(list(csv.DictReader(file))) == len(rows) + n_ranking


def test_no_roofline_is_announced_without_its_op(relneuron: Any, tmp_path: Path) -> None:
    code, out, err = relneuron("bench", "average_precision", "--quick", "-o", tmp_path)
    assert code == 0, err
    assert ".csv" in out and ".png" not in out
    assert [path.suffix for path in tmp_path.glob("[!.]*")] == [".csv"]


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["softmax"], "unknown op"),
        (["--dtype", "int8"], "unknown dtype"),
        (["--tokens", "many"], "unknown number"),
        (["--tokens", "0"], "at least 1"),
        (["--device", "tpu"], "no device"),
    ],
)
def test_bad_options(relneuron: Any, tmp_path: Path, words: list[str], cause: str) -> None:
    code, out, err = relneuron("bench", "--quick", "-o", tmp_path / "out", *words)
    assert code == 2
    lines = err.strip().splitlines()
    assert len(lines) == 2
    assert cause in lines[0]
    assert lines[1].startswith("fix:   ")
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused_before_measuring(
    relneuron: Any, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("")
    code, out, err = relneuron("bench", "--quick", "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "is a file" in err


def test_the_machine_is_a_processor_not_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    named = machines
    monkeypatch.setattr(named, "processor", lambda device: "AMD EPYC(TM) 9B45 / 2 @ 3.0GHz")
    assert named.machine("cpu") == "amd-epyc-9b45-2-3-0ghz"


@pytest.mark.slow
def test_the_gpu_script_goes_through_on_a_cpu(tmp_path: Path) -> None:
    """All sections in tiny sizes, in a process of its own as on the machine with a GPU."""
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--skip-tests", "--out", tmp_path]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {state["status"] for state in report["sections"].values()} == {"done"}
    assert all(report["checks"].values())
    assert {"P1", "P2", "P4", "P7a", "P8a", "P11a", "P11c", "P12a", "P12b", "P12c"} <= {
        name for name, goal in report["goals"].items() if goal["measured"] is not None
    }
    with (tmp_path / "gpu.csv").open(newline="") as file:
        assert {row["contestant"] for row in csv.DictReader(file)} >= {"relneuron", "triad"}
