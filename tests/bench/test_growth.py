"""bench.growth: every axis runs, a point costs what it costs, and exponents are those of curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from mmap import mmap
from pathlib import Path

import pytest

from bench import growth
from bench.growth_world import World
from relneuron.artifact.reading import read_csv
from tests.kit.forked import Forked


def measured(path: Path, *words: str) -> None:
    assert growth.main([*words, "-o", str(path)]) == 0


@pytest.mark.parametrize("axis", ["conditions", "tokens"])
def test_an_axis_runs_and_leaves_rows_and_a_picture(axis: str, tmp_path: Path) -> None:
    """In a process of its own: it forks, and nothing may run beside a fork."""
    first = f"{growth.AXES[axis].field}=6"
    words = ("--only", axis, "--world", first, "--doublings", "1", "--rounds", "1")
    run = Forked(measured, tmp_path, *words)
    out, err = run.said()
    assert run.wait() == 0, err
    [path] = tmp_path.glob("*-growth.csv")
    rows = list(read_csv(path, ("axis", "stage", "n", "cpu_s", "peak_bytes", "of")))
    stages = growth.AXES[axis].stages
    assert [(row["axis"], row["stage"], row["n"]) for row in rows] == [
        (axis, stage, n) for stage in stages for n in ("6", "12")
    ]
    assert all(row.real("cpu_s") > 0 and row.whole("peak_bytes") > 1 << 20 for row in rows)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert all(stage in out for stage in stages)


def test_a_stage_that_fails_ends_the_bench_with_what_it_said(tmp_path: Path) -> None:
    def fail() -> None:
        print("this is why")
        raise SystemExit(3)

    with pytest.raises(RuntimeError, match="this is why"):
        growth.in_fork(fail, tmp_path / "said.txt")


def test_a_fork_is_measured_by_its_own_work(tmp_path: Path) -> None:
    def work() -> None:
        with mmap(-1, 1 << 26) as held:  # 64 MiB that no process has had before
            for _ in range(20):
                held[:] = bytes(1 << 26)

    idle, busy = (growth.in_fork(act, tmp_path / "said.txt") for act in (lambda: None, work))
    assert busy.cpu_s > idle.cpu_s
    assert busy.peak_bytes - idle.peak_bytes > 60 << 20


N = [64.0, 128, 256, 512, 1024]


@pytest.mark.parametrize(
    ("curve", "exponent", "constant"),
    [
        (lambda n: 0.01 * n, 1.0, 0.0),
        (lambda n: 5 + 0.01 * n, 1.0, 5.0),
        (lambda n: 2 + 0.0001 * n**1.5, 1.5, 2.0),
        (lambda n: 1e-5 * n**2, 2.0, 0.0),
        (lambda n: 3 + 0.3 * n**0.5, 0.5, 3.0),
    ],
)
def test_a_curve_has_its_exponent_whatever_is_constant(
    curve: Callable[[float], float], exponent: float, constant: float
) -> None:
    found = growth.fit(N, [curve(n) for n in N])
    assert found.exponent == pytest.approx(exponent, abs=0.011)
    assert found.last == pytest.approx(exponent, abs=0.02)
    assert found.constant == pytest.approx(constant, abs=0.05)


def test_what_does_not_grow_is_flat_and_a_square_among_lines_is_seen() -> None:
    assert growth.fit(N, [2.0, 2.05, 1.98, 2.1, 2.02]).exponent == 0
    mixed = growth.fit(N, [1 + 0.01 * n + 1e-5 * n**2 for n in N])
    assert 1.2 < mixed.exponent < mixed.last < 2


def test_sizes_double_and_matrices_are_fitted_by_their_cells() -> None:
    axis = growth.AXES["groups"]._replace(world=World(groups=3, texts=8))
    worlds = growth.sizes_of(axis, 2)
    assert [(world.groups, world.texts) for world in worlds] == [(3, 8), (6, 4), (12, 2)]
    costs = {
        world: dict.fromkeys(axis.stages, growth.Cost(world.groups**2, 10 + world.groups**2))
        for world in worlds
    }
    rows = growth.rows_of("groups", axis, costs)
    by_stage = {row["stage"]: (row["of"], row["time_exponent"]) for row in rows}
    assert by_stage["count"] == ("n", 2.0)
    assert by_stage["report nll"] == ("cells", 1.0)
    assert not any(math.isnan(float(str(row["time_last"]))) for row in rows)
    assert {row["bytes_per_n"] for row in rows} == {(12**2 - 3**2) // (12 - 3)}


def test_there_is_as_much_in_all_where_relations_and_groups_double() -> None:
    for name in ("relations", "groups"):
        axis = growth.AXES[name]
        assert axis.halved
        worlds = growth.sizes_of(axis, 3)
        assert len({getattr(w, axis.field) * getattr(w, axis.halved) for w in worlds}) == 1
    with pytest.raises(ValueError, match="cannot be halved 5 times"):
        growth.sizes_of(axis._replace(world=World(texts=16)), 5)


def test_a_time_is_the_shortest_of_its_rounds_and_a_peak_the_highest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worlds, ran = [World(texts=n) for n in range(1, 7)], []

    def measure(axis: growth.Axis, world: World) -> dict[str, growth.Cost]:
        ran.append(world)
        number = ran.count(world)  # of this round
        return {"count": growth.Cost(world.texts + abs(number - 2), 10 * number)}

    monkeypatch.setattr(growth, "measure", measure)
    found = growth.measure_all(growth.AXES["tokens"], worlds, 3)
    assert [*found] == worlds
    assert [found[world]["count"] for world in worlds] == [(w.texts, 30) for w in worlds]
    # A machine that gets slower within a round does not slow the large sizes alone.
    orders = [ran[at : at + 6] for at in range(0, 18, 6)]
    assert all(set(order) == {*worlds} for order in orders)
    assert worlds not in orders
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--world", "fact=3"], "Got unexpected field names: ['fact']"),
        (["--world", "facts"], "not enough values to unpack"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--doublings", "-1"], "--doublings at least 0"),
    ],
)
def test_wrong_words_are_told(
    words: list[str], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        growth.main(["--only", "prompts", *words])
    assert cause in capsys.readouterr().err


def test_one_size_is_flat() -> None:
    axis = growth.AXES["relations"]._replace(world=World(relations=3, facts=5))
    worlds = growth.sizes_of(axis, 0)
    assert worlds == [axis.world]
    rows = growth.rows_of(
        "relations", axis, {worlds[0]: dict.fromkeys(axis.stages, growth.Cost(2, 3))}
    )
    assert {row["time_exponent"] for row in rows} == {0} == {row["bytes_per_n"] for row in rows}
