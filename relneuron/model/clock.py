"""How much of the time a model spends in its own matrix products: the part no study can do without.

`relneuron run` and `ablate` print it.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from torch import nn


class Clock:
    """Measures, as a context manager, its own time and that of a model's linear maps, in seconds.

    `products` stays None on a GPU, whose kernels run on while Python goes ahead.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seconds = 0.0
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.products: float | None = 0.0 if on_cpu else None
        self._linears = [m for m in model.modules() if isinstance(m, nn.Linear)] if on_cpu else []
        self._handles: list[Any] = []
        self._began = self._entered = 0.0

    def __enter__(self) -> Clock:
        self._entered = time.perf_counter()
        for module in self._linears:
            self._handles.append(module.register_forward_pre_hook(self._start))
            self._handles.append(module.register_forward_hook(self._stop))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.seconds += time.perf_counter() - self._entered

    def _start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: object) -> None:
        if self.products is not None:
            self.products += time.perf_counter() - self._began

    def __str__(self) -> str:
        if self.products is None or not self.seconds:
            return f"{self.seconds:.1f} s"
        share = self.products / self.seconds
        return f"{self.seconds:.1f} s, {share:.0%} of it in the model's matrix products"
