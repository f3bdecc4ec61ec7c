"""The vector that a neuron writes when it is active, as a place in the weights that can be changed.

`edit` erases and moves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.layers import Unfound, features, unreadable
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import Part

_FIX = "edit neurons of a model with ordinary weights, loaded whole on one device"


def value_vector(mlps: Sequence[Part], layer: int, index: int) -> Tensor:
    """The column of down (D,) of a neuron at gate or up, a view of the model's own weight.

    What is written into it changes the model. Of a dense MLP the view is
    proved: down of a one at the neuron, less down of zeros, is the column. Raises RelneuronError
    for weights that cannot be read as they lie (quantised, sharded, offloaded), that other layers
    share, or where something stands between the product and down.
    """
    for mlp in mlps:
        if mlp.layer == layer and mlp.inside.start <= index < mlp.inside.stop:
            place = index - mlp.inside.start
            if isinstance(mlp, Experts):
                return _of_expert(mlp, *divmod(place, mlp.expert_width))
            return _of_mlp(mlps, mlp, place)
    raise RelneuronError(f"layer {layer} has no neuron {index}", "neurons count from zero")


def _of_expert(experts: Experts, number: int, place: int) -> Tensor:
    weights = experts.output.weights(experts.module, experts.n_experts)
    _check(weights, experts.path)
    return weights.detach()[number, place]


def _of_mlp(mlps: Sequence[Part], mlp: MLP, place: int) -> Tensor:
    down, product = mlp.down_map.module, mlp.product
    weight = getattr(down, "weight", None)
    if not isinstance(weight, Tensor):
        raise RelneuronError(f"{mlp.path}: down has no weight of its own", _FIX)
    _check(weight, mlp.path)
    if product.module is not down or not product.of_input:
        raise RelneuronError(
            f"{mlp.path}: something stands between the product and down, so that no column is what "
            "a neuron writes",
            "edit another model",
        )
    shared = [one.path for one in mlps if one is not mlp and _has(one, weight)]
    if shared:
        raise RelneuronError(
            f"{mlp.path} shares its down with {shared[0]}: a change would be one of both",
            "edit a model whose layers have weights of their own",
        )
    try:
        n_inputs, _ = features(down)
    except Unfound as error:
        raise RelneuronError(f"{mlp.path}: down cannot be edited, {error}", _FIX) from error
    number = product.start + product.step * place
    is_transposed = hasattr(down, "nx")  # transformers' Conv1D
    column = weight.detach()[number] if is_transposed else weight.detach()[:, number]
    ones = torch.zeros(2, n_inputs, dtype=weight.dtype, device=weight.device)
    ones[1, number] = 1
    with torch.no_grad():
        out = mlp.down_map.of(cast(Tensor, down(ones))).double()
    bound = 4 * torch.finfo(weight.dtype).eps * float(out.abs().max())  # of sums with a bias
    if column.shape != out[0].shape or (out[1] - out[0] - column.double()).abs().max() > bound:
        raise RelneuronError(
            f"{mlp.path}: down is more than its weight (an adapter, say): its columns are not what "
            "neurons write",
            "merge what is added to it, and edit the merged model",
        )
    return column


def _has(part: Part, weight: Tensor) -> bool:
    module = part.module if isinstance(part, Experts) else part.down_map.module
    return any(p.data_ptr() == weight.data_ptr() for p in module.parameters())


def _check(weight: Tensor, path: str) -> None:
    if why := unreadable(weight):
        raise RelneuronError(f"{path}: its weights are {why}", _FIX)


def token_vector(model: Any, token: int, which: str) -> Tensor:
    """The embedding of a token (D,): `output`, the row of the unembedding, or `input`."""
    get = model.get_output_embeddings if which == "output" else model.get_input_embeddings
    module: nn.Module | None = get()
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or unreadable(weight):
        other = "input" if which == "output" else "output"
        raise RelneuronError(
            f"the model has no {which} embedding whose rows can be read", f"use --embedding {other}"
        )
    return weight[token].detach()
