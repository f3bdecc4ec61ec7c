"""The numbers of the report against tables worked out by hand.

The study is that of kit/studies.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from relneuron.analyses.chosen import site_counts
from relneuron.analyses.drops import drop_matrix, headline, random_sets
from relneuron.analyses.outcomes import filled_sets, outcomes, relations
from relneuron.analyses.page import answer
from relneuron.analyses.study import examples, read_study
from relneuron.artifact.effects import NOT_ASKED, Grid
from relneuron.report.page import Answer
from tests.kit.studies import NAN, RELATIONS, SETS, condition_of, write_study


def test_drop_matrix_of_the_method_s_vector(tmp_path: Path) -> None:
    # Accuracies before of 0.8, 0.5 and 0.25.
    right = {
        "clean": {"a": 80, "b": 50, "c": 25},
        "a": {"a": 40, "b": 50, "c": 0},
        "b": {"a": 80, "b": 10, "c": 25},
        "c": {"a": 82, "b": 55, "c": 50},
    }
    names = ("a", "b", "c")
    sets = {name: SETS["company_ceo"] for name in names}
    write_study(tmp_path, relations=names, right=right, sets=sets, n_prompts=100)
    grid = read_study(tmp_path).main
    expected = [[0.5, 0.0, -0.025], [0.0, 0.8, -0.1], [1.0, 0.0, -1.0]]
    np.testing.assert_allclose(drop_matrix(grid, names, names), expected, atol=1e-15)
    numbers = headline(grid)
    assert numbers.own.mean == pytest.approx(0.1)
    assert numbers.other.mean == pytest.approx(0.875 / 6)
    assert np.isnan(numbers.random).all()


def test_drop_matrix_is_nan_where_nothing_was_right_before() -> None:
    conditions = {name: condition_of(name) for name in ("clean", "x", "y")}
    answers = {"clean": [0, 0, 1, 0], "x": [0, 0, 1, 0], "y": [1, 0, NOT_ASKED, NOT_ASKED]}
    correct = {name: np.array(right, np.int8) for name, right in answers.items()}
    grid = Grid("eva", ["1", "2", "3", "4"], np.array([*"aabb"]), conditions, correct)
    drop = drop_matrix(grid, ["a", "b", "c"], ["x", "y", "z"])
    np.testing.assert_array_equal(drop, [[NAN, NAN, NAN], [0.0, NAN, NAN], [NAN, NAN, NAN]])


def test_headline_by_hand(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path))
    grid = study.main
    assert relations(grid) == [*filled_sets(grid)] == list(RELATIONS)
    before = [outcomes(grid, name, "clean").before for name in RELATIONS]
    random = [[outcomes(grid, name, off).after for off in random_sets(grid)] for name in RELATIONS]
    np.testing.assert_array_equal(before, [1.0, 0.5, 0.0])
    np.testing.assert_array_equal(random, [[1.0, 0.75], [0.25, 0.5], [0.0, 0.0]])
    expected = [[0.75, 0.25, 0.0], [0.0, 0.5, -0.5], [NAN, NAN, NAN]]
    np.testing.assert_array_equal(drop_matrix(grid, RELATIONS, RELATIONS), expected)
    numbers = headline(grid)
    assert numbers.own == pytest.approx((0.625, 0.5, 0.75))
    assert numbers.other == pytest.approx((-0.0625, -0.5, 0.25))
    # Drops of the seeds: (0, 0.5) and (0.25, 0); the range is over their means.
    assert numbers.random == pytest.approx((0.1875, 0.125, 0.25))
    assert answer(numbers, [3, 3, 3], study.n_neurons) == (
        "When the 3 neurons chosen for a relation (7.5\xa0% of the model's 40 MLP neurons) are "
        "off, accuracy on that relation falls by 62.5\xa0% on average; on the other relations "
        "it rises by 6.2\xa0%; with as many random neurons off instead it falls by 18.8\xa0%."
    )
    assert "; with 9 random neurons off instead it" in answer(numbers, [1, 3, 9], study.n_neurons)


def test_random_seeds_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    right = {f"random.{seed}": {"company_ceo": seed % 5} for seed in (10, 9, 2)}
    right["clean"] = {"company_ceo": 4}
    write_study(tmp_path, relations=("company_ceo",), right=right)
    grid = read_study(tmp_path).main
    assert random_sets(grid) == ["random.2", "random.9", "random.10"]
    drop = drop_matrix(grid, ["company_ceo"], random_sets(grid))
    np.testing.assert_array_equal(drop, [[0.5, 0.0, 1.0]])


def test_splits_share_their_rows_and_eva_comes_first(tmp_path: Path) -> None:
    study = write_study(tmp_path, splits=("eva.de", "eva2", "eva"))
    for path in (study / "accuracy.csv", study / "effects.csv"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if "company_hq,eva.de" not in line]
        path.write_text("".join(kept), encoding="utf-8")
    grids = read_study(study).grids
    assert [*grids] == ["eva", "eva2", "eva.de"]
    before = [outcomes(grids["eva.de"], name, "clean").before for name in RELATIONS]
    np.testing.assert_array_equal(before, [1.0, NAN, 0.0])
    assert headline(grids["eva.de"]).own.mean == 0.75


def test_sites_count_each_neuron_once(tmp_path: Path) -> None:
    twice = [*SETS["company_ceo"], [0, "gate", 1, 0.1]]
    sets = {**SETS, "company_ceo": twice, "star_constellation": []}
    chosen = read_study(write_study(tmp_path, sets=sets)).sets.values()
    assert site_counts(chosen, 2)[0].tolist() == [[1, 0], [0, 1], [0, 1]]
    assert site_counts(chosen, 2)[2].sum() == 0


def test_examples_show_a_broken_and_a_surviving_prompt(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path))
    shown = examples(study)
    broken, survivor = shown["company_ceo"]
    assert broken.prompt.id == "company_ceo.eva.1"
    assert (broken.before, broken.after) == (Answer("Tim", True), Answer("The", False))
    assert survivor.prompt.id == "company_hq.eva.0"
    # Nothing was right before: the first prompt stands for the relation.
    ids = [example.prompt.id for example in shown["star_constellation"]]
    assert ids == ["star_constellation.eva.0", "company_ceo.eva.0"]
