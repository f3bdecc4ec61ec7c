"""Five ways to rank the neurons of a relation, side by side on the bundled demo model.

    PYTHONPATH=. python -m bench.rankings -o DIR [--top K]

The det prompts that the model answers right choose, for each relation, the K best neurons by

- average precision of the responses (`record`, `identify --method ap`),
- mean gain in log-probability of the answer (`attribute`, `identify --method logprob_gain`),
- mean integrated gradient of its probability (`attribute --method ig`),
- mean positive relevance, gradient x activation (`attribute --method relevance`, `identify --method
  relevance --specific 0`),
- mean activation (`count --moments`, `identify --method mean`),

and by chance, with several seeds (`identify --method random`). A neuron is a (layer, index) of an
MLP: in the ranking of average precision it stands where its gate or its up stands first, and down,
which is no neuron of an MLP, is left out. Then `ablate` switches each set off and asks the facts
that were kept apart. Writes rankings.csv and rankings.png; prints the tables of docs/rankings.md.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.truth import INK, LINE, MUTED
from relneuron.ablation.ablate import ablate_prompts
from relneuron.analyses.outcomes import outcomes
from relneuron.analyses.uncertainty import percentile_interval, resampled
from relneuron.artifact.effects import Grid, main_split, read_conditions, read_effects
from relneuron.artifact.files import atomic_write, csv_bytes
from relneuron.artifact.gradients import FILES, IG, Gradients
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile, Shape
from relneuron.artifact.prompts import prompts_bytes, read_prompts
from relneuron.artifact.reading import read_csv
from relneuron.demo import CHECKPOINT, FACTS
from relneuron.methods.counts.count import count
from relneuron.methods.counts.options import CountedOptions, RandomOptions
from relneuron.methods.counts.rank import identify_counts
from relneuron.methods.gains.attribute import attribute as attribute_gains
from relneuron.methods.gains.options import AttributeOptions
from relneuron.methods.gains.rank import identify_gains
from relneuron.methods.gradients.attribute import attribute as attribute_gradients
from relneuron.methods.gradients.choices import ShareOptions
from relneuron.methods.gradients.options import IgOptions, RelevanceOptions
from relneuron.methods.gradients.rank import identify_gradients
from relneuron.methods.responses.options import RankOptions, RecordOptions
from relneuron.methods.responses.rank import identify
from relneuron.methods.responses.record import record
from relneuron.model.load import load_model, load_tokenizer
from relneuron.texts.options import CountOptions, PromptsOptions
from relneuron.texts.prompts import write_prompts
from relneuron.texts.sources import parse_sources

AP, GAIN, GRADIENT = "average precision", "log-probability gain", "integrated gradients"
RELEVANCE, ACTIVATION = "relevance", "activation"
RANKINGS = (AP, GAIN, GRADIENT, RELEVANCE, ACTIVATION)
NONE, RANDOM = "none off", "random choice"
TOP = 102  # a tenth of the demo model's 1,024 neurons
SEEDS = 10  # of random choice
ROUND = 6  # digits of rankings.csv
OWN, OTHERS = "accuracy of the own relation", "accuracy of the others"
SHARED, ALIKE = "overlap", "overlap of two relations"
COLOURS = {OWN: "#c2410c", OTHERS: "#2563a8"}

Neurons = dict[str, list[tuple[int, int]]]  # of each relation (layer, index), best first


class Line(NamedTuple):
    """A row of rankings.csv; of a mean over all relations `relation` is empty.

    `low` and `high`: the 95 % interval of a mean, of a bootstrap over relations.
    """

    number: str  # SHARED, ALIKE, OWN or OTHERS
    ranking: str
    beside: str  # the other ranking of an overlap
    relation: str
    value: float
    low: float | str = ""
    high: float | str = ""


class Study:
    """The demo model, its prompts, and a folder for all that the stages write."""

    def __init__(self, facts: Path, folder: Path, n_eva: int) -> None:
        self.folder, self.model = folder, load_model(str(CHECKPOINT), device="cpu")
        self.tokenizer = load_tokenizer(str(CHECKPOINT))
        self.given = (str(CHECKPOINT), self.model, self.tokenizer)
        self.prompts, self.right = folder / "prompts.jsonl", folder / "right" / "prompts.jsonl"
        write_prompts(facts, self.prompts, PromptsOptions(eva=n_eva))
        record(*self.given, self.prompts, folder, RecordOptions(), quiet=True)
        rows = read_csv(folder / "validated.csv", ("id", "correct"))
        right = {row["id"] for row in rows if row.flag("correct")}
        # What average precision takes as positives, for all.
        chosen = [p for p in read_prompts(self.prompts) if p.split == "det" and p.id in right]
        self.right.parent.mkdir()
        atomic_write(self.right, prompts_bytes(chosen))

    @property
    def shape(self) -> Shape:
        return Shape.of(Manifest(self.folder).data["model"])

    def rank(self, top: int) -> dict[str, Neurons]:
        """The `top` neurons of every relation by each of RANKINGS."""
        gains, gradients = self.folder / "gains", self.folder / "gradients"
        how = AttributeOptions(kinds=("ffn_neuron",), top=1, compare=False)
        attribute_gains(*self.given, self.right, gains, how, quiet=True)
        for options in (IgOptions(), RelevanceOptions()):
            attribute_gradients(*self.given, self.right, gradients, options, quiet=True)
        sources = parse_sources([str(self.right)], text_column="prompt", group_column="relation")
        counting = CountOptions(mode="documents", moments=True)
        count(*self.given, sources, self.folder / "counts", counting, quiet=True)
        everything = RankOptions(top=self.shape.total, permutations=0, bootstrap=0, noise=0)
        return {
            AP: neurons(identify(self.folder, self.out(AP), everything, quiet=True), top),
            GAIN: neurons(identify_gains(gains, self.out(GAIN), top=top, quiet=True), top),
            GRADIENT: by_mean(Gradients.read(gradients / FILES[IG], IG), top),
            RELEVANCE: neurons(
                identify_gradients(
                    gradients,
                    self.out(RELEVANCE),
                    ShareOptions(top=top, specific=0.0),
                    method="relevance",
                    quiet=True,
                ),
                top,
            ),
            ACTIVATION: self.by_counts("mean", CountedOptions(top=top)),
        }

    def by_counts(self, method: str, options: CountedOptions) -> Neurons:
        """What `identify --method mean` or `random` chooses, of the activations at `act`."""
        output = self.out(method)
        counts = self.folder / "counts"
        chosen = identify_counts(counts, output, options, method=method, force=True)
        return neurons(chosen, options.top or 0)

    def out(self, name: str) -> Path:
        return self.folder / "chosen" / name.replace(" ", "_") / "neurons.json"

    def switch_off(self, name: str, sets: Neurons) -> Grid:
        """The answers to facts that chose nothing, as the model is and with each set off."""
        folder = self.folder / "off" / name.replace(" ", "_")
        rows = {r: [(la, "gate", i, 0.0) for la, i in chosen] for r, chosen in sets.items()}
        folder.mkdir(parents=True)
        model = Manifest(self.folder).data["model"]
        NeuronFile(model, name, rows, {}).write(folder / "neurons.json")
        ablate_prompts(
            *self.given,
            folder / "neurons.json",
            self.prompts,
            folder / "effects.csv",
            splits=("eva",),
            random_seeds=0,
            quiet=True,
        )
        grids = read_effects(folder / "effects.csv", read_conditions(folder / "conditions.csv"))
        return grids[main_split(grids)]


def neurons(chosen: NeuronFile, top: int) -> Neurons:
    """The first `top` (layer, index) of each set, by whichever of gate and up it is named first."""
    found = {}
    for name, rows in sorted(chosen.sets.items()):
        once = dict.fromkeys((la, i) for la, site, i, _ in rows if site in ("gate", "up"))
        found[name] = list(once)[:top]
        assert len(found[name]) == top, f"{name} has {len(found[name])} of {top} neurons"
    return found


def by_mean(gradients: Gradients, top: int) -> Neurons:
    """The `top` neurons of each relation by their mean over its sentences, equal ones in order."""
    names = sorted(set(gradients.relations))
    # Divided by their number, the sums would have the same order.
    sums = gradients.group_sums(names)["signed"].reshape(len(names), -1)
    best = np.argsort(-sums, axis=1, kind="stable")[:, :top]
    return {
        name: [divmod(place, gradients.width) for place in row.tolist()]
        for name, row in zip(names, best, strict=True)
    }


def jaccard(a: Iterable[tuple[int, int]], b: Iterable[tuple[int, int]]) -> float:
    """|a and b| / |a or b|."""
    first, second = set(a), set(b)
    return len(first & second) / len(first | second)


def chance_overlap(n: int, top: int) -> float:
    """The expected Jaccard index of two sets of `top` neurons drawn from n."""
    from scipy.stats import hypergeom

    shared = np.arange(top + 1)
    weights = hypergeom.pmf(shared, n, top, top)
    return float((weights * shared / (2 * top - shared)).sum())


def lines_of(number: str, ranking: str, beside: str, found: Mapping[str, float]) -> list[Line]:
    """A line for each relation, and their mean with its interval over relations."""
    values = np.array(list(found.values()))
    interval = percentile_interval(resampled(len(values)) @ values / len(values))
    ends = (round(end, ROUND) for end in interval)
    each = [Line(number, ranking, beside, r, round(v, ROUND)) for r, v in found.items()]
    return [*each, Line(number, ranking, beside, "", round(float(values.mean()), ROUND), *ends)]


def overlaps(chosen: Mapping[str, Neurons], n: int) -> list[Line]:
    """How far any two rankings agree on a relation, and one ranking's sets of two relations."""
    found: list[Line] = []
    for one, other in combinations(chosen, 2):
        same = {r: jaccard(chosen[one][r], chosen[other][r]) for r in chosen[one]}
        found += lines_of(SHARED, one, other, same)
    top = len(next(iter(chosen[AP].values())))
    found.append(Line(SHARED, RANDOM, RANDOM, "", round(chance_overlap(n, top), ROUND)))
    for name, sets in chosen.items():
        others = {r: mean(jaccard(sets[r], sets[s]) for s in sets if s != r) for r in sets}
        found += lines_of(ALIKE, name, "", others)
    return found


def effects(name: str, grids: Sequence[Grid]) -> list[Line]:
    """Accuracies with a ranking's sets off, each relation's the mean over `grids`."""
    relations = grids[0].relations

    def after(asked: str, off: str) -> float:
        return mean(outcomes(grid, asked, off).after for grid in grids)

    own = {r: after(r, r) for r in relations}
    others = {r: mean(after(s, r) for s in relations if s != r) for r in relations}
    return lines_of(OWN, name, "", own) + lines_of(OTHERS, name, "", others)


def compare(
    facts: Path, folder: Path, *, top: int = TOP, seeds: int = SEEDS, n_eva: int = 50
) -> list[Line]:
    """All of rankings.csv, of the facts in `facts`; `folder` keeps what the stages wrote."""
    study = Study(facts, folder, n_eva)
    chosen = study.rank(top)
    found = overlaps(chosen, study.shape.site_places("gate").size)
    grids = {name: study.switch_off(name, sets) for name, sets in chosen.items()}
    clean = grids[AP]
    found += lines_of(
        OWN, NONE, "", {r: outcomes(clean, r, "clean").after for r in clean.relations}
    )
    for name, grid in grids.items():
        found += effects(name, [grid])
    by_chance = [
        study.switch_off(
            f"{RANDOM} {seed}", study.by_counts("random", RandomOptions(top=top, seed=seed))
        )
        for seed in range(seeds)
    ]
    return found + effects(RANDOM, by_chance)


# --- what is shown -------------------------------------------------------------------------------


def means(lines: Sequence[Line], number: str) -> dict[tuple[str, str], Line]:
    """The means over all relations, by ranking and the other ranking, in either order."""
    found = {}
    for line in lines:
        if line.number == number and not line.relation:
            found[line.ranking, line.beside] = found[line.beside, line.ranking] = line
    return found


def tables(lines: Sequence[Line]) -> list[str]:
    """The two tables of docs/rankings.md."""
    shared, alike = means(lines, SHARED), means(lines, ALIKE)
    said = [f"| | {' | '.join(RANKINGS)} | two relations |", f"|---|{'--:|' * 6}"]
    for one in RANKINGS:
        cells = [f"{shared[one, b].value:.2f}" if b != one else "" for b in RANKINGS]
        said.append(f"| {one} | {' | '.join(cells)} | {alike[one, ''].value:.2f} |")
    said += [f"chance: {shared[RANDOM, RANDOM].value:.3f}", ""]
    own, others = means(lines, OWN), means(lines, OTHERS)
    said += [f"| neurons off | {OWN} | {OTHERS} |", "|---|--:|--:|"]
    for name in (NONE, *RANKINGS, RANDOM):
        cells = [_percent(part[name, ""]) if (name, "") in part else "" for part in (own, others)]
        said.append(f"| {name} | {' | '.join(cells)} |")
    return said


def _percent(line: Line) -> str:
    said = f"{100 * line.value:.1f} %"
    if line.low == line.high:  # all relations are alike, of which a bootstrap knows nothing
        return said
    low, high = (f"{100 * float(end):.1f}" for end in (line.low, line.high))
    return f"{said} ({low} to {high})"


def draw_figure(lines: Sequence[Line]) -> bytes:
    """PNG of both tables: overlaps as a matrix, accuracies as points with their intervals."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"font.size": 9, "text.color": INK, "axes.labelcolor": MUTED})
        fig = Figure(figsize=(9.6, 3.9), layout="constrained")
        left, right = fig.subplots(1, 2, width_ratios=(1, 1.15))
        _draw_overlaps(left, means(lines, SHARED))
        _draw_effects(right, means(lines, OWN), means(lines, OTHERS))
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _draw_overlaps(ax: Axes, shared: Mapping[tuple[str, str], Line]) -> None:
    values = np.array(
        [[shared[a, b].value if a != b else np.nan for b in RANKINGS] for a in RANKINGS]
    )
    ax.imshow(values, cmap="Oranges", vmin=0, vmax=1)
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "white" if value > 0.6 else INK
            ax.text(x, y, f"{value:.2f}", ha="center", va="center", color=ink)
    ax.set_xticks(range(len(RANKINGS)), RANKINGS, rotation=35, ha="right")
    ax.set_yticks(range(len(RANKINGS)), RANKINGS)
    chance = shared[RANDOM, RANDOM].value
    title = f"overlap of the sets (Jaccard), chance {chance:.3f}"
    ax.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    _plain(ax)


def _draw_effects(
    ax: Axes, own: Mapping[tuple[str, str], Line], others: Mapping[tuple[str, str], Line]
) -> None:
    names = (*RANKINGS, RANDOM)
    for shift, label, part in ((-0.12, OWN, own), (0.12, OTHERS, others)):
        found = [part[name, ""] for name in names]
        x = np.array([100 * line.value for line in found])
        ends = np.array([[100 * float(line.low), 100 * float(line.high)] for line in found]).T
        spans = np.abs(ends - x)
        y = np.arange(len(names)) + shift
        ax.errorbar(x, y, xerr=spans, fmt="o", color=COLOURS[label], ms=4, lw=1.4, label=label)
    clean = 100 * own[NONE, ""].value
    ax.axvline(clean, color=MUTED, lw=1, ls="--")
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="right answers, % (dashed: no neuron off)", xlim=(-2, 102))
    ax.invert_yaxis()
    ax.set_title("accuracy with the sets off", loc="left", fontsize=9.5, fontweight="bold")
    ax.legend(loc="lower left", frameon=False, fontsize=8)
    _plain(ax)


def _plain(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        ax.spines[side].set_color(LINE)
    ax.tick_params(colors=MUTED, length=2)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add: Any = parser.add_argument
    add("--top", type=int, default=TOP, help="neurons of each relation and ranking")
    add("-o", "--output", type=Path, metavar="DIR", required=True)
    options = parser.parse_args(arguments)
    if not 1 <= options.top <= 1024:
        parser.error("--top must be from 1 to 1024, the neurons of the demo model")
    torch.set_num_threads(1)  # a model so small that threads only wait for each other
    with tempfile.TemporaryDirectory() as name:
        lines = compare(FACTS, Path(name), top=options.top)
    options.output.mkdir(parents=True, exist_ok=True)
    atomic_write(options.output / "rankings.csv", csv_bytes(Line._fields, lines))
    atomic_write(options.output / "rankings.png", draw_figure(lines))
    print("\n".join(tables(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
