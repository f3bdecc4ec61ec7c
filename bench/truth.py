"""How well are relation neurons found whose place is known: recall against planting strength.

    PYTHONPATH=. python -m bench.truth -o DIR [--strengths S ...] [--seeds N] [--longer N]

For each strength and seed one model of `bench.planted` goes through `record`, once for each
pooling, and through `identify`. All gates of all layers are ranked for each relation; its k best
are found, k being the number of planted ones. Beside average precision stand scores that a reader
might use instead, from the same responses. Writes truth.csv and truth.png; prints mean recalls.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.numpy import load_file

from bench.planted import (
    LAYER,
    LAYERS,
    RELATIONS,
    UNITS,
    WIDTH,
    make_model,
    make_tokenizer,
    planted_units,
    write_facts,
)
from relneuron.artifact.files import atomic_write, csv_bytes
from relneuron.artifact.prompts import read_prompts
from relneuron.methods.responses.options import RankOptions, RecordOptions
from relneuron.methods.responses.rank import identify
from relneuron.methods.responses.record import record
from relneuron.texts.options import PromptsOptions
from relneuron.texts.prompts import write_prompts

Array = NDArray[Any]

POOLINGS: dict[str, dict[str, Any]] = {
    "mean of all tokens": {"pooling": "mean", "exclude_bos": False},
    "mean without the first token": {"pooling": "mean", "exclude_bos": True},
    "last token": {"pooling": "last", "exclude_bos": False},
}
AP = {pooling: f"average precision of the {pooling}" for pooling in POOLINGS}
COHEN, LAPE, RANDOM = "Cohen's d of the last token", "LAPE of the last token", "random choice"
FILTER_RATE = 0.95  # as in arXiv 2402.16438
STRENGTHS = [i / 10 for i in range(11)]
CHANCE = UNITS / (LAYERS * WIDTH)
# A panel's title -> its methods, each with label and colour.
PANELS = {
    "average precision, by pooling": {
        AP["mean of all tokens"]: ("mean of all tokens", "#c2410c"),
        AP["mean without the first token"]: ("mean without the first", "#2563a8"),
        AP["last token"]: ("last token", "#15181c"),
    },
    "last token, by score": {
        AP["last token"]: ("average precision", "#15181c"),
        COHEN: ("Cohen's d", "#3f8f5b"),
        LAPE: ("LAPE", "#8a4fa3"),
    },
}
INK, MUTED, LINE = "#15181c", "#5b6470", "#d5dae0"


class Row(NamedTuple):
    """A line of truth.csv: recall and precision over all relations of one model."""

    method: str
    strength: float
    seed: int
    recall: float
    precision: float


def cohens_d(values: Array, relation: Array) -> Array:
    """Standardised differences of means (R, M) of the values (N, M) of prompts with a relation.

    (mean of r - mean of others) / sqrt((variance of r + variance of others) / 2)
    """
    pairs = [(values[relation == name], values[relation != name]) for name in RELATIONS]
    return np.stack(
        [(a.mean(0) - b.mean(0)) / np.sqrt((a.var(0) + b.var(0)) / 2) for a, b in pairs]
    )


def lape(p: Array, filter_rate: float = FILTER_RATE) -> Array:
    """Minus the entropy over relations (R, M) of p (R, M), how often a neuron is active for each.

    H = -sum_r q_r ln q_r with q = p / sum_r p (arXiv 2402.16438). A neuron is
    its likeliest relation's only and has -inf for the others; for all of them if none of its p
    reaches the `filter_rate` quantile of all p (in the paper: is above it; but with few prompts
    that quantile may be 1).
    """
    q = p / np.maximum(p.sum(0), np.finfo(float).tiny)
    minus_entropy = (q * np.log(np.where(q > 0, q, 1))).sum(0)
    threshold = np.sort(p, axis=None)[round(p.size * filter_rate) - 1]
    minus_entropy[~(p >= threshold).any(0)] = -np.inf
    scores = np.full(p.shape, -np.inf)
    scores[p.argmax(0), np.arange(p.shape[1])] = minus_entropy
    return scores


def judge(scores: Array) -> tuple[float, float]:
    """(recall, precision) of the UNITS best gates of each relation, of finite scores (R, M)."""
    n_right = n_found = 0
    for relation, row in enumerate(scores):
        best = np.argsort(-row, kind="stable")[:UNITS]
        found = set(best[np.isfinite(row[best])].tolist())
        n_right += len(found & {LAYER * WIDTH + unit for unit in planted_units(relation)})
        n_found += len(found)
    return n_right / (len(scores) * UNITS), n_right / n_found if n_found else float("nan")


def respond(
    model: Any, tokenizer: Any, prompts: Path, folder: Path, pooling: str
) -> tuple[Array, Array]:
    """Scores of average precision (R, M) and responses (N, M) of all gates, by the two stages."""
    # A weakly planted model does not know the answers. Every prompt counts as answered, so that
    # all strengths are ranked with the same ones.
    how = RecordOptions(**POOLINGS[pooling], validate=False)
    record("planted", model, tokenizer, prompts, folder, how, quiet=True)
    identify(
        folder,
        folder / "neurons.json",
        RankOptions(top=1, negatives=len(RELATIONS) - 1, permutations=0, bootstrap=0, noise=0),
        quiet=True,
    )
    scores = load_file(folder / "scores.safetensors")["ap.gate"]
    responses = load_file(folder / "responses.safetensors")
    gates = np.concatenate([responses[f"gate.{layer}"] for layer in range(LAYERS)], axis=1)
    return scores.reshape(len(RELATIONS), -1), gates.astype(np.float64)


def sweep(strengths: Sequence[float], seeds: Sequence[int], longer: int = 1) -> Iterator[Row]:
    """Every method's recall and precision for each strength and seed.

    `longer` is by how many words the templates of the relations differ.
    """
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_facts(folder / "facts", longer)
        path = folder / "prompts.jsonl"
        write_prompts(folder / "facts", path, PromptsOptions(eva=0, suffix=""))
        relation = np.array([prompt.relation for prompt in read_prompts(path)])
        for number, strength in enumerate(strengths):
            for seed in seeds:
                model = make_model(tokenizer, strength, seed)
                scores = {}
                for pooling in POOLINGS:
                    study = folder / f"{number}.{seed}.{pooling}"
                    scores[AP[pooling]], gates = respond(model, tokenizer, path, study, pooling)
                # What is left in `gates` is the last token's.
                p = np.stack([(gates[relation == name] > 0).mean(0) for name in RELATIONS])
                scores |= {COHEN: cohens_d(gates, relation), LAPE: lape(p)}
                draw = np.random.default_rng([seed, number])
                scores[RANDOM] = draw.random((len(RELATIONS), LAYERS * WIDTH))
                for method, found in scores.items():
                    yield Row(method, strength, seed, *judge(found))


def mean_recalls(rows: Sequence[Row]) -> list[str]:
    """A Markdown table: recall of each method and strength, mean over seeds."""
    curves = _curves(rows)
    strengths = sorted({row.strength for row in rows})
    lines = [f"| recall at strength | {' | '.join(f'{s:g}' for s in strengths)} |"]
    lines.append(f"|---|{'--:|' * len(strengths)}")
    for method, curve in curves.items():
        means = " | ".join(f"{np.mean(curve[s]):.2f}" for s in strengths)
        lines.append(f"| {method} | {means} |")
    return lines


def _curves(rows: Sequence[Row]) -> dict[str, dict[float, list[float]]]:
    """Recalls of all seeds by method and strength."""
    curves: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        curves[row.method][row.strength].append(row.recall)
    return curves


def draw_figure(rows: Sequence[Row]) -> bytes:
    """PNG of recall over strength: means over seeds, bands from the lowest to the highest."""
    curves = _curves(rows)
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"font.size": 9, "text.color": INK, "axes.labelcolor": MUTED})
        fig = Figure(figsize=(9.2, 3.9), layout="constrained")
        axes = fig.subplots(1, len(PANELS), sharey=True)
        for ax, (title, methods) in zip(axes, PANELS.items(), strict=True):
            for method, (label, colour) in methods.items():
                _draw_curve(ax, curves[method], colour, label)
            ax.axhline(CHANCE, color=MUTED, lw=1, ls="--")
            ax.text(1, CHANCE + 0.015, f"chance, {CHANCE:.3f}", color=MUTED, ha="right", size=8)
            ax.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
            ax.set(xlabel="planting strength s", xlim=(-0.02, 1.02), ylim=(-0.02, 1.03))
            for side in ("top", "right"):
                ax.spines[side].set_visible(False)
            for side in ("bottom", "left"):
                ax.spines[side].set_color(LINE)
            ax.tick_params(colors=MUTED, length=2)
            ax.legend(loc="upper left", frameon=False, fontsize=8)
        fig.axes[0].set_ylabel("planted gates among the k best (recall)")
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _draw_curve(ax: Axes, curve: dict[float, list[float]], colour: str, label: str) -> None:
    x = sorted(curve)
    ax.plot(x, [np.mean(curve[s]) for s in x], "o-", color=colour, ms=3, lw=1.4, label=label)
    low, high = [min(curve[s]) for s in x], [max(curve[s]) for s in x]
    ax.fill_between(x, low, high, color=colour, alpha=0.13, lw=0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--strengths", type=float, nargs="+", default=STRENGTHS, help="each from 0 to 1")
    add("--seeds", type=int, default=10, help="models of each strength")
    add("--longer", type=int, default=1, help="words by which templates differ, 0: none does")
    add("-o", "--output", type=Path, metavar="DIR", required=True)
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.longer < 0:
        parser.error("--seeds must be at least 1, --longer at least 0")
    if not all(0 <= s <= 1 for s in options.strengths):
        parser.error("--strengths must be from 0 to 1")
    torch.set_num_threads(1)  # models so small that threads only wait for each other
    rows = list(sweep(options.strengths, range(options.seeds), options.longer))
    rows.sort(key=lambda row: (row.method.lower(), *row))
    options.output.mkdir(parents=True, exist_ok=True)
    atomic_write(options.output / "truth.csv", csv_bytes(Row._fields, rows))
    atomic_write(options.output / "truth.png", draw_figure(rows))
    print("\n".join(mean_recalls(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
