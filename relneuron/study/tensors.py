"""Files of tensors as columns, a slice of them in memory: scores, counts, gains, responses.

`folder.Study` calls it with files that were checked. Layers and indices count from zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact import contrast
from relneuron.artifact.chosen import read_name
from relneuron.artifact.counts import BESIDE, RAN, SITES, Counts
from relneuron.artifact.examples import examples_of
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.gains import GAIN_ROWS, ffn_widths
from relneuron.artifact.gains import MADE_BY as ATTRIBUTE
from relneuron.artifact.gradients import Gradients
from relneuron.artifact.histogram import Histogram
from relneuron.artifact.neurons import ATTENTION, Neuron, Shape
from relneuron.artifact.reading import RESPONSE_ROWS, Tensors, open_tensors
from relneuron.methods.gains.rank import mean_gains
from relneuron.study.frames import Array, Names, check_size
from relneuron.texts.tokens import token_text

RECORD = "record MODEL prompts.jsonl -o DIR"
_SITES = (*SITES, *ATTENTION, *contrast.SITES)  # the order of the rows
_DTYPES = ("F32", "F64", "I64")
# Of a table of gains a block of columns is in memory at a time: so many bytes of the file.
_BLOCK_BYTES = 32 << 20


def place_of(known: Sequence[str], name: str, what: str, path: Path) -> int:
    """The place of a relation, a group or a prompt among the rows of a file."""
    if name not in known:
        some = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        raise RelneuronError(f"{path} has no {what} {name!r}", f"it has {some}", 2)
    return list(known).index(name)


def _by_site(names: Sequence[str]) -> dict[str, list[str]]:
    """The statistics of each site, of tensors called <statistic>.<site>."""
    found: dict[str, list[str]] = {}
    for name in names:
        statistic, dot, site = name.partition(".")
        if dot and name not in BESIDE:
            found.setdefault(site, []).append(statistic)
    return {site: found[site] for site in sorted(found, key=_SITES.index)}


def _width(order: Shape | None, layer: int, site: str, width: int) -> int:
    """The neurons that a layer has at a site; what stands behind them in a tensor are none."""
    inner = site if site in ("up", "down", "q", "k", "v", "o") else "gate"
    if order is None or inner not in order.widths:
        return width
    return min(width, order.width(layer, inner))


def _neurons(file: Tensors, row: int, order: Shape | None) -> dict[str, Any]:
    """A row of all tensors (R, L, F), and all (L, F): layer, site, index and each statistic.

    A statistic that is of other sites only is NaN at a site.
    """
    sites = _by_site(file.names)
    statistics = dict.fromkeys(name for found in sites.values() for name in found)
    parts: dict[str, list[Array]] = {name: [] for name in ("layer", "site", "index", *statistics)}
    for number, (site, found) in enumerate(sites.items()):
        values = {name: _plane(file, f"{name}.{site}", row) for name in found}
        n_layers, width = next(iter(values.values())).shape
        inside = [_width(order, layer, site, width) for layer in range(n_layers)]
        layers, index = np.nonzero(np.arange(width) < np.array(inside)[:, None])
        parts["layer"].append(layers.astype(np.int32))
        parts["site"].append(np.full(len(layers), number, np.int8))
        parts["index"].append(index.astype(np.int32))
        for name in statistics:
            here = values[name][layers, index] if name in values else np.full(len(layers), np.nan)
            parts[name].append(here)
    columns: dict[str, Any] = {name: np.concatenate(some) for name, some in parts.items()}
    return columns | {"site": Names(columns["site"], list(sites))}


def _plane(file: Tensors, name: str, row: int) -> Array:
    """(L, F) of a tensor: all of it, or a row of one of several."""
    if file.n_dims(name) == 2:
        whole: Array = file.get(name, (None, None), *_DTYPES)
        return whole
    found: Array = file.get(name, (None, None, None), *_DTYPES, rows=slice(row, row + 1))[0]
    return found


def scores(path: Path, made_by: str, relation: str, order: Shape | None) -> dict[str, Any]:
    """layer, site, index and the scores of all neurons for a relation or a group."""
    with open_tensors(path, made_by, what="file of scores") as file:
        known = file.names_of("relations") or file.names_of("groups")
        return _neurons(file, place_of(known, relation, "relation or group", path), order)


def groups_of(path: Path, kind: type[Counts]) -> list[str]:
    """The groups of a file of counts, or of a contrast."""
    with open_tensors(path, kind.MADE_BY, what=kind.WHAT) as file:
        about = file.about(kind.KEY)
        groups = about.get("groups") if isinstance(about, dict) else None
        if not (isinstance(groups, list) and all(isinstance(name, str) for name in groups)):
            raise file.wrong(f"the groups are {groups}")
        return groups


def counts(
    path: Path, kind: type[Counts], asked: Sequence[str] | None, order: Shape | None
) -> dict[str, Any]:
    """group, layer, site, index, tokens and what was counted of them, of some groups or of all."""
    known = groups_of(path, kind)
    groups = list(known if asked is None else asked)
    rows = [place_of(known, name, "group", path) for name in groups]
    # The other columns take as much as three numbers more.
    n_numbers = path.stat().st_size // 8 // max(1, len(known)) * len(groups)
    check_size(n_numbers, 4 * 8, f"the {len(groups)} groups of {path.name}", "ask for one group")
    parts = [_counted(path, kind, len(known), row, order) for row in rows]
    if not parts:
        raise RelneuronError(f"{path} has no group", f"make it again: relneuron {kind.MADE_BY}")
    sites = parts[0]["site"].names
    codes = [{**part, "site": part["site"].codes} for part in parts]
    columns: dict[str, Any] = {
        name: np.concatenate([part[name] for part in codes]) for name in codes[0]
    }
    group = np.repeat(np.arange(len(rows), dtype=np.int16), [len(part["layer"]) for part in parts])
    columns["site"] = Names(columns["site"], sites)
    return {"group": Names(group, groups), **columns}


def _counted(
    path: Path, kind: type[Counts], n: int, row: int, order: Shape | None
) -> dict[str, Any]:
    with open_tensors(path, kind.MADE_BY, what=kind.WHAT) as file:
        found = _neurons(file, row, order)
        ran = np.broadcast_to(file.get("tokens", (n,), "I64")[row], len(found["layer"]))
        if RAN in file.names:
            of_layers = file.get(RAN, (n, None), "I64", rows=slice(row, row + 1))[0]
            ran = of_layers[found["layer"]]
    about = {name: found.pop(name) for name in ("layer", "site", "index")}
    return {**about, "tokens": ran, **found}


def neuron_of(neuron: Neuron | str, model: Mapping[str, Any]) -> Neuron:
    """A neuron (layer, site, index), also of its name, such as 12.act.345."""
    if isinstance(neuron, str):
        return read_name(neuron, model)
    with suppress(TypeError, ValueError):
        layer, site, index = neuron
        return int(layer), str(site), int(index)
    raise RelneuronError(f"{neuron!r} is no neuron", 'write (12, "act", 345) or "12.act.345"', 2)


def examples(
    path: Path, named: Neuron | str, model: Mapping[str, Any], tokenizer: Any, context: int
) -> dict[str, Any]:
    """A row for each of a neuron's strongest tokens, each of another window, by group.

    layer, site, index, group, rank (1 = the strongest), value, position (of the token in its
    window), token, before and after (up to `context` tokens on either side, as texts), window (how
    many of its group stand before it in the corpus), token_id and text (the whole window). The
    tokenizer is that of the model unless one is given.
    """
    neuron = neuron_of(named, model)
    (found,) = examples_of(path, [neuron])
    if tokenizer is None:
        from relneuron.model.load import load_tokenizer

        tokenizer = load_tokenizer(model["id"], revision=model.get("revision"))

    def text(ids: Array) -> str:
        return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    at = [(one, one.ids, one.position) for one in found]
    return {
        **_only(neuron, len(found)),
        "group": [one.group for one in found],
        "rank": np.array([one.rank for one in found], np.int64),
        "value": np.array([one.value for one in found], np.float32),
        "position": np.array([t for _, _, t in at], np.int64),
        "token": [token_text(tokenizer, one.token) for one in found],
        "before": [text(ids[max(0, t - context) : t]) for _, ids, t in at],
        "after": [text(ids[t + 1 : t + 1 + context]) for _, ids, t in at],
        "window": np.array([one.number for one in found], np.int64),
        "token_id": np.array([one.token for one in found], np.int64),
        "text": [text(ids) for _, ids, _ in at],
    }


def histogram(path: Path, named: Neuron | str, model: Mapping[str, Any]) -> dict[str, Any]:
    """group, bin, low, high and count of a neuron's values, as `Study.histogram` says."""
    neuron = neuron_of(named, model)
    found, site = Histogram.read(path, neuron), neuron[1]
    n, n_bins = len(found.groups), int(found.last[site][0, 0]) + 1
    edges = found.edges(site)[0, 0]
    return {
        **_only(neuron, n * n_bins),
        "group": Names(np.repeat(np.arange(n, dtype=np.int16), n_bins), found.groups),
        "bin": np.tile(np.arange(n_bins), n),
        "low": np.tile(edges[:n_bins], n),
        "high": np.tile(edges[1 : n_bins + 1], n),
        "count": found.count[site][:, 0, 0, :n_bins].reshape(-1),
    }


def _only(neuron: Neuron, n_rows: int) -> dict[str, Any]:
    """layer, site and index of rows that are all of one neuron."""
    layer, site, index = neuron
    return {
        "layer": np.full(n_rows, layer, np.int32),
        "site": Names(np.zeros(n_rows, np.int8), [site]),
        "index": np.full(n_rows, index, np.int32),
    }


def changes(path: Path, order: Shape | None) -> dict[str, Any]:
    """layer, index and the RMS change of every neuron between two models, over all groups."""
    kind = contrast.Contrast
    with open_tensors(path, kind.MADE_BY, what=kind.WHAT) as file:
        rms = file.get(contrast.RMS, (None, None))
    widths = [_width(order, layer, "product", rms.shape[1]) for layer in range(len(rms))]
    columns = _of_layers(widths)
    return {**columns, "rms": rms[columns["layer"], columns["index"]]}


def rows_of(path: Path, made_by: str, key: str) -> list[str]:
    """The ids of a file's rows, as its metadata say."""
    with open_tensors(path, made_by) as file:
        about = file.about(key)
        ids = about.get("ids") if isinstance(about, dict) else None
        if not (isinstance(ids, list) and all(isinstance(name, str) for name in ids)):
            raise file.wrong(f"{key} names no rows")
        return ids


def responses(path: Path, prompt: str, order: Shape) -> dict[str, Any]:
    """layer, site, index and the response of every neuron to one prompt."""
    ids = rows_of(path, RECORD, RESPONSE_ROWS)
    row = place_of(ids, prompt, "prompt", path)
    blocks = list(order.blocks())
    sites = list(order.widths)
    with open_tensors(path, RECORD) as file:
        values = [
            file.get(f"{site}.{layer}", (len(ids), width), rows=slice(row, row + 1))[0]
            for layer, site, width in blocks
        ]
    widths = [width for *_, width in blocks]
    return {
        "layer": np.repeat(np.array([layer for layer, *_ in blocks], np.int32), widths),
        "site": Names(
            np.repeat(np.array([sites.index(site) for _, site, _ in blocks], np.int8), widths),
            sites,
        ),
        "index": np.concatenate([np.arange(width, dtype=np.int32) for width in widths]),
        "response": np.concatenate(values),
    }


def _of_layers(widths: Sequence[int]) -> dict[str, Array]:
    """layer and index of the neurons of layers of these widths."""
    return {
        "layer": np.repeat(np.arange(len(widths), dtype=np.int32), widths),
        "index": np.concatenate([np.arange(width, dtype=np.int32) for width in widths]),
    }


def gains_of(path: Path, sentence: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """layer, index and the gain of every FFN neuron for one sentence, in nats."""
    ids, widths = rows_of(path, ATTRIBUTE, GAIN_ROWS), ffn_widths(model)
    row = place_of(ids, sentence, "sentence", path)
    with open_tensors(path, ATTRIBUTE) as file:
        values = [
            file.get(f"ffn.{layer}", (len(ids), width), rows=slice(row, row + 1))[0]
            for layer, width in enumerate(widths)
        ]
    return {**_of_layers(widths), "gain": np.concatenate(values)}


def gains(path: Path, relations: Mapping[str, str], model: Mapping[str, Any]) -> dict[str, Any]:
    """relation, layer, index and the mean gain over the relation's sentences, in nats.

    `relations`: of each sentence that counts, by id. A block of columns is in memory at a time.
    """
    ids, widths = rows_of(path, ATTRIBUTE, GAIN_ROWS), ffn_widths(model)
    names = sorted({*relations.values()})
    check_size(
        len(names) * sum(widths),
        16,
        f"the gains of {len(names)} relations",
        "ask for one sentence: gains_of(id)",
    )
    group = np.array([names.index(relations[one]) if one in relations else -1 for one in ids])
    means = [
        np.concatenate(list(_means(path, layer, width, group, len(names))), axis=1)
        for layer, width in enumerate(widths)
    ]
    columns: dict[str, Any] = {
        name: np.tile(values, len(names)) for name, values in _of_layers(widths).items()
    }
    relation = Names(np.repeat(np.arange(len(names), dtype=np.int16), sum(widths)), names)
    return {"relation": relation, **columns, "gain": np.concatenate(means, axis=1).reshape(-1)}


def _means(path: Path, layer: int, width: int, group: Array, n: int) -> Iterator[Array]:
    step = max(1, _BLOCK_BYTES // (4 * max(1, len(group))))
    for start in range(0, width, step):
        part = (slice(None), slice(start, min(start + step, width)))
        # Opened again for each block: what was read of an open file stays in memory.
        with open_tensors(path, ATTRIBUTE) as file:
            yield mean_gains(file.get(f"ffn.{layer}", (len(group), width), rows=part), group, n)


def gradients(path: Path, method: str, sentence: str) -> dict[str, Any]:
    """layer, index and the score of every FFN neuron for one sentence."""
    found = Gradients.read(path, method)
    row = place_of(found.ids, sentence, "sentence", path)
    _, values = next(found.scores([row]))
    return {**_of_layers([found.width] * found.n_layers), "score": values.reshape(-1)}
