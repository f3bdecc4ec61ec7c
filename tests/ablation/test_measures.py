"""Measures of answers: values counted by hand, and what a function of the user's may do wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from relneuron.ablation.measures import (
    anls,
    exact_match,
    find_measure,
    levenshtein,
    option_letter,
    summarise,
)
from relneuron.artifact.files import RelneuronError


def test_exact_match() -> None:
    assert exact_match(" Two \n", ["three", "two"]) == 1
    assert exact_match("two.", ["two"]) == 0
    assert exact_match("two boats", ["two"]) == 0
    assert exact_match("two", []) == 0


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("", "abc", 3),
        ("abc", "", 3),
        ("", "", 0),
        ("same", "same", 0),
        ("intention", "execution", 5),
        ("ab", "ba", 2),
    ],
)
def test_levenshtein(a: str, b: str, distance: int) -> None:
    assert levenshtein(a, b) == distance


def test_levenshtein_is_the_least_of_all_edits() -> None:
    """Against the recursion that defines it, on all pairs of texts of up to four letters."""
    texts = [""]
    for _ in range(4):
        texts += [t + c for t in texts if len(t) == max(map(len, texts)) for c in "ab"]

    def distance(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        if a[-1] == b[-1]:
            return distance(a[:-1], b[:-1])
        return 1 + min(distance(a[:-1], b), distance(a, b[:-1]), distance(a[:-1], b[:-1]))

    for a in texts:
        for b in texts:
            assert levenshtein(a, b) == distance(a, b)


def test_anls() -> None:
    # One of seven characters is another: NL = 1/7.
    assert anls("Receipt", ["receipd"]) == pytest.approx(6 / 7)
    # Three of seven, below one half: 4/7. At just one half nothing counts.
    assert anls("kitten", ["sitting"]) == pytest.approx(4 / 7)
    assert anls("abcd", ["abxy"]) == 0
    assert anls("abcd", ["abxy"], threshold=1.0) == 0.5
    assert anls("abcd", ["wxyz"], threshold=1.0) == 0
    # The best of several answers; spaces and capitals do not matter.
    assert anls("  New   York ", ["los angeles", "new york"]) == 1
    assert anls("", [""]) == 1
    assert anls("", ["a"]) == 0
    assert anls("a", []) == 0


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("b.", "B"),
        ("B: a tumour", "B"),
        ("The answer is B.", "B"),
        ("The answer is A", "A"),
        ("A is right, B is not", "A"),
        ("A CT scan shows that C is right", "C"),
        ("**D** because", "D"),
        ("Because", ""),
        ("CT", ""),
        ("I see F", ""),
        ("a dog", ""),
        ("", ""),
    ],
)
def test_option_letter(said: str, letter: str) -> None:
    for wanted in "ABCDE":
        assert option_letter(said, [wanted]) == (wanted == letter)
    assert option_letter(said, []) == 0
    assert option_letter(said, ["Z", f"{letter}: x"]) == bool(letter)


def test_a_function_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_measure.py").write_text(
        "def shared(prediction, answers):\n"
        "    return sum(prediction in answer for answer in answers) / len(answers)\n"
        "def nothing(prediction, answers):\n    return float('nan')\n"
        "def text(prediction, answers):\n    return 'good'\n"
        "constant = 3\n"
    )
    (tmp_path / "broken_measure.py").write_text("import nowhere_at_all\n")
    monkeypatch.chdir(tmp_path)
    assert find_measure("own_measure:shared")("a", ["ab", "c"]) == 0.5
    with pytest.raises(RelneuronError, match="gives nan"):
        find_measure("own_measure:nothing")("a", ["a"])
    with pytest.raises(RelneuronError, match="ValueError"):
        find_measure("own_measure:text")("a", ["a"])
    with pytest.raises(RelneuronError, match="ZeroDivisionError"):
        find_measure("own_measure:shared")("a", [])
    for wrong, said in {
        "own_measure:constant": "no function constant",
        "own_measure:absent": "no function absent",
        "no_such_module:f": "cannot be imported",
        "broken_measure:f": "nowhere_at_all",
        "rouge": "unknown --measure",
        ":f": "unknown --measure",
    }.items():
        with pytest.raises(RelneuronError, match=said):
            find_measure(wrong)
    assert find_measure("anls", 1.0)("abcd", ["abxy"]) == 0.5
    assert find_measure("exact")("x", ["X"]) == 1


def test_the_summary_of_several_seeds() -> None:
    scores = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    found = summarise(scores)
    assert (found.n_prompts, found.n_seeds) == (4, 2)
    assert found.mean == 5 / 8
    # The means of the seeds are 3/4 and 1/2.
    assert found.sd_seeds == pytest.approx(np.sqrt(2) / 8)
    assert 0 <= found.low < 5 / 8 < found.high <= 1
    assert found == summarise(scores)
    assert summarise(scores[:, :1]).sd_seeds is None
    certain = summarise(np.ones((30, 1)))
    assert certain.low == certain.high == 1
    # Of many questions the interval is that of the normal distribution.
    many = np.random.default_rng(3).random((4000, 1))
    half = 1.96 * many.std() / np.sqrt(4000)
    found = summarise(many)
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
