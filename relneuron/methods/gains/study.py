"""The folder of an attribution as the report needs it: its files read once, summed by relation.

methods/gains/page.py calls `read_attribution_study` for a folder of `attribute`, without a model.
A relation is what arXiv 2312.12141 calls a type of knowledge.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.artifact.files import Json
from relneuron.artifact.gains import (
    COMPARISON,
    COMPARISON_COLUMNS,
    MADE_BY,
    PROMOTED,
    PROMOTED_COLUMNS,
    TARGETS,
    Target,
    ffn_widths,
    read_attributions,
    read_targets,
)
from relneuron.artifact.reading import Cells, read_csv
from relneuron.report.page import PageKind, opened
from relneuron.report.tables import Array

PAGE = PageKind(
    "attribution",
    reads={
        "manifest.json": MADE_BY,
        TARGETS: MADE_BY,
        "attributions.csv": MADE_BY,
        "attributions.parquet": f"{MADE_BY} --format parquet",
        PROMOTED: MADE_BY,
        COMPARISON: f"{MADE_BY} --compare",
    },
    needs=(),
    marks=(TARGETS,),
    hints=(),
    again="run attribute again with --force",
    build="relneuron.methods.gains.page:build",
)
LAYERS = ("attention_layer", "ffn_layer")
NEURONS = ("ffn_neuron", "attention_neuron", "query_ffn_neuron")
BEST = 10  # neurons of a sentence that count as its best
PAPER_TOP = 300  # neurons of a sentence that the published comparison of query and value takes
MOST_SHARE = 0.1  # ... and never more than this share of a small model's FFN neurons
MOST_HEADS = 1 << 16  # no layer has so many heads, nor a head so many coordinates

Unit = tuple[str, int, int, int]  # kind, layer, head (-1: none), index


class Promoted(NamedTuple):
    """What a neuron does to tokens: those that it raises and lowers most, the first one most.

    Its mean coefficient, and the share of sentences where that is negative.
    """

    coefficient: float
    negative: float
    raised: list[str]
    lowered: list[str]


class Effect(NamedTuple):
    """What one condition does to the sentences of a relation ("": of all of them).

    mrr, prob and logprob are means over n sentences; the drops are (clean - mean) / clean, of
    logprob clean - mean in nats, each with its low and high.
    """

    name: str
    relation: str
    n: int
    mrr: float
    prob: float
    logprob: float
    mrr_drop: tuple[float, float, float]
    prob_drop: tuple[float, float, float]
    logprob_drop: tuple[float, float, float]


@dataclass
class Sums:
    """Sums over sentences of the scores, and counts of the sentences' best neurons.

    Places are (relation, layer, head) and (relation, component), a component being that of h^0,
    A^0, F^0, A^1, ... `times`, `total`: in how many sentences of a relation a unit is among the
    BEST, and the sum of its scores there. `by_layer`: the top neurons of all sentences, by layer;
    `places`: the same as (sentence, layer, index), each as one number.
    """

    layers: dict[str, Array]  # (R, L) by kind
    heads: dict[tuple[int, int, int], float] = field(default_factory=dict)
    query_layers: dict[tuple[int, int], float] = field(default_factory=dict)
    times: Counter[tuple[int, Unit]] = field(default_factory=Counter)
    total: dict[tuple[int, Unit], float] = field(default_factory=dict)
    by_layer: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # (L,) by kind
    places: dict[str, array[int]] = field(default_factory=dict)  # by kind


@dataclass(frozen=True)
class AttributionStudy:
    manifest: Json
    model: Json  # layers and width at least
    targets: list[Target]
    sums: Sums
    promoted: dict[Unit, Promoted]
    conditions: list[Effect]

    @cached_property
    def scored(self) -> list[Target]:
        """The sentences that have scores."""
        return scored(self.targets, self.asked)

    @cached_property
    def relations(self) -> list[str]:
        """Of the sentences that have scores."""
        return list(dict.fromkeys(target.relation for target in self.scored))

    @cached_property
    def n_sentences(self) -> NDArray[np.int64]:
        """(R,) of those that have scores."""
        n = Counter(target.relation for target in self.scored)
        return np.array([n[relation] for relation in self.relations], np.int64)

    @property
    def asked(self) -> Json:
        """The options that `attribute` recorded."""
        inputs: Json = self.manifest["stages"].get("attribute", {}).get("inputs", {})
        return inputs

    @property
    def zeroed(self) -> Json:
        """How many neurons and heads each condition set to zero, as `attribute` noted."""
        found: Json = self.manifest["stages"].get("attribute", {}).get("zeroed", {})
        return {"method": self.asked.get("intervene") or BEST} | found

    @property
    def n_top(self) -> int:
        return n_top(self.model, self.asked)

    @cached_property
    def n_heads(self) -> int:
        return 1 + max((head for _, _, head in self.sums.heads), default=-1)

    def of(self, relation: str = "") -> dict[str, Effect]:
        """The conditions' effects on a relation's sentences, by name."""
        return {c.name: c for c in self.conditions if c.relation == relation}


def n_top(model: Json, asked: Json) -> int:
    """How many of a sentence's neurons are compared as its value and its query neurons."""
    share = max(1, int(MOST_SHARE * sum(ffn_widths(model))))
    return min(PAPER_TOP, int(asked.get("top", PAPER_TOP)), share)


def scored(targets: Sequence[Target], asked: Json) -> list[Target]:
    """The sentences that `attribute` scored: all, or those that the model knows."""
    return [target for target in targets if target.kept or asked.get("keep") != "known"]


def read_attribution_study(folder: Path) -> AttributionStudy:
    """Read a folder of `attribute`; a file whose digest is not the manifest's raises."""
    with opened(folder, PAGE) as manifest:
        targets = read_targets(folder / TARGETS)
        model = dict(manifest.get("model") or {})
        shape = {name: int(model[name]) for name in ("layers", "width")}
        asked = manifest["stages"].get("attribute", {}).get("inputs", {})
        rows, most = read_attributions(folder), n_top(model, asked)
        sums = read_sums(rows, scored(targets, asked), shape, most)
        promoted, effects = read_promoted(folder / PROMOTED), read_comparison(folder / COMPARISON)
        study = AttributionStudy(manifest, model, targets, sums, promoted, effects)
        _check(study)
        return study


def _check(study: AttributionStudy) -> None:
    """Raise unless the comparison is of these sentences."""
    n = dict(zip(study.relations, study.n_sentences.tolist(), strict=True))
    n[""] = len(study.scored)
    for condition in study.conditions:
        if not 0 <= condition.n <= n[condition.relation]:
            raise ValueError(f"{COMPARISON} has {condition.n} of {n[condition.relation]} sentences")


def read_sums(
    rows: Iterator[Cells], targets: list[Target], shape: Mapping[str, int], most: int
) -> Sums:
    """What the page needs of the table of scores, in one pass; `most`: neurons of `by_layer`."""
    relations = list(dict.fromkeys(target.relation for target in targets))
    sentence = {target.id: number for number, target in enumerate(targets)}
    relation = [relations.index(target.relation) for target in targets]
    n_layers, width = shape["layers"], shape["width"]
    sums = Sums({kind: np.zeros((len(relations), n_layers)) for kind in LAYERS})
    for row in rows:
        kind = row["kind"]
        if kind == "position":
            continue
        number = sentence[row["id"]]
        r, score = relation[number], row.finite("score")
        if kind == "query_layer":
            component = r, _place(row, "index", 2 * n_layers + 1)
            sums.query_layers[component] = sums.query_layers.get(component, 0.0) + score
            continue
        layer = _place(row, "layer", n_layers)
        if kind in LAYERS:
            sums.layers[kind][r, layer] += score
        elif kind == "head":
            at = r, layer, _place(row, "head", MOST_HEADS)
            sums.heads[at] = sums.heads.get(at, 0.0) + score
        elif score and (rank := row.whole("rank")) <= max(BEST, most):
            head = _place(row, "head", MOST_HEADS) if row["head"] else -1
            index = _place(row, "index", width if head < 0 else MOST_HEADS)
            if rank <= BEST:
                best = r, (kind, layer, head, index)
                sums.times[best] += 1
                sums.total[best] = sums.total.get(best, 0.0) + score
            if rank <= most:
                sums.by_layer.setdefault(kind, np.zeros(n_layers, np.int64))[layer] += 1
                place = (number * n_layers + layer) * width + index
                sums.places.setdefault(kind, array("q")).append(place)
    return sums


def _place(row: Cells, name: str, end: int) -> int:
    """A place from 0 to below `end`."""
    place = row.whole(name)
    if place >= end:
        raise row.wrong(name, f"below {end}")
    return place


def read_promoted(path: Path) -> dict[Unit, Promoted]:
    """What each unit of promoted.csv raises and lowers."""
    rows = list(read_csv(path, PROMOTED_COLUMNS)) if path.exists() else []
    found: dict[Unit, Promoted] = {}
    for row in sorted(rows, key=lambda row: row.whole("place")):
        head = row.whole("head") if row["head"] else -1
        unit = (row["kind"], row.whole("layer"), head, row.whole("index"))
        numbers = row.real("coefficient"), row.real("negative")
        one = found.setdefault(unit, Promoted(*numbers, [], []))
        (one.raised if row.flag("acts") else one.lowered).append(row["token"])
    return found


def read_comparison(path: Path) -> list[Effect]:
    """comparison.csv; an empty cell is NaN."""
    found = []
    for row in read_csv(path, COMPARISON_COLUMNS) if path.exists() else ():
        value = {name: row.real(name) for name in COMPARISON_COLUMNS[3:]}
        means = [value[name] for name in ("mrr", "prob", "logprob")]
        drops = [
            tuple(value[f"{name}_drop{end}"] for end in ("", "_low", "_high"))
            for name in ("mrr", "prob", "logprob")
        ]
        found.append(Effect(row["condition"], row["relation"], row.whole("n"), *means, *drops))  # type: ignore[arg-type]
    return found
