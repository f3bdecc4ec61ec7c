"""What is read of any decoder layers: their list, weights, hooks set on them and projections.

`model/mlps.py` and `model/stream.py` read layers by it, each in its way; `model/patch.py` changes
the projections.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import ATTENTION

TRAINING = "train mode: call model.eval()"


class Unfound(Exception):
    """Why a model or a layer has not the parts that are looked for."""


def first_line(error: BaseException) -> str:
    """What an error says in its first line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --- layers and their weights ----------------------------------------------------------------


def check_unwrapped(model: Any) -> None:
    """Refuse a model inside of another module (DataParallel, say), which is not one itself."""
    inner = getattr(model, "module", None)
    if not hasattr(model, "config") and hasattr(inner, "config"):
        raise RelneuronError(
            f"{type(model).__name__} holds the model as its .module",
            "give model.module in place of model",
        )


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The path and the `ModuleList` of the decoder layers, as long as the config says.

    It is looked for in what `model.get_decoder()` gives, not in an encoder or a vision tower.
    """
    config = model.config.get_text_config() if hasattr(model, "config") else None
    n_layers = getattr(config, "num_hidden_layers", None)
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if not lists:
        raise Unfound(f"no list of {n_layers} decoder layers")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if isinstance(decoder, nn.Module):
        inside = {id(module) for module in decoder.modules()}
        lists = [item for item in lists if id(item[1]) in inside] or lists
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def unreadable(weight: Tensor) -> str | None:
    """Why a weight cannot be read as it lies; None if it can."""
    if weight.device.type == "meta":
        return "offloaded (on the meta device)"
    if type(weight.data).__name__ == "DTensor":
        return "sharded over devices (a DTensor)"
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"quantised ({weight.dtype})"
    return None


def is_training(module: nn.Module) -> bool:
    return any(part.training for part in module.modules())


# --- hooks -----------------------------------------------------------------------------------

# Two threads that put back each other's hooks would lose some, and what is patched by another
# thread while it is looked at is not the model.
CHANGING = threading.RLock()
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs more than its class's forward, at it or inside."""
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    return any(
        "forward" in m.__dict__ or any(getattr(m, name) for name in _HOOKS)
        for m in module.modules()
    )


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Within it, a module and what is in it run no hook, not even those set for all modules."""
    everywhere = vars(torch.nn.modules.module)
    with CHANGING:
        held: list[tuple[dict[str, Any], str, Any]] = []
        for name in _HOOKS:
            held.append((everywhere, f"_global{name}", everywhere[f"_global{name}"]))
            held += [(m.__dict__, name, m.__dict__[name]) for m in module.modules()]
        try:
            for where, name, _ in held:
                where[name] = OrderedDict()
            yield
        finally:
            for where, name, hooks in held:
                where[name] = hooks


# --- projections -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """A site: `width` outputs of a linear map from `start` on, or as many of its inputs.

    With `step` 2 every other one.
    """

    site: str
    path: str
    module: nn.Module
    start: int
    width: int
    of_input: bool = False
    step: int = 1

    def of(self, y: Tensor) -> Tensor:
        """The site's part (..., width) of the whole output or input."""
        if y.shape[-1] == self.width:
            return y
        return y[..., self.start : self.start + self.step * self.width : self.step]


@dataclass(frozen=True)
class Parts:
    """One layer's MLP, of any kind, and the linear maps whose neurons a patch may change."""

    module: nn.Module
    projections: tuple[Projection, ...]


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
