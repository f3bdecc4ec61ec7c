"""Switch off FFN and attention neurons, every row of a batch its own, and measure the answer.

methods/gains/comparison.py plans what is off and the `attribute` stage runs it (arXiv 2312.12141,
section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.model.batches import SENTENCES, Budget, cut, pad, shared
from relneuron.model.patch import Patch
from relneuron.model.states import LayerState, Replacement, Tokens, pack_keep
from relneuron.model.stream.mixture import ExpertMember
from relneuron.model.stream.parts import ResidualLayer, ResidualModel
from relneuron.model.stream.trace import last_logits

Places = NDArray[np.int64]

CPU_TOKENS = 512  # activations of more leave the caches, and take up to 1.4 times as long


# --- what is off in a row --------------------------------------------------------------------


class Off(NamedTuple):
    """The neurons that are off in one row, as places (K,) int64, in any order.

    FFN neuron k of layer l has the place l * F + k, with the F of the layer that has the most. The
    attention neuron of head j and coordinate k, at all positions at once, has the place
    l * H * d_h + j * d_h + k.
    """

    ffn: Places
    attention: Places


def off(ffn: Iterable[int] = (), attention: Iterable[int] = ()) -> Off:
    """An Off of places, each once."""
    both = (np.array(sorted(set(places)), np.int64) for places in (ffn, attention))
    return Off(*both)


class Planned(Sequence[Off]):
    """The sets of a condition's N sentences, each made when it is asked for.

    They are of places that the model has: what makes them takes them from it.
    """

    def __init__(self, n: int, make: Callable[[int], Off]) -> None:
        self._n, self._make = n, make

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, sentence: Any) -> Any:
        if not 0 <= sentence < self._n:
            raise IndexError(sentence)
        return self._make(sentence)


def head_places(heads: Iterable[int], head_dim: int) -> list[int]:
    """All attention neurons of some heads; head j of layer l is number l * H + j."""
    return [head * head_dim + k for head in heads for k in range(head_dim)]


def row_states(residual: ResidualModel, offs: Sequence[Off]) -> list[LayerState]:
    """For each of the model's parts, what zeroes the neurons of each row of a batch.

    Row r is the patch's condition r. Bool tensors of one byte an element, and a bit of experts:
    rows x (F + H * d_h) x L bytes at most.
    """
    masks: list[dict[str, Tensor]] = [{} for _ in residual.layers]
    for site, width in widths(residual).items():
        chosen = [getattr(off, site) for off in offs]
        places = np.concatenate([*chosen, np.empty(0, np.int64)])
        rows = np.repeat(np.arange(len(chosen)), [len(some) for some in chosen])
        layers, indices = np.divmod(places, width)
        for layer in np.unique(layers).tolist():
            here = layers == layer
            own = residual.widths[layer] if site == "ffn" else width
            mask = torch.zeros(len(chosen), own, dtype=torch.bool, device="cpu")
            mask[torch.from_numpy(rows[here]), torch.from_numpy(indices[here])] = True
            masks[layer][site] = mask
    device = residual.unembed.device
    pairs = zip(residual.layers, masks, strict=True)
    return [state for layer, own in pairs for state in _part_states(layer, own, device)]


def _part_states(
    layer: ResidualLayer, masks: dict[str, Tensor], device: torch.device
) -> Iterator[LayerState]:
    """What zeroes the neurons `masks` (rows, F) of each site, for each part of a layer."""
    off = {site: Replacement(mask.to(device)) for site, mask in masks.items()}
    if not layer.mixture:
        yield LayerState(replace=off or None)
        return
    if layer.heads is not None:
        own = {site: new for site, new in off.items() if site == "attention"}
        yield LayerState(replace=own or None)
    for member in layer.mixture:
        mask = masks.get("ffn")
        if mask is not None:
            mask = mask[:, member.start : member.start + member.n_neurons]
        if mask is None or not mask.any():
            yield LayerState()
        elif isinstance(member, ExpertMember):
            keep = pack_keep(member.experts.fold(~mask).numpy())
            yield LayerState(keep=keep.to(device))
        else:
            yield LayerState(replace={"ffn": Replacement(mask.to(device))})


def widths(residual: ResidualModel) -> dict[str, int]:
    """How many places a layer has at each site of an Off, as many as the widest one's neurons."""
    return {"ffn": residual.width, "attention": residual.n_heads * residual.head_dim}


# --- the measurement -------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """What became of the targets under C conditions in N sentences, each (C, N)."""

    rank: NDArray[np.int64]  # 1 + the number of tokens with a larger logit
    prob: NDArray[np.float64]
    logprob: NDArray[np.float64]  # nats


def _ignore(n_rows: int) -> None:
    """Counts nothing."""


def intervene(
    residual: ResidualModel,
    ids: Sequence[Sequence[int]],
    targets: Sequence[int],
    conditions: Sequence[Sequence[Off]],
    *,
    batch_tokens: int,
    budget: Budget | None = None,
    journal: Journal | None = None,
    advance: Callable[[int], object] = _ignore,
) -> Answered:
    """Every sentence under every condition: rank, probability and log-probability of its target.

    `ids` and `targets` of N sentences; `conditions` are C of N sets of neurons that are off, one
    of each sentence. The rows of a batch, at most `batch_tokens` with their padding (on a CPU also
    at most CPU_TOKENS), are of any sentences and conditions of about the same length; each has its
    own neurons off. Finished batches stand in the `journal`, and are not run again. `advance` hears
    of rows that are done. `budget` is of the forwards that a batch is run in: by default one, and
    smaller ones when memory runs out.

    Raises RelneuronError for a place that the model does not have and for logits that are not
    finite.
    """
    n = len(ids)
    if len(targets) != n or any(len(offs) != n for offs in conditions):
        raise ValueError(
            f"intervene: one target and one set a condition for each of {n} sentences, got "
            f"{len(targets)} and {sorted({len(offs) for offs in conditions})}"
        )
    for offs in conditions:
        for one in () if isinstance(offs, Planned) else offs:
            _check_places(residual, one)
    found = np.zeros((3, len(conditions), n))
    lengths = [len(line) for line in ids]
    on_cpu = residual.unembed.is_cpu
    batches = plan_interventions(lengths, len(conditions), batch_tokens, on_cpu=on_cpu)
    budget = budget or Budget(batch_tokens, what=SENTENCES)

    def length(row: int) -> int:
        return lengths[row % n]

    def ask(part: list[int]) -> list[list[float]]:
        return _ask(
            residual,
            [ids[row % n] for row in part],
            [targets[row % n] for row in part],
            [conditions[row // n][row % n] for row in part],
        )

    said = shared(
        journal, "intervene", batches, lambda batch: budget.run(batch, length, ask), advance
    )
    for batch, answers in zip(batches, said, strict=True):
        places = np.array(batch)
        found[:, places // n, places % n] = np.array(answers).T
    return Answered(found[0].astype(np.int64), found[1], found[2])


def plan_interventions(
    lengths: Sequence[int], n_conditions: int, batch_tokens: int, *, on_cpu: bool
) -> list[list[int]]:
    """The batches of N sentences of these lengths, each under every condition, as `intervene` has
    them: row c * N + s is sentence s under condition c."""
    rows = np.argsort(np.tile(lengths, n_conditions), kind="stable").tolist()
    most = min(batch_tokens, CPU_TOKENS) if on_cpu else batch_tokens
    return cut(rows, lambda row: lengths[row % len(lengths)], most)


def _check_places(residual: ResidualModel, off: Off) -> None:
    for (site, width), places in zip(widths(residual).items(), off, strict=True):
        total = len(residual.layers) * width
        if len(places) and not 0 <= places.min() <= places.max() < total:
            wrong = places.min() if places.min() < 0 else places.max()
            name = {"ffn": "FFN"}.get(site, site)
            raise RelneuronError(
                f"the {name} neuron {wrong} is not in a model with {total}",
                "give neurons of this model; they count from zero",
            )
        if site == "ffn" and len(places):
            layers, indices = np.divmod(places, width)
            beyond = indices >= np.array(residual.widths)[layers]
            if beyond.any():
                layer, index = int(layers[beyond][0]), int(indices[beyond][0])
                raise RelneuronError(
                    f"layer {layer} has no FFN neuron {index}: it has {residual.widths[layer]}",
                    "give neurons of this model; they count from zero",
                )


def _ask(
    residual: ResidualModel,
    ids: Sequence[Sequence[int]],
    targets: Sequence[int],
    offs: Sequence[Off],
) -> list[list[float]]:
    """[rank, prob, logprob] of each row of a forward, or one a length where padding is seen."""
    lengths = sorted({len(line) for line in ids})
    if len(lengths) > 1 and not residual.pads:
        found: dict[int, list[float]] = {}
        for length in lengths:
            rows = [row for row, line in enumerate(ids) if len(line) == length]
            parts = ([every[row] for row in rows] for every in (ids, targets, offs))
            found |= dict(zip(rows, _ask(residual, *parts), strict=True))  # type: ignore[arg-type]
        return [found[row] for row in range(len(ids))]
    logits = _last_logits(residual, ids, offs)
    wanted = torch.tensor(targets, device=logits.device)[:, None]
    own = logits.gather(1, wanted)
    logprob = logits.log_softmax(-1).gather(1, wanted)[:, 0].double()
    if not logprob.isfinite().all():
        raise RelneuronError(
            "the model's logits are not finite with neurons switched off", "use --dtype float32"
        )
    rank = 1 + (logits > own).sum(1)
    return torch.stack([rank.double(), logprob.exp(), logprob], 1).tolist()


@torch.no_grad()
def _last_logits(
    residual: ResidualModel, ids: Sequence[Sequence[int]], offs: Sequence[Off]
) -> Tensor:
    """(E, V) float32 (float64 of a float64 model) logits of the last position, neurons off."""
    device = residual.unembed.device
    tokens, mask = pad(ids, device)
    states = row_states(residual, offs)
    # Experts take their own activation, so that no neuron that stays changes by a rounding.
    with Patch(residual.parts(), states, own_activation=True) as patch:
        patch.tokens = Tokens(conditions=torch.arange(len(offs), device=device), n_needed=1)
        logits = last_logits(residual.model, tokens, mask)
        patch.check_used()
    return logits if logits.dtype == torch.float64 else logits.float()
