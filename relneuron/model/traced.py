"""What a forward takes, without running it: its operations, and the bytes that it holds at most.

The model is one without numbers (`plan.meta_model`); the planners of the stages ask here.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from relneuron.model.ask import cache_of
from relneuron.model.batches import takes_keep
from relneuron.model.heap import most_resident


@dataclass(frozen=True)
class Traced:
    """A forward: its floating point operations, and the bytes of tensors that it made.

    `peak_bytes` are the most of them at once. `kept_bytes` are what a process on a CPU then holds,
    with the holes between them, as malloc puts them in memory, batch after batch (`heap.py`).
    """

    flops: int
    peak_bytes: int
    kept_bytes: int


class _Held(TorchDispatchMode):
    """The bytes of the tensors that are made while it is active, and the most of them at once.

    `events` are their comings and goings: (number, bytes), and (number, 0) of one that is freed.
    A number that is asked of a tensor without numbers is 0, or False.
    """

    def __init__(self, known: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.events: list[tuple[int, int]] = []
        self._weights = {t.untyped_storage()._cdata for t in known}
        self._seen = {*self._weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index.Tensor and self._is_weight(args[0]) and args[0].dim() == 3:
            return out  # a copy of each token's experts: with numbers there is none
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return out

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._weights

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, number = storage._cdata, len(self.events)
        if key not in self._seen and storage.nbytes():
            self._seen.add(key)
            self.events.append((number, storage.nbytes()))
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            # A storage's Python object lives as long as the storage.
            weakref.finalize(storage, self._forget, key, number, storage.nbytes())

    def _forget(self, key: int, number: int, n_bytes: int) -> None:
        self._seen.discard(key)
        self.events.append((number, 0))
        self.now -= n_bytes


@dataclass
class _Fused(TorchFunctionMode):
    """Attention whose weights are never held, as on a device with numbers; counts its operations.

    4 B H T K d, or 2 B H T K (d of keys + d of values): queries by keys, weights by values.
    """

    flops: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        size, width = query.shape[-1] + value.shape[-1], value.shape[-1]
        self.flops += 2 * query.shape[:-1].numel() * key.shape[-2] * size
        return query.new_empty(*query.shape[:-1], width)


def traced(
    model: Any,
    n_rows: int,
    n_tokens: int,
    *,
    n_logits: int = 1,
    cache: bool = True,
    then: str = "",
    held: Mapping[nn.Module, int] | None = None,
    shares: Sequence[float] = (1.0,),
) -> Traced:
    """A forward of `n_rows` x `n_tokens` token ids with a mask, as `ask.Asker` makes it.

    `n_logits` are the last columns that logits are asked of, 0 all of them. `then` says what
    becomes of them: "answers" are chosen, and one more token is asked for (`Asker.ask`), or they
    are "scores" of what is read (`Asker.score`). While one of the modules `held` runs, so many more
    tensors as large as its input stay: those that a patch looks at. `shares`: the sizes of the
    batches that a stage makes, one after the other, as parts of this one.
    """
    with suppress(Exception):  # the experts that run without looking at numbers
        model.set_experts_implementation("batched_mm")
    asked: dict[str, Any] = {"use_cache": cache}
    if takes_keep(model):
        asked["logits_to_keep"] = n_logits
    events = _Held(chain(model.parameters(), model.buffers()))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for module, n in (held or {}).items():
            _hold(stack, module, n)
        counter = stack.enter_context(FlopCounterMode(display=False))
        fused = stack.enter_context(_Fused())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(events)
        ids = torch.zeros(n_rows, n_tokens, dtype=torch.int64, device="meta")
        mask = torch.ones_like(ids)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=places, **asked)
        flops = counter.get_total_flops() + fused.flops
        if then == "answers":
            _answer(model, out, mask, asked)
        elif then:
            logits = out.logits[:, :-1].float().transpose(1, 2).contiguous()
            cross_entropy(logits, ids[:, 1:], reduction="none")
            del logits
        del out
    return Traced(flops, events.most, most_resident(events.events, shares))


def _hold(stack: ExitStack, module: nn.Module, n: int) -> None:
    """While the module runs, so many more tensors as large as its input are there."""
    kept: list[Tensor] = []

    def begin(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept.extend(torch.empty_like(args[0]) for _ in range(n))

    def end(module: nn.Module, args: Any, out: Any) -> None:
        kept.clear()

    stack.callback(module.register_forward_pre_hook(begin).remove)
    stack.callback(module.register_forward_hook(end).remove)


def _answer(model: Any, out: Any, mask: Tensor, asked: Mapping[str, Any]) -> None:
    """The first token's probabilities, and a step of one token more where there is a cache."""
    logits = out.logits[:, -2:].float()
    logits[:, 0].log_softmax(-1)
    with suppress(Exception):  # a cache of another kind: its step takes no more than the forward
        longer = torch.cat([mask, mask[:, :1]], 1)
        ids, places = mask[:, :1], longer.sum(1, keepdim=True) - 1
        step = {**asked, **cache_of(out)}
        model(input_ids=ids, attention_mask=longer, position_ids=places, **step)


@dataclass(frozen=True)
class Costs:
    """What forwards of a model cost, in floating point operations: a product and a sum are two.

    flops(B, T, K, n) = B (token T + pair T K + logit n), of B rows of T tokens that see K, with n
    logits each. `token` is 2 x the weights of the linear maps that a token goes through, of experts
    those of as many as it is sent to; `pair` 4 x the heads' width, of queries by keys and weights
    by values, of all layers, also where a window or the causal mask leaves a part of it out;
    `logit` 2 D V of the head. Norms, activations, rotations and softmax are left out, as in
    torch.utils.flop_counter, whose number it is for the model's own forward.
    """

    token: int
    pair: int
    logit: int

    @classmethod
    def of(cls, model: Any) -> Costs:
        """Those of a model without numbers, from its forwards of two lengths."""
        short, long = 8, 16
        head = model.get_output_embeddings()
        logit = 0 if head is None else 2 * head.weight.numel()
        n = {t: 1 if takes_keep(model) else t for t in (short, long)}
        found = {t: traced(model, 1, t).flops - logit * n[t] for t in (short, long)}
        # f(t) = token t + pair t^2 at two places.
        pair = (short * found[long] - long * found[short]) // (short * long * (long - short))
        return cls((found[short] - pair * short**2) // short, pair, logit)

    def flops(self, rows: int, tokens: int, *, keys: int | None = None, logits: int = 1) -> int:
        """Of one forward; `keys` default to its own tokens."""
        seen = tokens if keys is None else keys
        return rows * (self.token * tokens + self.pair * tokens * seen + self.logit * logits)
