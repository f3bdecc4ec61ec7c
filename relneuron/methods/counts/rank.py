"""The `identify` stage on counts of a corpus: how often neurons are active in, neuron sets out.

`relneuron identify` calls it for a folder with counts.safetensors. It needs no model: it ranks
neurons by the entropy of their activation probability over the groups (LAPE, arXiv 2402.16438),
or by a baseline that needs the same counts.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from relneuron.artifact.counts import NAME, Counts
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    refuse_output,
    require,
    sha256,
    writing,
)
from relneuron.artifact.manifest import Manifest, checked, json_digest, locked
from relneuron.artifact.neurons import NeuronFile, ScoredNeuron, Shape
from relneuron.artifact.stage import command, placed
from relneuron.methods.counts import METHOD
from relneuron.methods.counts import lape as scores
from relneuron.methods.counts.options import CountedOptions, LapeOptions, RandomOptions

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
        **options.recorded(),
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
    site, top, precision = options.site, options.top, options.precision
    refuse_output(output, "identify", force)
    described, manifest = Manifest(folder).data, Manifest(output.parent)
    counts, model = _read(folder, described, site, method)
    counts, left_out = _take(counts, options.groups, folder, site)
    if method == "lape" and len(counts.groups) < 2:
        raise RelneuronError(
            f"{folder / NAME}: LAPE needs at least two groups with tokens, there is "
            f"{', '.join(counts.groups)}",
            "count more groups, or use --method probability",
        )
    inputs = identify_counts_inputs(folder, method, options)
    there = _there(counts, model, site)
    count = counts.arrays[f"count.{site}"]
    n_neurons = len(there)
    k = round(n_neurons * options.top_rate) if top is None else min(top, n_neurons)
    if k == 0:
        raise RelneuronError(
            f"--top-rate {options.top_rate} of {n_neurons} neurons is none",
            "choose a higher --top-rate, or give their number with --top",
            2,
        )
    with locked(output.parent):
        chosen = _only(count, there)
        probability = scores.activation_probability(chosen, counts.tokens, precision=precision)
        selection: Json = {"site": site, "activation_threshold": described.get("threshold")}
        selection |= {"score": METHODS[method], "top": k, "left_out": left_out}
        seed = options.seed if isinstance(options, RandomOptions) else 0
        if isinstance(options, LapeOptions):
            found = scores.lape(
                probability, filter_rate=options.filter_rate, bar_ratio=options.bar_ratio, top=k
            )
            entropy = found.entropy
            ranked = _ranked_members(found)
            selection |= _cut(found, options)
        else:
            entropy = scores.entropies(probability)
            sums = counts.arrays.get(f"sum.{site}") if method == "mean" else None
            total = None if sums is None else _only(sums, there)
            ranked = _baseline(counts, probability, total, method, k, seed)
        width = count.shape[2]
        sets = {
            name: _neurons(there[flat], score, width, site)
            for name, (flat, score) in zip(counts.groups, ranked, strict=True)
        }
        selection |= _sizes(sets)
        result = NeuronFile(model, method, sets, selection)
        # A second choice in a folder leaves the scores of the first one as they are.
        stem = "" if output.name == "neurons.json" else f"{output.stem}."
        path = output.parent / f"{stem}scores.safetensors"
        data = save(
            {
                f"lape.{site}": _spread(entropy, there, count.shape[1:]),
                f"probability.{site}": _spread(probability.astype(np.float32), there, count.shape),
            },
            # One key only: safetensors writes several in an order that changes from run to run.
            {"groups": json.dumps(counts.groups, ensure_ascii=False)},
        )
        if output.parent.resolve() != folder.resolve():
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


def _switch(site: str) -> str:
    """The site by which a neuron is named: zeroing gate, act or product is one ablation."""
    return site if site in ("up", "down") else "gate"


def _there(counts: Counts, model: Json, site: str) -> Array:
    """The flat indices l * F + i of the neurons that there are, and that ran in every group."""
    order, name = Shape.of(model), _switch(site)
    ran = (counts.tokens_at() == counts.tokens[:, None]).all(axis=0)
    here = np.zeros(counts.arrays[f"count.{site}"].shape[1:], bool)
    for layer in range(order.layers):
        here[layer, : order.width(layer, name)] = ran[layer]
    return np.flatnonzero(here)


def _only(values: Array, there: Array) -> Array:
    """(G, L, F) values as (G, 1, N): those of some neurons."""
    return values.reshape(len(values), 1, -1)[:, :, there]


def _spread(values: Array, there: Array, shape: tuple[int, ...]) -> Array:
    """The values (..., 1, N) of some neurons as (..., L, F), NaN elsewhere."""
    result = np.full((*values.shape[:-2], shape[-2] * shape[-1]), np.nan, values.dtype)
    result[..., there] = values[..., 0, :]
    return result.reshape(shape)


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


def _take(
    counts: Counts, groups: Sequence[str] | None, folder: Path, site: str
) -> tuple[Counts, list[str]]:
    """The groups asked for that have tokens, and the names of those that have none."""
    asked = counts.groups if groups is None else list(groups)
    unknown = [name for name in asked if name not in counts.groups]
    if unknown:
        raise RelneuronError(
            f"{folder / NAME} has no group {', '.join(map(repr, unknown))}",
            f"its groups are {', '.join(counts.groups)}",
            2,
        )
    twice = [name for name, times in Counter(asked).items() if times > 1]
    if twice:
        raise RelneuronError(f"group {twice[0]!r} is given twice", "give each group once", 2)
    chosen = counts.take(asked)
    left_out = [name for name, n in zip(asked, chosen.tokens, strict=True) if n == 0]
    if len(left_out) == len(asked):
        raise RelneuronError(f"{folder / NAME} has no group with tokens", "count some text")
    for name in left_out:
        warnings.warn(f"group {name!r} has no token: it is left out", stacklevel=3)
    kept = chosen.take([name for name in asked if name not in left_out])
    for name, n, rows in zip(kept.groups, kept.tokens, kept.arrays[f"count.{site}"], strict=True):
        if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) <= n:
            raise RelneuronError(
                f"{folder / NAME}: group {name!r} has {n} tokens, but counts from "
                f"{rows.min()} to {rows.max()}",
                "count again: the file is damaged",
            )
    return kept, left_out


# --- choosing --------------------------------------------------------------------------------


def _ranked_members(found: scores.Lape) -> list[scores.Ranked]:
    """Each group's members by ascending entropy, then flat index, and their entropies."""
    entropy = found.entropy.reshape(-1)
    result = []
    for members in found.members:
        order = members[np.argsort(entropy[members], kind="stable")]
        result.append((order, entropy[order]))
    return result


def _baseline(
    counts: Counts, probability: Array, total: Array | None, method: str, k: int, seed: int
) -> list[scores.Ranked]:
    if method == "probability":
        return scores.highest_probability(probability, k)
    if total is not None:
        return scores.highest_mean(total, counts.tokens, k)
    return scores.random_choice(counts.groups, probability[0].size, k, seed)


def _neurons(flat: Array, score: Array, width: int, site: str) -> list[ScoredNeuron]:
    name = _switch(site)
    return [
        (place // width, name, place % width, value)
        for place, value in zip(flat.tolist(), score.tolist(), strict=True)
    ]


def _cut(found: scores.Lape, options: LapeOptions) -> Json:
    """What neurons.json says of the cut; JSON has no infinity, so null stands for none."""
    limits = {"threshold": found.threshold, "bar": found.bar}
    facts: Json = {
        "filter_rate": options.filter_rate,
        "bar_ratio": options.bar_ratio,
        "precision": options.precision,
        **{key: value if math.isfinite(value) else None for key, value in limits.items()},
        "candidates": found.candidates,
        "chosen": found.chosen.size,
    }
    if found.chosen.size < found.wanted:
        facts["reason"] = f"{found.wanted} neurons were wanted, {found.candidates} pass the filter"
    return facts


def _sizes(sets: dict[str, list[ScoredNeuron]]) -> Json:
    """How many neurons each set has, and how many neurons are in 1, 2, 3, ... sets."""
    times = Counter(neuron[:3] for chosen in sets.values() for neuron in chosen)
    multiplicity = Counter(times.values())
    return {
        "neurons": {name: len(chosen) for name, chosen in sets.items()},
        "multiplicity": [multiplicity[n] for n in range(1, max(multiplicity, default=0) + 1)],
    }
