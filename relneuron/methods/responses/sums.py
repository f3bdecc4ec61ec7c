"""The sums that one batch leaves: a tensor a device, of which each site of each layer is a view.

`record.py` makes them before a forward, which adds to them, and has them stored behind it: with one
copy a device, however many layers there are, which on a GPU runs while the next batch computes.
Responses that stay where they are computed are summed up in their own rows, with no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron.model.layers import device_of
from relneuron.model.mlps.shape import Part


@dataclass
class Section:
    """Part of a batch's sums: those at one site of one MLP."""

    name: str  # of the block: site.layer
    mlp: Part
    is_inner: bool  # gate or up
    values: Tensor  # (n, .) as the forward adds to it
    is_there: bool  # `values` are rows of the block itself

    @property
    def inside(self) -> slice:
        """Which columns of the block they are."""
        return self.mlp.inside if self.is_inner else slice(None)

    def matrix(self) -> Tensor:
        """(n_rows, .) by neuron."""
        return self.mlp.unfold(self.values) if self.is_inner else self.values


def zeros(n: int, device: torch.device) -> Tensor:
    return torch.zeros(n, device=device)


class Scratch:
    """Zeros on the CPU in the same memory each time: new memory costs more than to clear it.

    Who asks for the next ones is done with those before.
    """

    def __init__(self) -> None:
        self._kept = torch.empty(0, device="cpu")

    def zeros(self, n: int, device: torch.device) -> Tensor:
        if device.type != "cpu":
            return zeros(n, device)
        if len(self._kept) < n:
            self._kept = torch.empty(0, device="cpu")  # not both at a time
            self._kept = torch.from_numpy(np.empty(n, np.float32))  # of numpy's large pages
        return self._kept[:n].zero_()


class Sums:
    """Zeros for the sums of a batch of `n_rows` prompts at `sites` of all MLPs that text runs.

    `of` has what the forward of each MLP adds to, by site; None where text runs none of it. The
    MLPs of a layer write into one stream: their down is what they sum to. `room` has zeros of whole
    blocks, by their names, which sums of that shape are taken in: those of experts have another.
    """

    def __init__(
        self,
        mlps: Sequence[Part],
        sites: Sequence[str],
        n_rows: int,
        zeros: Callable[[int, torch.device], Tensor] = zeros,
        room: Mapping[str, Tensor] | None = None,
    ) -> None:
        # By layer and site, of gate and up by MLP, too: whose it is, where it begins, its shape.
        plan: dict[tuple[int, str, int], tuple[Part, torch.device, int, tuple[int, int]]] = {}
        sizes: dict[torch.device, int] = {}
        self._there: dict[tuple[int, str, int], Tensor] = {}
        for mlp in filter(_runs, mlps):
            device = device_of(mlp.module)
            for site, shape in _shapes(mlp, n_rows, sites).items():
                if (key := _key(mlp, site)) not in plan:
                    start = sizes.get(device, 0)
                    plan[key] = mlp, device, start, shape
                    there = (room or {}).get(f"{site}.{mlp.layer}")
                    if there is not None and there.shape == shape and there.device == device:
                        self._there[key] = there
                        continue
                    # A view begins where a line of the processor's cache does.
                    sizes[device] = start + -(-shape[0] * shape[1] // 16) * 16
        self._plan = plan
        self._flat = {device: zeros(n, device) for device, n in sizes.items()}
        found = dict(zip(plan, self._sections(self._flat), strict=True))
        self.of = [
            {site: found[_key(mlp, site)].values for site in _shapes(mlp, n_rows, sites)}
            if mlp.runs
            else None
            for mlp in mlps
        ]

    def _sections(self, flat: Mapping[torch.device, Tensor]) -> list[Section]:
        found = []
        for key, (mlp, device, start, (n, width)) in self._plan.items():
            layer, site, _ = key
            values = self._there.get(key)
            is_there = values is not None
            if values is None:
                values = flat[device][start : start + n * width].view(n, width)
            found.append(Section(f"{site}.{layer}", mlp, site in INNER, values, is_there))
        return found

    def sections(self, *, on_host: bool) -> Callable[[], list[Section]]:
        """Begin to bring them to the host, if they are to go there; who calls the result waits."""
        if not on_host:
            found = self._sections(self._flat)
            return lambda: found
        coming = {device: to_host(values) for device, values in self._flat.items()}

        def arrived() -> list[Section]:
            return self._sections({device: arrive() for device, arrive in coming.items()})

        return arrived


INNER = ("gate", "up")


def _runs(mlp: Part) -> bool:
    return mlp.runs


def _key(mlp: Part, site: str) -> tuple[int, str, int]:
    return mlp.layer, site, mlp.offset if site in INNER else 0


def _shapes(mlp: Part, n_rows: int, sites: Sequence[str]) -> dict[str, tuple[int, int]]:
    width, n = mlp.width // mlp.n_experts, n_rows * mlp.n_experts
    shapes = {"gate": (n, width), "up": (n, width), "down": (n_rows, mlp.hidden)}
    shapes |= {part.site: (n_rows, part.width) for part in mlp.projections}
    return {site: shapes[site] for site in sites if site in shapes}


_cuda: Any = torch.cuda  # its streams have no types
_STREAMS: dict[torch.device, Any] = {}  # of copies, one a GPU


def to_host(values: Tensor) -> Callable[[], Tensor]:
    """Begin to copy values to the host, and return what waits for them.

    From a GPU they go into pinned memory, behind what it has been asked to compute so far and
    beside what it is asked next.
    """
    if values.device.type != "cuda":
        found = values.cpu()
        return lambda: found
    device = values.device
    if device not in _STREAMS:
        _STREAMS[device] = _cuda.Stream(device)
    stream = _STREAMS[device]
    host = torch.empty(values.shape, device="cpu", pin_memory=True)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        host.copy_(values, non_blocking=True)
    values.record_stream(stream)  # so that its memory is not given away before
    done = stream.record_event()

    def arrive() -> Tensor:
        done.synchronize()
        return host

    return arrive
