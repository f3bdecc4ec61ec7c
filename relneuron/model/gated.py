"""The model: load it with its tokenizer, find its gated MLPs by structure, describe it.

The stages and `relneuron doctor` call it; `model/patch.py` acts on the gated MLPs that it finds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relneuron import ops
from relneuron.artifact.files import Json, RelneuronError
from relneuron.model.attention import Projection, find_projections
from relneuron.model.hooks import without_hooks
from relneuron.model.identity import ADAPTER, check_model_folder, model_digest

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")


# --- loading ---------------------------------------------------------------------------------


def _settle_arithmetic() -> None:
    """So that the same study gives the same bits, also on a busy machine."""
    # Said aloud, the number of threads holds for MKL, too; else it may take fewer of them from call
    # to call, and sums are rounded in another order.
    torch.set_num_threads(torch.get_num_threads())
    # MKL's vector functions choose their code in the first call. If two threads make it at once,
    # one may get code of lower accuracy: cosines of rotary embeddings that were off by 4e-5 in one
    # of fifteen runs. One element is one thread.
    for function in (torch.cos, torch.sin, torch.exp, torch.tanh, torch.erf, torch.log):
        function(torch.ones(1))


def choose_device(asked: str | None) -> str:
    """The device to run on: as asked for, if it is here; by default the GPU if there is one."""
    here = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count(),
    }
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = asked.partition(":")
    number = number if ":" in asked else "0"
    if not (number.isdecimal() and int(number) < here.get(kind, 0)):
        usable = [name for name, n in here.items() if n]
        why = (
            f"torch finds {here[kind]} of this kind"
            if kind in here
            else f"known are {', '.join(here)}"
        )
        raise RelneuronError(
            f"no device {asked!r} here: {why}", f"use --device {' or '.join(usable)}", 2
        )
    return "cpu" if kind == "cpu" else asked


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Any:
    """A causal language model, by anything `from_pretrained` takes.

    `device` defaults to the GPU if there is one; `dtype` to float32 on a CPU and to the
    checkpoint's own on a GPU. The model comes in eval mode.
    """
    from transformers import AutoModelForCausalLM

    device = choose_device(device)
    dtype = dtype or ("float32" if device == "cpu" else "auto")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise RelneuronError(f"unknown dtype {dtype!r}", "use float32, bfloat16 or float16", 2)
    _settle_arithmetic()
    looks_local = check_model_folder(name)
    if looks_local and revision is not None:
        raise RelneuronError(
            f"{name} is a folder, which has no revision {revision}", "leave out --revision", 2
        )
    if looks_local and (Path(name) / ADAPTER).is_file():
        becomes = "used, as peft is installed" if find_spec("peft") else "ignored without peft"
        warnings.warn(f"{name} also holds an adapter ({ADAPTER}): it is {becomes}", stacklevel=2)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # a damaged config or weight raises whatever it leads to
        raise RelneuronError(
            f"{name} could not be loaded as a causal language model: {_first_line(error)}",
            "give a Hugging Face model folder (config.json, weights, tokenizer) or a hub name",
        ) from error
    if info["missing_keys"]:
        raise RelneuronError(
            f"{name} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}, ...",
            "give the whole checkpoint",
        )
    return model.to(device).eval()


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """The tokenizer that belongs to a model."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        if not tokenizer("a")["input_ids"]:
            raise ValueError("it makes no tokens")
    except Exception as error:
        raise RelneuronError(
            f"{name} has no usable tokenizer: {_first_line(error).removesuffix(' from one of:')}",
            "save the model's tokenizer into its folder (tokenizer.save_pretrained)",
        ) from error
    return tokenizer


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --- finding gated MLPs ----------------------------------------------------------------------


@dataclass(frozen=True)
class GatedMLP:
    """One layer's `down(activation(gate(x)) * up(x))`: its module and how to compute the parts."""

    layer: int
    path: str
    module: nn.Module
    activation: str
    width: int  # F
    hidden: int  # D
    packed: bool  # gate_up_proj gives gate and up side by side
    projections: tuple[Projection, ...] = ()  # of the layer's attention, where they were asked for

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """gate and up (T, F) of x (..., D); halves of one tensor where the weights are packed."""
        if self.packed:
            both = cast(Tensor, cast(Any, self.module).gate_up_proj(x)).reshape(-1, 2 * self.width)
            return both[:, : self.width], both[:, self.width :]
        module = cast(Any, self.module)
        return (
            module.gate_proj(x).reshape(-1, self.width),
            module.up_proj(x).reshape(-1, self.width),
        )

    def own_activation(self) -> Callable[[Tensor], Tensor]:
        """The module's own activation, as its own forward calls it."""
        names = (name for name in _ACTIVATION_NAMES if callable(getattr(self.module, name, None)))
        return cast(Callable[[Tensor], Tensor], getattr(self.module, next(names)))

    def activate(self, gate: Tensor) -> Tensor:
        return self.own_activation()(gate)

    def uncalled(self) -> list[tuple[str, nn.Module]]:
        """The modules inside that neither the projections nor the activation are made of."""
        own = cast(Any, self.module)
        names = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
        roots = [self.own_activation(), *(getattr(own, name, None) for name in names)]
        called = {id(m) for root in roots if isinstance(root, nn.Module) for m in root.modules()}
        return [
            (name, m) for name, m in own.named_modules() if m is not own and id(m) not in called
        ]

    def down(self, h: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.module).down_proj(h))

    def formula(self, x: Tensor) -> Tensor:
        """The MLP's output by the formula, in torch: what the self-check compares with."""
        gate, up = self.project(x)
        h = ACTIVATIONS[self.activation](gate) * up
        return self.down(h.reshape(*x.shape[:-1], self.width))


@dataclass(frozen=True)
class Verdict:
    """Whether a layer's MLP is supported, and why not."""

    layer: int
    mlp: GatedMLP | None
    reason: str


def inspect_layers(model: Any) -> list[Verdict]:
    """A verdict for every decoder layer, by structure and by a numeric self-check.

    The decoder layers are the `ModuleList` as long as `config.num_hidden_layers`. In each, a
    gated MLP is a module with `gate_proj`, `up_proj` and `down_proj`, or `gate_up_proj` and
    `down_proj`, and an activation; on one random row it must give what the formula gives.
    """
    check_unwrapped(model)
    path, layers = _decoder_layers(model)
    return [_inspect_layer(i, f"{path}.{i}", layer) for i, layer in enumerate(layers)]


def _decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    config = model.config.get_text_config() if hasattr(model, "config") else None
    n_layers = getattr(config, "num_hidden_layers", None)
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if not lists:
        raise RelneuronError(
            f"{type(model).__name__} has no list of {n_layers} decoder layers",
            "relneuron needs a decoder-only model with config.num_hidden_layers layers",
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def check_unwrapped(model: Any) -> None:
    """Refuse a model inside of another module (DataParallel, say), which is not one itself."""
    inner = getattr(model, "module", None)
    if not hasattr(model, "config") and hasattr(inner, "config"):
        raise RelneuronError(
            f"{type(model).__name__} holds the model as its .module",
            "give model.module in place of model",
        )


def _inspect_layer(number: int, path: str, layer: nn.Module) -> Verdict:
    names = {name: module for name, module in layer.named_modules()}
    found = [
        name
        for name, module in names.items()
        if hasattr(module, "down_proj")
        and (hasattr(module, "gate_up_proj") or hasattr(module, "gate_proj"))
    ]
    compiled = [name for name in found if f"{name}._orig_mod" in found]
    if compiled:
        why = f"{compiled[0]} is compiled by itself: compile the whole model, or no part of it"
        return Verdict(number, None, why)
    if len(found) != 1:
        if any("expert" in name for name in names):
            return Verdict(number, None, "mixture of experts, not one gated MLP")
        if found:
            return Verdict(number, None, f"{len(found)} gated MLPs ({', '.join(found)}), not one")
        maps = [name for name, m in names.items() if getattr(m, "weight", torch.ones(1)).dim() == 2]
        return Verdict(number, None, f"no gated MLP (linear maps: {', '.join(maps) or 'none'})")
    module = names[found[0]]
    patched = getattr(module.__dict__.get("forward"), "mlp", None)
    if isinstance(patched, GatedMLP):
        return Verdict(number, patched, "patched already, checked before that")
    try:
        with without_hooks(module):
            return _inspect_mlp(number, f"{path}.{found[0]}", module)
    except Exception as error:
        return Verdict(number, None, f"its MLP cannot be run alone: {_first_line(error)}")


def _inspect_mlp(number: int, path: str, module: nn.Module) -> Verdict:
    packed = hasattr(module, "gate_up_proj")
    needed = ("gate_up_proj", "down_proj") if packed else ("gate_proj", "up_proj", "down_proj")
    parts = [getattr(module, name, None) for name in needed]
    if any(
        isinstance(part, nn.Parameter) and part.dim() == 3 or isinstance(part, nn.ModuleList)
        for part in parts
    ):
        return Verdict(number, None, "mixture of experts, not one gated MLP")
    linears = [part for part in parts if isinstance(part, nn.Module)]
    weights = [getattr(part, "weight", None) for part in linears]
    if len(linears) < len(needed) or not all(isinstance(w, Tensor) for w in weights):
        return Verdict(number, None, f"{', '.join(needed)} are not all linear maps")
    dtypes = {cast(Tensor, weight).dtype for weight in weights}
    if not all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes):
        return Verdict(
            number, None, f"quantised weights ({', '.join(map(str, sorted(dtypes, key=str)))})"
        )
    if torch.float64 in dtypes:
        return Verdict(
            number, None, "float64 weights, the kernels take float32, bfloat16 and float16"
        )
    weight = cast(Tensor, weights[0])
    if weight.device.type == "meta" or type(weight.data).__name__ == "DTensor":
        return Verdict(number, None, "its weights are offloaded or sharded over devices")
    if any(module.training for module in module.modules()):
        return Verdict(number, None, "in train mode: call model.eval()")
    # Shapes are read from outputs, so wrapped linear maps (LoRA, say) need no special case.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        hidden = cast(Tensor, weights[-1]).shape[0]
        x = torch.randn(1, 1, hidden, generator=generator).to(weight.device, weight.dtype)
        width = int(cast(Any, linears[0])(x).shape[-1]) // (2 if packed else 1)
        activation = _activation(module, weight)
        if activation is None:
            return Verdict(number, None, f"its activation is none of {', '.join(ACTIVATIONS)}")
        mlp = GatedMLP(number, path, module, activation, width, hidden, packed)
        ours, theirs = mlp.formula(x), module(x)
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            return Verdict(number, None, "its MLP does not return one tensor like its input")
        tolerance = 16 * torch.finfo(weight.dtype).eps * float(theirs.abs().max())
        if not bool((ours - theirs).abs().max() <= tolerance):
            return Verdict(number, None, "its MLP is not down(activation(gate(x)) * up(x))")
    return Verdict(number, mlp, f"{path}: {activation}, F={width}, D={hidden}")


def _activation(module: nn.Module, like: Tensor) -> str | None:
    """The name of a module's activation, found by comparing values."""
    x = torch.linspace(-6, 6, 97, device=like.device)
    for name in _ACTIVATION_NAMES:
        function = getattr(module, name, None)
        if not callable(function):
            continue
        value = function(x)
        for known, formula in ACTIVATIONS.items():
            if isinstance(value, Tensor) and torch.allclose(value, formula(x), rtol=0, atol=1e-6):
                return known
    return None


def find_gated_mlps(model: Any, *, attention: bool = False) -> list[GatedMLP]:
    """The gated MLP of every layer, or an error with the reasons of the layers without one.

    With `attention` each comes with the projections of its layer's attention.
    """
    verdicts = inspect_layers(model)
    reasons: dict[str, list[int]] = {}
    for verdict in verdicts:
        if verdict.mlp is None:
            reasons.setdefault(verdict.reason, []).append(verdict.layer)
    if reasons:
        n_good = sum(verdict.mlp is not None for verdict in verdicts)
        why = "; ".join(f"layers {_ranges(layers)}: {why}" for why, layers in reasons.items())
        raise RelneuronError(
            f"{n_good} of {len(verdicts)} layers have a supported gated MLP; {why}",
            "give a dense model with gated MLPs; `relneuron doctor MODEL` lists every layer",
        )
    mlps = [verdict.mlp for verdict in verdicts if verdict.mlp is not None]
    if attention:
        path, layers = _decoder_layers(model)
        mlps = [
            replace(mlp, projections=find_projections(f"{path}.{mlp.layer}", layers[mlp.layer]))
            for mlp in mlps
        ]
    shapes = {
        (mlp.width, mlp.hidden, mlp.activation, *(part.width for part in mlp.projections))
        for mlp in mlps
    }
    if len(shapes) > 1:
        raise RelneuronError(
            f"the layers differ in width, hidden size, activation or attention: {sorted(shapes)}",
            "relneuron needs the same shape in every layer",
        )
    return mlps


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def model_shape(mlps: Sequence[GatedMLP]) -> dict[str, int]:
    """layers, width (F) and hidden (D); q, k, v and o where they were asked for."""
    shape = {"layers": len(mlps), "width": mlps[0].width, "hidden": mlps[0].hidden}
    return shape | {part.site: part.width for part in mlps[0].projections}


def describe_model(
    name: str, model: Any, mlps: Sequence[GatedMLP] | Mapping[str, int], backend: str
) -> Json:
    """What the manifest says of a model; `digest` is `identity.model_digest`.

    A model whose MLPs are not gated gives its shape (layers, width and hidden) in their place.
    """
    parameter = next(model.parameters())
    if isinstance(mlps, Mapping):
        text = model.config.get_text_config()
        names = ("hidden_act", "hidden_activation", "activation_function")
        activation = next((getattr(text, name) for name in names if hasattr(text, name)), None)
        shape = {key: mlps[key] for key in ("layers", "width", "hidden")}
    else:
        activation, shape = mlps[0].activation, model_shape(mlps)
    return {
        "id": name,
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        **shape,
        "activation": activation,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None),
        "device": parameter.device.type,
        "backend": _resolve_backend(backend, parameter.device.type),
        "digest": model_digest(model),
    }


def fallbacks(described: Json) -> list[str]:
    """What was used in place of the kernels that are made for the model's device, and why."""
    made_for = {"cuda": "triton", "cpu": "cpu"}.get(described["device"])
    if made_for is None or described["backend"] == made_for:
        return []
    status = ops.available_backends()[made_for]
    why = "asked for" if status.works else status.detail
    return [f"backend {described['backend']} in place of {made_for}: {why}"]


def _resolve_backend(backend: str, device: str) -> str:
    """The backend that "auto" means on a device; one that is asked for must work there."""
    status = ops.available_backends()
    if backend == "auto":
        made_for = {"cuda": "triton", "cpu": "cpu"}.get(device, "reference")
        return made_for if status[made_for].works else "reference"
    if backend not in status:
        raise RelneuronError(
            f"unknown backend {backend!r}", f"use auto, {', '.join(status)}", exit_code=2
        )
    if not status[backend].works:
        raise RelneuronError(
            f"backend {backend} does not work here: {status[backend].detail}",
            "leave out --backend, or see `relneuron doctor`",
        )
    return backend
