"""Steering: the neurons of one group at zero, those of another at their mean activation.

`generate` and `eval` call it, and users who steer a model of their own (Tang et al., arXiv
2402.16438).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.ablation.masks import check_set
from relneuron.artifact.counts import NAME, Counts
from relneuron.artifact.files import RelneuronError, require
from relneuron.artifact.manifest import checked
from relneuron.artifact.neurons import NeuronFile, check_neurons
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.patch import Patch
from relneuron.model.states import LayerState, mask_states, replacements

Array = np.ndarray[Any, Any]


def mean_activations(folder: Path, group: str, shape: dict[str, int]) -> Array:
    """sum.act / tokens of a group in `folder`'s counts.safetensors, as (L, F) float32.

    The tokens are those that each layer ran; where there were none the mean is 0.

    Raises RelneuronError if the counts have no moments, not this group or no token of it, or are
    of a model with other layers or another width.
    """
    path = folder / NAME
    counts = Counts.read(checked(path), "count MODEL GROUP=TEXT... -o DIR --moments")
    sums = counts.arrays.get("sum.act")
    if sums is None:
        raise RelneuronError(
            f"{path} holds no sums of activations",
            "count with the site act and moments: relneuron count ... --moments",
        )
    if group not in counts.groups:
        raise RelneuronError(
            f"{path} has no group {group!r}", f"its groups are {', '.join(counts.groups)}"
        )
    if sums.shape[1:] != (shape["layers"], shape["width"]):
        raise RelneuronError(
            f"{path} is of a model with {sums.shape[1]} layers and width {sums.shape[2]}, this one "
            f"has {shape['layers']} and {shape['width']}",
            "count on this model",
        )
    row = counts.groups.index(group)
    if not counts.tokens[row]:
        raise RelneuronError(f"{path} has no token of {group!r}", "count text of this group")
    ran = np.maximum(counts.tokens_at()[row], 1)[:, None]
    means: Array = (sums[row] / ran).astype(np.float32)
    return means


def steering_states(
    mlps: Sequence[Part],
    off: Sequence[Iterable[Sequence[Any]]],
    set_to: Iterable[Sequence[Any]] = (),
    means: Array | None = None,
) -> list[LayerState]:
    """Per Part, what a patch needs to steer: C conditions that differ in what is off.

    off       of each condition the (layer, site, index) of the neurons at zero
    set_to    the neurons, at site gate, whose activation becomes their mean in every condition:
              product i of layer l is means[l, i] * up_i. One that is also off is set, not off
    means     (L, F) float32

    Raises RelneuronError for a neuron out of range, or one to be set at another site than gate.
    """
    states = mask_states(off, mlps)
    shape = model_shape(mlps)
    chosen = np.zeros((shape["layers"], shape["width"]), bool)
    for layer, site, index in check_neurons(set_to, shape):
        if site != "gate":
            raise RelneuronError(
                f"neuron {index} of layer {layer} is at site {site}, which has no mean activation",
                "set neurons that were identified at act, gate or product",
            )
        chosen[layer, index] = True
    if not chosen.any():
        return states
    if means is None or means.shape != chosen.shape:
        raise RelneuronError(
            f"the means are not (layers, width) = {chosen.shape}", "count on this model"
        )
    for mlp, state in zip(mlps, states, strict=True):
        rows = np.tile(chosen[mlp.layer], (len(off), 1))
        values = np.tile(means[mlp.layer].astype(np.float32), (len(off), 1))
        new = replacements(mlp, {"act": rows}, shifts={"act": values})
        if new:
            state.replace = (state.replace or {}) | new
    return states


def steering_patch(
    mlps: Sequence[Part], neurons: NeuronFile, name: str, counts: Path, **how: Any
) -> Patch:
    """A patch that sets the neurons of a set to their mean activation; `how` are a Patch's own."""
    check_set(name, neurons.sets)
    if not neurons.sets[name]:
        raise RelneuronError(
            f"no neuron to set to its mean: the set {name} has none",
            "give a set with neurons: identify with other options, such as a larger --top-rate",
        )
    require(counts, "count MODEL GROUP=TEXT... -o DIR --moments")
    means = mean_activations(counts.parent, name, model_shape(mlps))
    return Patch(mlps, steering_states(mlps, [[]], neurons.sets[name], means), **how)
