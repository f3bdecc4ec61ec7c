"""What the suites share: sizes, the measuring, and how pytest-benchmark gets the times.

`pytest bench` runs them; each test is one contestant of one case. relneuron.bench measures all
contestants of a case in the same rounds, which pytest-benchmark's own loop, one test after the
other, cannot; the rounds are then replayed to it through a clock, for its tables, comparisons and
json.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from relneuron.bench.sizes import SUITES
from relneuron.bench.suite import CONTESTANTS, Case
from relneuron.bench.timing import EFFORTS, Row, append_rows, run_case

_rows: list[Row] = []  # of this session, in the order measured


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("relneuron")
    group.addoption("--size", choices=list(SUITES), default="usual", help="which suite of cases")
    group.addoption("--no-compile", action="store_true", help="without torch.compile")
    group.addoption("--on", choices=["cpu", "cuda"], default="cpu", help="device")
    group.addoption("--rows", type=Path, metavar="DIR", help="add rows to DIR/<machine>.csv")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every contestant of every case; who they are is seen from tiny cases."""
    option = metafunc.config.option
    found = []
    for case in SUITES[option.size]:
        if case.op == metafunc.module.OP:
            tiny = Case(case.op, case.dtype, 4 * case.G, 32, case.G, case.layout)
            take_part = CONTESTANTS[case.op](tiny, option.on, 1, not option.no_compile)
            found += [(case, number, c) for number, c in enumerate(take_part)]
    metafunc.parametrize(
        ("case", "number"),
        [(case, number) for case, number, _ in found],
        ids=[_id(case, c.variant, c.name) for case, _, c in found],
    )


def _id(case: Case, variant: str, name: str) -> str:
    return f"{case.dtype}-{case.T}-{case.G}-{case.layout}-{variant}-{name}".replace(" ", "_")


class Clock:
    """The timer of the tests: it stands still but for what is replayed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, ms: float) -> None:
        self.now += ms / 1e3


CLOCK = Clock()


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest):
    """Gives the rows of a case, measured when the first of its contestants is asked for."""
    option = request.config.option
    effort = EFFORTS[option.size]

    @cache
    def measure(case: Case) -> list[Row]:
        rows = run_case(case, device=option.on, compiled=not option.no_compile, effort=effort)
        _rows.extend(rows)
        return rows

    return measure


@pytest.fixture
def replay(measured, case: Case, number: int, request: pytest.FixtureRequest):
    """Hands one contestant's rounds to pytest-benchmark; a wrong contestant fails, untimed."""

    def play() -> None:
        row = measured(case)[number]
        if row.correct is None:
            pytest.skip(row.note)
        assert row.correct, row.note
        # Asked for here, since the plugin warns of one that is not used.
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = str(case)
        for name in ("ratio", "GB_s", "share_triad", "share_copy", "bytes"):
            benchmark.extra_info[name] = getattr(row, name)
        rounds = iter(row.rounds_ms)
        # With --benchmark-disable the function is called once and not timed.
        benchmark.pedantic(lambda: CLOCK.advance(next(rounds)), rounds=len(row.rounds_ms))

    return play


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    del machine_info["node"]  # the host's name is nobody's business
    machine_info["threads"] = torch.get_num_threads()


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = session.config.option.rows
    if folder and _rows:
        append_rows(folder, _rows)
