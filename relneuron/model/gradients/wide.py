"""A model in float64 for a while: its weights, and what its code would narrow to float32.

The stage asks for it with `--precision float64`; norms and softmaxes of transformers compute in
float32 whatever the weights are, which would leave seven digits of a float64 model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class _Wide(TorchFunctionMode):
    """Within it a cast to a narrower float, and a softmax in one, are in float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = {k: self._widened(v) for k, v in (kwargs or {}).items()}
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        if func in (Tensor.to, Tensor.type):
            args = (args[0], *map(self._widened, args[1:]))
        return func(*args, **kwargs)

    @staticmethod
    def _widened(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float64 if value in _NARROW else value
        return value


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Within it the model computes in float64; its weights come back as they were, bit for bit."""
    held = {
        name: tensor.dtype
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.dtype in _NARROW
    }
    narrow = set(held.values())
    model.double()
    try:
        with _Wide():
            yield
    finally:
        if len(narrow) == 1:
            model.to(narrow.pop())
        else:
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if name in held:
                    tensor.data = tensor.data.to(held[name])
