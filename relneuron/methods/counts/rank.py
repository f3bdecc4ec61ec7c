"""The `identify` stage on counts of a corpus: how often neurons are active in, neuron sets out.

`relneuron identify` calls it for a folder with counts.safetensors. It needs no model: it ranks
neurons by the entropy of their activation probability over the groups (LAPE, arXiv 2402.16438),
or by a baseline that needs the same counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from relneuron.artifact.counts import NAME, Counts
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
from relneuron.artifact.modules import is_asked, module_layers, module_shape
from relneuron.artifact.neurons import NeuronFile, ScoredNeuron
from relneuron.artifact.stage import command, placed
from relneuron.methods.counts import METHOD
from relneuron.methods.counts.choose import Choice, choose, sizes
from relneuron.methods.counts.options import CountedOptions, RandomOptions

METHODS = {
    "lape": "entropy of the activation probability over the groups, in nats: low is specific",
    "probability": "activation probability in the group: high is best",
    "mean": "mean activation in the group: high is best",
    "random": "none: drawn at random",
}
OPTIONS: dict[str, type[Any]] = {one.name: one.options for one in METHOD.rankings}
MADE_BY = "count MODEL GROUP=TEXT... -o DIR"

Array = np.ndarray[Any, Any]


def identify_counts_inputs(folder: Path, method: str, options: CountedOptions) -> Json:
    """What the stage depends on, for the manifest."""
    return {
        "digests": {NAME: sha256(require(folder / NAME, MADE_BY))},
        "count": json_digest(Manifest(folder).data["stages"].get("count", {}).get("inputs")),
        "method": method,
        # Where no module was asked for, it is as before there were any.
        **{k: v for k, v in options.recorded().items() if k != "module" or v is not None},
    }


def identify_counts(
    folder: Path,
    output: Path,
    options: CountedOptions | None = None,
    *,
    method: str = "lape",
    force: bool = False,
) -> NeuronFile:
    """Choose each group's neurons from `folder`'s counts and write them to `output`.

    `lape`: the K = round(N top_rate) neurons with the lowest entropy (`top` gives K itself), each
    in the sets of the groups where it is active enough; see `lape.lape` for `filter_rate`
    and `bar_ratio`. The baselines choose K neurons of each group: by activation `probability`, by
    `mean` activation (the counts need moments) or at `random`. `groups` takes some of the groups
    only, in that order; one without tokens is left out with a warning.

    Of counts of several modules `module` names some of them; each is ranked alone, as if it were
    the whole model, and a group's set is those of the modules one behind the other.

    Zeroing a neuron's gate, act or product is the same ablation: a set names the site `gate` for
    all three, else `up` or `down`. Beside neurons.json stands scores.safetensors
    (beside x.json x.scores.safetensors) with
    `lape.<site>` (L, F) float64, the entropy before the filter in nats, and `probability.<site>`
    (G, L, F) float32; its metadata name the groups. F is D at site down. Where a layer has fewer
    neurons, or none that ran, they are NaN, and no method sees them.
    """
    if method not in METHODS:
        raise RelneuronError(f"unknown method {method!r}", f"use one of {', '.join(METHODS)}", 2)
    options = options or OPTIONS[method]()
    site = options.site
    refuse_output(output, "identify", force)
    described, manifest = Manifest(folder).data, Manifest(output.parent)
    counts, model = _read(folder, described, site, method)
    inputs = identify_counts_inputs(folder, method, options)
    modules = _modules(model, options.module, folder)
    chosen = {
        name: choose(
            counts.of_layers(layers) if "modules" in model else counts,
            module_shape(model, name) if "modules" in model else model,
            options,
            method,
            f"{folder / NAME}{f', module {name}' if 'modules' in model else ''}",
        )
        for name, layers in modules.items()
    }
    with locked(output.parent):
        k = sum(one.top for one in chosen.values())
        n_neurons = sum(one.n_neurons for one in chosen.values())
        seed = options.seed if isinstance(options, RandomOptions) else 0
        selection: Json = {"site": site, "activation_threshold": described.get("threshold")}
        selection |= {"score": METHODS[method], "top": k}
        if "modules" in model:
            parts = {n: {"top": one.top, **one.selection} for n, one in chosen.items()}
            selection["modules"] = parts
        else:
            selection |= next(iter(chosen.values())).selection
        asked = counts.groups if options.groups is None else options.groups
        groups = [g for g in asked if any(g in one.groups for one in chosen.values())]
        sets: dict[str, list[ScoredNeuron]] = {name: [] for name in groups}
        for name, layers in modules.items():
            for group, own in chosen[name].sets.items():
                sets[group] += [(layers.start + row[0], *row[1:]) for row in own]
        if "modules" in model:
            selection |= sizes(sets)
        result = NeuronFile(model, method, sets, selection)
        # A second choice in a folder leaves the scores of the first one as they are.
        stem = "" if output.name == "neurons.json" else f"{output.stem}."
        path = output.parent / f"{stem}scores.safetensors"
        entropy, probability = _together(chosen, modules, groups, counts, site)
        data = save(
            {f"lape.{site}": entropy, f"probability.{site}": probability},
            # One key only: safetensors writes several in an order that changes from run to run.
            {"groups": json.dumps(groups, ensure_ascii=False)},
        )
        if real_path(output.parent) != real_path(folder):
            kept = ("versions", "model", "dtype", "threshold", "fallbacks")
            manifest.describe(**{key: described[key] for key in kept if key in described})
        manifest.describe(seeds=manifest.data.get("seeds", {}) | {"identify": seed})
        made_by = command(
            "identify",
            *(placed(folder, output.parent), "-o", placed(output, output.parent)),
            *("--method", method, *options.words()),
        )
        with writing("identify", output.parent, [path, output]):
            atomic_write(path, data)
            result.write(output)
            manifest.finish(
                "identify",
                inputs,
                [path, output],
                reads=[folder / NAME],
                top=k,
                share_of_neurons=k / n_neurons,
                commands=made_by,
            )
    return result


def _modules(model: Json, asked: Sequence[str] | None, folder: Path) -> dict[str, range]:
    """The layers of the modules that are ranked."""
    known = module_layers(model)
    for word in asked or ():
        if not any(is_asked(name, word) for name in known):
            raise RelneuronError(
                f"{folder / NAME} has no counts of the module {word}",
                f"it has {', '.join(known)}",
                2,
            )
    return {n: own for n, own in known.items() if any(is_asked(n, w) for w in asked or ("all",))}


def _together(
    chosen: Mapping[str, Choice],
    modules: Mapping[str, range],
    groups: list[str],
    counts: Counts,
    site: str,
) -> tuple[Array, Array]:
    """Entropy (L, F) and probabilities (G, L, F) of all modules; NaN where none is ranked."""
    shape = counts.arrays[f"count.{site}"].shape[1:]
    first, second = next(iter(chosen.values())).scores
    entropy = np.full(shape, np.nan, first.dtype)
    probability = np.full((len(groups), *shape), np.nan, second.dtype)
    for name, layers in modules.items():
        own, inside = chosen[name], slice(layers.start, layers.stop)
        entropy[inside] = own.scores[0]
        for group, values in zip(own.groups, own.scores[1], strict=True):
            probability[groups.index(group), inside] = values
    return entropy, probability


# --- reading ---------------------------------------------------------------------------------


def _read(folder: Path, described: Json, site: str, method: str) -> tuple[Counts, Json]:
    """The counts, which must be as they were written and fit the model; and the model."""
    path = require(checked(folder / NAME), MADE_BY)
    model = described.get("model")
    if model is None:
        raise RelneuronError(
            f"{folder} has no count in its manifest", f"count it with: relneuron {MADE_BY} --force"
        )
    counts = Counts.read(path)
    if f"count.{site}" not in counts.arrays:
        raise RelneuronError(
            f"{path} has no counts of site {site!r}, only of {', '.join(counts.sites)}",
            f"use --site {counts.sites[0]}" if counts.sites else "count again",
        )
    if method == "mean":
        _check_moments(counts, path, site)
    expected = (int(model["layers"]), int(model["hidden" if site == "down" else "width"]))
    shape = counts.arrays[f"count.{site}"].shape[1:]
    if shape != expected:
        raise RelneuronError(
            f"{path} has counts of the shape {shape} at site {site}, its model has {expected}",
            "count again: the file is of another model",
        )
    return counts, model


def _check_moments(counts: Counts, path: Path, site: str) -> None:
    """Refuse means of values that were not summed, or were not all finite."""
    if f"sum.{site}" not in counts.arrays:
        raise RelneuronError(
            f"{path} holds no sums at site {site}: there is no mean",
            "count with --moments, or use another --method",
        )
    n_bad = counts.arrays.get(f"n_nonfinite.{site}", np.zeros(1)).any()
    if n_bad or not np.isfinite(counts.arrays[f"sum.{site}"]).all():
        raise RelneuronError(
            f"{path}: values at site {site} were not all finite",
            "count with --dtype float32 or bfloat16, or use another --method",
        )
