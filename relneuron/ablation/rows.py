"""Switch off FFN and attention neurons, every row of a batch its own, and measure the answer.

methods/gains/comparison.py plans what is off and the `attribute` stage runs it (arXiv 2312.12141,
section 4).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Journal
from relneuron.model.batches import SENTENCES, Budget, cut, pad
from relneuron.model.stream_layers import ResidualModel

Places = NDArray[np.int64]

_ABSENT = object()
CPU_TOKENS = 512  # activations of more leave the caches, and take up to 1.4 times as long


# --- masks on a running model ----------------------------------------------------------------


class masked:
    """Within it, inputs of the layers' `down` and `out` that are not kept are 0, row by row.

    `ffn` and `attention` have one mask a layer, (E, F) and (E, H * d_h), bool or 0 and 1, of what
    stays in each of the E rows of a batch at all positions; None: everything. A neuron that is
    not kept contributes exactly 0: the same as its column of the weight at 0.

    With `last_only` what the last layer writes is computed at the last position alone, which is
    all that the logits there need, and is 0 elsewhere.

    A context manager. It replaces the modules' `forward` on the instance and puts back what was
    there. Inside another one both act; leaving in another order than last-in first-out raises.
    """

    def __init__(
        self,
        residual: ResidualModel,
        ffn: Sequence[Tensor | None],
        attention: Sequence[Tensor | None],
        *,
        last_only: bool = False,
    ) -> None:
        n_layers = len(residual.layers)
        sides = {"ffn": (ffn, residual.width), "attention": (attention, _attention_width(residual))}
        for name, (masks, width) in sides.items():
            shapes = [tuple(mask.shape) for mask in masks if mask is not None]
            if len(masks) != n_layers or any(len(s) != 2 or s[1] != width for s in shapes):
                raise ValueError(
                    f"masked: {name} must be {n_layers} masks (E, {width}) (from the model), "
                    f"got {len(masks)} of {sorted(set(shapes))}"
                )
        modules = [(la.down, m) for la, m in zip(residual.layers, ffn, strict=True)]
        modules += [(la.out, m) for la, m in zip(residual.layers, attention, strict=True)]
        self._forwards: list[_Forward] = [
            _Masked(module, ~mask.bool()) for module, mask in modules if mask is not None
        ]
        if last_only:
            last = residual.layers[-1]
            self._forwards += [_LastPosition(last.out), _LastPosition(last.mlp)]
        self._is_active = False

    def __enter__(self) -> masked:
        if self._is_active:
            raise RelneuronError("these masks are active already", "make a second one to nest")
        self._is_active = True
        for forward in self._forwards:
            forward.put_on()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_active = False
        in_order = all([forward.take_off() for forward in reversed(self._forwards)])
        if not in_order and error is None:
            raise RelneuronError(
                "masks were taken off in another order than last-in first-out",
                "leave the inner context first; no neuron of this one is off any more",
            )

    def check_used(self) -> None:
        """Raise unless the model has called every patched module: guards against a dead patch."""
        if not all(forward.is_used for forward in self._forwards):
            raise RelneuronError(
                "the model does not call the layers that neurons were switched off in",
                "give the model uncompiled, with its own forward methods",
            )


class _Forward:
    """The forward of one module. A plain callable, so nothing of it is copied or saved."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before: Any = _ABSENT
        self.inner: Callable[[Tensor], Tensor] = module.forward
        self.is_used = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RelneuronError("a patched model cannot be copied", "copy it outside the context")

    def __reduce__(self) -> Any:
        raise RelneuronError("a patched model cannot be pickled", "save it outside the context")

    def __call__(self, x: Tensor) -> Tensor:
        self.is_used = True
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def put_on(self) -> None:
        self.before = self.module.__dict__.get("forward", _ABSENT)
        self.inner = self.module.forward
        self.module.__dict__["forward"] = self

    def take_off(self) -> bool:
        """Put back what was there; whether this forward was the last one put on."""
        current = self.module.__dict__.get("forward")
        above = current
        while isinstance(above, _Forward) and above is not self:
            above = above.before
        # Not ours and not on top of ours: an outer context has taken this one off already, and to
        # put back what stood before it would bring a dead patch to life.
        if above is self:
            if self.before is _ABSENT:
                self.module.__dict__.pop("forward")
            else:
                self.module.__dict__["forward"] = self.before
        return current is self


class _Masked(_Forward):
    """The forward of a `down` or `out` with inputs `off` (E, width) bool at 0."""

    def __init__(self, module: nn.Module, off: Tensor) -> None:
        super().__init__(module)
        self.off = off.unsqueeze(1)

    def compute(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[0] != self.off.shape[0]:
            raise ValueError(
                f"masked: a batch of {self.off.shape[0]} rows (from the masks) is expected, "
                f"got an input of shape {tuple(x.shape)}"
            )
        return self.inner(x.masked_fill(self.off, 0))


class _LastPosition(_Forward):
    """The forward of a module that is only wanted at the last position; 0 at the others."""

    def compute(self, x: Tensor) -> Tensor:
        last = self.inner(x[:, -1:])
        y = last.new_zeros(*x.shape[:-1], last.shape[-1])
        y[:, -1:] = last
        return y


def _attention_width(residual: ResidualModel) -> int:
    return residual.n_heads * residual.head_dim


# --- what is off in a row --------------------------------------------------------------------


class Off(NamedTuple):
    """The neurons that are off in one row, as places (K,) int64, in any order.

    FFN neuron k of layer l has the place l * F + k. The attention neuron of head j and coordinate
    k, at all positions at once, has the place l * H * d_h + j * d_h + k.
    """

    ffn: Places
    attention: Places


def off(ffn: Iterable[int] = (), attention: Iterable[int] = ()) -> Off:
    """An Off of places, each once."""
    both = (np.array(sorted(set(places)), np.int64) for places in (ffn, attention))
    return Off(*both)


def head_places(heads: Iterable[int], head_dim: int) -> list[int]:
    """All attention neurons of some heads; head j of layer l is number l * H + j."""
    return [head * head_dim + k for head in heads for k in range(head_dim)]


def batch_masks(
    residual: ResidualModel, offs: Sequence[Off]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The masks of a batch for `masked`: of the FFN and of the attention neurons.

    Bool tensors of one byte an element: rows x (F + H * d_h) x L bytes at most.
    """
    n_layers, device = len(residual.layers), residual.unembed.device

    def masks(chosen: Sequence[Places], width: int) -> list[Tensor | None]:
        places = np.concatenate([*chosen, np.empty(0, np.int64)])
        rows = np.repeat(np.arange(len(chosen)), [len(some) for some in chosen])
        layers, indices = np.divmod(places, width)
        found: list[Tensor | None] = [None] * n_layers
        for layer in np.unique(layers).tolist():
            here = layers == layer
            mask = torch.ones(len(chosen), width, dtype=torch.bool)
            mask[torch.from_numpy(rows[here]), torch.from_numpy(indices[here])] = False
            found[layer] = mask.to(device)
        return found

    return (
        masks([off.ffn for off in offs], residual.width),
        masks([off.attention for off in offs], _attention_width(residual)),
    )


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
        for one in offs:
            _check_places(residual, one)
    found = np.zeros((3, len(conditions), n))
    rows = sorted(
        ((c, s) for c in range(len(conditions)) for s in range(n)), key=lambda row: len(ids[row[1]])
    )
    if residual.unembed.is_cpu:
        batch_tokens = min(batch_tokens, CPU_TOKENS)
    budget = budget or Budget(batch_tokens, what=SENTENCES)

    def length(row: tuple[int, int]) -> int:
        return len(ids[row[1]])

    def ask(part: list[tuple[int, int]]) -> list[list[float]]:
        return _ask(
            residual,
            [ids[s] for _, s in part],
            [targets[s] for _, s in part],
            [conditions[c][s] for c, s in part],
        )

    for number, batch in enumerate(cut(rows, length, batch_tokens)):
        key = f"intervene {number}"
        if journal is None or key not in journal.done:
            said = budget.run(batch, length, ask)
            if journal is not None:
                journal.add(key, said)
        else:
            said = journal.done[key]
        for (c, s), values in zip(batch, said, strict=True):
            found[:, c, s] = values
        advance(len(batch))
    return Answered(found[0].astype(np.int64), found[1], found[2])


def _check_places(residual: ResidualModel, off: Off) -> None:
    widths = {"FFN": residual.width, "attention": _attention_width(residual)}
    for (name, width), places in zip(widths.items(), off, strict=True):
        total = len(residual.layers) * width
        if len(places) and not 0 <= places.min() <= places.max() < total:
            wrong = places.min() if places.min() < 0 else places.max()
            raise RelneuronError(
                f"the {name} neuron {wrong} is not in a model with {total}",
                "give neurons of this model; they count from zero",
            )


def _ask(
    residual: ResidualModel,
    ids: Sequence[Sequence[int]],
    targets: Sequence[int],
    offs: Sequence[Off],
) -> list[list[float]]:
    """[rank, prob, logprob] of each row of one forward."""
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
    model, device = residual.model, residual.unembed.device
    tokens, mask = pad(ids, device)
    takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    with masked(residual, *batch_masks(residual, offs), last_only=True) as masks:
        out = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            **({"logits_to_keep": 1} if takes_keep else {}),
        )
    masks.check_used()
    logits: Tensor = out.logits[:, -1]
    return logits if logits.dtype == torch.float64 else logits.float()
