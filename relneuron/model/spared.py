"""What a forward for answers need not compute: its answers have the same bits without it.

No neuron is off before the first MLP, so all up to there is the same under every condition: it is
computed once for the rows of a batch that are of the same prompt. Of the last layer nothing behind
its attention is looked at but the columns whose logits are asked: keys and values are made by then.
`model/ask.py` says which rows and columns; `ablation/asking.py` has it found. On a CPU, where a row
of a matrix product has the same bits whatever rows are beside it, bits stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.batches import takes_keep
from relneuron.model.layers import Unfound, decoder_layers, input_device, is_sharded, is_watched
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import Part
from relneuron.model.patch import Patch
from relneuron.model.states import Tokens, mask_states

# Fewer tokens may be multiplied in another way than many are, in other bits.
LEAST_TOKENS = 64
LEAST_ROWS = 32  # of a batch
N_AXES = 4  # that a token's position has at most, in models that read pictures


def may_share(model: Any, mlps: Sequence[Part]) -> bool:
    """Whether batches are made of rows of the same prompts: on a CPU, of an MLP's neurons only."""
    weights = list(model.parameters())
    is_plain = all(w.dtype == torch.float32 and not is_sharded(w) for w in weights)
    are_mlps = all(isinstance(mlp, MLP) and not mlp.projections for mlp in mlps)
    return input_device(model).type == "cpu" and is_plain and are_mlps


@dataclass(frozen=True)
class Spared:
    """Has all before the first layer's MLP computed on one row of each prompt, and repeated.

    And has the last layer, where it has an attention `last`, computed behind that at the asked
    columns alone. `of` says which rows and columns; outside of it all is as ever. `sizes` are those
    of other dimensions than the rows, such as heads.
    """

    layers: Sequence[nn.Module]
    first: nn.Module  # the attention of the first layer
    last: nn.Module | None = None  # of the last one
    sizes: frozenset[int] = frozenset()

    @contextmanager
    def of(self, prompts: Sequence[int], n_tokens: int, n_asked: int) -> Iterator[Tensor]:
        """The next forward, and no second one, of rows of these prompts, each of `n_tokens`.

        Yields the rows (n,) int64 that it is to be given, without a cache. What comes out is of all
        rows; of its columns the last `n_asked` are looked at.
        """
        rows = self._rows(prompts, n_tokens)
        is_cut = n_asked < n_tokens and len(prompts) * n_asked >= LEAST_TOKENS
        at_end = self.last if is_cut else None
        with ExitStack() as stack:
            for place, layer in enumerate(self.layers):
                is_first, is_last = place == 0, place == len(self.layers) - 1
                attention = self.first if is_first and rows else at_end if is_last else None
                if rows or attention:
                    n_columns = n_asked if is_last and at_end else None
                    ours = _shortened(layer.forward, attention, rows, is_first, n_columns)
                    stack.enter_context(_forward_of(layer, ours))
            yield rows.first if rows else torch.arange(len(prompts), device="cpu")

    def _rows(self, prompts: Sequence[int], n_tokens: int) -> _Rows | None:
        """Which rows stand for which; None where each is computed."""
        firsts = {prompt: row for row, prompt in reversed([*enumerate(prompts)])}
        places = {prompt: place for place, prompt in enumerate(firsts)}
        # Some rows run twice, rather than so few tokens. A number that is that of tokens or heads,
        # too, would not tell which dimension is the rows.
        unclear = self.sizes | {n_tokens}
        least = max(len(firsts), -(-LEAST_TOKENS // n_tokens), N_AXES + 1)
        n = next(n for n in count(least) if n not in unclear)
        if n >= len(prompts):
            return None
        rows = [*firsts.values()] * -(-n // len(firsts))
        like = [places[prompt] for prompt in prompts]
        return _Rows(torch.tensor(rows[:n], device="cpu"), torch.tensor(like, device="cpu"))


@dataclass(frozen=True)
class _Rows:
    """The rows that are computed, and of each row the place there of one that is like it."""

    first: Tensor  # (n,)
    places: Tensor  # (N,)
    _repeated: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def repeat(self, value: Any) -> Any:
        """All rows of a tensor of n rows, or of those in tuples and dicts; each is made once."""
        if isinstance(value, Tensor):
            if value.dim() < 2 or len(value) != len(self.first):
                return value
            if id(value) not in self._repeated:
                self._repeated[id(value)] = value, value.index_select(0, self.places)
            return self._repeated[id(value)][1]
        if type(value) is tuple:
            return tuple(map(self.repeat, value))
        if type(value) is dict:
            return {name: self.repeat(one) for name, one in value.items()}
        return value


class _Reached(Exception):
    """Ends a layer's forward behind its attention, whose output this is."""

    def __init__(self, output: Any) -> None:
        super().__init__("behind the attention")
        self.output = output


def _shortened(
    plain: Callable[..., Any],
    attention: nn.Module | None,
    rows: _Rows | None,
    is_first: bool,
    n_columns: int | None,
) -> Callable[..., Any]:
    """A layer's forward in two halves: up to its `attention`, and behind that.

    The first layer's second half is of all rows, where the first one was of some; the last layer's
    of the last `n_columns`. Without an attention it is whole, of all rows.
    """

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if rows is not None and not is_first:
            args, kwargs = rows.repeat((args, kwargs))
        if attention is None:
            return plain(hidden, *args, **kwargs)
        attend = attention.forward

        def reach(*given: Any, **named: Any) -> Any:
            raise _Reached(attend(*given, **named))

        try:
            with _forward_of(attention, reach):
                plain(hidden, *args, **kwargs)
            raise RuntimeError("the layer does not call its attention")
        except _Reached as reached:
            out = reached.output
        if n_columns is not None:
            hidden, out = hidden[:, -n_columns:], _columns(out, n_columns)
        if rows is not None and is_first:
            hidden, out = rows.repeat((hidden, out))
            for cache in (*args, *kwargs.values()):
                for layer in getattr(cache, "layers", [])[:1]:  # what the next token looks at
                    layer.keys, layer.values = rows.repeat((layer.keys, layer.values))
        with _forward_of(attention, lambda *_, **__: out):
            return plain(hidden, *args, **kwargs)

    return forward


def _columns(out: Any, n: int) -> Any:
    """The last `n` columns of an attention's output (B, T, D), the first one of a tuple."""
    return (out[0][:, -n:], *out[1:]) if isinstance(out, tuple) else out[:, -n:]


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module with this forward of its own."""
    own = module.__dict__
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def find_spared(model: Any, mlps: Sequence[Part], prompt: Sequence[int]) -> Spared | None:
    """What can be spared of a model, proved on a `prompt`; None where nothing can.

    Proof: of some prompts, each under two conditions, the last logits and the cache have the same
    bits.
    """
    if not may_share(model, mlps) or len(prompt) < 2:
        return None
    try:
        _, layers = decoder_layers(model)
    except Unfound:
        return None
    first, last = (_attention_of(layers[place], mlps) for place in (0, -1))
    if first is None:
        return None
    about = model.config.get_text_config()
    sizes = [getattr(about, f"num_{kind}_heads", None) for kind in ("attention", "key_value")]
    found = Spared((*layers,), first, last, frozenset(n for n in sizes if isinstance(n, int)))
    tried = [found, replace(found, last=None)]
    return next((one for one in tried if _is_exact(one, model, mlps, prompt)), None)


def _attention_of(layer: nn.Module, mlps: Sequence[Part]) -> nn.Module | None:
    """The one module, beside the MLP, with a matrix; None where there are more, or hooks.

    A hook of the layer or of its parts would be called in each half; one inside of these is not.
    """
    patched = {id(mlp.module) for mlp in mlps}
    others = [
        part
        for part in layer.children()
        if not any(id(module) in patched for module in part.modules())
        and any(weight.dim() == 2 for weight in part.parameters())
    ]
    is_plain = len(others) == 1 and not any(map(is_watched, (layer, *layer.children())))
    return others[0] if is_plain else None


def _is_exact(spared: Spared, model: Any, mlps: Sequence[Part], prompt: Sequence[int]) -> bool:
    """Whether some prompts under two conditions have the same bits with and without it."""
    n_tokens = len(prompt)
    n_asked = min(2, n_tokens - 1)  # answers ask for as many
    unclear = spared.sizes | {n_tokens}
    n = next(n for n in count(2) if n not in unclear)
    n_rows = n * -(-max(LEAST_ROWS, LEAST_TOKENS * 2) // n)
    lines = [[*prompt[k % n_tokens :], *prompt[: k % n_tokens]] for k in range(n)]
    which = [row % n for row in range(n_rows)]
    tokens = torch.tensor([lines[k] for k in which], device="cpu")
    off = [(mlp.layer, "gate", i) for mlp in mlps for i in range(8)]
    conditions = torch.tensor([row // n % 2 for row in range(n_rows)], device="cpu").int()
    seen = []
    asked = {"logits_to_keep": n_asked} if takes_keep(model) else {}
    try:
        with torch.no_grad(), Patch(mlps, mask_states([[], off], mlps)) as patch:
            patch.tokens = Tokens(conditions=conditions)
            for way in (nullcontext(slice(None)), spared.of(which, n_tokens, n_asked)):
                with way as rows:
                    out = model(input_ids=tokens[rows], use_cache=True, **asked)
                cache = getattr(out, "cache", None) or out.past_key_values
                kept = [cache.layers[place] for place in ((0, -1) if spared.last else (0,))]
                states = [x for layer in kept for x in (layer.keys, layer.values)]
                seen.append([out.logits[:, -n_asked:], *states])
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError, RelneuronError):
        return False
    return all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
