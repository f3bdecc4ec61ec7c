"""The counting itself: a patched model that takes batches, and its counters.

`count` runs it over a corpus, the bench file times it beside the bare model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron import ops
from relneuron.artifact.counts import BESIDE, DTYPES, RAN, Counts
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.modules import layers_of
from relneuron.methods.counts.batches import Batch, Pictured
from relneuron.model.counting import TOKENS, counting_state, fill, tables
from relneuron.model.layers import decoder_layers, input_device
from relneuron.model.mlps.shape import Part, check_sites, model_shape
from relneuron.model.patch import Patch, StatisticsDone
from relneuron.model.peaks import BINS, TABLES, Asked, Looked, Segments, check_can_look
from relneuron.model.pictures import sent
from relneuron.model.shards import part_number
from relneuron.model.states import LayerState, Tokens

Array = np.ndarray[Any, Any]

INNER = ("gate", "up", "act", "product")  # sites, whose neurons each part has its own of


class Counter:
    """Counts active neurons per group while it is entered as a context manager.

    A forward ends with the last layer's statistics: its down_proj (unless the site `down` is asked
    for), the final norm and the lm_head are left out. Where no part is of the language model, it
    ends before its first layer.
    """

    def __init__(
        self,
        model: Any,
        mlps: Sequence[Part],
        *,
        sites: Sequence[str] = ("act",),
        threshold: float = 0.0,
        moments: bool = False,
        asked: Asked | None = None,
        backend: str = "auto",
    ) -> None:
        # The language model runs last, behind what reads the pictures.
        n_language = layers_of(mlps[0].modules).get("language", range(0)).stop
        self.mlps = sorted(mlps, key=lambda part: part.layer < n_language)
        self.model, self.has_language = model, n_language > 0 or not mlps[0].modules
        # The forward without the lm_head, where the model has one.
        self.body = getattr(model, "base_model", model)
        self.device = input_device(model)
        # A weight that is made of others (quanto's 4 bits) may not be read in inference mode.
        made = any(hasattr(weight, "__tensor_flatten__") for weight in model.parameters())
        self._without_grad = torch.no_grad if made else torch.inference_mode
        self.sites = tuple(sites)
        self._width = model_shape(self.mlps)["width"]
        self._hidden = max(mlp.hidden for mlp in self.mlps)
        # Of processes that hold the model in parts the first has what is the same in all of them.
        self._is_first = part_number(model) == 0
        check_sites(self.mlps, self.sites)
        self.threshold, self.moments = threshold, moments
        self.asked = asked or Asked()
        check_can_look(self.mlps, self.asked)
        # Of each part, exponent and first of its histograms by site; `set_edges` says them.
        self._edges: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in self.mlps]
        # On a CPU the model's own activation leaves every later layer as it is without the patch.
        self.patch = Patch(
            self.mlps,
            [LayerState() for _ in self.mlps],
            backend=backend,
            only_statistics=self.has_language,
            own_activation=self.device.type == "cpu",
        )
        self.states = self.patch.states
        self._end: Any = None
        self.grow(1)

    def __enter__(self) -> Counter:
        self.patch.__enter__()
        if not self.has_language:
            self._end = decoder_layers(self.model)[1][0].register_forward_pre_hook(_stop)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._end is not None:
            self._end.remove()
        self.patch.__exit__(*error)

    def grow(self, n_groups: int) -> None:
        """Make room for so many groups; what was counted stays."""
        for i, (part, state) in enumerate(zip(self.mlps, self.states, strict=True)):
            before = tables(part, state)
            if before and len(before[TOKENS]) >= n_groups:
                continue
            new = counting_state(
                part,
                n_groups,
                self.sites,
                threshold=self.threshold,
                moments=self.moments,
                looked=Looked.nothing(part, n_groups, self.sites, self.asked, self._edges[i]),
            )
            if before:
                fill(part, new, before)
            self.states[i] = new

    def count(self, batch: Batch | Pictured) -> None:
        """Run one batch and add its tokens; on a GPU without waiting for it."""
        self.look_at(batch)

    def look_at(self, batch: Batch | Pictured) -> None:
        """The same of a batch that may be one of a sample."""
        looks = batch if isinstance(batch, Batch) and self.asked != Asked() else None
        segments = None if looks is None else self._segments(looks)
        self.patch.tokens = Tokens(group_ids=self._sent(batch.group_ids), segments=segments)
        self.run(batch)

    def _segments(self, batch: Batch) -> Segments:
        """The windows of a batch; a token that is not counted is of none."""
        rows = np.arange(len(batch.lengths), dtype=np.int32)
        ids = np.where(batch.group_ids >= 0, rows[:, None], np.int32(-1))
        parts = (ids, batch.numbers, batch.groups, rows * np.int32(batch.ids.shape[1]))
        return Segments(*map(self._sent, parts))

    def run(self, batch: Batch | Pictured) -> None:
        """One forward of the model without its lm_head; unpatched, this is the bare forward."""
        # The end of the statistics is the end of the forward, unless another patch needs it all.
        with suppress(StatisticsDone), self._without_grad():
            self.body(**self._arguments(batch), use_cache=False)

    def _arguments(self, batch: Batch | Pictured) -> dict[str, Tensor]:
        if isinstance(batch, Pictured):
            return sent(self.model, batch.inputs)
        arguments = {"input_ids": self._sent(batch.ids).long()}
        if batch.is_padded:
            place = np.arange(batch.ids.shape[1])
            arguments["attention_mask"] = self._sent(place < batch.lengths[:, None]).long()
        if batch.positions is not None:
            arguments["position_ids"] = self._sent(batch.positions).long()
        return arguments

    def _sent(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def result(self, groups: Sequence[str]) -> Counts:
        """What was counted so far, on the host; on a GPU this waits for it.

        Of a model in parts what was counted here; what all count, the first process has alone.
        """
        self.grow(len(groups))
        n, shape = len(groups), model_shape(self.mlps)
        n_layers = shape["layers"]
        found: dict[str, Array] = {}
        for part, state in zip(self.mlps, self.states, strict=True):
            for name, table in tables(part, state).items():
                values = table[:n].cpu().numpy()
                size = self._size(name, values)
                whole = found.setdefault(name, _nothing(name, n, n_layers, *size))
                is_inner = name.partition(".")[2] in INNER
                if self._is_first or name == TOKENS or (is_inner and part.whole):
                    whole[:, part.layer, self._inside(name, part)] = values
        found[RAN] = found.pop(TOKENS)
        tokens = found[RAN].max(axis=1)
        has_mlp = sorted({part.layer for part in self.mlps})
        # Processes that share the work must say the same of several modules.
        is_one = not self.mlps[0].modules
        if is_one and (found[RAN][:, has_mlp] == tokens[:, None]).all():
            del found[RAN]
        elif not self._is_first:
            found[RAN][:] = 0
        tokens = tokens if self._is_first else np.zeros_like(tokens)
        return Counts.of_tensors(list(groups), {TOKENS: tokens, **found})

    def _size(self, name: str, values: Array) -> tuple[int, ...]:
        """The last dimensions of a counter of a layer, of which a part has `values`."""
        site = name.partition(".")[2]
        width = self._hidden if site == "down" else self._width
        return (width, *values.shape[2:]) if site in (*INNER, "down") else values.shape[1:]

    def _inside(self, name: str, part: Part) -> Any:
        """Where a part's own values stand in a counter of its layer."""
        site = name.partition(".")[2]
        if site == "down":
            return slice(part.hidden)
        return part.inside if site in INNER else ...

    def restore(self, counts: Counts) -> None:
        """Go on from what was counted before."""
        n = len(counts.groups)
        if not n:
            return
        self.grow(n)
        saved = counts.tensors() | {TOKENS: counts.tokens_at()}
        for part, state in zip(self.mlps, self.states, strict=True):
            given = {}
            for name in tables(part, state):
                values = saved[name][:, part.layer, self._inside(name, part)]
                given[name] = torch.from_numpy(values.copy())
            fill(part, state, given)

    def sample(self, run: Callable[[], object]) -> dict[str, Array]:
        """The bins of histograms of values that `look_at` sees in `run`, by name, (L, F) int32.

        `exponent.act` and `first.act` and so on, as `ops.histogram_edges` chooses them.
        """
        self.states[:] = [LayerState(looked=Looked.sample(part, self.sites)) for part in self.mlps]
        with self:
            run()
        n_layers = model_shape(self.mlps)["layers"]
        found: dict[str, Array] = {}
        for part, state in zip(self.mlps, self.states, strict=True):
            assert state.looked is not None
            for site, ends in state.looked.ranges.items():
                edges = ops.histogram_edges(*ends, self.asked.bins or 0)
                for name, edge in zip(BINS[1:], edges, strict=True):
                    name = f"{name}.{site}"
                    size = self._size(name, edge[None].cpu().numpy())
                    whole = found.setdefault(name, _nothing(name, n_layers, *size))
                    whole[part.layer, self._inside(name, part)] = edge.cpu().numpy()
        self.clear()
        return found

    def set_edges(self, edges: Mapping[str, Array]) -> None:
        """The bins of histograms, as `sample` gives them, before anything is counted."""
        for own, part in zip(self._edges, self.mlps, strict=True):
            for site in self.sites:
                names = [f"{name}.{site}" for name in BINS[1:]]
                exponent, first = (
                    torch.from_numpy(edges[name][part.layer, self._inside(name, part)].copy())
                    for name in names
                )
                own[site] = (exponent, first)

    def clear(self) -> None:
        """Begin again, with room for one group."""
        self.states[:] = [LayerState() for _ in self.mlps]
        self.grow(1)


def _stop(*_: object) -> None:
    raise StatisticsDone


def _nothing(name: str, *shape: int) -> Array:
    """A counter of no token."""
    statistic = name.partition(".")[0]
    kind = BESIDE.get(name) or DTYPES.get(statistic, np.int64)
    kind, empty = TABLES.get(statistic, (kind, -np.inf if statistic == "max" else 0))
    return np.full(shape, empty, kind)


FIRST_TIMED, EVERY = 3, 128  # batches that are run without the patch, too


def next_timed(number: int) -> int:
    """Which batch is timed beside the bare forward after one that was: 3, 6, 12, ..., 384, 512."""
    return number + min(number, EVERY)


class Speed:
    """How fast the counting is beside the bare forward of the same batches; times in seconds.

    A batch is also run without the patch now and then: the third, sixth, twelfth, ... and from
    there on each 128th. `share` is the median over these of the bare time by the counted time.
    """

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.tokens = 0
        self._shares: list[float] = []
        self._batches, self._next = 0, FIRST_TIMED
        self._began = time.perf_counter()

    def count(self, batch: Batch | Pictured) -> None:
        """Count a batch; now and then it is timed."""
        self._batches += 1
        self.tokens += batch.n_tokens
        if self._batches < self._next:
            self.counter.count(batch)
            return
        self._next = next_timed(self._next)
        self._wait()
        times = [time.perf_counter()]
        self.counter.count(batch)
        self._wait()
        times.append(time.perf_counter())
        self.counter.patch.__exit__(None, None, None)
        try:
            self.counter.run(batch)
            self._wait()
        finally:
            self.counter.patch.__enter__()
        self._shares.append((time.perf_counter() - times[1]) / (times[1] - times[0]))

    def _wait(self) -> None:
        if self.counter.device.type == "cuda":
            torch.cuda.synchronize(self.counter.device)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def share(self) -> float | None:
        """The speed as a share of the bare forward's; None before it was measured."""
        return median(self._shares) if self._shares else None


def check_boundaries(counter: Counter) -> None:
    """Raise unless positions that begin again keep the documents of one window apart.

    Two windows that differ in their first document must be equal in their second one.
    """
    n = 8
    ids = np.ones((2, 2 * n), np.int32)
    ids[1, :n] = 2
    positions = np.tile(np.arange(n, dtype=np.int32), (2, 2))
    seen: list[Tensor] = []
    handle = counter.mlps[-1].module.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    try:
        counter.run(Batch(ids, np.zeros_like(ids), np.full(2, 2 * n), positions))
    finally:
        handle.remove()
    first, second = seen[0][:, n:].float()
    if not torch.allclose(first, second, rtol=0, atol=1e-3 * float(first.abs().max())):
        attention = getattr(counter.model.config, "_attn_implementation", None)
        raise RelneuronError(
            f"with attention {attention!r} a document sees the ones before it in its window",
            "use --boundaries none, or --packing documents",
        )
