"""What is read of any decoder layers: their list, weights, places, hooks and projections.

`model/mlps/` and `model/stream/` read layers by it, each in its way; `model/patch.py` changes
the projections.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakSet

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

    It is looked for in what `model.get_decoder()` gives, not in an encoder or a vision tower; of
    several, and where none is as long, a forward of text runs it.
    """
    config = model.config.get_text_config() if hasattr(model, "config") else None
    n_layers = getattr(config, "num_hidden_layers", None)
    every = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if isinstance(decoder, nn.Module):
        inside = {id(module) for module in decoder.modules()}
        every = [item for item in every if id(item[1]) in inside] or every
    lists = [item for item in every if len(item[1]) == n_layers]
    if len(lists) > 1:
        lists = _run_by_text(model, lists) or lists
    elif not lists:
        lists = _run_by_text(model, every)
        inner = [path for path, _ in lists if any(path.startswith(f"{p}.") for p, _ in lists)]
        lists = [item for item in lists if item[0] not in inner]
        if len(lists) != 1:
            found = f", but {', '.join(path for path, _ in lists)}" if lists else ""
            raise Unfound(f"no list of {n_layers} decoder layers{found}")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _run_by_text(
    model: Any, lists: Sequence[tuple[str, nn.ModuleList]]
) -> list[tuple[str, nn.ModuleList]]:
    """Those whose modules a forward of text calls; none where there is no such forward."""
    called: set[int] = set()
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: called.add(number))
        for number, (_, layers) in enumerate(lists)
        for layer in layers
    ]
    try:
        with torch.no_grad():
            text_run(model, 2)()
    except Exception:
        called.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return [lists[number] for number in sorted(called)]


def text_run(model: Any, n_tokens: int) -> Callable[[], object]:
    """A forward of a few tokens of text, without a cache, uncompiled."""
    inner = getattr(model, "_orig_mod", model)
    takes = inspect.signature(inner.forward).parameters
    options = {"use_cache": False} if "use_cache" in takes else {}

    def run() -> object:
        n_ids = inner.get_input_embeddings().num_embeddings
        ids = torch.arange(1, 1 + n_tokens, device=input_device(inner))[None] * 7 % n_ids
        return inner.forward(input_ids=ids, **options)

    return run


def unreadable(weight: Tensor) -> str | None:
    """Why a weight cannot be read as it lies; None if it can."""
    if weight.device.type == "meta":
        return "offloaded (on the meta device)"
    if is_sharded(weight):
        return "sharded over devices (a DTensor)"
    if _is_quantised(weight):
        kind = type(weight).__name__ if is_float(weight) else weight.dtype
        return f"quantised ({kind})"
    return None


def _is_quantised(weight: Tensor) -> bool:
    """Whether a weight is packed numbers, or made of other tensors (torchao's, quanto's)."""
    is_made = hasattr(weight, "__tensor_flatten__") and not is_sharded(weight)
    return is_made or not is_float(weight)


def uncallable(module: nn.Module) -> str | None:
    """Why a module cannot be called; None if it can, as what is quantised or offloaded can."""
    kept = offloaded_weights(module)
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        # Tensor parallelism replaces the forward of each module that has a part of its weights.
        owner = module.get_submodule(name.rpartition(".")[0])
        if is_sharded(tensor) and "forward" not in owner.__dict__:
            return "sharded over devices (a DTensor)"
        if tensor.device.type == "meta" and name not in kept:
            return "not in memory (on the meta device)"
    return None


def is_sharded(tensor: Tensor) -> bool:
    return type(tensor.data).__name__ == "DTensor"


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor's dtype is one that models compute in; float8 is one to store weights in."""
    return tensor.is_floating_point() and tensor.dtype.itemsize >= 2


def compute_dtype(model: Any) -> torch.dtype:
    """The dtype that a model computes in: that of its embedding, quantised weights or not.

    Where that is quantised, too, it is that of the first weight which is not.
    """
    parts = [part for part in (_embedding(model), model) if part is not None]
    for weight in chain(*(part.parameters() for part in parts), model.buffers()):
        if is_float(weight):
            return weight.dtype  # type: ignore[no-any-return]
    raise RelneuronError(
        f"{type(model).__name__} has no weight of a floating-point dtype", "give a language model"
    )


def _embedding(model: Any) -> nn.Module | None:
    get = getattr(model, "get_input_embeddings", None)
    try:
        found = get() if callable(get) else None
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def features(linear: nn.Module) -> tuple[int, int]:
    """How many inputs and outputs a linear map has, as it says or by its weight (out, in).

    A quantised weight is packed: its shape says nothing. Raises Unfound for what is no linear map.
    """
    # transformers' Conv1D has nx inputs and nf outputs, and its weight the other way round.
    names = ("nx", "nf") if hasattr(linear, "nx") else ("in_features", "out_features")
    sizes = tuple(getattr(linear, name, None) for name in names)
    weight = getattr(linear, "weight", None)
    if None in sizes and isinstance(weight, Tensor) and weight.dim() == 2:
        sizes = tuple(weight.shape[::-1])
    if None in sizes:
        raise Unfound("it is no linear map")
    return int(sizes[0]), int(sizes[1])  # type: ignore[arg-type]


_SETTLED: WeakSet[Any] = WeakSet()


def settle(model: Any) -> None:
    """Run one token through a quantised model, once, before anything looks at its weights.

    In their first forward bitsandbytes packs them in another way (4 bits on some CPUs), and
    compressed-tensors unpacks them.
    """
    if model in _SETTLED or not any(map(_is_quantised, model.parameters())):
        return
    try:
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64, device=input_device(model)), use_cache=False)
    except Exception as error:
        raise RelneuronError(
            f"the quantised model cannot run one token: {first_line(error)}",
            "give the model as it was before, or run it where its package can",
        ) from error
    _SETTLED.add(model)


def is_training(module: nn.Module) -> bool:
    return any(part.training for part in module.modules())


# --- places ----------------------------------------------------------------------------------


def _placing(module: nn.Module) -> tuple[Any, ...]:
    """The hooks by which accelerate moves a module's inputs and weights to where it computes."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where accelerate brings its weights, else where they lie."""
    for part in module.modules():
        for hook in _placing(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return next(chain(module.parameters(), module.buffers())).device


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids: the device of its embedding."""
    return device_of(_embedding(model) or model)


# Of bitsandbytes' weights of 8 bits: `state_dict` has them, but they are no parameter or buffer.
_BESIDE = ("SCB", "weight_format")


def offloaded_weights(module: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Of each weight that accelerate keeps elsewhere until it is used: its name, how to read it."""
    found: dict[str, Callable[[], Tensor]] = {}
    for path, part in module.named_modules():
        for hook in _placing(part):
            if not getattr(hook, "offload", False) or hook.weights_map is None:
                continue
            own = hook.place_submodules
            tensors = chain(part.named_parameters("", own), part.named_buffers("", own))
            kept = {name: t.dtype for name, t in tensors if t.device.type == "meta"}
            kept |= {name: None for name in _BESIDE if kept and name in hook.weights_map}
            for name, dtype in kept.items():
                read = partial(_read, hook.weights_map, name, dtype)
                found[f"{path}.{name}".removeprefix(".")] = read
    return found


def _read(weights: Any, name: str, dtype: torch.dtype | None) -> Tensor:
    value: Tensor = weights[name]
    return value if dtype in (None, value.dtype) else value.to(dtype)


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


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks of its own, or such as are set for all modules.

    But those by which transformers collects a forward's outputs.
    """
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    return not all(_is_collecting(h) for name in _HOOKS for h in getattr(module, name).values())


def _is_collecting(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Within it, a module and what is in it run no hook, not even those set for all modules.

    But those by which transformers collects hidden states: a vision tower's are of its forward.
    """
    everywhere = vars(torch.nn.modules.module)
    with CHANGING:
        held: list[tuple[dict[str, Any], str, Any]] = []
        for name in _HOOKS:
            held.append((everywhere, f"_global{name}", everywhere[f"_global{name}"]))
            held += [(m.__dict__, name, m.__dict__[name]) for m in module.modules()]
        try:
            for where, name, hooks in held:
                where[name] = OrderedDict((k, h) for k, h in hooks.items() if _is_collecting(h))
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
    outputs = {part: _width(where[part], linear, 1) for part, linear in maps.items()}
    if parts == plain:
        return tuple(
            Projection(site, where[part], maps[part], 0, outputs[part])
            for site, part in zip(ATTENTION, plain, strict=True)
        )
    # What o_proj reads is as wide as q; k and v share the rest.
    query = _width(where["o_proj"], maps["o_proj"], 0)
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
    """How many inputs (dim 0) or outputs (dim 1) a linear map has."""
    try:
        return features(linear)[dim]
    except Unfound:
        raise RelneuronError(f"{path} is no linear map", "record without --attention") from None
