"""Studies of very many sets, relations or groups: short ways give what the long ways give."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relneuron import analyses
from relneuron.analyses import MOST_SETS, compared
from relneuron.analyses.answers import kind_of_error
from relneuron.analyses.outcomes import effects, outcomes
from relneuron.analyses.page import build
from relneuron.analyses.sections import MOST_COLUMNS, costliest
from relneuron.analyses.study import MOST_EXAMPLES, examples, read_study
from relneuron.analyses.uncertainty import signed_rank_ps, signed_rank_rows
from relneuron.artifact.effects import Condition, Grid, read_effects
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import Neuron
from relneuron.artifact.prompts import Prompt
from relneuron.methods.counts.rises import NLL, WINDOWS, read_nll, read_windows
from relneuron.report import kit
from relneuron.report.figures import layers_plot
from relneuron.report.page import render
from relneuron.report.tables import MOST_LISTED, Share, Table, listed
from tests.analyses.test_analyses import GRID, SETS
from tests.kit.studies import RELATIONS, RIGHT, write_study
from tests.kit.studies import SETS as STUDY_SETS


def drawn_grid(seed: int) -> Grid:
    """Prompts of five relations in any order, under sets that were asked some of them."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    relation = np.array([f"r{i}" for i in rng.integers(0, 5, n)])
    names = ["clean", *(f"x{i}" for i in range(6))]
    kinds = {name: Condition(name, "set", name, n_neurons=1) for name in names[1:]}
    grid = Grid("eva", [str(i) for i in range(n)], relation, {"clean": Condition("clean", "clean")})
    grid.conditions |= kinds
    for name in names:
        grid.correct[name] = rng.integers(0 if name == "clean" else -1, 2, n).astype(np.int8)
    return grid


def test_effects_of_all_relations_are_those_of_each() -> None:
    for seed in range(30):
        grid = drawn_grid(seed)
        names = [*grid.conditions, None]
        found = effects(grid, names)
        for i, relation in enumerate(grid.relations):
            rows = np.flatnonzero(grid.relation == relation)
            assert np.array_equal(grid.rows(relation), rows)
            for j, name in enumerate(names):
                one = outcomes(grid, relation, name)
                both = np.array([found.after[i, j], found.drop[i, j]])
                assert np.array_equal(both, [one.after, one.drop], equal_nan=True)
        assert not grid.rows("nobody").size


def test_the_sets_that_are_compared_have_the_rows_of_all() -> None:
    """Of three sets two: p and q are those of the tests that are left."""
    whole, some = analyses.overlap(SETS, 20), analyses.overlap(SETS, 20, {"a", "b"})
    assert [repr(row[:6]) for row in some.rows] == [
        repr(row[:6]) for row in whole.rows if row[0] in ("a", "b")
    ]
    q = {(row[0], row[1]): row[6] for row in some.rows}
    p = {(row[0], row[1]): row[5] for row in some.rows}
    assert q["a", "b"] == q["b", "a"] == pytest.approx(3 * float(p["a", "b"]))
    assert np.isfinite([float(q["a", "c"]), float(q["b", "c"])]).all()
    many: dict[str, list[Neuron]] = {f"s{i}": [(0, "gate", 1)] for i in range(MOST_SETS)}
    assert compared(many, GRID) is None
    assert compared(many | {"a": []}, GRID) == {"a", "b", "c"}


def test_of_many_sets_those_that_cost_most_are_drawn() -> None:
    draw = random.Random(0)
    rows = [
        [relation, off, int(relation == off), drop]
        for relation in ("r0", "r1")
        for off in ("r0", "r1", *(f"x{i}" for i in range(MOST_COLUMNS)))
        for drop in [Share(0.0 if relation == off else draw.random() - 0.5)]
    ]
    table = Table("Drops", ["relation", "off", "own", "drop"], rows)
    kept = costliest(table)
    names = list(dict.fromkeys(kept.column("off")))
    assert len(names) == kit.MOST
    assert names[:2] == ["r0", "r1"]
    worst = {name: max(abs(float(row[3])) for row in rows if row[1] == name) for name in names[2:]}
    left = [abs(float(row[3])) for row in rows if row[1] not in names]
    assert min(worst.values()) >= max(left)
    assert [row for row in rows if row[1] in names] == kept.rows
    few = table._replace(rows=[row for row in rows if row[1] not in ("x0", "x1")])
    assert costliest(few) is few


def test_a_page_of_very_many_sets_shows_some_and_says_so(tmp_path: Path) -> None:
    sets = STUDY_SETS | {f"x{i}": [[0, "gate", 1, 0.5]] for i in range(MOST_EXAMPLES + 50)}
    right = RIGHT | {name: RIGHT["company_hq"] for name in sets if name not in RIGHT}
    study = write_study(tmp_path, sets=sets, right=right)
    shown = examples(read_study(study))
    assert [*shown][:3] == list(RELATIONS)
    assert len(shown) == MOST_EXAMPLES
    made = build(study, {})
    text = render(made)
    assert f"Single answers are shown of {MOST_EXAMPLES} of 253 sets." in text
    assert "Drawn: the sets of the relations that were asked and those that cost one" in text
    assert "Of 253 sets those of the 3 relations that were asked are compared" in text
    assert len(made.tables["overlap"].rows) == 3 * 253
    assert len(made.tables["drop"].rows) == 3 * 253
    assert len(text) < 1_000_000


def test_a_picture_of_very_many_sets_is_as_high_as_a_page() -> None:
    count = np.ones((300, 1, 2), np.int64)
    names = [f"s{i}" for i in range(300)]
    tall, low = (layers_plot(count[:n], names[:n], ["gate"]) for n in (100, 300))
    heights = [drawn.figure.axes[1].get_position().height for drawn in (tall, low)]
    assert heights == pytest.approx([24, kit.BROAD])
    assert ">s8<" in low.svg and ">s7<" not in low.svg and ">s7<" in tall.svg


def test_names_in_a_sentence_end() -> None:
    names = [str(i) for i in range(MOST_LISTED + 2)]
    assert listed(names[:3]) == "0, 1, 2"
    assert listed(names[:-2]) == ", ".join(names[:-2])
    assert listed(names).endswith(f", {MOST_LISTED - 1} and 2 more")


def effects_csv(path: Path, *rows: str) -> Path:
    head = "condition,relation,split,id,prediction,correct,logprob"
    path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return path


CLEAN = ["clean,r,eva,1,a,1,-1", "clean,r,eva,2,a,0,-1", "clean,q,eva,3,b,1,-2"]
OFF = ["r,r,eva,1,b,0,-3", "r,q,eva,3,b,1,-4"]


def test_answers_may_stand_in_any_order(tmp_path: Path) -> None:
    known = {"clean": Condition("clean", "clean"), "r": Condition("r", "set", "r", n_neurons=1)}
    wanted = read_effects(effects_csv(tmp_path / "a.csv", *CLEAN, *OFF), known)["eva"]
    assert wanted.correct["r"].tolist() == [0, -1, 1]
    for rows in ([*OFF, *CLEAN], [CLEAN[0], OFF[0], CLEAN[1], CLEAN[2], OFF[1]]):
        found = read_effects(effects_csv(tmp_path / "b.csv", *rows), known)["eva"]
        assert found.ids == wanted.ids
        for name in known:
            assert found.correct[name].tolist() == wanted.correct[name].tolist()
            assert found.prediction[name] == wanted.prediction[name]
            assert np.array_equal(found.logprob[name], wanted.logprob[name], equal_nan=True)
    assert read_effects(effects_csv(tmp_path / "c.csv"), known) == {}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([*CLEAN, *OFF, CLEAN[1]], "holds 2 twice"),
        ([*CLEAN, OFF[0], OFF[0]], "holds 1 twice"),
        ([*CLEAN, "r,q,eva,4,b,1,-4"], "it asks what clean does not"),
        ([*CLEAN, "s,q,eva,3,b,1,-4"], "conditions.csv does not know s"),
    ],
)
def test_answers_that_do_not_belong_together_are_refused(
    rows: list[str], says: str, tmp_path: Path
) -> None:
    known = {"clean": Condition("clean", "clean"), "r": Condition("r", "set", "r", n_neurons=1)}
    with pytest.raises(RelneuronError, match=says):
        read_effects(effects_csv(tmp_path / "a.csv", *rows), known)


def test_rows_are_tested_as_samples_are() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 5, 20):
        rows = rng.standard_normal((9, n))
        rows[1] = np.round(rows[1])
        rows[2], rows[3, 0], rows[4, 0] = 0, 0, np.nan
        found = signed_rank_rows(rows)
        assert np.array_equal(found, signed_rank_ps(list(rows)), equal_nan=True)
        assert np.isnan(found[4]) and found[2] == 1


def test_a_window_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nll_windows.csv"
    rows = ["mask,group,window,n_tokens,nll", "clean,a,0,8,1.0", "clean,b,0,8,1.0", "m,a,1,8,2.0"]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    masks, groups = {"m": 0, "clean": 1}, {"a": 0}
    found = read_windows(path, masks, groups)
    assert (masks, groups) == ({"m": 0, "clean": 1}, {"a": 0})
    # Cells by mask and group: m, a; clean, a; clean, b.
    assert found.n_groups == 2 and found.cells.tolist() == [0, 2, 3]
    assert found.places(np.array([1, 1, 0, 0, -1]), np.array([0, 1, 1, 0, 1])).tolist() == [
        *(1, 2, -1, 0, -1)
    ]
    assert found.names.tolist() == [1, 0, 0] and found.nll.tolist() == [2.0, 1.0, 1.0]
    path.write_text("\n".join([*rows, "clean,a,0,8,1.0"]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="twice"):
        read_windows(path, masks, groups)


def test_cells_of_many_groups_are_numbers_and_no_objects(tmp_path: Path) -> None:
    names = [f"language {i}" for i in range(120)]
    cells = [(m, g) for m in ["clean", *names] for g in names]
    nll = {cell: i % 7 / 4 for i, cell in enumerate(cells)}
    path, windows = tmp_path / "nll.csv", tmp_path / "nll_windows.csv"
    found = [f"{m},{g},2,16,{1.5 * x},0.5,1" for (m, g), x in nll.items()]
    path.write_text("\n".join([",".join(NLL), *found]) + "\n", encoding="utf-8")
    lines = [f"{m},{g},{i},8,{x * (1 + i)}" for (m, g), x in nll.items() for i in range(2)]
    windows.write_text("\n".join([",".join(WINDOWS), *lines]) + "\n", encoding="utf-8")
    del found, lines
    signed_rank_rows(np.array([[1.0, 2.0]]))  # what it imports is no cell's
    tracemalloc.start()
    try:
        read = read_nll(path, windows)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read.rise.tolist()[:120] == pytest.approx([np.nan] * 120, nan_ok=True)
    rises = [1.5 * (x - nll["clean", g]) for (_, g), x in nll.items()][120:]
    assert read.rise.tolist()[120:] == pytest.approx(rises)
    # 11 columns of 8 bytes, and the names once; a cell as an object takes about 500.
    assert kept < 120 * len(cells)


class Looked(Sequence[str]):
    """Texts that count how often one of them is looked at."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.n = texts, 0

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, place: Any) -> Any:
        self.n += 1
        return self.texts[place]


def test_a_lost_answer_is_looked_up_among_all_objects() -> None:
    # Each was held to each object: a report of twice the facts took four times as long.
    rng = random.Random(0)
    names = sorted({"".join(rng.choices("abcü", k=rng.randrange(2, 9))) for _ in range(5000)})
    prompt = Prompt("r.0", "r", "eva", "en", "{}", "s", "o", "s is")
    own, found = names[::7], set()
    for _ in range(300):
        text = "".join(rng.choices("abcü", k=rng.randrange(2, 9)))
        is_own, is_any = (any(o.startswith(text) for o in some) for some in (own, names))
        objects, all_objects = Looked(own), Looked(names)
        kind = kind_of_error(text, prompt, objects, all_objects)
        assert kind == ("same_relation" if is_own else "other_relation" if is_any else "other")
        assert objects.n + all_objects.n <= 4 + len(own).bit_length() + len(names).bit_length()
        found.add(kind)
    assert len(found) == 3
