"""Every analysis against small tables worked out by hand and against plain loops over the rows."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy.stats import hypergeom, mannwhitneyu, spearmanr, wilcoxon

from relneuron import analyses
from relneuron.analyses.answers import kind_of_error
from relneuron.analyses.outcomes import outcomes
from relneuron.analyses.uncertainty import paired_bootstrap, q_values, sign_flip_p
from relneuron.artifact.effects import Condition, Grid
from relneuron.artifact.neurons import Neuron
from relneuron.artifact.prompts import Prompt
from relneuron.report.tables import Share, Table

NAN = float("nan")


def condition_of(name: str) -> Condition:
    """The condition that a name stands for; sets have 10 neurons."""
    if name == "clean":
        return Condition(name, "clean")
    if name.startswith("random."):
        return Condition(name, "random", seed=int(name[7:]), n_neurons=10)
    if name.startswith("concept:"):
        return Condition(name, "concept", name[8:], n_neurons=10)
    if "~" in name:
        relation, seed = name.split("~")
        return Condition(name, "matched", relation, seed=int(seed), n_neurons=10)
    relation, _, what = name.partition("@")
    if not what:
        return Condition(name, "set", relation, n_neurons=10)
    if not what[0].isdigit():
        return Condition(name, "site", relation, site=what, n_neurons=10)
    first, _, last = what.rpartition("-")
    kind = "range" if first else "size"
    return Condition(name, kind, relation, None, int(first or 1), int(last), n_neurons=int(last))


def grid_of(answers: dict[str, dict[str, str]], split: str = "eva") -> Grid:
    """A grid from {condition: {relation: one character a prompt}}: 1, 0, or - if not asked."""
    asked = answers["clean"]
    ids = [f"{relation}.{i}" for relation, marks in asked.items() for i in range(len(marks))]
    relation = np.array([name for name, marks in asked.items() for _ in marks])
    grid = Grid(split, ids, relation, {name: condition_of(name) for name in answers})
    for name, by_relation in answers.items():
        marks = "".join(by_relation.get(r, "-" * len(asked[r])) for r in asked)
        grid.correct[name] = np.array([{"-": -1}.get(m) or int(m) for m in marks], np.int8)
        grid.logprob[name] = np.full(len(ids), NAN)
        grid.prediction[name] = [f"{name}: {i}" for i in ids]
    return grid


def cells(table: Table, *key: object) -> dict[str, Any]:
    """The one row that begins with `key`, by column."""
    [row] = [row for row in table.rows if tuple(row[: len(key)]) == key]
    assert len(row) == len(table.columns)
    return dict(zip(table.columns, row, strict=True))


GRID = grid_of(
    {
        "clean": {"a": "1110", "b": "1100", "c": "00"},
        "a": {"a": "1001", "b": "1100", "c": "00"},
        "b": {"a": "1110", "b": "0000", "c": "10"},
        "random.0": {"a": "1110", "b": "1000", "c": "00"},
        "random.1": {"a": "1100", "b": "1000", "c": "00"},
        "a~0": {"a": "0110"},
        "a~1": {"a": "1111"},
        "b~0": {"b": "0000"},
        "a@4": {"a": "1000", "b": "1000", "c": "01"},
        "a@2": {"a": "1110", "b": "1100", "c": "11"},
        "a@6": {"a": "0000", "b": "0000", "c": "00"},
        "a@3-4": {"a": "1010"},
        "a@5-6": {"a": "1000"},
        "a@gate": {"a": "0110", "b": "1100", "c": "00"},
        "a@down": {"a": "1110", "b": "1110", "c": "00"},
        "concept:people": {"a": "1100", "b": "0000", "c": "00"},
    }
)
SETS: dict[str, list[Neuron]] = {
    "a": [(0, "gate", i) for i in range(4)],
    "b": [(0, "gate", i) for i in range(2, 5)],
    "c": [],
}
PROMPTS = {
    name: Prompt(name, name[0], "eva", "en", "{} is", f"S{name[2:]}", f"O{name}", f"S{name[2:]} is")
    for name in GRID.ids
}


def test_accuracy_by_hand() -> None:
    table = analyses.accuracy({"eva": GRID})
    assert [tuple(row[:2]) for row in table.rows] == [("eva", "a"), ("eva", "b"), ("eva", "c")]
    a, b, c = (cells(table, "eva", name) for name in "abc")
    assert (a["n_prompts"], a["before"], a["own"], a["lost"], a["gained"]) == (4, 0.75, 0.5, 2, 1)
    assert a["drop"] == (0.75 - 0.5) / 0.75
    ends = paired_bootstrap(np.array([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 1]]))
    for name, (low, high) in zip(("before", "own", "drop"), ends, strict=True):
        assert (a[f"{name}_low"], a[f"{name}_high"]) == (low, high)
    assert (a["p_value"], b["p_value"], b["q_value"]) == (1, 0.5, 1)
    assert [a[f"others{end}"] for end in ("", "_low", "_high")] == [0.75, 0.75, 0.75]
    assert [b[f"random{end}"] for end in ("", "_low", "_high")] == [0.25, 0.25, 0.25]
    assert [a[f"random{end}"] for end in ("", "_low", "_high")] == [0.625, 0.5, 0.75]
    assert a["random_drop"] == pytest.approx((0 + 1 / 3) / 2)
    assert [a[f"matched{end}"] for end in ("", "_low", "_high")] == [0.75, 0.5, 1.0]
    assert a["matched_drop"] == pytest.approx((1 / 3 - 1 / 3) / 2)
    assert [c[f"others{end}"] for end in ("", "_low", "_high")] == [0.25, 0.0, 0.5]
    unknown = ("own", "own_low", "own_high", "drop", "drop_low", "drop_high", "lost", "gained")
    for name in (*unknown, "p_value", "q_value", "random_drop", "matched", "matched_drop"):
        assert math.isnan(c[name]), name
    assert (b["matched"], b["matched_drop"]) == (0, 1)
    assert isinstance(a["before"], Share) and isinstance(a["matched_drop"], Share)
    assert type(a["lost"]) is int and type(a["p_value"]) is float


def test_accuracy_adjusts_within_a_split() -> None:
    german = grid_of(
        {"clean": {"b": "111111", "a": "1111"}, "b": {"b": "000000", "a": "1111"}}, "eva.de"
    )
    table = analyses.accuracy({"eva": GRID, "eva.de": german})
    assert len(table.rows) == 5
    row = cells(table, "eva.de", "b")
    assert row["p_value"] == row["q_value"] == 2 / 64
    assert cells(table, "eva", "b")["q_value"] == 1
    assert math.isnan(cells(table, "eva.de", "a")["own"])
    assert math.isnan(row["random"]) and math.isnan(row["others"])


def test_drop_by_hand() -> None:
    table = analyses.drop_table(GRID)
    assert [row[:3] for row in table.rows[:3]] == [["a", "a", 1], ["a", "b", 0], ["b", "a", 0]]
    own, mended = cells(table, "b", "b"), cells(table, "c", "b")
    assert (own["n_prompts"], own["n_before"], own["n_after"], own["drop"]) == (4, 2, 0, 1.0)
    assert (mended["n_before"], mended["n_after"], mended["gained"]) == (0, 1, 1)
    assert math.isnan(mended["drop"]) and math.isnan(mended["drop_low"])
    p = [row[table.columns.index("p_value")] for row in table.rows]
    # Nothing of c is right before: no drop, no test, no part of the family.
    np.testing.assert_array_equal(p, [1, 1, 1, 0.5, NAN, NAN])
    np.testing.assert_array_equal([row[-1] for row in table.rows], q_values(p))


def test_a_fact_is_a_case_however_often_it_is_asked() -> None:
    """Two facts asked twice each, and one once, of a; b has a set without neurons."""
    grid = grid_of(
        {
            "clean": {"a": "11110", "b": "111111"},
            "a": {"a": "00010", "b": "111111"},
            "b": {"a": "11110", "b": "000000"},
        }
    )
    grid.facts = np.array([0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8])
    grid.conditions["b"] = Condition("b", "set", "b", n_neurons=0)
    found = outcomes(grid, "a", "a")
    assert found.facts.tolist() == [[2, 2, 0], [2, 2, 1], [1, 0, 0]]
    table = analyses.drop_table(grid)
    a, b = cells(table, "a", "a"), cells(table, "b", "b")
    assert (a["n_prompts"], a["lost"], a["gained"]) == (5, 3, 0)
    # Two facts changed: p is 2 / 4, not the 2 / 8 of three answers.
    assert a["p_value"] == sign_flip_p(np.array([-2, -1, 0])) == 0.5
    assert (a["drop_low"], a["drop_high"]) == paired_bootstrap(found.facts).drop
    # Without neurons no test, and no part of the family.
    assert math.isnan(b["p_value"]) and math.isnan(b["q_value"])
    accuracy = analyses.accuracy({"eva": grid})
    assert cells(accuracy, "eva", "a")["q_value"] == 0.5
    assert math.isnan(cells(accuracy, "eva", "b")["q_value"])


def test_only_prompts_asked_count_and_sets_give_the_order() -> None:
    grid = grid_of(
        {
            "clean": {"c": "1", "b": "111", "a": "11"},
            "a": {"a": "1-", "b": "0-1"},
            "b": {"a": "01", "b": "0-1"},
        }
    )
    rows = [row[:6] for row in analyses.drop_table(grid).rows]
    assert [tuple(row[:2]) for row in rows] == list(product("abc", "ab"))
    assert [row[3:] for row in rows[:3]] == [[1, 1, 1], [2, 2, 1], [2, 2, 1]]
    assert rows[4][3:] == [0, 0, 0]


def test_overlap_by_hand() -> None:
    table = analyses.overlap(SETS, 20)
    assert len(table.rows) == 9
    ab, ba, ac, ca, aa = (cells(table, *pair) for pair in ("ab", "ba", "ac", "ca", "aa"))
    assert (ab["shared"], ab["share"], ab["expected"]) == (2, 0.5, 0.6)
    assert (ba["shared"], ba["share"], ba["expected"]) == (2, 2 / 3, 0.6)
    expected = sum(hypergeom.pmf(k, 20, 4, 3) for k in (2, 3))
    assert ab["p_value"] == ba["p_value"] == pytest.approx(expected)
    assert ab["q_value"] == ba["q_value"] == pytest.approx(3 * expected)
    assert (ac["shared"], ac["share"], ac["expected"], ac["p_value"]) == (0, 0.0, 0.0, 1.0)
    assert ca["shared"] == 0 and math.isnan(ca["share"])
    assert (aa["shared"], aa["share"]) == (4, 1.0)
    assert math.isnan(aa["p_value"]) and math.isnan(aa["q_value"])
    assert not analyses.overlap({}, 20).rows


def test_versatility_and_whether_overlap_goes_with_effect() -> None:
    assert analyses.versatility(SETS).rows == [[1, 3, 0.6], [2, 2, 0.4]]
    three = SETS | {"d": [(0, "gate", 3)]}
    assert analyses.versatility(three).rows == [[1, 3, 0.6], [2, 1, 0.2], [3, 1, 0.2]]
    assert analyses.versatility({"c": []}).rows == []
    marks = {"a": "1100", "b": "1000", "d": "1110"}
    clean = dict.fromkeys("abcd", "1111") | {"e": "0000"}
    grid = grid_of({"clean": clean} | dict.fromkeys("abcde", marks | {"c": "0000", "e": "0000"}))
    found = analyses.overlap_effect(three | {"e": []}, grid)
    shared = {"ab": 2, "ad": 1, "bd": 1}
    drops = {"a": 0.5, "b": 0.75, "d": 0.25}
    pairs = [(shared["".join(sorted(i + j))], drops[i]) for i, j in product("abd", "abd") if i != j]
    assert found.n_pairs == 6
    assert found[:2] == pytest.approx(tuple(spearmanr(*zip(*pairs, strict=True))))
    never_right = analyses.overlap_effect({"a": SETS["a"], "e": SETS["b"]}, grid)
    assert never_right.n_pairs == 1
    few = analyses.overlap_effect({"a": SETS["a"]}, grid)
    assert few.n_pairs == 0 and math.isnan(few.rho)


def test_interference_lists_what_a_foreign_set_mends() -> None:
    table = analyses.interference(GRID, PROMPTS)
    assert table.rows == [["c", "b", "c.0", "S0", "Oc.0", "clean: c.0", "b: c.0"]]


def test_sizes_by_hand() -> None:
    table = analyses.sizes(GRID)
    assert [tuple(row[:2]) for row in table.rows] == [("a", 0), ("a", 2), ("a", 4), ("a", 6)]
    zero, two, four = (cells(table, "a", size) for size in (0, 2, 4))
    assert (zero["own"], zero["others"], zero["own_drop"], zero["others_drop"]) == (
        0.75,
        0.25,
        0,
        0,
    )
    assert (two["own"], two["others"], two["others_drop"]) == (0.75, 0.75, 0)
    assert (four["own"], four["others"], four["others_drop"]) == (0.25, 0.375, 0.5)
    assert four["own_drop"] == (0.75 - 0.25) / 0.75
    facts = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0]])
    assert (four["own_low"], four["own_high"]) == paired_bootstrap(facts).after
    more = grid_of({"clean": dict.fromkeys("abc", "11"), "a@1": {"a": "11", "b": "10", "c": "00"}})
    row = cells(analyses.sizes(more), "a", 1)
    assert (row["others"], row["others_drop"]) == (0.25, 0.75)
    alone = grid_of({"clean": {"a": "10"}, "a@2": {"a": "00"}})
    assert math.isnan(cells(analyses.sizes(alone), "a", 2)["others"])


def test_cumulativity_by_hand() -> None:
    table = analyses.cumulativity(GRID)
    assert table.rows == [["a", 2, 4, 2, 1, 0.5], ["a", 4, 6, 1, 0, 1.0]]
    partly = {name: {"a": "11"} for name in ("clean", "a@1")} | {"a@2": {"a": "00"}}
    assert analyses.cumulativity(grid_of(partly | {"a@2-2": {"a": "0-"}})).rows[0][3:5] == [1, 1]
    nothing = grid_of(
        {name: {"b": "01"} for name in ("clean", "b@2", "b@4", "b@3-4", "b@8")}
        | {"clean": {"b": "11"}}
    )
    [row] = analyses.cumulativity(nothing).rows
    assert row[:5] == ["b", 2, 4, 0, 0] and math.isnan(row[5])
    both = Table("", table.columns, [*table.rows, row, ["c", 2, 4, 4, 3, 0.25]])
    summary = analyses.cumulativity_summary(both)
    assert summary.rows == [[2, 4, 6, 4, 0.375, 1 - 4 / 6], [4, 6, 1, 0, 1.0, 1.0]]


def test_sites_by_hand() -> None:
    table = analyses.sites(GRID)
    assert [row[:3] for row in table.rows] == [["a", s, 10] for s in ("gate", "down", "all")]
    gate, down = cells(table, "a", "gate"), cells(table, "a", "down")
    assert (gate["own"], gate["own_drop"], gate["others_drop"]) == (0.5, (0.75 - 0.5) / 0.75, 0.0)
    facts = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]])
    assert (gate["own_low"], gate["own_high"]) == paired_bootstrap(facts).after
    assert (down["own_drop"], down["others_drop"]) == (0.0, -0.5)
    assert cells(table, "a", "all")["own"] == 0.5
    more = grid_of({"clean": dict.fromkeys("abc", "11"), "a@up": {"a": "11", "b": "10", "c": "00"}})
    [row] = analyses.sites(more).rows
    assert row[1] == "up" and row[-1] == 0.75


def test_modules_by_hand() -> None:
    names = ("a@language", "a@vision+projector", "b@language")
    grid = grid_of(
        {
            "clean": {"a": "1110", "b": "1100"},
            "a@language": {"a": "1001"},
            "a@vision+projector": {"a": "0000"},
            "b@language": {"b": "1100"},
        }
    )
    for name in names:
        relation, _, modules = name.partition("@")
        grid.conditions[name] = Condition(name, "modules", relation, site=modules, n_neurons=7)
    table = analyses.modules(grid)
    assert [row[:3] for row in table.rows] == [[*name.split("@"), 7] for name in names]
    language = cells(table, "a", "language")
    assert (language["before"], language["own"]) == (0.75, 0.5)
    assert language["drop"] == pytest.approx((0.75 - 0.5) / 0.75)
    assert cells(table, "a", "vision+projector")["drop"] == 1.0
    assert cells(table, "b", "language")["drop"] == 0.0
    assert not analyses.modules(GRID).rows


def test_concepts_by_hand() -> None:
    sets = {"people": [(0, "gate", 1), (0, "gate", 3), (1, "up", 0)], "towns": []}
    table = analyses.concepts(SETS, sets, GRID, 20)
    assert [tuple(row[:2]) for row in table.rows] == list(product("abc", sets))
    row = cells(table, "a", "people")
    assert (row["shared"], row["share"], row["expected"]) == (2, 0.5, 0.6)
    assert row["drop"] == (0.75 - 0.5) / 0.75
    p = [row[table.columns.index("p_value")] for row in table.rows]
    assert p[0] == hypergeom.sf(1, 20, 4, 3) and p[1] == 1
    assert [row[-1] for row in table.rows] == q_values(p).tolist()
    assert math.isnan(cells(table, "a", "towns")["drop"])
    assert analyses.concepts(SETS, {}, GRID, 20).rows == []


def test_resilience_by_hand() -> None:
    grid = grid_of(
        {
            "clean": {"a": "11111", "b": "11", "c": "10"},
            "a": {"a": "11000", "b": "11", "c": "10"},
            "b": {"b": "11", "a": "11111", "c": "10"},
        }
    )
    grid.logprob["clean"] = -np.array([1.0, 2, 3, 4, 8, 1, 2, 5, 5])
    frequency = {"a.0": 200.0, "a.1": 400.0, "a.2": 120.0, "b.0": 7.0}
    table = analyses.resilience(grid, frequency)
    assert [row[0] for row in table.rows] == ["a", "b"]
    a, b = cells(table, "a"), cells(table, "b")
    assert (a["n_resilient"], a["n_sensitive"]) == (2, 3)
    assert (a["logprob_resilient"], a["logprob_sensitive"]) == (-1.5, -5)
    assert a["p_value"] == mannwhitneyu([-1, -2], [-3, -4, -8]).pvalue
    assert (a["frequency_resilient"], a["frequency_sensitive"]) == (300, 120)
    assert a["frequency_difference"] == -1.5
    assert (b["n_sensitive"], b["logprob_resilient"], b["frequency_resilient"]) == (0, -1.5, 7)
    for name in ("logprob_sensitive", "p_value", "frequency_sensitive", "frequency_difference"):
        assert math.isnan(b[name]), name
    without = cells(analyses.resilience(grid), "a")
    assert math.isnan(without["frequency_resilient"])
    assert math.isnan(without["frequency_difference"])
    rows = [["r", 1, 1, -x, -y] for x, y in ((1.0, 2.0), (1.0, 4.0), (3.0, 2.5), (NAN, 1.0))]
    test = analyses.resilience_test(Table("", table.columns, rows))
    assert test == (*wilcoxon([1, 3, -0.5]), 3)
    assert math.isnan(analyses.resilience_test(Table("", table.columns, [])).p_value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *[(" \n", "empty"), ("The CEO", "repeats_prompt"), ("apple", "repeats_prompt")],
        *[("The", "article"), ("A.", "article"), ("an", "article"), ("...", "article")],
        *[
            ("Than", "other"),
            ("pple", "other"),
            ("nadella", "other"),
            ("Satya", "same_relation"),
            ("SATYA N", "same_relation"),
        ],
        *[("Redm", "other_relation"), ("Redmont", "other"), ("Ap", "other")],
    ],
)
def test_kinds_of_errors(text: str, kind: str) -> None:
    prompt = Prompt("ceo.0", "ceo", "eva", "en", "{}", "Apple", "Tim Cook", "Apple? the CEO is")
    own, other = ["satya nadella", "tim cook"], ["redmond", "satu mare"]
    assert kind_of_error(text, prompt, own, sorted(own + other)) == kind


def test_errors_by_hand() -> None:
    grid = grid_of({"clean": {"a": "1111", "b": "1"}, "a": {"a": "0001", "b": "0"}})
    german = Prompt("b.de", "b", "eva", "de", "{} ist", "S", "of course", "S ist")
    prompts = PROMPTS | {german.id: german}
    for given, expected in (
        (["Ob.0", "of course", "Ob.0", "-"], [3, 0, 0, 0, 0, 2, 1, "Ob.0", 2]),
        (["", "S1", "!", "-"], [3, 1, 1, 1, 0, 0, 0, "", 1]),
        (["y", "Oa.3", "Oa.0x", "-"], [3, 0, 0, 0, 1, 0, 2, "Oa.0x", 1]),
    ):
        grid.prediction["a"] = [*given, "x"]
        assert analyses.errors(grid, prompts).rows == [["a", *expected]]
    grid.correct["a"][:] = 1
    assert analyses.errors(grid, prompts).rows == [["a", *[0] * 7, "", 0]]
