"""Norms, told by their numbers: gain, bias, centring and eps of any RMSNorm or LayerNorm.

model/stream/find.py and read.py call it for what stands in front of a part, behind it, and at the
end.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import cast

import torch
from torch import Tensor, nn

from relneuron.model.layers import Unfound

_USUAL = (1e-5, 1e-6)  # of norms that keep their eps in their code


@dataclass(frozen=True)
class Norm:
    """y = (x - mean(x), if `centred`) / sqrt(mean square of that + eps) * gain + bias."""

    module: nn.Module
    gain: Tensor  # (D,)
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
        y = self.linear(x.double()) * self.scale(x).unsqueeze(-1)
        return y if self.bias is None else y + self.bias.double()

    def linear(self, x: Tensor) -> Tensor:
        """gain * (x - mean(x), if `centred`) of x (..., D): y without the scale and the bias.

        In the wider of both dtypes, and float32 at least.
        """
        wide = torch.promote_types(torch.promote_types(x.dtype, self.gain.dtype), torch.float32)
        x = x.to(wide)
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.gain.to(wide)

    def keys(self, rows: Tensor, center: bool = True) -> Tensor:
        """Rows (n, D) that read y, as rows that read x but for the scale: float64 (n, D).

        < x - mean(x), k > = < x, k - mean(k) >, so with a centred key no component needs centring.
        """
        keys = rows.double() * self.gain.double()
        return keys - keys.mean(-1, keepdim=True) if self.centred and center else keys


def read_norm(module: nn.Module, width: int, like: Tensor) -> Norm:
    """A norm's gain, bias and eps, told by its outputs for random inputs (D,) of two sizes.

    RMSNorm or LayerNorm with gain `weight`, 1 + `weight` (Gemma) or 1. The smaller input has a mean
    square like eps, so that a wrong eps shows. The eps is a number that the module holds, or a
    usual one. `like` has the dtype and the device of what the module reads.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    name = type(module).__name__
    if isinstance(weight, Tensor):
        weight = weight.detach()
        if weight.shape != (width,):
            raise Unfound(f"{name} has not {width} weights")
    bias = bias.detach() if isinstance(bias, Tensor) else None
    ones = torch.ones(width, dtype=like.dtype, device=like.device)
    # 1 + weight is made wide, as Gemma makes it: 16 bits would round it.
    wide = torch.promote_types(like.dtype, torch.float32)
    gains = [ones] if weight is None else [weight, 1 + weight.to(wide)]
    held = [v for v in vars(module).values() if isinstance(v, float) and 0 < v < 1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(width, generator=generator, dtype=torch.float64, device="cpu")
    limit = 4 * max(torch.finfo(like.dtype).eps, torch.finfo(torch.float32).eps)
    for eps in dict.fromkeys((*held, *_USUAL)):
        inputs = torch.stack([x, x * eps**0.5]).to(like.device, like.dtype)
        with torch.no_grad():
            outputs = cast(Tensor, module(inputs))
        if not isinstance(outputs, Tensor) or outputs.shape != inputs.shape:
            break
        for gain, centred in product(gains, (False, True)):
            norm = Norm(module, gain, bias, centred, eps)
            # Number by number, as large gains would hide whether 1 is added.
            # The mean is rounded by its values' size, whose own may be much smaller.
            exact = inputs.double()
            size = exact.abs() + exact.square().mean(1, keepdim=True).sqrt()
            size = size * norm.scale(inputs)[:, None] * gain.double().abs()
            size = size if bias is None else size + bias.double().abs()
            if bool(((outputs.double() - norm.apply(inputs)).abs() <= limit * size).all()):
                return norm
    raise Unfound(f"{name} is neither an RMSNorm nor a LayerNorm of its weight")
