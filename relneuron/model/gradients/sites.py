"""Where gradients are taken: one vector of neurons a layer, read and replaced while a model runs.

The staircase, its reference and gradient x activation all act on a model by `acting`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.batches import pad
from relneuron.model.layers import Projection, decoder_layers, input_device
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import check_sites
from relneuron.model.stream.trace import last_logits


@dataclass(frozen=True)
class Sites:
    """A model's decoder layers, and the vector of neurons in each that is scaled.

    parts   one a layer, None where a layer has no MLP
    mlps    what the parts belong to
    width   F, the largest
    """

    model: Any
    layers: list[nn.Module]
    parts: list[Projection | None]
    mlps: list[MLP | None]
    width: int

    @property
    def numbers(self) -> list[int]:
        """The layers that have neurons."""
        return [number for number, part in enumerate(self.parts) if part is not None]

    @property
    def device(self) -> torch.device:
        return input_device(self.model)


def read_sites(model: Any, site: str = "product") -> Sites:
    """Where the neurons of every layer are at a site.

    `product`, what the MLP's down map reads, stands for `act` and `up`, too: a layer's vector times
    its gradient is the same at each of them, along a path of scaled layers as well. `gate`, what
    the activation reads, differs. Raises RelneuronError for a model without supported MLPs, with
    experts, or with several MLPs in a layer.
    """
    found = find_mlps(model)
    check_sites(found, [site] if site in ("up", "gate") else [])
    _, layers = decoder_layers(model)
    parts: list[Projection | None] = [None] * len(layers)
    mlps: list[MLP | None] = [None] * len(layers)
    for mlp in found:
        if not isinstance(mlp, MLP):
            raise RelneuronError(
                f"layer {mlp.layer} has experts: which of them a token goes to has no gradient",
                "give a model without experts",
            )
        if not mlp.runs:
            continue
        if parts[mlp.layer] is not None:
            raise RelneuronError(
                f"layer {mlp.layer} has several MLPs, and so no one vector of neurons to scale",
                "give a model with one MLP a layer",
            )
        parts[mlp.layer] = mlp.gate if site == "gate" else mlp.product
        mlps[mlp.layer] = mlp
    width = max(part.width for part in parts if part is not None)
    return Sites(model, list(layers), parts, mlps, width)


@contextmanager
def acting(part: Projection, act: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Within it, `act` sees the neurons (..., F) of each call, and may give others for them."""

    def changed(y: Tensor) -> Tensor | None:
        new = act(part.of(y))
        if new is None or new.shape[-1] == y.shape[-1]:
            return new
        # A part of a packed map's output, of which there may be more rows now.
        y = y.expand(*new.shape[:-1], -1).clone()
        part.of(y).copy_(new)
        return y

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = changed(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = next(iter(kwargs))
        new = changed(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})

    def behind(_module: Any, _args: Any, output: Tensor) -> Tensor | None:
        return changed(output)

    if part.of_input:
        handle = part.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = part.module.register_forward_hook(behind)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it no weight has a gradient, so that a graph keeps only what leads to the neurons."""
    held = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in held:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in held:
            weight.requires_grad_(True)


def probability(logits: Tensor, targets: Tensor) -> Tensor:
    """P (...,) of the targets (...,) int64, from logits (..., V): a softmax in float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = wide.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (own - wide.logsumexp(-1)).exp()


def sentences(model: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Token ids of no meaning, for checks."""
    n_ids = model.get_input_embeddings().num_embeddings
    return [[(1 + 7 * k + 3 * row) % n_ids for k in range(n)] for row, n in enumerate(lengths)]


@torch.no_grad()
def sees_padding(model: Any) -> bool:
    """Whether a sentence behind padding has other logits than it has alone."""
    lines = sentences(model, (6, 3))
    device = input_device(model)
    both = last_logits(model, *pad(lines, device))[1]
    alone = last_logits(model, *pad(lines[1:], device))[0]
    limit = torch.finfo(alone.dtype).eps ** 0.5 if alone.dtype.itemsize >= 4 else 0.1
    return not bool((both - alone).abs().max() <= limit * alone.abs().max())
