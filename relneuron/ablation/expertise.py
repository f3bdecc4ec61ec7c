"""What every neuron's responses are on a concept's positives and negatives, and selfcond's tables.

`ablate` sets neurons to these values, `export` writes them as expertise.csv; no model is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from relneuron.ablation.conditions import scores_beside
from relneuron.ablation.options import FORCED
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    csv_bytes,
    json_bytes,
    refuse_output,
    require,
    writing,
)
from relneuron.artifact.manifest import Manifest, checked, locked
from relneuron.artifact.neurons import ATTENTION, SITES, NeuronFile, Shape
from relneuron.artifact.prompts import RECORDED, read_prompts
from relneuron.artifact.reading import open_tensors, read_csv

VALUES = ("off_mean", "off_p50", "on_p50", "on_p90")
COLUMNS = ("ap", *VALUES, "layer", "unit", "uuid", "concept", "group")
THRESHOLDS = np.linspace(0.5, 1.0, 501)  # of neurons_at_ap
GROUP = "relation"  # of what its file gives no group
# Where a recording does not say it: the names of a Llama's modules.
_MODULES = {site: [f"model.layers.{{}}.mlp.{site}_proj", 0] for site in SITES}

Array = np.ndarray[Any, Any]


class Rows(NamedTuple):
    """The rows of responses.safetensors that a concept is found with, and its group."""

    positive: Array
    negative: Array
    group: str


def read_rows(folder: Path) -> dict[str, Rows]:
    """By relation or concept, by labels.csv and prompts.jsonl of `folder`; "" has all rows."""
    labels = require(checked(folder / "labels.csv"), "identify DIR -o DIR/neurons.json --method ap")
    prompts = [p for p in read_prompts(checked(folder / "prompts.jsonl")) if p.split in RECORDED]
    row_of = {prompt.id: row for row, prompt in enumerate(prompts)}
    found: dict[str, tuple[list[int], list[int]]] = {}
    for line in read_csv(labels, ("relation", "id", "label")):
        row = row_of.get(line["id"])
        if row is None or line["label"] not in ("0", "1"):
            raise RelneuronError(
                f"{labels}: the prompt {line['id']} with the label {line['label']} is not recorded",
                "identify the neurons again",
            )
        negative, positive = found.setdefault(line["relation"], ([], []))
        (positive if line["label"] == "1" else negative).append(row)
    groups = {prompt.relation: prompt.group for prompt in prompts}
    rows = {
        name: Rows(np.array(positive), np.array(negative), groups.get(name) or GROUP)
        for name, (negative, positive) in found.items()
        if positive and negative
    }
    used = np.unique([row for sides in found.values() for side in sides for row in side])
    return rows | {"": Rows(used, used, GROUP)}


def statistic(values: Array, name: str) -> Array:
    """`off_mean` or a percentile of responses (n, K): (K,) float32, as numpy interpolates it."""
    wide = values.astype(np.float64)
    is_mean = name.endswith("mean")
    found: Array = wide.mean(axis=0) if is_mean else np.percentile(wide, int(name[-2:]), axis=0)
    return found.astype(np.float32)


def read_values(
    folder: Path, rows: Mapping[str, Rows], names: Sequence[str], shape: Mapping[str, int]
) -> Iterator[tuple[int, str, dict[str, dict[str, Array]]]]:
    """(layer, site, {concept: {name: (K,) float32}}) of recorded responses, block by block."""
    path = require(checked(folder / "responses.safetensors"), "record MODEL prompts.jsonl -o DIR")
    last = max(int(part.max()) for own in rows.values() for part in own[:2])
    for layer, site, width in Shape.of(shape).blocks():
        with open_tensors(path, "record MODEL prompts.jsonl -o DIR") as file:
            values = file.get(f"{site}.{layer}", (None, width))
        if last >= len(values):
            raise RelneuronError(
                f"{path} has {len(values)} rows, prompts.jsonl more recorded prompts",
                "record these prompts again",
            )
        yield (
            layer,
            site,
            {
                concept: {
                    name: statistic(
                        values[own.positive if name.startswith("on_") else own.negative], name
                    )
                    for name in names
                }
                for concept, own in rows.items()
            },
        )


def forced_values(folder: Path, mode: str, shape: Mapping[str, int]) -> dict[str, Array]:
    """The value (M,) that `ablate --mode p50|p90|off_mean` gives each neuron, by concept.

    Of the concept's positives (p50, p90) or negatives (off_mean); "" of all recorded prompts, for
    what belongs to no concept. Neurons in the order (layer, site, index).
    """
    rows, name = read_rows(folder), FORCED[mode]
    parts: dict[str, list[Array]] = {concept: [] for concept in rows}
    for _, _, found in read_values(folder, rows, (name,), shape):
        for concept, values in found.items():
            parts[concept].append(values[name])
    return {concept: np.concatenate(values) for concept, values in parts.items()}


# --- selfcond's files ------------------------------------------------------------------------


def export_expertise(source: Path, output: Path, *, force: bool = False) -> list[Path]:
    """Write expertise.csv and expertise_info.json of `source`, a neurons.json or its folder.

    A row a neuron, in the authors' order: by the name of its module, then its unit. An `output`
    that ends in .csv holds all concepts one after the other, the info beside it of one concept or
    a list; else it is a folder, GROUP/CONCEPT/expertise/ in it as the authors have it.
    """
    neurons = source / "neurons.json" if source.is_dir() else source
    folder = neurons.parent
    known = Manifest(folder).data
    rows = {name: own for name, own in read_rows(folder).items() if name}
    if not rows:
        raise RelneuronError(f"{folder} has no ranked relation", "identify neurons there first")
    scores = _read_scores(scores_beside(neurons))
    shape = NeuronFile.read(checked(neurons)).model
    if output.suffix == ".csv":
        pairs = [(output, output.with_name(f"{output.stem}_info.json"))]
    else:
        places = [
            output / _part(own.group) / _part(name) / "expertise" for name, own in rows.items()
        ]
        pairs = [(place / "expertise.csv", place / "expertise_info.json") for place in places]
    files = [path for pair in pairs for path in pair]
    place = output.parent if output.suffix == ".csv" else output
    for path in files:
        refuse_output(path, "export", force, place)
    units = _units(known.get("modules") or _MODULES, shape)
    found: dict[str, dict[tuple[int, str], dict[str, Array]]] = {name: {} for name in rows}
    with locked(place, *(path.parent for path in files)):
        for layer, site, values in read_values(folder, rows, VALUES, shape):
            for name in rows:
                found[name][layer, site] = {"ap": scores[name][site][layer]} | values[name]
        tables, infos = [], []
        for name, own in rows.items():
            table, info = _expertise(name, own.group, found.pop(name), units)
            tables.append(table)
            infos.append(info)
        if output.suffix == ".csv":
            rest = (row for table in tables for row in table)
            data = [csv_bytes(COLUMNS, rest), json_bytes(infos[0] if len(infos) == 1 else infos)]
        else:
            made = zip(tables, infos, strict=True)
            data = [part for t, i in made for part in (csv_bytes(COLUMNS, t), json_bytes(i))]
        with writing("export", place, files):
            for path, part in zip(files, data, strict=True):
                atomic_write(path, part)
    return files


def _part(name: str) -> str:
    """A name as a part of a path: no part of it leaves the folder."""
    text = quote(name, safe=" ")
    return text.replace(".", "%2E") if not text.strip(". ") else text


def _read_scores(path: Path) -> dict[str, dict[str, Array]]:
    """AP by relation and site, (L, K) each."""
    with open_tensors(checked(path), "identify DIR -o DIR/neurons.json --method ap") as file:
        names = file.names_of("relations")
        sites = [site for site in (*SITES, *ATTENTION) if f"ap.{site}" in file.names] or SITES
        scores = {site: file.get(f"ap.{site}", (len(names), None, None)) for site in sites}
    return {name: {s: scores[s][row] for s in sites} for row, name in enumerate(names)}


def _units(
    modules: Mapping[str, Sequence[Any]], shape: Mapping[str, Any]
) -> list[tuple[str, int, tuple[int, str]]]:
    """(response name, first unit, (layer, site)) of every block, in the authors' order."""
    units = [
        (f"{str(modules[site][0]).format(layer)}:0", int(modules[site][1]), (layer, site))
        for layer, site, _ in Shape.of(shape).blocks()
    ]
    return sorted(units)


def _expertise(
    concept: str,
    group: str,
    found: Mapping[tuple[int, str], Mapping[str, Array]],
    units: Sequence[tuple[str, int, tuple[int, str]]],
) -> tuple[list[tuple[Any, ...]], Json]:
    """The rows of a concept's expertise.csv, and its expertise_info.json."""
    rows: list[tuple[Any, ...]] = []
    for layer, first, block in units:
        own = found[block]
        # As strings: the shortest that are read as the same float32.
        cells = [own[name].astype(str).tolist() for name in COLUMNS[: 1 + len(VALUES)]]
        start = len(rows)
        rows += [
            (*numbers, layer, first + i, start + i, concept, group)
            for i, numbers in enumerate(zip(*cells, strict=True))
        ]
    ap = np.sort(np.concatenate([own["ap"] for own in found.values()]))
    above = ap.size - np.searchsorted(ap.astype(np.float64), THRESHOLDS, side="right")
    info = {
        "concept": concept,
        "group": group,
        "max_ap": float(ap[-1]),
        "layer_names": list(dict.fromkeys(layer for layer, _, _ in units)),
        "total_neurons": ap.size,
        "neurons_at_ap": {
            f"{t:0.5f}": n for t, n in zip(THRESHOLDS.tolist(), above.tolist(), strict=True)
        },
    }
    return rows, info
