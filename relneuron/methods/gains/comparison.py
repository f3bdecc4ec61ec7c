"""What becomes of the answers without the neurons that each of eight scores puts first.

The `attribute` stage calls it (arXiv 2312.12141, section 4): `choose` while a batch's trace is at
hand, `plan` when every sentence has been through, `run` to measure; `drops.py` makes the table.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relneuron.ablation.rows import Answered, Off, Planned, head_places, off
from relneuron.methods.gains.scores import (
    METHODS,
    QueryScores,
    TargetRanks,
    method_scores,
    traced_scores,
)
from relneuron.methods.gains.values import ValueScores
from relneuron.model.stream.parts import ResidualModel
from relneuron.model.stream.trace import Trace
from relneuron.ops.logprob_gain.op import TopGains

Array = NDArray[np.float64]

__all__ = ["METHODS", "TargetRanks", "method_scores"]  # of methods/gains/scores.py

# --- which neurons are off -------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How many neurons and heads a condition switches off in a sentence, at most."""

    method: int  # FFN neurons of each of METHODS
    value_attention: int
    value_ffn: int
    query: int
    heads: int

    @classmethod
    def of(cls, residual: ResidualModel, method: int = 10) -> Sizes:
        """The paper's 200, 100 and 1000 neurons and 1 % of the heads.

        Of FFN or attention neurons fewer than 30,000, in proportion. At most a tenth of them, and
        at least one; none of heads that are not told apart.
        """
        layers, n_heads = len(residual.layers), residual.n_heads
        ffn, attention = sum(residual.widths), layers * n_heads * residual.head_dim

        def scaled(n: int, total: int) -> int:
            share = min(1.0, total / 30_000)
            return min(total, max(1, min(round(n * share), total // 10)))

        return cls(
            max(1, min(method, ffn // 10)),
            *(scaled(200, attention), scaled(100, ffn), scaled(1000, ffn)),
            min(layers * n_heads, max(1, layers * n_heads // 100)),
        )


def best(scores: Tensor, n: int) -> Tensor:
    """(E, n) int64: the places of the n largest of (E, M), best first; of equal ones the later."""
    n_all = scores.shape[1]
    order = scores.flip(1).sort(dim=1, descending=True, stable=True).indices
    return n_all - 1 - order[:, :n]


def choose(
    residual: ResidualModel,
    trace: Trace,
    targets: Tensor,
    value: ValueScores,
    query: QueryScores | None,
    sizes: Sizes,
    *,
    gains: Tensor | None = None,
    ranks: TargetRanks | None = None,
    norm_bias: bool = False,
    backend: str = "auto",
) -> list[dict[str, list[int]]]:
    """What each sentence of a batch has off, as places (see interventions.Off), best first.

    Neurons of experts that the last token was not sent to are not chosen, by any of them; `sent`
    are the places [start, stop) of the others, one pair after the other, of a model with experts.

    Keys: METHODS and `value_ffn`, `query` (FFN neurons; `query` with query scores only),
    `value_attention` (each coordinate once, whatever its position; not without heads). Plain
    lists, for a journal.
    Neurons whose query score is 0, which no value unit reads, are not among `query`.
    `gains` (E, L, F) are the FFN neurons' where they are known with the frozen norm and the same
    `norm_bias`. Tops of `value` that are shorter than `sizes` give fewer neurons.
    """
    kept: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in METHODS}
    for layer in range(len(residual.layers)):
        found = traced_scores(
            *(residual, trace, targets, layer),
            gain=None if gains is None else gains[:, layer],
            ranks=ranks,
            norm_bias=norm_bias,
            backend=backend,
        )
        for name, scores in found.items():
            places = best(scores, sizes.method).sort(dim=1).values
            kept[name][0].append(scores.gather(1, places))
            kept[name][1].append(places + layer * residual.width)
    columns: dict[str, Tensor] = {}
    for name, (parts, places_of) in kept.items():
        every = torch.cat(parts, 1)
        order = best(every, sizes.method)
        chosen = torch.cat(places_of, 1).gather(1, order)
        columns[name] = chosen.where(every.gather(1, order) > -torch.inf, -1)
    heads_width = residual.n_heads * residual.head_dim
    columns["value_ffn"] = _top_ffn(value, residual.width, sizes.value_ffn)
    if not residual.no_heads:
        columns["value_attention"] = _top_attention(value, heads_width, sizes.value_attention)
    if query is not None:
        scores = query.ffn_neuron.flatten(1)
        places = best(scores, sizes.query)
        columns["query"] = places.where(scores.gather(1, places) != 0, -1)
    rows = {name: places.tolist() for name, places in columns.items()}
    limits = {"value_attention": sizes.value_attention}
    sets: list[dict[str, list[int]]] = [
        {name: _distinct(rows[name][e], limits.get(name)) for name in rows}
        for e in range(len(targets))
    ]
    if any(layer.mixture for layer in residual.layers):
        for one, spans in zip(sets, _sent(residual, trace), strict=True):
            one["sent"] = spans
    return sets


def _sent(residual: ResidualModel, trace: Trace) -> list[list[int]]:
    """Of each sentence the places [start, stop) of neurons that its last token went through."""
    found: list[list[int]] = [[] for _ in trace.n_pad]
    sentences = torch.arange(len(found), device=trace.mask.device)
    for layer in residual.layers:
        first = layer.layer * residual.width
        for block in trace.blocks(layer, sentences, sentences.new_full((len(found),), -1)):
            rows = sentences if block.rows is None else block.rows
            for e in rows.tolist():
                found[e] += [first + block.span.start, first + block.span.stop]
    return found


def _distinct(places: Iterable[int], n: int | None) -> list[int]:
    """The first n places, each once; -1 is none."""
    return list(dict.fromkeys(place for place in places if place >= 0))[:n]


def _top_ffn(value: ValueScores, width: int, n: int) -> Tensor:
    if value.ffn_top is not None:
        return _places(value.ffn_top, width)[:, :n]
    if value.ffn_neuron is None:
        raise ValueError("choose: value has no scores of FFN neurons; ask value_scores for them")
    return best(value.ffn_neuron.flatten(1), n)


def _top_attention(value: ValueScores, width: int, n: int) -> Tensor:
    """At least n different ones, or all that there are; one may be there at several positions."""
    if value.attention_top is not None:
        return _places(value.attention_top, width)
    if value.attention_neuron is None:
        raise ValueError("choose: value has no scores of attention neurons; ask for them")
    # The order of the neurons' best positions.
    scores = value.attention_neuron.nan_to_num(nan=-torch.inf).amax(2).flatten(1)
    return best(scores, n)


def _places(top: TopGains, width: int) -> Tensor:
    """Layer * width + index within the layer, without the position; -1 where there is none."""
    return torch.where(top.layer < 0, -1, top.layer * width + top.index % width)


class Condition(NamedTuple):
    """A name in interventions.csv, and what is off in each of N sentences."""

    name: str
    offs: Sequence[Off]


def plan(
    residual: ResidualModel,
    ids: Sequence[str],
    types: Sequence[str],
    chosen: Sequence[Mapping[str, Sequence[int]]],
    heads: Array,
    sizes: Sizes,
    *,
    n_seeds: int = 3,
) -> list[Condition]:
    """All conditions of N sentences, `clean` first, each asked of every sentence.

    `chosen` as `choose` returns it; `heads` (N, L, H) are the heads' value scores. What is off in a
    sentence is made of what was chosen in it when it is asked for. Random sets are
    drawn from all neurons, or from those that the last token was sent to, as many as the condition
    they stand beside has in the sentence. If no
    sentence has a query neuron, as in models of one layer, there is no condition `query`; where
    heads are not told apart, none of heads.
    """
    n_layers = len(residual.layers)
    n_ffn, n_heads = n_layers * residual.width, n_layers * residual.n_heads
    n_attention = n_heads * residual.head_dim

    def drawn(kind: str, seed: int, key: str, total: int, n: int) -> list[int]:
        return random.Random(f"relneuron.{kind}.{seed}.{key}").sample(range(total), n)

    def of_ffn(
        kind: str, seed: int, key: str, row: Mapping[str, Sequence[int]], n: int
    ) -> list[int]:
        if "sent" not in row:
            return drawn(kind, seed, key, n_ffn, n)
        starts, stops = np.array(row["sent"], np.int64).reshape(-1, 2).T
        ends = (stops - starts).cumsum()
        some = np.array(drawn(kind, seed, key, int(ends[-1]), min(n, int(ends[-1]))), np.int64)
        span = np.searchsorted(ends, some, side="right")
        places: list[int] = (stops[span] - (ends[span] - some)).tolist()
        return places

    conditions: list[Condition] = []

    def add(name: str, make: Callable[..., Off], *asked: Any) -> None:
        conditions.append(Condition(name, Planned(len(ids), partial(make, *asked))))

    def of_method(name: str, s: int) -> Off:
        return off(chosen[s][name])

    def of_random(seed: int, s: int) -> Off:
        return off(of_ffn("random", seed, ids[s], chosen[s], sizes.method))

    def both(name: str, s: int) -> tuple[Sequence[int], Sequence[int]]:
        row = chosen[s]
        if name == "query":
            return row.get("query", ()), ()
        return row["value_ffn"], row.get("value_attention", ())

    def of_both(name: str, s: int) -> Off:
        return off(*both(name, s))

    def of_random_both(name: str, seed: int, s: int) -> Off:
        ffn, attention = both(name, s)
        return off(
            of_ffn(f"random_{name}.ffn", seed, ids[s], chosen[s], len(ffn)),
            drawn(f"random_{name}.attention", seed, ids[s], n_attention, len(attention)),
        )

    def of_all(one: Off, s: int) -> Off:
        return one

    add("clean", of_all, off())
    for name in METHODS:
        add(name, of_method, name)
    for seed in range(n_seeds):
        add(f"random.{seed}", of_random, seed)
    has_query = any(row.get("query") for row in chosen)
    for name in ("value", "query") if has_query else ("value",):
        add(name, of_both, name)
        for seed in range(n_seeds):
            add(f"random_{name}.{seed}", of_random_both, name, seed)
    sets_of_heads = {}
    if n_heads:
        best_heads = top_heads(heads, types, sizes)
        sets_of_heads = {f"heads:{kind}": top for kind, top in best_heads.items()}
    for seed in range(n_seeds if n_heads else 0):
        some = drawn("random_heads", seed, "all", n_heads, sizes.heads)
        sets_of_heads[f"random_heads.{seed}"] = some
    for name, some in sets_of_heads.items():
        one = off((), head_places(some, residual.head_dim))
        add(name, of_all, one)
    return conditions


def most_conditions(n_layers: int, n_types: int, n_seeds: int) -> int:
    """How many conditions `plan` makes of sentences of so many types, all that there may be.

    clean, METHODS, value, the heads of each type, and of each seed four random sets; of query one,
    and one of each seed, where a layer stands above another.
    """
    has_query = n_layers > 1
    return 1 + len(METHODS) + 1 + n_types + 3 * n_seeds + has_query * (1 + n_seeds)


def top_heads(heads: Array, types: Sequence[str], sizes: Sizes) -> dict[str, list[int]]:
    """Each type's heads with the largest mean score over its sentences, (N, L, H), best first.

    Head j of layer l is number l * H + j; of equal ones the later comes first.
    """
    found = {}
    for kind in sorted(set(types)):
        rows = np.array([name == kind for name in types])
        mean = torch.from_numpy(np.asarray(heads, np.float64)[rows].mean(0).reshape(1, -1))
        found[kind] = best(mean, sizes.heads)[0].tolist()
    return found


# --- the measurement -------------------------------------------------------------------------


class Row(NamedTuple):
    """One row of interventions.csv."""

    condition: str
    id: str
    relation: str
    rank: int
    prob: float
    logprob: float  # nats


def rows_of(
    names: Sequence[str], ids: Sequence[str], types: Sequence[str], answered: Answered
) -> Iterator[Row]:
    """What became of the targets: every condition, by its name, of every sentence."""
    for c, name in enumerate(names):
        for s, (key, kind) in enumerate(zip(ids, types, strict=True)):
            rank, prob, logprob = (
                part[c, s] for part in (answered.rank, answered.prob, answered.logprob)
            )
            yield Row(name, key, kind, int(rank), float(prob), float(logprob))
