"""Which neurons of a module, or of a model that is all of one, a method chooses by counts.

`rank.py` asks for each module that was counted, so that each has a ranking of its own.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from relneuron.artifact.counts import Counts
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.neurons import ScoredNeuron, Shape
from relneuron.methods.counts import lape as scores
from relneuron.methods.counts.options import CountedOptions, LapeOptions, RandomOptions

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Choice:
    """What was chosen in a module, or in a model that is all of one.

    groups   those that have tokens
    sets     of each the neurons, best first, the layers numbered as in the module
    scores   entropy (L, F) and probabilities (G, L, F), NaN where no neuron is ranked
    """

    groups: list[str]
    sets: dict[str, list[ScoredNeuron]]
    scores: tuple[Array, Array]
    selection: Json
    top: int
    n_neurons: int


def choose(counts: Counts, model: Json, options: CountedOptions, method: str, where: str) -> Choice:
    """The neurons of one module by a method, as if its layers were all of the model."""
    site, top = options.site, options.top
    counts, left_out = _take(counts, options.groups, where, site)
    if method == "lape" and len(counts.groups) < 2:
        raise RelneuronError(
            f"{where}: LAPE needs at least two groups with tokens, there is "
            f"{', '.join(counts.groups)}",
            "count more groups, or use --method probability",
        )
    there = _there(counts, model, site)
    count = counts.arrays[f"count.{site}"]
    n_neurons = len(there)
    k = round(n_neurons * options.top_rate) if top is None else min(top, n_neurons)
    if k == 0:
        raise RelneuronError(
            f"--top-rate {options.top_rate} of {n_neurons} neurons is none"
            + (f" ({where})" if "modules" in model else ""),
            "choose a higher --top-rate, or give their number with --top",
            2,
        )
    chosen = _only(count, there)
    tokens = _tokens(counts, there, count.shape[2])
    probability = scores.activation_probability(chosen, tokens, precision=options.precision)
    selection: Json = {"left_out": left_out}
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
        seed = options.seed if isinstance(options, RandomOptions) else 0
        ranked = _baseline(counts.groups, tokens, probability, total, method, k, seed)
    width = count.shape[2]
    sets = {
        name: _neurons(there[flat], score, width, site)
        for name, (flat, score) in zip(counts.groups, ranked, strict=True)
    }
    selection |= sizes(sets)
    spread = (
        _spread(entropy, there, count.shape[1:]),
        _spread(probability.astype(np.float32), there, count.shape),
    )
    return Choice(counts.groups, sets, spread, selection, k, n_neurons)


def _switch(site: str) -> str:
    """The site by which a neuron is named: zeroing gate, act or product is one ablation."""
    return site if site in ("up", "down") else "gate"


def _there(counts: Counts, model: Json, site: str) -> Array:
    """The flat indices l * F + i of the neurons that there are, and that ran in every group."""
    order, name = Shape.of(model), _switch(site)
    ran = counts.tokens_at() == counts.tokens[:, None]
    if "modules" in model:  # a tower may have fewer patches in its later layers
        ran = counts.tokens_at() > 0
    ran = ran.all(axis=0)
    here = np.zeros(counts.arrays[f"count.{site}"].shape[1:], bool)
    for layer in range(order.layers):
        here[layer, : order.width(layer, name)] = ran[layer]
    return np.flatnonzero(here)


def _tokens(counts: Counts, there: Array, width: int) -> Array:
    """(G,) tokens of each group; (G, 1, N) of each neuron, where the layers ran different ones."""
    ran = counts.tokens_at()[:, None, there // width]
    return counts.tokens if (ran == counts.tokens[:, None, None]).all() else ran


def _only(values: Array, there: Array) -> Array:
    """(G, L, F) values as (G, 1, N): those of some neurons."""
    return values.reshape(len(values), 1, -1)[:, :, there]


def _spread(values: Array, there: Array, shape: tuple[int, ...]) -> Array:
    """The values (..., 1, N) of some neurons as (..., L, F), NaN elsewhere."""
    result = np.full((*values.shape[:-2], shape[-2] * shape[-1]), np.nan, values.dtype)
    result[..., there] = values[..., 0, :]
    return result.reshape(shape)


def _take(
    counts: Counts, groups: Sequence[str] | None, where: str, site: str
) -> tuple[Counts, list[str]]:
    """The groups asked for that have tokens, and the names of those that have none."""
    asked = counts.groups if groups is None else list(groups)
    unknown = [name for name in asked if name not in counts.groups]
    if unknown:
        raise RelneuronError(
            f"{where} has no group {', '.join(map(repr, unknown))}",
            f"its groups are {', '.join(counts.groups)}",
            2,
        )
    twice = [name for name, times in Counter(asked).items() if times > 1]
    if twice:
        raise RelneuronError(f"group {twice[0]!r} is given twice", "give each group once", 2)
    chosen = counts.take(asked)
    left_out = [name for name, n in zip(asked, chosen.tokens, strict=True) if n == 0]
    if len(left_out) == len(asked):
        raise RelneuronError(f"{where} has no group with tokens", "count some text")
    for name in left_out:
        warnings.warn(f"group {name!r} has no token: it is left out", stacklevel=3)
    kept = chosen.take([name for name in asked if name not in left_out])
    for name, n, rows in zip(kept.groups, kept.tokens, kept.arrays[f"count.{site}"], strict=True):
        if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) <= n:
            raise RelneuronError(
                f"{where}: group {name!r} has {n} tokens, but counts from "
                f"{rows.min()} to {rows.max()}",
                "count again: the file is damaged",
            )
    return kept, left_out


def _ranked_members(found: scores.Lape) -> list[scores.Ranked]:
    """Each group's members by ascending entropy, then flat index, and their entropies."""
    entropy = found.entropy.reshape(-1)
    result = []
    for members in found.members:
        order = members[np.argsort(entropy[members], kind="stable")]
        result.append((order, entropy[order]))
    return result


def _baseline(
    groups: Sequence[str],
    tokens: Array,
    probability: Array,
    total: Array | None,
    method: str,
    k: int,
    seed: int,
) -> list[scores.Ranked]:
    if method == "probability":
        return scores.highest_probability(probability, k)
    if total is not None:
        return scores.highest_mean(total, tokens, k)
    return scores.random_choice(groups, probability[0].size, k, seed)


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


def sizes(sets: dict[str, list[ScoredNeuron]]) -> Json:
    """How many neurons each set has, and how many neurons are in 1, 2, 3, ... sets."""
    times = Counter(neuron[:3] for chosen in sets.values() for neuron in chosen)
    multiplicity = Counter(times.values())
    return {
        "neurons": {name: len(chosen) for name, chosen in sets.items()},
        "multiplicity": [multiplicity[n] for n in range(1, max(multiplicity, default=0) + 1)],
    }
