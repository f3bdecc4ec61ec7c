"""One forward that keeps what later rows of the last token need: keys, values, calls of layers.

`staircase.py` calls a model's own layers again, on rows of the last token alone, as they were
called here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from relneuron.model.gradients.sites import Sites, acting
from relneuron.model.layers import Unfound

# A tensor among a layer's arguments: where it stands, such as ("position_embeddings", 0).
Place = tuple[Any, ...]
HIDDEN = object()  # stands where the hidden states were


def mapped(tree: Any, change: Callable[[Place, Any], Any], place: Place = ()) -> Any:
    """Arguments with each of their leaves changed."""
    if isinstance(tree, tuple | list) and not hasattr(tree, "_fields"):
        return type(tree)(mapped(one, change, (*place, k)) for k, one in enumerate(tree))
    if type(tree) is dict:
        return {key: mapped(one, change, (*place, key)) for key, one in tree.items()}
    return change(place, tree)


def first(output: Any) -> Tensor:
    """The hidden states among what a layer gives."""
    found = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(found, Tensor):
        raise Unfound("its layers give no hidden states")
    return found


class Kept:
    """The keys and values of every layer, in place of a model's own cache.

    In the prefill it keeps what each attention writes into it, whole, also where the attention's
    window is shorter. Behind it (`is_whole`) the attention sees them with its new ones behind.
    """

    def __init__(self) -> None:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache()
        # On the instance: its class differs from version to version, its name does not.
        self.cache.update = self._update
        self.tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self.is_whole = False

    def _update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_whole:
            self.tensors[layer_idx] = (keys, values)
            return keys, values
        before = self.tensors[layer_idx]
        return torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)


class Prefill:
    """What E sentences (E, T), padded on either side, leave of one forward without a graph.

    last     (E,) int64: the column of each sentence's last token
    h        per layer (E, D): what it read there
    top      (E, D): what the last layer gave there
    neurons  per layer that has some (E, F): those at the site there
    calls    per layer: the arguments that it was called with
    """

    def __init__(self, sites: Sites, tokens: Tensor, mask: Tensor) -> None:
        self.sites = sites
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        self.last = (mask * columns).argmax(1)
        self.n_tokens = tokens.shape[1]
        self.kept = Kept()
        self.h: list[Tensor] = []
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.neurons: dict[int, Tensor] = {}
        self.is_tuple: list[bool] = []
        outputs: list[Tensor] = []
        with torch.no_grad(), self._watched(outputs):
            forward(sites.model, tokens, mask, self.kept.cache)
        if len(self.calls) != len(sites.layers):
            raise Unfound("a forward does not call its layers one after the other")
        self.top = outputs[-1]
        self.kept.is_whole = True

    @contextmanager
    def _watched(self, outputs: list[Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for number, layer in enumerate(self.sites.layers):
                reads, gives = self._reads(number), self._gives(outputs)
                handle = layer.register_forward_pre_hook(reads, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(layer.register_forward_hook(gives).remove)
            for number in self.sites.numbers:
                part: Any = self.sites.parts[number]
                stack.enter_context(acting(part, self._neurons(number)))
            yield

    def at_last(self, x: Tensor) -> Tensor:
        """(E, n) of x (E, T, n) at the last tokens, a copy; also of one that is (E * T, n)."""
        x = x.reshape(len(self.last), self.n_tokens, -1)
        return x[torch.arange(len(x), device=x.device), self.last.to(x.device)]

    def _reads(self, number: int) -> Any:
        def read(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if number != len(self.calls):
                raise Unfound("a forward does not call its layers one after the other")
            place = hidden_place((args, kwargs))
            at = args if place[0] == 0 else kwargs
            self.h.append(self.at_last(at[place[1]]))

            def without(where: Place, leaf: Any) -> Any:
                return HIDDEN if where == place else leaf

            self.calls.append(mapped((args, kwargs), without))

        return read

    def _gives(self, outputs: list[Tensor]) -> Any:
        def give(_module: Any, _args: Any, output: Any) -> None:
            self.is_tuple.append(isinstance(output, tuple | list))
            outputs[:] = [self.at_last(first(output))]

        return give

    def _neurons(self, number: int) -> Callable[[Tensor], None]:
        def read(values: Tensor) -> None:
            self.neurons[number] = self.at_last(values)

        return read


def hidden_place(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Place:
    """Where the hidden states stand among a layer's arguments: the first tensor."""
    args, kwargs = call
    for k, value in enumerate(args):
        if isinstance(value, Tensor):
            return (0, k)
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return (1, name)
    raise Unfound("its layers read no tensor")


def forward(model: Any, tokens: Tensor, mask: Tensor | None, cache: Any) -> Any:
    """A forward with explicit positions, of which only the last logits are computed."""
    known = inspect.signature(model.forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in known), None)
    if name is None:
        raise Unfound("its forward takes no cache of keys and values")
    more: dict[str, Any] = {name: cache, "use_cache": True}
    if mask is not None and "position_ids" in known:
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in known:
        more["logits_to_keep"] = 1
    return model(input_ids=tokens, attention_mask=mask, **more)


# --- the same call, on rows of the last token ----------------------------------------------------

Axes = dict[Place, tuple[int, ...]]


def time_axes(one: Prefill, other: Prefill) -> list[Axes]:
    """Which axes of each layer's arguments are tokens: those that differ as the lengths do.

    Told from two prefills of other lengths and other numbers of sentences, and not from names or
    from a size that might be that of something else.
    """
    found: list[Axes] = []
    for ours, theirs in zip(one.calls, other.calls, strict=True):
        shapes: list[dict[Place, tuple[int, ...]]] = [{}, {}]
        for call, into in zip((ours, theirs), shapes, strict=True):

            def note(place: Place, leaf: Any, into: Any = into) -> Any:
                if isinstance(leaf, Tensor):
                    into[place] = tuple(leaf.shape)
                return leaf

            mapped(call, note)
        lengths = (one.n_tokens, other.n_tokens)
        axes: Axes = {}
        for place, shape in shapes[0].items():
            pairs = zip(shape, shapes[1].get(place, ()), strict=False)
            axes[place] = tuple(k for k, pair in enumerate(pairs) if pair == lengths)
        found.append(axes)
    return found


class Rows:
    """The arguments of layers for n rows of each sentence's last token, side by side.

    Each row sees the sentence up to the token before, by the keys and values that were kept, and
    itself, in place of the last token; so it is told in the attention mask.
    """

    def __init__(self, prefill: Prefill, axes: Sequence[Axes], n_most: int) -> None:
        self.prefill, self.axes, self.n_most = prefill, axes, n_most
        self._masks: dict[Any, Tensor] = {}

    def call(self, number: int, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a layer is called with for `hidden` (E, n, D)."""
        n, axes = hidden.shape[1], self.axes[number]
        args, kwargs = self.prefill.calls[number]

        def change(place: Place, leaf: Any) -> Any:
            if leaf is HIDDEN:
                return hidden
            if len(axes.get(place, ())) == 2:
                return self._mask(leaf, hidden)[..., :n, : self.prefill.n_tokens + n]
            if isinstance(leaf, Tensor) and axes.get(place):
                return self._at_last(leaf, axes[place][0], n)
            return leaf

        found: tuple[tuple[Any, ...], dict[str, Any]] = mapped((args, kwargs), change)
        return found

    def _at_last(self, x: Tensor, axis: int, n: int) -> Tensor:
        """x with the last token alone on its axis of tokens, n times.

        Where that axis is of keys, as all queries share x (ALiBi's biases), they come behind it.
        """
        last = self.prefill.last.to(x.device)
        if axis == x.dim() - 1 > 1 and x.shape[-2] == 1:
            own = x.index_select(axis, last.amax()[None])
            return torch.cat([x, own.expand(*x.shape[:-1], n)], axis)
        if axis == 1 and x.shape[0] == len(last):
            one = x[torch.arange(len(last), device=x.device), last].unsqueeze(1)
        else:
            one = x.index_select(axis, last.amax()[None])
        return one.expand(*(n if k == axis else size for k, size in enumerate(one.shape)))

    def _mask(self, mask: Tensor | None, hidden: Tensor) -> Tensor:
        """(E, ., N, T + N) for the most rows N, from the mask of the prefill (E, ., T, T).

        None stands for one that hides only what comes later, and becomes one of truth values.
        """
        key = None if mask is None else id(mask)
        if key not in self._masks:
            n, t = self.n_most, self.prefill.n_tokens
            last, device = self.prefill.last.to(hidden.device), hidden.device
            if mask is None:
                row = torch.ones(len(last), 1, t, dtype=torch.bool, device=device)
            else:
                rows = torch.arange(len(last), device=device)
                row = mask.expand(len(last), *mask.shape[1:])[rows, :, last]
            hides = False if row.dtype == torch.bool else torch.finfo(row.dtype).min
            sees = True if row.dtype == torch.bool else 0.0
            # Its own column of the prefill is not the row's: that one is among those behind.
            is_own = torch.arange(t, device=device) == last[:, None, None]
            row = row.masked_fill(is_own, hides).unsqueeze(2)
            own = torch.full((n, n), hides, dtype=row.dtype, device=device).fill_diagonal_(sees)
            self._masks[key] = torch.cat(
                [row.expand(-1, -1, n, -1), own.expand(*row.shape[:2], n, n)], -1
            )
        return self._masks[key]
