"""The tables of the page on a contrast: layers, concentration, sets, effects, texts.

page.py calls `contrast_tables`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from relneuron.ablation.options import CLEAN, DONOR
from relneuron.artifact.contrast import DIFFERENCE, A, B
from relneuron.methods.contrast.study import ContrastStudy
from relneuron.report.tables import Cell, Share, Table, spread

SHARES = (0.0001, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
TOP = 100  # neurons that the table of neurons has
LAYERS = ("layer", "n_neurons", "rms", "relative_change", "largest", "of_squares", "n_chosen")
CONCENTRATION = ("of_neurons", "n_neurons", "of_squares", "least_change")
NEURONS = ("rank", "neuron", "change", "mean_a", "mean_b", "std_a", "std_b")
GROUPS = ("group", "n_tokens", "rms", "relative_change", "of_squares", "among_top")
EFFECTS = (
    *("set", "n_neurons", "of_neurons", "cost_clean", "cost_donor", "cost"),
    *("effect", "effect_low", "effect_high", "random", "random_low", "random_high", "n_random"),
)
TEXTS = ("mask", "n_neurons", "n_texts", "as_clean", "as_donor")
EXAMPLES = ("prompt", "clean", "donor", "patched", "random")

Array = np.ndarray[Any, Any]


def contrast_tables(study: ContrastStudy) -> dict[str, Table]:
    tables = {
        "layers": layers(study),
        "concentration": concentration(study),
        "neurons": neurons(study),
    }
    if len(study.contrast.groups) > 1:
        tables["groups"] = groups(study)
    if any(mask in study.sets for mask in study.effects):
        tables["effects"] = effects(study)
    if CLEAN in study.outputs and any(mask != CLEAN for mask in study.outputs):
        tables["texts"] = texts(study)
        tables["examples"] = examples(study)
    return tables


def ratio(part: float, whole: float) -> Share:
    return Share(part / whole) if whole else Share("nan")


def gini(values: Array) -> float:
    """Gini coefficient of values (N,) from 0 up: 0 of equal ones, 1 - 1/N of one that has all.

    2 sum_i i x_(i) / (N sum x) - (N + 1) / N, x_(1) <= ... <= x_(N); NaN if all are 0.
    """
    ordered, n = np.sort(values.astype(np.float64)), values.size
    total = ordered.sum()
    if not total:
        return float("nan")
    return float(2 * (np.arange(1, n + 1) @ ordered) / (n * total) - (n + 1) / n)


def layers(study: ContrastStudy) -> Table:
    """One row a layer: its change, as a part of what A's neurons are, and of the whole change."""
    width = study.score.shape[1]
    relative = _relative(study, axis=1)
    chosen = study.sets[study.largest] if study.largest is not None else np.empty(0, np.int64)
    squares = study.squares.reshape(study.score.shape)
    total = float(squares.sum())
    cells: list[list[Cell]] = []
    for layer, score in enumerate(study.score):
        here = score[np.isfinite(score)]
        own = float(squares[layer].sum())
        cells.append(
            [
                *(layer, here.size, float(np.sqrt(own / here.size)) if here.size else np.nan),
                *(Share(relative[layer]), float(here.max(initial=0)), ratio(own, total)),
                int((chosen // width == layer).sum()),
            ]
        )
    return Table("Change by layer", LAYERS, cells)


def _relative(study: ContrastStudy, axis: int | None = None) -> Array:
    """sqrt(sum (a - b)^2 / sum a^2) over the tokens and neurons of each layer, or of all."""
    sums = [study.contrast.arrays[f"sum_sq.{site}"].sum(0).sum(axis) for site in (DIFFERENCE, A)]
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.sqrt(sums[0] / sums[1])
    return np.where(np.isfinite(found), found, np.nan)


def curve(study: ContrastStudy) -> Array:
    """(N,) float64: of the whole squared change the share of the 1, 2, ..., N that change most."""
    ordered = np.sort(study.squares[study.there])[::-1]
    total = ordered.sum()
    return np.cumsum(ordered) / total if total else np.full(ordered.size, np.nan)


def concentration(study: ContrastStudy) -> Table:
    """One row a share of the neurons: which part of the squared change they have."""
    share, n = curve(study), study.there.size
    ordered = np.sort(study.score.reshape(-1)[study.there])[::-1]
    cells: list[list[Cell]] = []
    for part in SHARES:
        k = round(part * n)
        if k:
            cells.append([Share(k / n), k, Share(share[k - 1]), float(ordered[k - 1])])
    return Table("Share of the squared change", CONCENTRATION, cells)


def neurons(study: ContrastStudy) -> Table:
    """The neurons that change most, with both models' means and deviations."""
    score = study.score.reshape(-1)
    best = study.there[np.argsort(-score[study.there].astype(np.float32), kind="stable")][:TOP]
    moments = [
        getattr(study.contrast, kind)(site).reshape(-1)[best]
        for kind in ("mean", "std")
        for site in (A, B)
    ]
    cells: list[list[Cell]] = [
        [rank + 1, study.label(place), float(score[place]), *(float(own[rank]) for own in moments)]
        for rank, place in enumerate(best.tolist())
    ]
    return Table("Neurons that change most", NEURONS, cells)


def groups(study: ContrastStudy) -> Table:
    """One row a group: its change, and how much of it the neurons have that change most overall.

    among_top  of as many neurons as the largest set, or 5 %, the share that is in both rankings
    """
    n = study.there.size
    k = len(study.sets[study.largest]) if study.largest is not None else max(1, round(0.05 * n))
    overall = _best(study.squares, study.there, k)
    cells: list[list[Cell]] = []
    for name, tokens in zip(study.contrast.groups, study.contrast.tokens.tolist(), strict=True):
        own = study.contrast.take([name])
        squares = np.nan_to_num(own.rms().reshape(-1)) ** 2
        sums = [float(own.arrays[f"sum_sq.{site}"].sum()) for site in (DIFFERENCE, A)]
        total = float(squares[study.there].sum())
        both = np.intersect1d(overall, _best(squares, study.there, k)).size
        cells.append(
            [
                *(name, tokens, float(np.sqrt(total / n))),
                Share(np.sqrt(sums[0] / sums[1])) if sums[1] else Share("nan"),
                *(ratio(float(squares[overall].sum()), total), Share(both / k)),
            ]
        )
    return Table("Change by group", GROUPS, cells)


def _best(squares: Array, there: Array, k: int) -> Array:
    return there[np.argsort(-squares[there], kind="stable")[:k]]


def effects(study: ContrastStudy) -> Table:
    """One row a set: what its neurons with B's values do to the cost, and what random ones do.

    `random` is the mean effect of the masks of random neurons beside the set, and its least and
    greatest.
    """
    cells: list[list[Cell]] = []
    for name in sorted(study.sets, key=lambda name: len(study.sets[name])):
        if name not in study.effects:
            continue
        row = study.effects[name]
        drawn = study.controls(name, [*study.effects])
        controls = spread(np.array([study.effects[mask].real("effect") for mask in drawn]))
        n = len(study.sets[name])
        cells.append(
            [
                *(name, n, Share(n / study.there.size)),
                # No change of a cost that falls is written as -0.
                *(row.finite(key) + 0.0 for key in ("cost_clean", "cost_donor", "cost")),
                *(row.real(key) + 0.0 for key in ("effect", "low", "high")),
                *(*(value + 0.0 for value in controls), len(drawn)),
            ]
        )
    return Table("Causal effect of patching", EFFECTS, cells)


def texts(study: ContrastStudy) -> Table:
    """One row a mask: how many of its texts are those of A itself, and how many those of B."""
    clean, donor = study.outputs[CLEAN], study.outputs.get(DONOR, {})
    cells: list[list[Cell]] = []
    for mask, own in study.outputs.items():
        n = len(study.sets[mask]) if mask in study.sets else float("nan")
        cells.append([mask, n, len(own), *(_equal(own, other) for other in (clean, donor))])
    return Table("Texts under each mask", TEXTS, cells)


def _equal(own: Any, other: Any) -> Share:
    both = [key for key in own if key in other]
    return ratio(sum(own[key].output == other[key].output for key in both), len(both))


def shown_mask(study: ContrastStudy) -> str | None:
    """The patched set whose texts are shown: the smallest of those that say most what B says."""
    masks = [mask for mask in study.sets if mask in study.outputs]
    donor = study.outputs.get(DONOR, {})

    def order(mask: str) -> tuple[float, int]:
        share = float(_equal(study.outputs[mask], donor))
        return (-np.nan_to_num(share), len(study.sets[mask]))

    return min(masks, key=order, default=None)


def examples(study: ContrastStudy) -> Table:
    """The texts of A, of B, and of A with B's values; prompts where these make a change first."""
    mask = shown_mask(study)
    masks = list(study.outputs)
    random = next(iter(study.controls(mask or "", masks)), None)
    clean = study.outputs[CLEAN]
    columns = [study.outputs.get(name or "", {}) for name in (CLEAN, DONOR, mask, random)]

    def is_same(key: tuple[str, int | None]) -> bool:
        return key not in columns[2] or columns[2][key].output == clean[key].output

    cells: list[list[Cell]] = [
        [clean[key].prompt, *(own[key].output if key in own else "" for own in columns)]
        for key in sorted(clean, key=is_same)
    ]
    return Table("Texts side by side", EXAMPLES, cells)
