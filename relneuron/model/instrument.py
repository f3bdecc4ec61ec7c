"""Context managers around a model that someone else runs: `instrument`, `ablate`, and a clock.

`instrument` counts and `ablate` switches neurons off: patches (model/patch.py) that say what a
token is. `Clock` tells how much of the time the model spends in its own matrix products, the part
that no study can do without; `relneuron run` and `ablate` print it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from relneuron.artifact.chosen import choose_neurons
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import ATTENTION, NeuronFile, Shape, check_neurons
from relneuron.model.counting import ROUTED, TOKENS, WEIGHT, counting_state, tables
from relneuron.model.layers import input_device
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import Part, check_sites, model_shape
from relneuron.model.patch import Patch
from relneuron.model.pictures import Processor, picture_run
from relneuron.model.states import LayerState, Tokens, mask_states, replacements


@dataclass
class Probe:
    """Statistics of a running model: `stats[layer]` is that layer's `ops.GroupStats`.

    A layer with several MLPs, or with experts, has a `Together`, one without any MLP None.
    """

    groups: list[str]
    stats: list[Any]
    _patch: Patch = field(repr=False)

    def batch(self, attention_mask: Tensor, group_ids: int | Sequence[int] | Tensor = 0) -> None:
        """Say what the next forward's tokens are; call it before each forward, which counts once.

        A second forward raises: so does `generate` after its first token. What gradient
        checkpointing runs again in backward() is not counted again.

        `attention_mask` (B, T): padding (0) is never counted. `group_ids`: one group, one per
        row (B,), or one per token (B, T); -1 = not counted.
        """
        ids = torch.as_tensor(group_ids, device=attention_mask.device).to(torch.int32)
        if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < len(self.groups):
            raise ValueError(
                f"batch: group_ids must be in [-1, {len(self.groups)}) (from groups), got "
                f"{int(ids.min())} to {int(ids.max())}"
            )
        if ids.dim() == 1:
            ids = ids.unsqueeze(1)
        # masked_fill makes a new tensor, so the caller's mask and ids stay as they are.
        full = ids.expand(attention_mask.shape).masked_fill(attention_mask == 0, -1)
        self._patch.tokens = Tokens(group_ids=full, counted=set())


class Together:
    """Statistics of a layer with several MLPs, or with experts, side by side; read while it runs.

    `tokens` (G,) and, by site, `count`, `sum`, `sum_sq`, `max` and `n_nonfinite` (G, width) are
    those of `ops.GroupStats`: neuron i of expert e is at e * F + i, a shared expert's behind them.
    `expert_tokens` (G, E) int64 are the tokens that the router sent to each expert, and
    `expert_weight` (G, E) float64 its mean weight, NaN where there were none.
    """

    def __init__(self, parts: Sequence[tuple[Part, LayerState]]) -> None:
        self._parts = parts

    def _tables(self, name: str) -> list[Tensor]:
        found = (tables(part, state).get(name) for part, state in self._parts)
        return [table for table in found if table is not None]

    @property
    def tokens(self) -> Tensor:
        return torch.stack(self._tables(TOKENS)).amax(0)

    def _statistic(self, name: str) -> dict[str, Tensor]:
        stats = self._parts[0][1].stats
        sites = stats.sites if stats is not None else ()
        found = {site: self._tables(f"{name}.{site}") for site in sites}
        return {site: torch.cat(values, 1) for site, values in found.items() if values}

    count = property(lambda self: self._statistic("count"))
    sum = property(lambda self: self._statistic("sum"))
    sum_sq = property(lambda self: self._statistic("sum_sq"))
    max = property(lambda self: self._statistic("max"))
    n_nonfinite = property(lambda self: self._statistic("n_nonfinite"))

    @property
    def expert_tokens(self) -> Tensor:
        return torch.cat(self._tables(ROUTED), 1)

    @property
    def expert_weight(self) -> Tensor:
        return torch.cat(self._tables(WEIGHT), 1) / self.expert_tokens


@contextmanager
def instrument(
    model: Any,
    groups: Sequence[str] | int,
    *,
    sites: Sequence[str] = ("act",),
    threshold: float = 0.0,
    moments: bool = False,
    backend: str = "auto",
) -> Iterator[Probe]:
    """Count, per group, how often every neuron passes `threshold`, while the model runs.

    `groups`: their names or their number G. Inside the context call `probe.batch(...)` before
    each forward; `probe.stats[layer].count[site]` is (G, F) int64 and `.tokens` (G,) int64.
    `sites`, `threshold` and `moments` are those of `ops.GroupStats`.

    The model belongs to this thread meanwhile: a forward of another one raises, and so it does in
    `ablate`. Hooks on the MLPs and their parts run as ever. With gradient checkpointing call
    backward() inside the context, as it runs the forward again.
    """
    names = [str(i) for i in range(groups)] if isinstance(groups, int) else list(groups)
    mlps = find_mlps(model)
    check_sites(mlps, sites)
    states = [
        counting_state(mlp, len(names), sites, threshold=threshold, moments=moments) for mlp in mlps
    ]
    stats: list[Any] = [None] * mlps[0].n_layers
    for layer, own in groupby(zip(mlps, states, strict=True), lambda pair: pair[0].layer):
        parts = list(own)
        plain = parts[0][1].stats if len(parts) == 1 and isinstance(parts[0][0], MLP) else None
        stats[layer] = plain or Together(parts)
    # On a CPU the model's own activation leaves every later layer as it is without the patch.
    is_own = input_device(model).type == "cpu"
    patch = Patch(mlps, states, backend=backend, own_activation=is_own)
    # Until the first `batch` no shape fits: a forward without it raises instead of counting.
    patch.tokens = Tokens(group_ids=torch.empty(0, 0, dtype=torch.int32, device="cpu"))
    with patch:
        yield Probe(names, stats, patch)


LANGUAGE = ("language",)  # the modules of a model of text


@contextmanager
def ablate(
    model: Any,
    neurons: NeuronFile | str | Path | Iterable[Sequence[Any]] | Any,
    *,
    sets: str | Sequence[str] | None = None,
    mode: str = "zero",
    value: float | Sequence[float] | None = None,
    modules: Sequence[str] | None = None,
    processor: Any = None,
    backend: str = "auto",
) -> Iterator[None]:
    """Switch neurons off while the model runs, generation included, at every position.

    `neurons`: a NeuronFile or the path of one, of which `sets` names one set or several (needless
    where it has one only); a data frame with the columns layer, site and index, and for `sets` set;
    or (layer, site, index) triples. Sites are gate and up (the outputs of gate_proj and up_proj),
    down (the output of down_proj), and q, k, v and o (those of the attention's projections). A file
    of neurons of a model of another shape is refused. `mode`: "zero", outputs become 0 (arXiv
    2502.17355, section 3.3); "scale", outputs times `value`; "mean", outputs become `value`, a
    number for all or one per neuron: their mean responses, say.

    Of a model that reads pictures the layers may be those of several `modules`, numbered through as
    in the file of the neurons (default: those of the file, else ("language",)). They are found in a
    forward with a picture, which the model's `processor` of transformers makes ready.
    """
    chosen, file = choose_neurons(neurons, sets)
    if modules is None:
        modules = file.model.get("modules", LANGUAGE) if file is not None else LANGUAGE
    if not chosen:
        warnings.warn("ablate: no neuron is given, so that nothing is off", stacklevel=3)
    run = picture_run(model, Processor(processor)) if processor is not None else None
    attention = any(site in ATTENTION for _, site, *_ in chosen)
    mlps = find_mlps(model, attention=attention, modules=tuple(modules), run=run)
    if file is not None:
        file.check_model(model_shape(mlps))
    if (value is None) != (mode == "zero") or mode not in ("zero", "scale", "mean"):
        raise RelneuronError(
            f"mode {mode!r} with the value {value}",
            "use zero without a value, scale or mean with one",
            2,
        )
    if mode == "zero":
        states = mask_states([chosen], mlps)
    else:
        states = _replacing_states(chosen, mlps, mode, value)
    with Patch(mlps, states, backend=backend):
        yield


def _replacing_states(
    neurons: Sequence[Sequence[Any]], mlps: Sequence[Part], mode: str, value: Any
) -> list[LayerState]:
    shape = model_shape(mlps)
    check_neurons(neurons, shape)
    values = [value] * len(neurons) if isinstance(value, int | float) else list(value)
    if mode == "scale" and len(set(values)) > 1:
        raise RelneuronError("scale takes one value for all neurons", "give a number", 2)
    states = [LayerState(replace={}) for _ in mlps]
    widths = Shape.of(shape).widths
    chosen: dict[int, dict[str, Any]] = {}
    for (layer, site, index, *_), new in zip(neurons, values, strict=True):
        empty = np.full((1, widths[site]), np.nan, np.float32)
        chosen.setdefault(layer, {}).setdefault(site, empty)[0, index] = new
    for mlp, state in zip(mlps, states, strict=True):
        here = chosen.get(mlp.layer, {})
        shifts = None if mode == "scale" else {s: np.nan_to_num(v) for s, v in here.items()}
        rows = {site: ~np.isnan(new) for site, new in here.items()}
        state.replace = replacements(mlp, rows, values[0], shifts)
    return states


# --- time ------------------------------------------------------------------------------------


class Clock:
    """Measures, as a context manager, its own time and that of a model's linear maps, in seconds.

    `products` stays None on a GPU, whose kernels run on while Python goes ahead.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seconds = 0.0
        on_cpu = input_device(model).type == "cpu"
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
