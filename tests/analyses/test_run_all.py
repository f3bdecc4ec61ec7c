"""The analyses of a made-up study, read from its files, against plain loops over its rows."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from scipy.stats import wilcoxon

from relneuron.analyses import Gains, SentenceRow, perplexity, read_perplexity, run_all
from relneuron.artifact.effects import (
    EFFECTS,
    Condition,
    Grid,
    conditions_bytes,
    read_conditions,
    read_effects,
)
from relneuron.artifact.files import RelneuronError, csv_bytes
from relneuron.artifact.neurons import Neuron
from relneuron.artifact.prompts import Prompt
from relneuron.report.tables import Table

RELATIONS = ("ceo", "hq", "father", "star", "sport")
SIZES = (1, 3, 5, 8)
N_PROMPTS = 30
N_NEURONS = 60
KEYS = [
    *("accuracy", "drop", "overlap", "versatility", "interference", "sizes", "cumulativity"),
    *("cumulativity_summary", "sites", "concepts", "gain", "gain_overlap", "perplexity"),
    *("resilience", "errors"),
]

Answers = dict[tuple[str, str], dict[str, int]]  # (condition, relation) -> {prompt: right}


def draw_sets(rng: random.Random) -> dict[str, list[Neuron]]:
    """Of every size from none to 20 neurons."""
    everything: list[Neuron] = [(0, "gate", i) for i in range(N_NEURONS)]
    return {name: rng.sample(everything, 5 * i) for i, name in enumerate(RELATIONS)}


def draw_conditions(full: bool) -> list[Condition]:
    """Of all kinds; or without those that only the whole ablation study asks."""
    found = [Condition("clean", "clean")]
    found += [Condition(name, "set", name, n_neurons=5) for name in RELATIONS]
    found += [Condition(f"random.{seed}", "random", seed=seed) for seed in range(3)]
    for r in RELATIONS if full else ():
        found += [Condition(f"{r}~{seed}", "matched", r, seed=seed) for seed in range(2)]
        found += [Condition(f"{r}@{k}", "size", r, first=1, last=k) for k in SIZES]
        ranges = [(a + 1, b) for a, b in pairwise(SIZES)]
        found += [Condition(f"{r}@{a}-{b}", "range", r, first=a, last=b) for a, b in ranges]
        found += [Condition(f"{r}@{site}", "site", r, site=site) for site in ("gate", "up", "down")]
        found.append(Condition(f"gain:{r}", "gain", r, n_neurons=4))
    return found + [Condition("concept:people", "concept", "people")] * full


def write_rows(folder: Path, full: bool, splits: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """effects.csv and conditions.csv with answers at random; nothing of `star` is right before."""
    rng = random.Random(1)
    conditions = draw_conditions(full)
    rows = []
    for condition in conditions:
        for split in splits if condition.kind in ("clean", "set", "random") else ("eva",):
            for relation in RELATIONS:
                if condition.kind in ("matched", "range") and condition.relation != relation:
                    continue
                for i in range(N_PROMPTS):
                    right = int(rng.random() < 0.6)
                    right *= (condition.name, relation) != ("clean", "star")
                    text = f"object {i}" if right else rng.choice(["The", "", "Paris", "who"])
                    name = f"{relation}.{split}.{i}"
                    rows.append((condition.name, relation, split, name, text, right, -rng.random()))
    (folder / "conditions.csv").write_bytes(conditions_bytes(conditions))
    (folder / "effects.csv").write_bytes(csv_bytes(EFFECTS, rows))
    return rows


def read_grids(folder: Path) -> dict[str, Grid]:
    return read_effects(folder / "effects.csv", read_conditions(folder / "conditions.csv"))


def prompts_of(rows: list[tuple[Any, ...]]) -> dict[str, Prompt]:
    return {
        name: Prompt(name, relation, "eva", "en", "{} is", "S", "object 7", "S is")
        for _, relation, _, name, *_ in rows
    }


def by_pair(rows: list[tuple[Any, ...]]) -> Answers:
    found: Answers = {}
    for condition, relation, split, name, _, right, _ in rows:
        if split == "eva":
            found.setdefault((condition, relation), {})[name] = right
    return found


def same(found: object, expected: float) -> bool:
    assert isinstance(found, float)
    return found == expected or (math.isnan(found) and math.isnan(expected))


class Study(NamedTuple):
    rows: list[tuple[Any, ...]]
    grids: dict[str, Grid]
    sets: dict[str, list[Neuron]]

    def analyse(self) -> dict[str, Table]:
        return run_all(
            self.grids,
            self.sets,
            prompts_of(self.rows),
            N_NEURONS,
            concept_sets={"people": self.sets["hq"]},
            gains=Gains(draw_sets(random.Random(5)), N_NEURONS, {"hq": 0.5}),
            sentences=sentences(),
            frequency={name: float(i) for i, name in enumerate(self.grids["eva"].ids)},
        )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    rows = write_rows(folder, True, ("eva2", "eva", "eva.de"))
    return Study(rows, read_grids(folder), draw_sets(random.Random(3)))


@pytest.fixture(scope="module")
def tables(study: Study) -> dict[str, Table]:
    return study.analyse()


def sentences() -> list[SentenceRow]:
    rng = random.Random(2)
    names = ("clean", *RELATIONS, "random.0", "random.1")
    return [
        SentenceRow(name, relation, f"{relation}.{i}", 7, 20 + rng.random())
        for name in names
        for relation in RELATIONS
        for i in range(6)
        if name not in RELATIONS or name == relation
    ]


def test_drop_is_that_of_plain_loops(study: Study, tables: dict[str, Table]) -> None:
    answers = by_pair(study.rows)
    table = tables["drop"]
    found = {(row[0], row[1]): row for row in table.rows}
    assert len(found) == len(table.rows) == len(RELATIONS) ** 2
    for (relation, off), row in found.items():
        before, after = answers["clean", relation], answers[off, relation]
        n, n_before, n_after = len(before), sum(before.values()), sum(after.values())
        lost = sum(before[i] > after[i] for i in before)
        assert row[2:6] == [int(relation == off), n, n_before, n_after]
        assert row[9:11] == [lost, lost - n_before + n_after]
        drop = (n_before / n - n_after / n) / (n_before / n) if n_before else math.nan
        assert same(row[6], drop)


def test_cumulativity_is_that_of_plain_loops(study: Study, tables: dict[str, Table]) -> None:
    answers = by_pair(study.rows)
    table = tables["cumulativity"].rows
    assert len(table) == len(RELATIONS) * (len(SIZES) - 1)
    totals: dict[tuple[object, object], list[tuple[int, int]]] = {}
    for relation, a, b, *counts, share in table:
        names = [f"{relation}@{a}", f"{relation}@{b}", f"{relation}@{int(a) + 1}-{b}"]
        small, large, only = (answers[name, str(relation)] for name in names)
        total = [i for i in small if small[i] and not large[i]]
        affected = [i for i in total if not only[i]]
        assert counts == [len(total), len(affected)]
        assert same(share, 1 - len(affected) / len(total))
        totals.setdefault((a, b), []).append((len(total), len(affected)))
    for row, (ends, pairs) in zip(tables["cumulativity_summary"].rows, totals.items(), strict=True):
        each = [1 - affected / total for total, affected in pairs]
        total, affected = (sum(column) for column in zip(*pairs, strict=True))
        assert row == [*ends, total, affected, sum(each) / len(each), 1 - affected / total]


def test_overlap_is_that_of_plain_loops(study: Study, tables: dict[str, Table]) -> None:
    sets, table = study.sets, tables["overlap"]
    assert len(table.rows) == len(RELATIONS) ** 2
    for a, b, n_shared, share, expected, p, _ in table.rows:
        one, other = sets[str(a)], sets[str(b)]
        assert n_shared == sum(neuron in other for neuron in one)
        assert same(share, int(n_shared) / len(one) if one else math.nan)
        assert same(expected, len(one) * len(other) / N_NEURONS)
        if a != b:
            # C(K, k) C(M - K, n - k) / C(M, n), summed exactly.
            m, k, n = N_NEURONS, len(one), len(other)
            ways = sum(
                math.comb(k, i) * math.comb(m - k, n - i)
                for i in range(int(n_shared), min(k, n) + 1)
            )
            assert p == pytest.approx(ways / math.comb(m, n), rel=1e-9)


def test_all_analyses_in_their_order_twice_the_same(study: Study, tables: dict[str, Table]) -> None:
    assert list(tables) == KEYS
    assert len({table.title for table in tables.values()}) == len(KEYS)
    for table in tables.values():
        assert len(set(table.columns)) == len(table.columns)
        for row in table.rows:
            assert len(row) == len(table.columns)
            assert all(isinstance(cell, str | int | float) for cell in row)
            assert all(type(cell).__module__ != "numpy" for cell in row)
    again = study.analyse()
    assert [t.csv() for t in again.values()] == [t.csv() for t in tables.values()]
    assert all(math.isfinite(float(cell)) for cell in tables["resilience"].rows[0][1:])
    assert len(tables["accuracy"].rows) == 3 * len(RELATIONS)


def test_what_was_not_asked_has_no_table(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, False, ("eva2", "eva.de"))
    grids = read_grids(tmp_path)
    tables = run_all(grids, draw_sets(random.Random(3)), prompts_of(rows), N_NEURONS)
    absent = {"sizes", "cumulativity", "cumulativity_summary", "sites", "concepts", "perplexity"}
    absent |= {"gain", "gain_overlap"}
    assert list(tables) == [key for key in KEYS if key not in absent]
    # Where there is no eva, the first split stands for it.
    right = [int(row[5]) for row in rows if row[:3] == ("clean", "ceo", "eva2")]
    assert tables["drop"].rows[0][4] == sum(right)


def test_a_model_without_sets_has_its_accuracy(tmp_path: Path) -> None:
    rows = [("clean", "ceo", "eva", f"ceo.{i}", "Tim", i % 2, -1.0) for i in range(4)]
    (tmp_path / "conditions.csv").write_bytes(conditions_bytes([Condition("clean", "clean")]))
    (tmp_path / "effects.csv").write_bytes(csv_bytes(EFFECTS, rows))
    tables = run_all(read_grids(tmp_path), {}, prompts_of(rows), N_NEURONS)
    assert list(tables) == ["accuracy"]
    [row] = tables["accuracy"].rows
    assert row[:4] == ["eva", "ceo", 4, 0.5]
    assert all(math.isnan(float(cell)) for cell in row[6:])


def sentence_rows() -> list[SentenceRow]:
    """Three sentences of a of 2 tokens, two of b without b's set; perplexities are whole."""
    found = []
    for condition, relation, values in [
        ("clean", "a", (2, 4, 60)),
        ("a", "a", (3, 10, 41)),
        ("random.0", "a", (2, 2, 2)),
        ("random.1", "a", (4, 4, 7)),
        ("b", "a", (90, 90, 90)),
        ("clean", "b", (10, 20)),
        ("b", "b", (10,)),
    ]:
        for i, value in enumerate(values):
            loss = 2 * math.log(value)
            found.append(SentenceRow(condition, relation, f"{relation}.{i}", 2, loss))
    return found


def test_perplexity_by_hand() -> None:
    table = perplexity(sentence_rows(), {"random.0", "random.1"})
    a, b = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (a["n_sentences"], b["n_sentences"]) == (3, 2)
    assert [a[n] for n in ("before", "own", "random", "ratio")] == pytest.approx(
        [22, 18, 3.5, 9 / 11]
    )
    # The ratios of single sentences are 3/2, 5/2 and 41/60: no resample leaves their range.
    assert 41 / 60 - 1e-9 < a["ratio_low"] < 9 / 11 < a["ratio_high"] < 5 / 2 + 1e-9
    steps = [math.log(after / before) for before, after in ((2, 3), (4, 10), (60, 41))]
    assert a["p_value"] == a["q_value"] == wilcoxon(steps).pvalue
    assert b["before"] == pytest.approx(15)
    for name in ("own", "random", "ratio", "ratio_low", "p_value", "q_value"):
        assert math.isnan(b[name]), name


def test_a_relation_may_be_named_like_a_random_set(study: Study) -> None:
    rows = [
        row._replace(condition="random.walk") if row.condition == "ceo" else row
        for row in sentences()
    ]
    rows = [row._replace(relation="random.walk") if row.relation == "ceo" else row for row in rows]
    grids = study.grids
    tables = run_all(grids, study.sets, prompts_of(study.rows), N_NEURONS, sentences=rows)
    row = dict(zip(tables["perplexity"].columns, tables["perplexity"].rows[0], strict=True))
    assert row["relation"] == "random.walk"
    drawn = [r for r in rows if r.relation == "random.walk" and r.condition[-1].isdigit()]
    assert len(drawn) == 12
    assert row["random"] == pytest.approx(sum(math.exp(r.nll / r.n_tokens) for r in drawn) / 12)
    assert not math.isnan(row["own"])


def test_perplexity_is_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "perplexity.csv"
    rows = sentence_rows()
    path.write_bytes(csv_bytes(SentenceRow._fields, rows))
    assert read_perplexity(path) == rows
    for wrong in (
        SentenceRow("clean", "a", "a.9", 0, 1.0),
        SentenceRow("clean", "a", "a.9", 2, math.nan),
        SentenceRow("a", "a", "a.9", 2, 1.0),
    ):
        path.write_bytes(csv_bytes(SentenceRow._fields, [*rows, wrong]))
        with pytest.raises(RelneuronError, match="perplexity.csv"):
            read_perplexity(path)
