"""How many neurons a model has by its config, where no weights are at hand to prove it.

`plan.py` plans with it, and files of other authors, which hold no shape, are read by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from relneuron.artifact.files import Json, RelneuronError
from relneuron.model.layers import Unfound, decoder_layers, features, find_projections
from relneuron.model.mlps.candidates import linear_maps
from relneuron.model.mlps.find_experts import expert_parts

# What configurations call the width of an MLP, and models that do not say it where it is 4 D.
_WIDTHS = (
    *("intermediate_size", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "n_inner"),
    *("d_ff", "dff", "dim_ff"),
)
_RATIOS = ("expansion_ratio", "intermediate_multiple_size")
_FOUR_TIMES = ("bloom", "codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt")
_SHARED = ("shared_expert_intermediate_size", "shared_intermediate_size")
_N_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


def mlp_width(config: Any) -> Any:
    """F by a configuration: by its name there, a ratio to D, or what the architecture has."""
    width = _first(config, _WIDTHS)
    hidden = getattr(config, "hidden_size", None)
    if width is None and type(hidden) is int:
        if type(ratio := _first(config, _RATIOS)) is int:
            return ratio * hidden
        if config.model_type in _FOUR_TIMES:
            return 4 * hidden
    return width


def _first(config: Any, names: Sequence[str]) -> Any:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if value is not None), None)


def told_widths(model: Any, layers: Sequence[nn.Module]) -> list[int]:
    """How many neurons the MLPs of each layer have by the config, those of experts by their shape.

    0 where no linear map of a layer has so many inputs.
    """
    config = model.config.get_text_config()
    width, shared = mlp_width(config), _first(config, _SHARED)
    if not shared and (each := _first(config, ("moe_intermediate_size", *_WIDTHS))):
        shared = each * (_first(config, _N_SHARED) or 0) if type(each) is int else None
    widths = []
    for number, layer in enumerate(layers):
        experts = [(m, parts) for m in layer.modules() if (parts := expert_parts(m)) is not None]
        routed = sum(m.get_parameter(parts[2]).numel() for m, parts in experts)
        routed //= config.hidden_size if experts else 1
        own = (*width, *[0] * len(layers))[number] if isinstance(width, list | tuple) else width
        if experts:
            own = shared or (own if "shared" in (last_map(layer, own or 0) or "") else 0)
        told = own or 0
        widths.append(routed + (told if last_map(layer, told) is not None else 0))
    return widths


def told_shape(model: Any, *, attention: bool = False) -> Json:
    """What files will say of a model's neurons (`shape.model_shape`), by its structure alone.

    An MLP is gated if beside its last map as many outputs are made twice as that has inputs. Raises
    RelneuronError for a model in which no layer has an MLP.
    """
    try:
        path, found = decoder_layers(model)
    except Unfound as error:
        raise RelneuronError(
            f"{type(model).__name__} has {error}", "give a decoder-only model"
        ) from None
    layers = list(found)
    widths, hidden = told_widths(model, layers), model.config.get_text_config().hidden_size
    if not any(widths):
        raise RelneuronError(
            f"the config of {type(model).__name__} tells of no MLP in its layers",
            "ask relneuron doctor MODEL, which looks at its weights",
        )
    shape: Json = {"layers": len(layers), "width": max(widths), "hidden": int(hidden)}
    if min(widths) < max(widths):
        shape["widths"] = widths
    if not any(_is_gated(layer, model.config.get_text_config()) for layer in layers):
        shape["gated"] = False
    experts = [_experts(layer, int(hidden)) for layer in layers]
    if any(experts):
        shape["experts"] = [one[0] if one else 0 for one in experts]
        shape["expert_width"] = next(one[1] for one in experts if one)
    if attention:
        number = next(number for number, width in enumerate(widths) if width)
        parts = find_projections(f"{path}.{number}", layers[number])
        shape |= {part.site: part.width for part in parts}
    return shape


def _experts(layer: nn.Module, hidden: int) -> tuple[int, int] | None:
    """How many routed experts a layer has, and how wide each is."""
    for module in layer.modules():
        parts = expert_parts(module)
        if parts is not None:
            last = module.get_parameter(parts[2])
            n = len(last) if last.dim() == 3 else int(module.num_experts)  # type: ignore[arg-type]
            return n, last.numel() // n // hidden
    return None


def _is_gated(layer: nn.Module, config: Any) -> bool:
    for module in layer.modules():
        parts = expert_parts(module)
        if parts is not None:
            return parts[1] != ("up_proj",)
    width = mlp_width(config)
    down = last_map(layer, width) if type(width) is int else None
    if down is None:
        return True  # as most are
    beside = layer.get_submodule(down.rpartition(".")[0])
    made = [features(m)[1] for p, m in linear_maps(beside).items() if p != down.rpartition(".")[2]]
    return bool(sum(n for n in made if n in (width, 2 * width)) >= 2 * width)


def last_map(layer: nn.Module, width: int) -> str | None:
    """The path of the last linear map in a layer that has so many inputs; none of a state space."""
    found = None
    for path, module in linear_maps(layer).items():
        beside = layer.get_submodule(path.rpartition(".")[0]).children()
        if any(isinstance(other, nn.Conv1d) for other in beside):
            continue
        with suppress(Unfound):
            found = path if width and features(module)[0] == width else found
    return found
