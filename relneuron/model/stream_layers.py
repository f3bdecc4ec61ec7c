"""The parts of a decoder layer that write into the residual stream, found by their structure.

`model/stream.py` calls it and confirms by numbers what is found here; `model/trace.py` reads these
parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.layers import Parts, Projection, Unfound, decoder_layers

QUERY_KEYS = ("gate", "up", "down")


def unsupported(model: Any, reason: str) -> RelneuronError:
    """The error for a model whose residual stream is not a plain sum of what its layers write."""
    return RelneuronError(
        f"{type(model).__name__} cannot be attributed: {reason}",
        "give a dense decoder-only model on one device whose layers add their attention and MLP "
        "outputs to the residual stream as they are (Llama, Mistral, Qwen, GPT-2, ...)",
    )


def matrix(module: nn.Module) -> Tensor:
    """A linear map's matrix (out, in), a view of its weight; GPT-2's Conv1D stores (in, out)."""
    weight = cast(Tensor, module.weight).detach()
    return weight.T if type(module).__name__ == "Conv1D" else weight


@dataclass(frozen=True)
class Rows:
    """`n` outputs of a linear map, from `start` on: the values within packed q, k and v, say."""

    module: nn.Module
    start: int
    n: int

    def matrix(self) -> Tensor:
        """(n, in)."""
        return matrix(self.module)[self.start : self.start + self.n]

    def of(self, output: Tensor) -> Tensor:
        """The part (..., n) of the map's output."""
        return output[..., self.start : self.start + self.n]


@dataclass(frozen=True)
class Norm:
    """y = (x - mean(x), if `centred`) / sqrt(mean square of that + eps) * gain + bias."""

    module: nn.Module
    gain: Tensor  # (D,) in the weight's dtype
    bias: Tensor | None  # (D,)
    centred: bool
    eps: float

    def scale(self, x: Tensor) -> Tensor:
        """1 / sqrt(mean square + eps) of x (..., D), float64 (...)."""
        x = x.double()
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return (x.square().mean(-1) + self.eps).rsqrt()

    def apply(self, x: Tensor) -> Tensor:
        """y of x (..., D), float64: what the module gives but for its rounding."""
        scale = self.scale(x).unsqueeze(-1)
        x = x.double()
        y = (x - x.mean(-1, keepdim=True) if self.centred else x) * scale * self.gain.double()
        return y if self.bias is None else y + self.bias.double()


@dataclass(frozen=True)
class ResidualLayer:
    """What one decoder layer writes into the residual stream.

    r = h + out(heads of norm(h)) and h' = r + down(neurons of norm(r)), biases included.
    """

    layer: int
    path: str
    module: nn.Module
    attention_norm: Norm
    attention: nn.Module
    value: Rows  # the heads' values (n_kv_heads * d_h) before the repetition of grouped heads
    out: nn.Module  # from the heads' outputs (.., H * d_h) to the attention write
    ffn_norm: Norm
    mlp: nn.Module
    gate: Rows  # of an MLP without a gate: its first map, which is `up`, too
    up: Rows
    down: nn.Module  # from the neurons (.., F) to the FFN write
    n_heads: int

    def ffn_values(self) -> Tensor:
        """(F, D): the value vector of each FFN neuron, a view of the weight."""
        return matrix(self.down).T

    def attention_values(self) -> Tensor:
        """(H * d_h, D): the value vector of each head's coordinates, a view of the weight."""
        return matrix(self.out).T

    def parts(self) -> Parts:
        """Its neurons as a patch zeroes them: `ffn`, inputs of `down`; `attention`, of `out`."""
        maps = {"ffn": self.down, "attention": self.out}
        return Parts(
            self.mlp,
            tuple(
                Projection(site, self.path, module, 0, matrix(module).shape[1], of_input=True)
                for site, module in maps.items()
            ),
        )

    def ffn_keys(self, key: str, index: Tensor, *, center: bool = True) -> Tensor:
        """(n, D) float64: the key q (.) gain of FFN neurons `index` (n,) int64, in methods B4.

        `key` is `gate`, `up` or `down` (the notebook's: the value vector). Of an MLP without a
        gate both `gate` and `up` are the rows of its first map. `center`: as the norm does.
        """
        if key not in QUERY_KEYS:
            raise RelneuronError(f"unknown key {key!r}", f"use {', '.join(QUERY_KEYS)}", 2)
        rows = {"gate": self.gate.matrix, "up": self.up.matrix, "down": self.ffn_values}[key]()
        return _fold(rows[index], self.ffn_norm, center)

    def attention_keys(self, index: Tensor, *, center: bool = True) -> Tensor:
        """(n, D) float64: the key q (.) gain of head coordinates `index` (n,) int64 in H * d_h."""
        rows = self.value.matrix()
        head_dim = matrix(self.out).shape[1] // self.n_heads
        group = self.n_heads * head_dim // len(rows)  # query heads that share one value head
        shared = index // (group * head_dim) * head_dim + index % head_dim
        return _fold(rows[shared], self.attention_norm, center)


@dataclass(frozen=True)
class ResidualModel:
    """A model whose residual stream is h^0 plus what its layers write, and what reads it.

    logits(y) = scale * y @ unembed.T (+ offset), with `scale` of the final norm. `unembed` has the
    norm's gain folded in and, under a LayerNorm, its rows centred; float64 for a float64 model.
    """

    model: Any
    layers: list[ResidualLayer]
    final_norm: Norm
    n_heads: int
    n_kv_heads: int
    head_dim: int
    width: int  # F
    hidden: int  # D
    vocabulary: int  # V
    is_gated: bool  # SwiGLU or a kin: the neuron is activation(gate) * up
    centred: bool  # LayerNorm
    eps: float
    unembed: Tensor  # (V, D) float32
    offset: Tensor | None  # (V,): what the final norm's bias and the lm_head's add to the logits

    @property
    def shape(self) -> dict[str, int]:
        """layers, width (F) and hidden (D), as files name them."""
        return {"layers": len(self.layers), "width": self.width, "hidden": self.hidden}


def _fold(rows: Tensor, norm: Norm, center: bool = True) -> Tensor:
    """Rows (n, D) times the norm's gain, centred where the norm centres (and `center`), float64.

    < x - mean(x), k > = < x, k - mean(k) >, so with a centred key no component needs centring.
    """
    keys = rows.double() * norm.gain.double()
    return keys - keys.mean(-1, keepdim=True) if norm.centred and center else keys


# --- finding them ----------------------------------------------------------------------------


def residual_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """`layers.decoder_layers`, with the error of this room."""
    try:
        return decoder_layers(model)
    except Unfound as error:
        raise unsupported(model, f"it has {error}") from None


def find_layers(model: Any) -> list[ResidualLayer]:
    """The parts of every decoder layer by structure; RelneuronError says which layer lacks what."""
    path, layers = residual_layers(model)
    n_heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    if not isinstance(n_heads, int):
        raise unsupported(model, "its config has no single num_attention_heads")
    found = []
    for number, layer in enumerate(layers):
        try:
            found.append(_find_layer(number, f"{path}.{number}", layer, n_heads))
        except Unfound as error:
            raise unsupported(model, f"layer {number}: {error}") from None
    return found


def _find_layer(number: int, path: str, layer: nn.Module, n_heads: int) -> ResidualLayer:
    attention = _one(layer, "attention", (("v_proj", "o_proj"), ("qkv_proj", "o_proj")), "c_attn")
    mlp = _one(layer, "MLP", (("down_proj", "gate_proj"), ("down_proj", "gate_up_proj")), "c_fc")
    out = _linear(attention, "o_proj", "c_proj")
    down = _linear(mlp, "down_proj", "c_proj")
    hidden, heads_width = matrix(out).shape
    if matrix(down).shape[0] != hidden or heads_width % n_heads:
        raise Unfound(
            f"its maps {tuple(matrix(out).shape)} and {tuple(matrix(down).shape)} do not fit "
            f"{n_heads} heads and one residual stream"
        )
    gate, up = _gate_and_up(mlp, matrix(down).shape[1])
    norms = [
        module
        for module in layer.children()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() == 1
    ]
    if len(norms) != 2:
        raise Unfound(f"{len(norms)} norms, not one in front of the attention and of the MLP")
    attention_norm, ffn_norm = (read_norm(norm, hidden) for norm in norms)
    return ResidualLayer(
        layer=number,
        path=path,
        module=layer,
        attention_norm=attention_norm,
        attention=attention,
        value=_values(attention, heads_width, n_heads),
        out=out,
        ffn_norm=ffn_norm,
        mlp=mlp,
        gate=gate,
        up=up,
        down=down,
        n_heads=n_heads,
    )


def _one(
    layer: nn.Module, what: str, pairs: tuple[tuple[str, ...], ...], gpt2_name: str
) -> nn.Module:
    """The one module of a layer that has the attributes of one of the pairs."""
    names = (*pairs, (gpt2_name, "c_proj"))
    found = [
        module
        for module in layer.modules()
        if any(all(hasattr(module, name) for name in pair) for pair in names)
    ]
    if any("expert" in name for name, _ in layer.named_modules()):
        raise Unfound("a mixture of experts, not one MLP")
    if len(found) != 1:
        kinds = " or ".join(" + ".join(pair) for pair in names)
        raise Unfound(f"{len(found)} modules with {kinds}, not one {what}")
    return found[0]


def _linear(module: nn.Module, *names: str) -> nn.Module:
    """The first of the named maps that there is, with a dense matrix of floating-point numbers."""
    name = next(name for name in names if hasattr(module, name))
    part = getattr(module, name)
    weight = getattr(part, "weight", None)
    if not isinstance(part, nn.Module) or not isinstance(weight, Tensor) or weight.dim() != 2:
        raise Unfound(f"{name} is no linear map with a weight (quantised?)")
    return part


def _values(attention: nn.Module, heads_width: int, n_heads: int) -> Rows:
    """Where the heads' values are made: an own map, or the last part of packed q, k and v."""
    head_dim = heads_width // n_heads
    packed = not hasattr(attention, "v_proj")
    module = _linear(attention, "v_proj", "qkv_proj", "c_attn")
    width = matrix(module).shape[0]
    if packed:
        width = (width - heads_width) // 2
    n_kv_heads = width // head_dim
    if not n_kv_heads or width % head_dim or n_heads % n_kv_heads:
        raise Unfound(f"{width} values a token do not fit {n_heads} heads of {head_dim}")
    return Rows(module, matrix(module).shape[0] - width, width)


def _gate_and_up(mlp: nn.Module, width: int) -> tuple[Rows, Rows]:
    if hasattr(mlp, "gate_up_proj"):
        packed = _linear(mlp, "gate_up_proj")
        gate, up = Rows(packed, 0, width), Rows(packed, width, width)
        n_outputs = 2 * width
    elif hasattr(mlp, "gate_proj"):
        gate = Rows(_linear(mlp, "gate_proj"), 0, width)
        up = Rows(_linear(mlp, "up_proj"), 0, width)
        n_outputs = width
    else:
        gate = up = Rows(_linear(mlp, "c_fc"), 0, width)
        n_outputs = width
    if any(matrix(rows.module).shape[0] != n_outputs for rows in (gate, up)):
        raise Unfound(f"its MLP's first maps have not {n_outputs} outputs")
    return gate, up


def read_norm(module: nn.Module, hidden: int) -> Norm:
    """A norm's gain, bias and eps, told by its outputs for random inputs (D,) of two sizes.

    RMSNorm with gain `weight` or 1 + `weight` (Gemma), or LayerNorm. The smaller input has a mean
    square like eps, so that a wrong eps shows.
    """
    weight = cast(Tensor, module.weight).detach()
    bias = getattr(module, "bias", None)
    eps = next(
        (getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)),
        None,
    )
    if not isinstance(eps, float) or weight.shape != (hidden,):
        raise Unfound(f"{type(module).__name__} has no eps or not {hidden} weights")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(hidden, generator=generator, dtype=torch.float64, device="cpu")
    inputs = torch.stack([x, x * eps**0.5]).to(weight.device, weight.dtype)
    with torch.no_grad():
        outputs = cast(Tensor, module(inputs)).double()
    limit = 4 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
    for gain, centred in ((weight, False), (1 + weight, False), (weight, True)):
        norm = Norm(module, gain, bias.detach() if bias is not None else None, centred, eps)
        # Number by number, as large gains would hide whether 1 is added.
        size = inputs.double().abs() + inputs.double().mean(1, keepdim=True).abs()
        size = size * norm.scale(inputs)[:, None] * gain.double().abs()
        size = size if norm.bias is None else size + norm.bias.double().abs()
        if bool(((outputs - norm.apply(inputs)).abs() <= limit * size).all()):
            return norm
    raise Unfound(f"{type(module).__name__} is neither an RMSNorm nor a LayerNorm of its weight")
