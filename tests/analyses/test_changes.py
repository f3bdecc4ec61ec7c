"""The change of an answer's probability, against sums written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from relneuron.analyses.changes import ALL, changes, sides
from relneuron.artifact.effects import Condition, Grid, fact_numbers
from relneuron.artifact.prompts import Prompt, rows_about
from relneuron.report.tables import Table

# Two facts of r in two wordings, one of s.
ASKED = [("r", "a", 0), ("r", "a", 1), ("r", "b", 0), ("r", "b", 1), ("s", "c", 0)]
PROMPTS = {
    f"{relation}.{subject}.{k}": Prompt(
        f"{relation}.{subject}.{k}", relation, "eva", "en", "", subject, "x", f"{subject} {k}"
    )
    for relation, subject, k in ASKED
}
CLEAN = [0.5, 0.25, 0.8, 0.4, 0.1]


def grid_of(**off: tuple[Condition, list[float | None]]) -> Grid:
    """The answers under `clean` and under each condition: P, right where it is above 0.3."""
    ids = list(PROMPTS)
    conditions = {"clean": Condition("clean", "clean")}
    conditions |= {name: condition for name, (condition, _) in off.items()}
    grid = Grid(
        "eva",
        ids,
        np.array([relation for relation, *_ in ASKED]),
        conditions,
        facts=fact_numbers(ids, PROMPTS),
    )
    values: dict[str, list[float | None]] = {"clean": [*CLEAN]}
    for name, found in (values | {name: p for name, (_, p) in off.items()}).items():
        grid.logprob[name] = np.array([math.nan if p is None else math.log(p) for p in found])
        right = [-1 if p is None else int(p > 0.3) for p in found]
        grid.correct[name] = np.array(right, np.int8)
        grid.choice[name] = ["" if p is None else "AB"[p > 0.3] for p in found]
    return grid


def fact(subject: str, n: int) -> Condition:
    return Condition(f"r/{subject}", "set", f"r/{subject}", n_neurons=n)


def cell(table: Table, relation: str, column: str) -> float:
    return float(table.where("relation", relation).floats(column)[0])


# Halved, the same; two of its own relation; s: 10 % more.
A: list[float | None] = [0.25, 0.25, 0.8, 0.8, 0.11]
B: list[float | None] = [None, None, 0.4, 0.6, 0.08]


@pytest.fixture
def grid() -> Grid:
    r: list[float | None] = [0.5, 0.5, 0.8, 0.4, 0.05]
    return grid_of(
        **{
            "r/a": (fact("a", 4), A),
            "r/b": (fact("b", 2), B),
            "s": (Condition("s", "set", "s", n_neurons=3), r),
            "r/a~0": (Condition("r/a~0", "matched", "r/a", 0), [0.45, 0.25, None, None, None]),
            "r/a~1": (Condition("r/a~1", "matched", "r/a", 1), [0.55, 0.25, None, None, 0.1]),
        }
    )


def test_changes_of_facts_are_pooled_in_their_relation(grid: Grid) -> None:
    table = changes(grid, PROMPTS)
    assert table.column("relation") == ["r", "s", ALL]
    # Set a on its two prompts, set b on its own: -1/2, 0, -1/2, +1/2; on s: +10 %, -20 %.
    assert cell(table, "r", "related_change") == pytest.approx((-0.5 + 0 - 0.5 + 0.5) / 4)
    assert cell(table, "r", "unrelated_change") == pytest.approx((0.1 - 0.2) / 2)
    assert cell(table, "r", "pcr") == pytest.approx(0.125 / 0.05)
    assert [cell(table, "r", n) for n in ("n_sets", "n_neurons", "n_related", "n_unrelated")] == [
        *(2, 3, 4, 2)
    ]
    # s off: on r 0, +1, 0, 0; on itself -1/2.
    assert cell(table, "s", "unrelated_change") == pytest.approx(0.25)
    assert cell(table, "s", "related_change") == pytest.approx(-0.5)
    assert cell(table, ALL, "related_change") == pytest.approx((-0.5 - 0.5) / 5)
    assert cell(table, ALL, "unrelated_change") == pytest.approx((0.1 - 0.2 + 1) / 6)


def test_random_sets_have_the_range_of_their_seeds(grid: Grid) -> None:
    table = changes(grid, PROMPTS)
    low, high = -0.05, 0.05
    assert cell(table, "r", "matched") == pytest.approx((low + high) / 2, abs=1e-12)
    assert cell(table, "r", "matched_low") == pytest.approx(low)
    assert cell(table, "r", "matched_high") == pytest.approx(high)
    assert math.isnan(cell(table, "s", "matched"))


def test_right_answers_and_flips_are_counted(grid: Grid) -> None:
    table = changes(grid, PROMPTS)
    # Clean: right where P > 0.3: a0, b0, b1. After: set a loses a0, set b none.
    assert cell(table, "r", "related_before") == pytest.approx(3 / 4)
    assert cell(table, "r", "related_after") == pytest.approx(2 / 4)
    assert cell(table, "r", "related_flips") == pytest.approx(1 / 4)
    assert cell(table, "s", "unrelated_flips") == pytest.approx(1 / 4)  # a1: 0.25 -> 0.5
    for name in grid.choice:
        grid.choice[name] = [""] * len(grid.ids)
    assert math.isnan(cell(changes(grid, PROMPTS), "r", "related_flips"))


def test_of_one_relation_other_facts_are_unrelated(grid: Grid) -> None:
    about = rows_about(PROMPTS.values())
    assert [rows.tolist() for rows in sides(grid, fact("a", 1), about)] == [[0, 1], [4]]
    grid.relation = np.array(["r"] * 5)
    assert [rows.tolist() for rows in sides(grid, fact("a", 1), about)] == [[0, 1], [2, 3, 4]]


def test_intervals_hold_most_true_means() -> None:
    """Facts of normal changes: their mean is within about 95 of 100 intervals."""
    rng, n, hits = np.random.default_rng(0), 40, 0
    prompts = {
        f"r.{i}": Prompt(f"r.{i}", "r", "eva", "en", "", str(i), "x", str(i)) for i in range(n)
    }
    conditions = {"clean": Condition("clean", "clean"), "r": Condition("r", "set", "r")}
    for _ in range(100):
        grid = Grid("eva", list(prompts), np.array(["r"] * n), conditions)
        change = rng.normal(-0.2, 0.3, n).clip(-0.99)
        for name in conditions:
            grid.correct[name], grid.choice[name] = np.ones(n, np.int8), [""] * n
        grid.logprob = {"clean": np.full(n, -1.0), "r": np.log1p(change) - 1}
        table = changes(grid, prompts)
        low, high = (cell(table, "r", f"related_change_{end}") for end in ("low", "high"))
        hits += low <= -0.2 <= high
        assert cell(table, "r", "related_change") == pytest.approx(change.mean())
    assert 86 <= hits <= 99


def test_nothing_to_compare_is_not_measured() -> None:
    grid = grid_of(r=(Condition("r", "set", "r"), [0.5, 0.25, 0.8, 0.4, None]))
    table = changes(grid, PROMPTS)
    assert cell(table, "r", "related_change") == 0 and math.isnan(cell(table, "r", "pcr"))
    assert math.isnan(cell(table, "r", "unrelated_change"))
    assert not changes(grid_of(), PROMPTS).rows
