"""How right a generated answer is: exact match, ANLS, an option's letter, or a user's own function.

`generate` scores its outputs with one of them. A measure is a function of a prediction and all of
its accepted answers; it gives a number, 1 for right and 0 for wrong, or something between.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.stage import load_own

Measure = Callable[[str, Sequence[str]], float]

NAMES = ("exact", "anls", "letter")
ANLS_THRESHOLD = 0.5  # arXiv 1905.13648, section 5.1
LETTERS = "ABCDE"
N_RESAMPLES = 2000
INSIDE = (0.025, 0.975)  # the ends of a 95 % interval


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, both in lower case and without space around them.

    As MMNeuron counts right answers to remote-sensing and common questions (arXiv 2406.11193).
    """
    given = prediction.strip().lower()
    return float(any(given == answer.strip().lower() for answer in answers))


def levenshtein(a: str, b: str) -> int:
    """The least number of characters to insert, delete or replace that makes b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(before + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def anls(prediction: str, answers: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Average normalised Levenshtein similarity (arXiv 1905.13648, equation 1), of one question.

    max over the answers a of s(a) = 1 - NL if NL < threshold, else 0, where NL is the Levenshtein
    distance of prediction and answer divided by the length of the longer one. Both are in lower
    case, without space around them and with single spaces inside. The mean over questions is the
    ANLS. MMNeuron (arXiv 2406.11193) scores documents with the threshold 1: whatever is alike
    counts.
    """
    given = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        wanted = " ".join(answer.lower().split())
        longest = max(len(given), len(wanted))
        distance = levenshtein(given, wanted) / longest if longest else 0.0
        best = max(best, 1 - distance if distance < threshold else 0.0)
    return best


# A capital letter alone, also in brackets or bold. Of "A" the article is no option: it is one only
# at the end, before a mark, or before "is".
_OPTION = re.compile(
    rf"(?<![A-Za-z0-9'])(?:[B-{LETTERS[-1]}](?![A-Za-z0-9'])|A(?=\s*$|\s+is\b|[).:,;\]*\n]))"
)


def option_letter(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first option that the prediction names, a letter from A to E, is an answer's.

    An option is a capital letter that stands alone, as in "B", "(B)", "B: a tumour" or "The answer
    is B."; a text of one small letter is one, too. An answer is a letter, or begins with one
    ("B: a tumour"). MMNeuron's code (arXiv 2406.11193) adds one for every character of the output
    that is the right letter, so that one output can count several times.
    """
    given = _letter(prediction)
    return float(bool(given) and given in {_letter(answer) for answer in answers})


def _letter(text: str) -> str:
    stripped = text.strip().strip("().: ")
    if len(stripped) == 1 and stripped.upper() in LETTERS:
        return stripped.upper()
    found = _OPTION.search(text)
    return found[0] if found else ""


# --- which measure -------------------------------------------------------------------------------


def find_measure(name: str, threshold: float = ANLS_THRESHOLD) -> Measure:
    """The measure of a name in NAMES, or a function `module:function(prediction, answers)`.

    Raises RelneuronError for another name, and as `find_function` does.
    """
    known: dict[str, Measure] = {
        "exact": exact_match,
        "anls": partial(anls, threshold=threshold),
        "letter": option_letter,
    }
    if name in known:
        return known[name]
    if ":" not in name:
        raise RelneuronError(
            f"unknown --measure {name!r}",
            f"use {', '.join(NAMES)}, or a function of your own as module:function",
            2,
        )
    own = find_function(
        "--measure",
        name,
        "a prediction and a list of answers",
        lambda prediction, _: f"the answer {prediction[:60]!r}",
    )
    return lambda prediction, answers: own(prediction, list(answers))


def find_function(
    flag: str, name: str, takes: str, shown: Callable[..., str]
) -> Callable[..., float]:
    """The function `module:function` that an option names; what it gives is a finite number.

    `takes` says what the function is of, and `shown` what it was given, for errors. Raises
    RelneuronError as `load_own` does, and for a function that raises or gives no finite number.
    """
    found = load_own(flag, name, takes)
    return partial(_checked, f"{flag} {name}", found, shown)


def _checked(said: str, function: Callable[..., Any], shown: Callable[..., str], *of: Any) -> float:
    """What a user's function gives, if it is a number."""
    try:
        value = float(function(*of))
    except Exception as error:  # it is the user's
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RelneuronError(
            f"{said} failed on {shown(*of)}: {why}",
            "mend the function; the texts are kept, so that only scores are made again",
        ) from error
    if not math.isfinite(value):
        raise RelneuronError(
            f"{said} gives {value} for {shown(*of)}", "let the function give a finite number"
        )
    return value


# --- many answers --------------------------------------------------------------------------------


class Score(NamedTuple):
    """The mean score of the answers to some questions, asked with one seed or several."""

    n_prompts: int
    n_seeds: int
    mean: float
    sd_seeds: float | None  # of the means of the seeds, n - 1 in its denominator; None of one seed
    low: float  # of a 95 % interval of the mean
    high: float


def summarise(scores: NDArray[np.float64]) -> Score:
    """The Score of an array (questions, seeds).

    The interval is a bootstrap by percentiles (Efron and Tibshirani 1993, 13.3): questions are
    drawn with replacement, each with all of its seeds, so that it says how far the mean would be
    another one with other questions of the domain. The draw is the same in every run.
    """
    n, n_seeds = scores.shape
    of_seeds = scores.mean(0)
    own = scores.mean(1)
    low, high = np.quantile(resampled(own), INSIDE).tolist()
    spread = float(of_seeds.std(ddof=1)) if n_seeds > 1 else None
    return Score(n, n_seeds, float(scores.mean()), spread, low, high)


def resampled(own: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N_RESAMPLES, ...) means of an array (questions, ...) over questions drawn with replacement.

    What stands in one row is drawn together, and the draw is the same in every run.
    """
    rng, n = np.random.default_rng(0), len(own)
    return np.array([own[rng.integers(0, n, n)].mean(0) for _ in range(N_RESAMPLES)])
