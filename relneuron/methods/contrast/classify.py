"""The probe: a logistic regression on products of neurons, its file, and how well it tells.

`probe.py` fits and applies it. It is read and written without pickles.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.ablation.measures import INSIDE, resampled
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.reading import open_tensors

NAME = "probe.safetensors"
KEY = "relneuron.probe"
MADE_BY = "probe MODEL PROMPTS -o DIR --neurons NEURONS --labels FILE.csv:COLUMN"
PREDICTIONS = ("id", "label", "fold", "predicted", "probability")  # of probe_predictions.csv

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Probe:
    """p(label 1) = 1 / (1 + exp(-(intercept + sum of coefficient x product))); nothing is scaled.

    neurons (K, 2) int64 are (layer, index), zero-based; coefficients (K,) float64; `about` says
    which model, where it is read and what from.
    """

    neurons: Array
    coefficients: Floats
    intercept: float
    about: Json

    def probabilities(self, values: Array) -> Floats:
        """(N,) of label 1, from products (N, K)."""
        with np.errstate(over="ignore"):
            score = values.astype(np.float64) @ self.coefficients + self.intercept
            return np.asarray(1 / (1 + np.exp(-score)), np.float64)

    def to_bytes(self) -> bytes:
        from safetensors.numpy import save

        tensors = {
            "coefficients": self.coefficients,
            "intercept": np.array([self.intercept]),
            "neurons": np.ascontiguousarray(self.neurons, np.int64),
        }
        return bytes(save(tensors, {KEY: json.dumps(self.about, ensure_ascii=False)}))

    @classmethod
    def read(cls, path: Path) -> Probe:
        """The probe of a file; one that is damaged raises RelneuronError."""
        with open_tensors(path, MADE_BY, what="probe") as file:
            about = file.about(KEY)
            (k,) = file.shape("coefficients", (None,), "F64")
            found = cls(
                file.get("neurons", (k, 2), "I64"),
                file.get("coefficients", (k,), "F64"),
                float(file.get("intercept", (1,), "F64")[0]),
                about if isinstance(about, dict) else {},
            )
            numbers = np.append(found.coefficients, found.intercept)
            if not found.about or not k or not np.isfinite(numbers).all():
                raise file.wrong("it says nothing of itself, or has numbers that are not finite")
            return found


class Scored(NamedTuple):
    """One row of probe.csv: how many of some prompts a probe labels right.

    neurons    `top`, `random.<seed>`, or `random.*` for the mean of all random sets
    low, high  a 95 % interval of the accuracy (a bootstrap over prompts); None of `random.*`
    chance     what it is to say the more frequent label always
    sd_sets    of `random.*`, the standard deviation of its sets (n - 1); else None
    """

    neurons: str
    n_prompts: int
    n_positive: int
    n_neurons: int
    accuracy: float
    low: float | None
    high: float | None
    chance: float
    sd_sets: float | None = None


def score(name: str, probabilities: Floats, labels: Labels, n_neurons: int) -> Scored:
    """How well probabilities tell labels: the more probable label is said."""
    right = ((probabilities > 0.5) == (labels == 1)).astype(np.float64)
    low, high = np.quantile(resampled(right), INSIDE).tolist()
    share = float(labels.mean())
    numbers = (len(labels), int(labels.sum()), n_neurons)
    return Scored(name, *numbers, float(right.mean()), low, high, max(share, 1 - share))


def summed_up(rows: Sequence[Scored]) -> Scored:
    """The mean of random sets, and their spread."""
    found = [row.accuracy for row in rows]
    spread = float(np.std(found, ddof=1)) if found[1:] else None
    return rows[0]._replace(
        neurons="random.*", accuracy=float(np.mean(found)), low=None, high=None, sd_sets=spread
    )


def fit(values: Array, labels: Labels) -> tuple[Floats, float, bool]:
    """Coefficients (K,), intercept, and whether scikit-learn's default of steps was enough."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(values.astype(np.float64), labels)
    has_converged = int(model.n_iter_[0]) < model.max_iter
    return np.asarray(model.coef_[0], np.float64), float(model.intercept_[0]), has_converged


class Told(NamedTuple):
    """Of each prompt (N,) the probability of label 1 by a probe of the other folds, and its fold.

    n_short: how many of the fits did not converge.
    """

    probabilities: Floats
    folds: NDArray[np.int64]
    n_short: int


def cross_validated(values: Array, labels: Labels, folds: int, seed: int) -> Told:
    """Probes of products (N, K), each of all folds but one that it is measured on.

    Folds are stratified (scikit-learn's StratifiedKFold, shuffled by the seed).
    """
    from sklearn.model_selection import StratifiedKFold

    found, number, n_short = np.zeros(len(labels)), np.zeros(len(labels), np.int64), 0
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(values, labels)
    for fold, (inside, outside) in enumerate(parts):
        coefficients, intercept, has_converged = fit(values[inside], labels[inside])
        one = Probe(np.empty((0, 2), np.int64), coefficients, intercept, {})
        found[outside] = one.probabilities(values[outside])
        number[outside] = fold
        n_short += not has_converged
    return Told(found, number, n_short)


def check_labels(labels: Labels, folds: int) -> None:
    """Refuse labels of which a fold would have none of a kind."""
    least = min(int(labels.sum()), int((1 - labels).sum()))
    if least < folds:
        raise RelneuronError(
            f"of {len(labels)} prompts {int(labels.sum())} are labelled 1: each label needs as "
            f"many as there are folds, {folds}",
            "give more prompts, another --above, or fewer --folds",
        )
