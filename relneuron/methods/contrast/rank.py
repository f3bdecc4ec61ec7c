"""The `identify` stage on a contrast: two models' differences in, sets of neurons out.

`relneuron identify` calls it for a folder with contrast.safetensors. It needs no model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from relneuron.artifact.contrast import DIFFERENCE, MADE_BY, NAME, RMS, Contrast
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    real_path,
    refuse_output,
    require,
    sha256,
    writing,
)
from relneuron.artifact.manifest import Manifest, checked, json_digest, locked
from relneuron.artifact.neurons import NeuronFile, ScoredNeuron, Shape, check_neurons
from relneuron.artifact.stage import command, placed
from relneuron.methods.contrast.choices import ChangeOptions

METHOD = "contrast"
ALL = "contrast"  # the set of a ranking by the tokens of all groups
SCORE = "root mean square of a - b over the tokens: high is best"
BESIDE = ("within", "without")  # options that name another neurons.json

Array = np.ndarray[Any, Any]


def change(contrast: Contrast, where: str) -> Array:
    """S (L, F) float64 of a contrast (`Contrast.rms`), all finite."""
    if not contrast.tokens.sum():
        raise RelneuronError(f"{where} has no token", "contrast some prompts, or other --groups")
    found = contrast.rms()
    if contrast.arrays[f"n_nonfinite.{DIFFERENCE}"].any() or not np.isfinite(found).all():
        raise RelneuronError(
            f"{where}: some differences were not finite",
            "contrast with --dtype float32 or bfloat16",
        )
    return found


def ranking(score: Array, able: Array) -> Array:
    """The flat places (N,) of the `able` neurons (L, F), the largest change S first.

    arXiv 2406.14144 ranks over all layers at once and leaves ties open. Scores are compared as
    float32, and of equal ones the lower place l F + i comes first.
    """
    flat = score.astype(np.float32).reshape(-1)
    places = np.flatnonzero(able)
    ranked: Array = places[np.argsort(-flat[places], kind="stable")]
    return ranked


@dataclass(frozen=True)
class _Ranked:
    """Of a group, or of all, the scores and the places, best first."""

    score: Array
    places: Array

    def neurons(self, first: int, last: int) -> list[ScoredNeuron]:
        """Those of the ranks `first` to `last`, counted from 0, the last one left out.

        One that is the same in both models is in no set.
        """
        width, flat = self.score.shape[1], self.score.astype(np.float32).reshape(-1)
        chosen = self.places[first:last]
        return [
            (place // width, "gate", place % width, float(flat[place]))
            for place in chosen[flat[chosen] > 0].tolist()
        ]


def identify_contrast_inputs(folder: Path, options: ChangeOptions) -> Json:
    """What the stage depends on, for the manifest."""
    described, path = Manifest(folder).data, require(folder / NAME, MADE_BY)
    return {
        "digests": {NAME: sha256(path)} | {name: sha256(p) for name, p in _beside(options)},
        "contrast": json_digest(described["stages"].get("contrast", {}).get("inputs")),
        "method": METHOD,
        # Of a file beside only its content decides, whatever it is called.
        **{k: v for k, v in options.recorded().items() if k not in BESIDE},
    }


def identify_contrast(
    folder: Path, output: Path, options: ChangeOptions | None = None, *, force: bool = False
) -> NeuronFile:
    """Choose the neurons that differ most between the models of `folder`'s contrast.

    The set `contrast` has the ranks from_rank + 1 to from_rank + K of `ranking`: K is `top`, or
    round(N rate) of the N neurons that may be ranked, those of no layer of `without_layers`, in a
    set of `within` and in none of `without`. With `sizes` there is a set `contrast@K` of each size,
    and with `by_group` those of each group, named after it, by its own tokens. Neurons are named by
    the site `gate`, since to zero a gate zeroes all that a neuron writes.

    Beside neurons.json stands scores.safetensors (beside x.json x.scores.safetensors) with `rms`
    (R, L, F) float32, a row for each name in the metadata's `sets`, before anything is left out;
    NaN where a layer has fewer neurons.
    """
    options = options or ChangeOptions()
    refuse_output(output, "identify", force)
    path = folder / NAME
    described, manifest = Manifest(folder).data, Manifest(output.parent)
    contrast, model = read_contrast(folder, described)
    there, able = _able(model, options)
    inputs = identify_contrast_inputs(folder, options)
    ranked = _ranked(contrast, there, able, options, str(path))
    n_able = int(able.sum())
    sizes = options.sizes or (options.top or round(n_able * options.rate),)
    sets, short = _sets(ranked, sizes, options, n_able)
    for line in short:
        warnings.warn(line, stacklevel=2)
    selection: Json = {"score": SCORE, "site": "product", "ranked": n_able, "sizes": list(sizes)}
    selection |= {"from_rank": options.from_rank, "without_layers": list(options.without_layers)}
    selection |= {"groups": contrast.groups if options.groups is None else list(options.groups)}
    result = NeuronFile(model, METHOD, sets, selection)
    with locked(output.parent):
        if real_path(output.parent) != real_path(folder):
            kept = ("versions", "model", "model_b", "dtype", "fallbacks")
            manifest.describe(**{key: described[key] for key in kept if key in described})
        # A second choice in a folder leaves the scores of the first one as they are.
        stem = "" if output.name == "neurons.json" else f"{output.stem}."
        scores = output.parent / f"{stem}scores.safetensors"
        made_by = command(
            "identify",
            *(placed(folder, output.parent), "-o", placed(output, output.parent)),
            *("--method", METHOD, *_words(options, output.parent)),
        )
        with writing("identify", output.parent, [scores, output]):
            atomic_write(scores, _scores(ranked, there))
            result.write(output)
            manifest.finish(
                "identify",
                inputs,
                [scores, output],
                reads=[path, *(p for _, p in _beside(options))],
                top=max(sizes),
                share_of_neurons=max(sizes) / n_able,
                commands=made_by,
            )
    return result


def rank(
    folder: Path,
    output: Path,
    options: ChangeOptions,
    *,
    method: str,
    force: bool,
    quiet: bool,
) -> Iterator[str]:
    """`identify --method contrast`: says the sets and the change at their ends."""
    chosen = identify_contrast(folder, output, options, force=force)
    yield f"{chosen.selection['ranked']:,} neurons ranked by their change"
    for name, neurons in chosen.sets.items():
        ends = f", S from {neurons[0][3]:.4g} to {neurons[-1][3]:.4g}" if neurons else ""
        yield f"{name}: {len(neurons):,} neurons{ends}"


def _words(options: ChangeOptions, folder: Path) -> list[str]:
    """The options as the recorded command takes them, files of the folder named from there."""
    paths = {str(path): placed(path, folder) for _, path in _beside(options)}
    return [paths.get(word, word) for word in options.words()]


def _beside(options: ChangeOptions) -> list[tuple[str, Path]]:
    found = ((name, getattr(options, name)) for name in BESIDE)
    return [(name, path) for name, path in found if path is not None]


# --- what is ranked --------------------------------------------------------------------------


def read_contrast(folder: Path, described: Json) -> tuple[Contrast, Json]:
    """The contrast, which must be as it was written and fit the model; and the model."""
    path = require(checked(folder / NAME), MADE_BY)
    model = described.get("model")
    if model is None:
        raise RelneuronError(
            f"{folder} has no contrast in its manifest",
            f"make it with: relneuron {MADE_BY} --force",
        )
    contrast = Contrast.read(path)
    shape = contrast.arrays[f"count.{DIFFERENCE}"].shape[1:]
    try:
        order = Shape.of(model)
        widths = [order.width(layer, "gate") for layer in range(order.layers)]
        expected = (len(widths), order.widths["gate"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise RelneuronError(
            f"{folder}: the manifest does not say the shape of the model ({error!r})",
            f"make it again with: relneuron {MADE_BY} --force",
        ) from error
    if shape != expected:
        raise RelneuronError(
            f"{path} is of the shape {shape}, its model has {expected}",
            "contrast again: the file is of another model",
        )
    return contrast, model


def _able(model: Json, options: ChangeOptions) -> tuple[Array, Array]:
    """(L, F) bool: the neurons that there are, and those of them that may be ranked."""
    order = Shape.of(model)
    there = np.zeros((order.layers, order.widths["gate"]), bool)
    for layer in range(order.layers):
        there[layer, : order.width(layer, "gate")] = True
    kept = kept_layers(order.layers, options.without_layers)
    able = np.zeros_like(there)
    able[kept] = there[kept]
    for name, path in _beside(options):
        neurons = NeuronFile.read(checked(path))
        neurons.check_model(model)
        named = np.zeros_like(there)
        for rows in neurons.sets.values():
            for layer, site, index in check_neurons(rows, model):
                named[layer, index] |= site in ("gate", "up")
        able &= named if name == "within" else ~named
    if not able.any():
        raise RelneuronError("no neuron is left to rank", "leave out --within or --without", 2)
    return there, able


def kept_layers(n_layers: int, without: Sequence[int]) -> list[int]:
    """The layers that are not left out, of which there must be one."""
    wrong = [layer for layer in without if not 0 <= layer < n_layers]
    if wrong:
        raise RelneuronError(
            f"--without-layers {wrong[0]}: there are the layers 0 to {n_layers - 1}",
            "layers count from zero",
            2,
        )
    kept = [layer for layer in range(n_layers) if layer not in without]
    if not kept:
        raise RelneuronError("--without-layers leaves no layer", "leave out fewer", 2)
    return kept


def _ranked(
    contrast: Contrast, there: Array, able: Array, options: ChangeOptions, where: str
) -> dict[str, _Ranked]:
    """By the name of their set the rankings: one, or one for each group that has tokens."""
    asked = contrast.groups if options.groups is None else list(options.groups)
    unknown = [name for name in asked if name not in contrast.groups]
    if unknown or len({*asked}) < len(asked):
        cause = f"no group {unknown[0]!r}" if unknown else "a group that --groups names twice"
        raise RelneuronError(
            f"{where} has {cause}", f"its groups are {', '.join(contrast.groups)}", 2
        )
    chosen = contrast.take(asked)
    parts = {ALL: chosen}
    if options.by_group:
        empty = [g for g, n in zip(asked, chosen.tokens, strict=True) if not n]
        for name in empty:
            warnings.warn(f"group {name!r} has no token: it is left out", stacklevel=3)
        parts = {name: chosen.take([name]) for name in asked if name not in empty} or parts
    found = {}
    for name, part in parts.items():
        score = change(part, f"{where}, group {name!r}" if options.by_group else where)
        found[name] = _Ranked(score, ranking(score, able))
    if not any((one.score[able] > 0).any() for one in found.values()):
        raise RelneuronError(
            f"{where}: no neuron differs between the models on these tokens",
            "contrast two models that differ, or rank other layers",
        )
    return found


def _sets(
    ranked: Mapping[str, _Ranked], sizes: Sequence[int], options: ChangeOptions, n_able: int
) -> tuple[dict[str, list[ScoredNeuron]], list[str]]:
    """The sets by name, and a line for each that has fewer neurons than its size."""
    first = options.from_rank
    if first >= n_able:
        raise RelneuronError(
            f"--from-rank {first}, but {n_able:,} neurons are ranked",
            f"use a number below {n_able}",
            2,
        )
    if not max(sizes):
        raise RelneuronError(
            f"--rate {options.rate:g} of {n_able} neurons is none",
            "use --top 1, or a higher one",
            2,
        )
    sets: dict[str, list[ScoredNeuron]] = {}
    short = []
    for name, one in ranked.items():
        for size in sizes:
            key = f"{name}@{size}" if options.sizes else name
            if key in sets:
                raise RelneuronError(f"two sets are named {key}", "rename the groups", 2)
            sets[key] = one.neurons(first, first + size)
            if len(sets[key]) < size:
                short.append(f"{key}: {len(sets[key]):,} neurons, there are no more that change")
    return sets, short


def _scores(ranked: Mapping[str, _Ranked], there: Array) -> bytes:
    rows = [np.where(there, one.score, np.nan).astype(np.float32) for one in ranked.values()]
    # One key only: safetensors writes several in an order that changes from run to run.
    text = json.dumps([*ranked], ensure_ascii=False)
    data: bytes = save({RMS: np.stack(rows)}, {"sets": text})
    return data
