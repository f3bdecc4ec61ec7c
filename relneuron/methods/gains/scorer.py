"""Batches of sentences scored: their rows of attributions.csv, and what the comparison zeroes.

The `attribute` stage calls it for each batch and keeps in its journal what it returns.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.gains import Row, best_first, number, rows_text
from relneuron.artifact.prompts import Prompt
from relneuron.methods.gains.comparison import Sizes, TargetRanks, choose
from relneuron.methods.gains.options import AttributeOptions
from relneuron.methods.gains.scores import QueryScores, query_scores
from relneuron.methods.gains.targets import keep as knows
from relneuron.methods.gains.targets import type_tokens
from relneuron.methods.gains.values import ValueScores, value_scores
from relneuron.model.stream.parts import ResidualModel
from relneuron.model.stream.trace import Trace, scaled, trace
from relneuron.model.targets import Targets
from relneuron.ops.logprob_gain.op import TopGains

GAIN_TOLERANCE = 1e-5  # nats, of the gains that the comparison ranks neurons by
N_BEST = 10  # a neuron counts as one of a sentence's best up to this rank
NEURONS = ("ffn_neuron", "attention_neuron", "query_ffn_neuron")

Array = np.ndarray[Any, Any]

# Hears of a sentence, by its row among all, its rows of the table and what else is kept of it.
Keep = Callable[[int, str, Json], None]


@dataclass(frozen=True)
class Sentences:
    """What is attributed: N sentences with their tokens and targets."""

    prompts: Sequence[Prompt]
    targets: Targets

    @cached_property
    def type_tokens(self) -> dict[str, Tensor]:
        every = zip(self.prompts, self.targets.rights, strict=True)
        pairs = [(token, prompt.relation) for prompt, tokens in every for token in tokens]
        return type_tokens([t for t, _ in pairs], [kind for _, kind in pairs])


@dataclass(frozen=True)
class _Scored:
    """The scores of E sentences of a batch."""

    rows: list[int]  # among all sentences
    traced: Trace
    wanted: Tensor  # (E,) int64
    values: ValueScores
    query: QueryScores | None


class Scorer:
    """Scores batches of sentences; what `score` says of each goes into the journal."""

    def __init__(
        self,
        residual: ResidualModel,
        sentences: Sentences,
        options: AttributeOptions,
        sizes: Sizes,
        backend: str,
    ) -> None:
        self.residual, self.sentences, self.options = residual, sentences, options
        self.sizes, self.backend = sizes, backend
        asked, compare = set(options.kinds), options.compare
        self.has_query, self.has_writes = options.has_query, options.has_writes
        of_ffn, of_attention = (
            self.has_query and options.query_of == n for n in ("ffn", "attention")
        )
        self.has_ffn = compare or of_ffn or "ffn_neuron" in asked
        has_heads = not residual.no_heads
        self.has_attention = has_heads and (compare or of_attention) or "attention_neuron" in asked
        self._ranks: TargetRanks | None = None
        # The comparison is of gains under the frozen norm, certified to GAIN_TOLERANCE.
        is_close = options.mode == "exact" or options.tolerance <= GAIN_TOLERANCE
        self._gains_are_compared = is_close and not options.own_norm

    def score(self, rows: list[int], keep: Keep) -> tuple[list[Json], Array | None]:
        """How the model knows each sentence in `rows`, and the gains (E, L, F) float32.

        `keep` hears of each of them the rows of the table as text, and its best neurons with what
        is zeroed; of one that is left out, none. Its gains are NaN; without `ffn_neuron` there are
        none.
        """
        residual, options = self.residual, self.options
        traced = trace(residual, [self.sentences.targets.ids[row] for row in rows])
        logits, wanted = traced.logits, self._targets(rows)
        own = logits.gather(1, wanted[:, None])
        logprob = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        self._check_finite(rows, logprob, "log-probabilities")
        types = [self.sentences.prompts[row].relation for row in rows]
        rights = [self.sentences.targets.rights[row] for row in rows]
        kept = knows(logits, wanted, types, self.sentences.type_tokens, rights).tolist()
        found: list[Json] = [
            {"rank": rank, "prob": prob, "logprob": log, "kept": known}
            for rank, prob, log, known in zip(
                (1 + (logits > own).sum(1)).tolist(),
                logprob.exp().tolist(),
                logprob.tolist(),
                kept,
                strict=True,
            )
        ]
        taken = [i for i in range(len(rows)) if kept[i] or options.keep == "all"]
        for i in {*range(len(rows))} - {*taken}:
            keep(rows[i], "", {})
        shape = (len(rows), len(residual.layers), residual.width)
        gains = np.full(shape, np.nan, np.float32) if "ffn_neuron" in options.kinds else None
        if taken:
            if len(taken) < len(rows):
                traced = trace(residual, [self.sentences.targets.ids[rows[i]] for i in taken])
            scored = self._scores([rows[i] for i in taken], traced)
            self._keep_parts(scored, [kept[i] for i in taken], keep)
            if gains is not None:
                assert scored.values.ffn_neuron is not None
                self._check_finite(scored.rows, scored.values.ffn_neuron, "gains")
                gains[taken] = _array(scored.values.ffn_neuron)
        return found, gains

    def _check_finite(self, rows: Sequence[int], values: Tensor, what: str) -> None:
        is_bad = ~values.reshape(len(rows), -1).isfinite().all(1)
        if is_bad.any():
            name = self.sentences.prompts[rows[int(is_bad.nonzero()[0])]].id
            raise RelneuronError(
                f"prompt {name}: its {what} are not all finite",
                "use --dtype float32 or bfloat16",
            )

    def _targets(self, rows: Sequence[int]) -> Tensor:
        wanted = [self.sentences.targets.targets[row] for row in rows]
        return torch.tensor(wanted, device=self.residual.unembed.device)

    def _scores(self, rows: list[int], traced: Trace) -> _Scored:
        options, wanted = self.options, self._targets(rows)
        values = value_scores(
            self.residual,
            traced,
            wanted,
            writes=self.has_writes,
            ffn=options.mode if self.has_ffn else None,
            attention="top" if self.has_attention else None,
            top=max(
                *(options.top, options.query_units),
                *(self.sizes.value_attention, self.sizes.value_ffn),
            ),
            tolerance=options.tolerance,
            own_norm=options.own_norm,
            norm_bias=options.norm_bias,
            backend=self.backend,
        )
        query = None
        if self.has_query:
            units = values.ffn_top if options.query_of == "ffn" else values.attention_top
            assert units is not None
            query = query_scores(
                self.residual,
                traced,
                units,
                kind=options.query_of,
                n_units=options.query_units,
                key=options.key,
                center_keys=options.center_keys,
            )
        return _Scored(rows, traced, wanted, values, query)

    def _keep_parts(self, scored: _Scored, kept: Sequence[bool], keep: Keep) -> None:
        """Of each sentence its rows as text, its best neurons and, if kept, what is zeroed."""
        known = [e for e, is_kept in enumerate(kept) if is_kept]
        chosen: dict[int, Mapping[str, Sequence[int]]] = {}
        if self.options.compare and known:
            chosen = dict(zip(known, self._choose(scored, known), strict=True))
        table = _Table(scored, self.residual)
        for e, row in enumerate(scored.rows):
            rows = table.rows(e, self.sentences.prompts[row].id, self.options)
            part: Json = {"best": table.best(e, rows)}
            if e in chosen:
                heads = table.arrays["head"][e] if "head" in table.arrays else np.empty(0)
                off = {name: pack(np.array(places, "<i4")) for name, places in chosen[e].items()}
                part |= {"off": off, "heads": pack(heads.astype("<f4"))}
            keep(row, rows_text(rows), part)

    def _choose(self, scored: _Scored, known: list[int]) -> list[dict[str, list[int]]]:
        """What the comparison zeroes in the sentences `known` of the batch."""
        if self._ranks is None:
            everyone = self._targets(range(len(self.sentences.prompts)))
            self._ranks = TargetRanks.of(self.residual, everyone)
        traced, wanted = scored.traced, scored.wanted
        values, query = scored.values, scored.query
        if len(known) < len(wanted):
            places = torch.tensor(known, device=wanted.device)
            traced, wanted, values, query = (
                _take(part, places) for part in (traced, wanted, values, query)
            )
        return choose(
            self.residual,
            traced,
            wanted,
            values,
            query,
            self.sizes,
            gains=values.ffn_neuron if self._gains_are_compared else None,
            ranks=self._ranks,
            norm_bias=self.options.norm_bias,
            backend=self.backend,
        )


def _take(scores: Any, rows: Tensor) -> Any:
    """Some sentences of a trace or of scores: their rows of every tensor in it."""
    if isinstance(scores, Tensor):
        return scores[rows]
    if isinstance(scores, list):
        return [_take(part, rows) for part in scores]
    if isinstance(scores, TopGains):
        return TopGains(scores.gain[rows], scores.layer[rows], scores.index[rows])
    if scores is None:
        return None
    parts = {field.name: _take(getattr(scores, field.name), rows) for field in fields(scores)}
    return replace(scores, **parts)


# --- rows ------------------------------------------------------------------------------------


class _Table:
    """The scores of a batch as arrays, and each sentence's rows of attributions.csv."""

    def __init__(self, scored: _Scored, residual: ResidualModel) -> None:
        values, query = scored.values, scored.query
        self.n_pad: list[int] = scored.traced.n_pad.tolist()
        self.head_dim, self.heads_width = residual.head_dim, residual.n_heads * residual.head_dim
        self.layers = residual.layers
        self.traced, self.query = scored.traced, query
        found = {
            "ffn_layer": values.ffn_layer,
            "attention_layer": values.attention_layer,
            "head": values.head,
            "position": values.position,
            "query_layer": None if query is None else query.layer,
            "query_ffn_neuron": None if query is None else query.ffn_neuron,
        }
        self.arrays = {kind: _array(scores) for kind, scores in found.items() if scores is not None}
        tops = {"ffn_neuron": values.ffn_top, "attention_neuron": values.attention_top}
        self.tops = {
            kind: [_array(part) for part in (top.gain, top.layer, top.index)]
            for kind, top in tops.items()
            if top is not None
        }

    def rows(self, e: int, name: str, options: AttributeOptions) -> list[Row]:
        """The rows of sentence `e`, kind by kind, best first."""
        rows: list[Row] = []
        for kind in options.kinds:
            if kind in ("ffn_neuron", "attention_neuron"):
                places = self._top(kind, e, options.top)
            else:
                whole = kind not in ("query_ffn_neuron", "position")
                places = self._dense(kind, e, None if whole else options.top)
            rows += [
                (name, kind, *place, number(score), rank)
                for rank, (place, score) in enumerate(places, 1)
            ]
        return rows

    def _dense(self, kind: str, e: int, top: int | None) -> Iterator[tuple[Row, float]]:
        """((layer, head, index, position), score) of one kind, "" for what does not apply."""
        scores = self.arrays[kind][e]
        order = best_first(scores, top)
        if kind == "query_ffn_neuron":
            # No unit reads the others: those of the layers above, or all of them.
            order = order[scores.reshape(-1)[order] != 0]
        axes = [axis.tolist() for axis in np.unravel_index(order, scores.shape)]
        empty = [""] * len(order)
        if kind == "query_layer":
            # h^0 is of no layer; A^l and F^l follow.
            layers = ["" if place == 0 else (place - 1) // 2 for place in axes[0]]
            columns: list[list[Any]] = [layers, empty, axes[0], empty]
        elif kind == "query_ffn_neuron":
            columns = [axes[0], empty, axes[1], empty]
        elif kind == "position":
            columns = [*axes[:2], empty, [place - self.n_pad[e] for place in axes[2]]]
        else:
            columns = [*axes, *[empty] * (4 - len(axes))]
        return zip(zip(*columns, strict=True), scores.reshape(-1)[order].tolist(), strict=True)

    def _top(self, kind: str, e: int, top: int) -> Iterator[tuple[Row, float]]:
        """The same of the neurons of value scores, which come ranked."""
        gain, layer, index = (part[e][:top] for part in self.tops[kind])
        taken = layer >= 0
        gain, layer, index = gain[taken], layer[taken], index[taken]
        head = position = np.full(len(gain), "")
        if kind == "attention_neuron":
            position, index = np.divmod(index, self.heads_width)
            head, index = np.divmod(index, self.head_dim)
        columns = [part.tolist() for part in (layer, head, index, position)]
        return zip(zip(*columns, strict=True), gain.tolist(), strict=True)

    def best(self, e: int, rows: Sequence[Row]) -> list[list[Any]]:
        """[kind, layer, head (-1: none), index, score, coefficient] of the neurons up to N_BEST."""
        return [
            [
                *(kind, layer, -1 if head == "" else head, index, score),
                self._coefficient(e, str(kind), (layer, head, index, position)),
            ]
            for _, kind, layer, head, index, position, score, rank in rows
            if kind in NEURONS and rank <= N_BEST  # type: ignore[operator]
        ]

    def _coefficient(self, e: int, kind: str, place: tuple[Any, ...]) -> float:
        """What the value vector of a neuron is multiplied with in sentence `e`."""
        layer, head, index, position = place
        traced = self.traced
        if kind == "attention_neuron":
            column = position + self.n_pad[e]
            value = traced.values[layer][e, column, head, index]
            value = traced.weights[layer][e, head, column].float() * value
            return scaled(value, traced.attention_scale[layer], e)
        if kind == "query_ffn_neuron":
            assert self.query is not None
            return float(self.query.coefficient[e, layer, index])
        return traced.ffn_coefficient(self.layers[layer], e, index)


# --- arrays in the journal -------------------------------------------------------------------


def pack(array: Array) -> str:
    """An array's bytes as text."""
    return base64.b64encode(array.tobytes()).decode()


def unpack(text: str, dtype: str) -> Array:
    """The array (K,) of `pack`."""
    return np.frombuffer(base64.b64decode(text), dtype)


def _array(tensor: Tensor) -> Array:
    """A tensor as numpy: scores as float32, places as int64."""
    tensor = tensor.detach().cpu()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
