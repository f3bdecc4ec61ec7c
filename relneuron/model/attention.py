"""The projections of an attention, found by structure: their outputs are neurons like an MLP's.

model/gated.py hangs them on the layers where they are asked for; model/patch.py reads and changes
them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import ATTENTION


@dataclass(frozen=True)
class Projection:
    """The outputs `start` to `start + width` of a linear map: q, k, v or o of one layer."""

    site: str
    path: str
    module: nn.Module
    start: int
    width: int


def find_projections(path: str, layer: nn.Module) -> tuple[Projection, ...]:
    """q, k, v and o of the one attention in a decoder layer whose path is `path`.

    An attention is a module with `q_proj`, `k_proj`, `v_proj` and `o_proj`, or with `qkv_proj`,
    which gives q, k and v side by side, and `o_proj`. Raises RelneuronError for another layer.
    """
    packed = ("qkv_proj", "o_proj")
    plain = tuple(f"{site}_proj" for site in ATTENTION)
    found = [
        (name, module, parts)
        for name, module in layer.named_modules()
        for parts in (plain, packed)
        if all(isinstance(getattr(module, part, None), nn.Module) for part in parts)
    ]
    if len(found) != 1:
        raise RelneuronError(
            f"{path} has {len(found)} attentions with the projections {', '.join(plain)}, not one",
            "record without --attention",
        )
    name, module, parts = found[0]
    maps = {part: getattr(module, part) for part in parts}
    where = {part: f"{path}.{name}.{part}" for part in parts}
    outputs = {part: _width(where[part], linear, 0) for part, linear in maps.items()}
    if parts == plain:
        return tuple(
            Projection(site, where[part], maps[part], 0, outputs[part])
            for site, part in zip(ATTENTION, plain, strict=True)
        )
    # What o_proj reads is as wide as q; k and v share the rest.
    query = _width(where["o_proj"], maps["o_proj"], 1)
    key, rest = divmod(outputs["qkv_proj"] - query, 2)
    if key < 1 or rest:
        raise RelneuronError(
            f"{where['qkv_proj']} has {outputs['qkv_proj']} outputs, which are no q of {query}, "
            "k and v",
            "record without --attention",
        )
    sizes = {"q": (0, query), "k": (query, key), "v": (query + key, key)}
    both = (where["qkv_proj"], maps["qkv_proj"])
    return (
        *(Projection(site, *both, *size) for site, size in sizes.items()),
        Projection("o", where["o_proj"], maps["o_proj"], 0, outputs["o_proj"]),
    )


def _width(path: str, linear: nn.Module, dim: int) -> int:
    """How many outputs (dim 0) or inputs (dim 1) a linear map has, by its weight (out, in)."""
    weight = getattr(linear, "weight", None)
    if weight is None or weight.dim() != 2:
        raise RelneuronError(f"{path} is no linear map", "record without --attention")
    return int(weight.shape[dim])
