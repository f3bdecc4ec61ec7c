"""Files of other authors: the neurons of facts as knowledge neurons and QRNCA write them.

The commands `import` and `export` call it. Knowledge neurons: JSON, `{uuid: [[layer, index], ...]}`
(EleutherAI/knowledge-neurons). QRNCA: a JSON object a line, `{"uuid", "neurons": [[layer, index],
...], "scores"}`, or before common neurons are taken off with "attr_scores" (tigerchen52/qrneuron).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    refuse_output,
    refuse_overwrite,
    sha256,
    writing,
)
from relneuron.artifact.manifest import Manifest, locked
from relneuron.artifact.neurons import NeuronFile, ScoredNeuron, check_neurons
from relneuron.artifact.prompts import read_prompts
from relneuron.artifact.reading import parse_json, read_json, read_lines
from relneuron.artifact.stage import command, placed
from relneuron.model.config import config_shape
from relneuron.texts.queries import queries_bytes, uuids

METHODS = {".json": "knowledge_neurons", ".jsonl": "qrnca"}
SUFFIXES = tuple(METHODS)
_SCORES = ("scores", "attr_scores")
_FIX = {
    ".json": "give {uuid: [[layer, index], ...]}, as knowledge neurons are written",
    ".jsonl": 'give {"uuid", "neurons": [[layer, index], ...], "scores"} a line, as of QRNCA',
}


def read_facts(path: Path, shape: Mapping[str, Any]) -> dict[str, list[ScoredNeuron]]:
    """The neurons of each fact, by its uuid, at site gate; without scores each has 0.

    Raises RelneuronError that names the fact for anything else than the form of the file's suffix,
    and for neurons that a model of this `shape` does not have.
    """
    fix = _FIX[path.suffix]
    if not path.is_file():
        raise RelneuronError(f"{path} does not exist", fix, 2)
    found: dict[str, list[ScoredNeuron]] = {}
    for where, key, neurons, scores in _records(path, fix):
        if not isinstance(key, str) or not key or key in found:
            raise RelneuronError(f"{where}: a fact without a name of its own", fix)
        if not isinstance(neurons, list) or not all(map(_is_place, neurons)):
            raise RelneuronError(f"{where}: its neurons are no list of [layer, index]", fix)
        if scores is None:
            scores = [0.0] * len(neurons)
        is_one_each = isinstance(scores, list) and len(scores) == len(neurons)
        if not is_one_each or not all(type(s) in (int, float) for s in scores):
            raise RelneuronError(f"{where}: its scores are not one a neuron", fix)
        rows = [(layer, "gate", i, float(s)) for (layer, i), s in zip(neurons, scores, strict=True)]
        try:
            check_neurons(rows, shape)
        except RelneuronError as error:
            raise RelneuronError(f"{where}: {error.cause}", error.fix) from error
        found[key] = rows
    if not found:
        raise RelneuronError(f"{path} holds no fact", fix)
    return found


def _records(path: Path, fix: str) -> Iterator[tuple[str, Any, Any, Any]]:
    """Where a fact stands, its uuid, its neurons and their scores."""
    if path.suffix == ".json":
        data = read_json(path, "JSON file of knowledge neurons")
        if not isinstance(data, dict):
            raise RelneuronError(f"{path} is no object", fix)
        yield from ((f"{path}: {key!r}", key, neurons, None) for key, neurons in data.items())
        return
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        record = parse_json(line, where, fix)
        if not isinstance(record, dict):
            raise RelneuronError(f"{where} is no object", fix)
        scores = next((record[name] for name in _SCORES if name in record), None)
        yield where, record.get("uuid"), record.get("neurons"), scores


def _is_place(row: object) -> bool:
    return isinstance(row, list) and [type(x) for x in row] == [int, int]


def import_facts(path: Path, model: str, output: Path, *, force: bool = False) -> NeuronFile:
    """Make `output` a neurons.json with a set a fact; of `model` only the configuration is read."""
    refuse_output(output, "import", force)
    shape = config_shape(model)
    chosen = NeuronFile(shape, METHODS[path.suffix], read_facts(path, shape), {})
    folder = output.parent
    with locked(folder), writing("import", folder, [output]):
        chosen.write(output)
        words = (placed(path, folder), "-o", placed(output, folder))
        Manifest(folder).finish(
            "import",
            {"file": sha256(path)},
            [output],
            reads=[],
            commands=command("import", *words, model=model),
        )
    return chosen


def facts_bytes(neurons: NeuronFile, suffix: str) -> bytes:
    """The sets in the form of the suffix; a fact's uuid is what follows its relation's name."""
    found: Json = dict(zip(uuids(list(neurons.sets)), neurons.sets.values(), strict=True))
    places = {key: [[layer, index] for layer, _, index, _ in s] for key, s in found.items()}
    if suffix == ".json":
        return (json.dumps(places, ensure_ascii=False) + "\n").encode()
    lines = (
        {"uuid": key, "neurons": places[key], "scores": [score for *_, score in rows]}
        for key, rows in found.items()
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def export_facts(neurons: NeuronFile, output: Path, *, force: bool = False) -> None:
    """Write the sets in the form of `output`'s suffix; neurons of the site down have none."""
    if any(site not in ("gate", "up") for rows in neurons.sets.values() for _, site, *_ in rows):
        raise RelneuronError(
            "some neurons are at no site gate or up: a layer and an index do not say which",
            "choose neurons with knowledge_neurons, qrnca, query_localization or logprob_gain",
        )
    _write(output, facts_bytes(neurons, output.suffix), force)


def export_queries(prompts: Path, output: Path, *, force: bool = False) -> None:
    """Write a prompts.jsonl as facts with their sentences, which both authors' code reads."""
    if output.suffix != ".json":
        raise RelneuronError(f"{output} does not end in .json", "prompts become a .json", 2)
    _write(output, queries_bytes(read_prompts(prompts)), force)


def _write(output: Path, data: bytes, force: bool) -> None:
    refuse_overwrite(output, force)
    with locked(output.parent):
        atomic_write(output, data)
