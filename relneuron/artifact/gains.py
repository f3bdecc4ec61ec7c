"""The files of an attribution: which neurons, heads and layers raised each sentence's answer.

`attribute` writes them; `identify` and the report read them. Nothing here needs a model.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact.dense import create_safetensors, release, rows_digest, zeros_bytes
from relneuron.artifact.files import Json, RelneuronError, cell_text, csv_bytes, require
from relneuron.artifact.installed import need
from relneuron.artifact.parquet import Sink, read_table
from relneuron.artifact.reading import Cells, open_tensors, read_csv

TARGETS = "targets.csv"
GAINS = "gains.safetensors"
PROMOTED = "promoted.csv"
INTERVENTIONS = "interventions.csv"
COMPARISON = "comparison.csv"
TABLES = ("attributions.csv", "attributions.parquet")
MADE_BY = "attribute MODEL PROMPTS -o DIR"
GAIN_ROWS = "relneuron.gains"  # the key of what gains.safetensors says of its rows

# One row a score. `layer` from zero; of a query_layer, `index` is the place of the component in
# h^0, A^0, F^0, A^1, ... and `layer` is empty for h^0. `index` is the neuron, or of an attention
# neuron the coordinate within its `head`; `position` is a token of the sentence, from zero.
ATTRIBUTIONS = ("id", "kind", "layer", "head", "index", "position", "score", "rank")
# The tokens at both ends of a neuron's value vector, which its coefficient is multiplied with:
# `promoted` have its largest logits, `suppressed` its least. `coefficient`: mean over the sentences
# that the neuron is among the best of, `negative` the share of them where it is below 0. `acts` is
# 1 at the end that the neuron raises: the suppressed one if the coefficient is negative.
ENDS = {"promoted": 1, "suppressed": -1}
PROMOTED_COLUMNS = (
    *("kind", "layer", "head", "index", "coefficient", "negative"),
    *("end", "acts", "place", "token", "token_id", "logit"),
)
INTERVENTIONS_COLUMNS = ("condition", "id", "relation", "rank", "prob", "logprob")
_DROPS = ("mrr_drop", "prob_drop", "logprob_drop")
COMPARISON_COLUMNS = (
    *("condition", "relation", "n", "mrr", "prob", "logprob", *_DROPS),
    *(f"{drop}_{end}" for drop in _DROPS for end in ("low", "high")),
)
BLOCK = 1 << 22  # characters of the table that are turned into columns at a time
GAIN_BLOCK = 256  # sentences whose gains of a layer are read at a time

Array = np.ndarray[Any, Any]
Row = tuple[object, ...]


def number(value: float) -> str:
    """A float32 in decimal: nine digits give every one of them back; "" for NaN."""
    return "" if value != value else f"{value:.9g}"


# --- sentences -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One row of targets.csv: a sentence, its answer's first token, and how the model knew it.

    `rank` is 1 + the number of tokens with a larger logit; `logprob` is in nats. `kept`: the
    comparison takes the sentence in (methods B7).
    """

    id: str
    relation: str
    target: str  # the token as text
    target_id: int
    n_answer_tokens: int
    n_tokens: int
    rank: int
    prob: float
    logprob: float
    kept: bool
    answer: str = ""  # of several right answers the one that the target begins


_TARGETS = tuple(f.name for f in fields(Target))


def targets_bytes(targets: Iterable[Target]) -> bytes:
    """targets.csv; the column `answer` is there if a sentence has several right answers."""
    rows = list(targets)
    names = _TARGETS if any(t.answer for t in rows) else _TARGETS[:-1]

    def cell(value: object) -> object:
        if isinstance(value, bool):
            return int(value)
        return number(value) if isinstance(value, float) else value

    return csv_bytes(names, ([cell(getattr(t, name)) for name in names] for t in rows))


def read_targets(path: Path) -> list[Target]:
    """The rows of a targets.csv, in the file's order."""
    found = []
    for row in read_csv(require(path, MADE_BY), _TARGETS[:-1]):
        whole = {n: row.whole(n) for n in ("target_id", "n_answer_tokens", "n_tokens", "rank")}
        real = {name: row.finite(name) for name in ("prob", "logprob")}
        text = {name: row[name] for name in ("id", "relation", "target")}
        answer = row.get("answer") or ""
        found.append(Target(**text, **whole, **real, kept=row.flag("kept"), answer=answer))  # type: ignore[arg-type]
    if not found:
        raise RelneuronError(
            f"{path} has no row", f"make it again with: relneuron {MADE_BY} --force"
        )
    return found


# --- the table of scores ---------------------------------------------------------------------


def best_first(scores: Array, top: int | None = None) -> Array:
    """Flat places (K,) of the `top` highest scores (default: all), NaN left out.

    Of equal scores the later place comes first, as the published method ranks them (methods B3).
    """
    flat = scores.reshape(-1)
    places = np.flatnonzero(flat == flat)
    if top is not None and top < places.size:
        # All that can be among the best, before anything is sorted.
        least = np.partition(flat[places], places.size - top)[places.size - top]
        places = places[flat[places] >= least]
    order = np.lexsort((-places, -flat[places]))
    result: Array = places[order[:top]]
    return result


def rows_text(rows: Sequence[Row]) -> str:
    """Rows of a csv as text, without a header."""
    return csv_bytes([str(cell) for cell in rows[0]], rows[1:]).decode() if rows else ""


def table_pieces(name: str, texts: Iterable[str]) -> Iterator[bytes]:
    """attributions.csv or .parquet from the texts of its rows, in their order, some at a time."""
    if name.endswith(".csv"):
        yield csv_bytes(ATTRIBUTIONS, ())
        for text in texts:
            yield text.encode()
        return
    import pyarrow
    import pyarrow.parquet

    types = dict.fromkeys(ATTRIBUTIONS, pyarrow.int32())
    types |= {"id": pyarrow.string(), "kind": pyarrow.string(), "score": pyarrow.float32()}
    sink = Sink()
    with pyarrow.parquet.ParquetWriter(sink, pyarrow.schema(types.items())) as writer:
        for block in _blocks(texts):
            columns = zip(*csv.reader(io.StringIO(block, newline="")), strict=True)
            arrays = [
                pyarrow.array([_value(name, cell) for cell in column], types[name])
                for name, column in zip(ATTRIBUTIONS, columns, strict=True)
            ]
            writer.write_table(pyarrow.table(arrays, ATTRIBUTIONS))
            yield sink.taken()
    yield sink.taken()


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    """Texts joined to blocks of at least BLOCK characters, so that few rows are objects at once."""
    waiting: list[str] = []
    n_waiting = 0
    for text in texts:
        waiting.append(text)
        n_waiting += len(text)
        if n_waiting >= BLOCK:
            yield "".join(waiting)
            waiting.clear()
            n_waiting = 0
    if n_waiting:
        yield "".join(waiting)


def _value(name: str, cell: str) -> object:
    if name in ("id", "kind"):
        return cell_text(cell)
    if not cell:
        return None
    return float(cell) if name == "score" else int(cell)


def read_attributions(folder: Path) -> Iterator[Cells]:
    """The rows of a folder's attributions.csv or .parquet, each cell as text."""
    path = next((folder / name for name in TABLES if (folder / name).exists()), folder / TABLES[0])
    if path.suffix == ".parquet":
        need(f"reading {path}", "pyarrow")
    yield from read_table(require(path, MADE_BY), ATTRIBUTIONS, _text)


def _text(cell: object) -> str:
    return number(cell) if isinstance(cell, float) else str(cell)


# --- gains -----------------------------------------------------------------------------------


class GainFile:
    """gains.safetensors while it is filled: `ffn.<layer>` (N, F) float32, a memory map each.

    F is that of the layer; of a mixture of E experts of F neurons E * F and more, most of them zero
    as a token is sent to few of the experts: 4 N bytes a neuron, all the same, are reserved. Its
    metadata hold `about`, whose `ids` are the sentences of the rows.
    """

    def __init__(self, path: Path, shape: Mapping[str, Any], about: Json) -> None:
        self._maps = list(create_safetensors(path, *_gain_form(shape, about)).values())

    def store(self, rows: Sequence[int], gains: Array) -> None:
        """Write the gains (E, L, F) of the sentences in `rows`, F that of the widest layer."""
        for layer, array in enumerate(self._maps):
            array[list(rows)] = gains[:, layer, : array.shape[1]]

    def digest(self, rows: Sequence[int]) -> str:
        """Of the gains of some sentences as they are in the file."""
        digest = rows_digest(self._maps, rows)
        release(self._maps)
        return digest

    def blocks(self, layer: int) -> Iterator[tuple[slice, Array]]:
        """The gains of a layer, some sentences at a time."""
        array = self._maps[layer]
        for first in range(0, len(array), GAIN_BLOCK):
            rows = slice(first, first + GAIN_BLOCK)
            yield rows, np.array(array[rows])
            release([array])

    def flush(self) -> None:
        for array in self._maps:
            array.flush()


def _gain_form(
    shape: Mapping[str, Any], about: Json
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The tensors of gains.safetensors and its metadata."""
    n = len(about["ids"])
    widths = enumerate(ffn_widths(shape))
    sizes: dict[str, tuple[int, ...]] = {f"ffn.{layer}": (n, width) for layer, width in widths}
    # One key only, as in every file: safetensors writes several in any order.
    return sizes, {GAIN_ROWS: json.dumps(about, ensure_ascii=False)}


def gains_bytes(shape: Mapping[str, Any], about: Json) -> int:
    """The size of gains.safetensors."""
    return zeros_bytes(*_gain_form(shape, about))


def read_gains(
    path: Path, shape: Mapping[str, Any], n_sentences: int
) -> Iterator[tuple[int, Array]]:
    """(layer, gains (N, F) float32) of gains.safetensors, one layer at a time."""
    for layer, width in enumerate(ffn_widths(shape)):
        # Opened again for each layer: what was read of an open file stays in memory.
        with open_tensors(path, MADE_BY) as file:
            gains = file.get(f"ffn.{layer}", (n_sentences, width))
        yield layer, gains


def ffn_widths(shape: Mapping[str, Any]) -> list[int]:
    """F of each layer, as a file says of a model."""
    return list(shape.get("widths") or [shape["width"]] * shape["layers"])
