"""The attention of the first layer, once for all rows of a batch that are of the same prompt.

No neuron is off before the first MLP, so what stands before it is the same under every condition:
rows of one prompt differ from there on. `model/ask.py` says which rows are alike;
`ablation/ablate.py` has it found. On a CPU, where a row of a matrix product has the same bits
whatever rows are beside it, answers stay as they are, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.batches import takes_keep
from relneuron.model.layers import Unfound, decoder_layers, input_device, is_sharded
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import Part
from relneuron.model.patch import Patch
from relneuron.model.states import Tokens, mask_states

# Fewer tokens may be multiplied in another way than many are, in other bits.
LEAST_TOKENS = 64
LEAST_ROWS = 32  # of a batch


def may_share(model: Any, mlps: Sequence[Part]) -> bool:
    """Whether batches are made of rows of the same prompts: on a CPU, of an MLP's neurons only."""
    weights = list(model.parameters())
    is_plain = all(w.dtype == torch.float32 and not is_sharded(w) for w in weights)
    are_mlps = all(isinstance(mlp, MLP) and not mlp.projections for mlp in mlps)
    return input_device(model).type == "cpu" and is_plain and are_mlps


class Alike:
    """Has the first layer's attention run on one row of each prompt, and its outputs repeated.

    `of` says for how many rows of which prompts; outside of it all is as ever.
    """

    def __init__(self, attention: nn.Module, sizes: Collection[int] = ()) -> None:
        self.attention = attention
        self.sizes = {*sizes}  # of other dimensions than the rows, such as heads

    @contextmanager
    def of(self, prompts: Sequence[int], n_tokens: int) -> Iterator[None]:
        """The next forward, and no second one: of rows of these prompts, each of `n_tokens`."""
        firsts = {prompt: row for row, prompt in reversed([*enumerate(prompts)])}
        places = {prompt: place for place, prompt in enumerate(firsts)}
        # Some rows run twice, rather than so few tokens. A number that is that of tokens or heads,
        # too, would not tell which dimension is the rows.
        unclear, n_all = self.sizes | {n_tokens}, len(prompts)
        least = max(len(firsts), -(-LEAST_TOKENS // n_tokens))
        n = next(n for n in count(least) if n not in unclear)
        if n >= n_all or n_all in unclear:
            yield
            return
        rows = [*firsts.values()] * -(-n // len(firsts))
        first = torch.tensor(rows[:n], device="cpu")
        repeated = torch.tensor([places[prompt] for prompt in prompts], device="cpu")
        before = self.attention.__dict__.get("forward")
        plain = self.attention.forward
        self.attention.__dict__["forward"] = _once(plain, first, repeated)
        try:
            yield
        finally:
            if before is None:
                del self.attention.__dict__["forward"]
            else:
                self.attention.__dict__["forward"] = before


def _once(plain: Callable[..., Any], first: Tensor, repeated: Tensor) -> Callable[..., Any]:
    """A forward that runs `plain` on the rows `first` and repeats what comes out of it."""
    n, n_all = len(first), len(repeated)

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _rows(args, n_all, first), _rows(kwargs, n_all, first)
        out = _rows(plain(*args, **kwargs), n, repeated)
        # What the next token looks at.
        for cache in kwargs.values():
            for layer in getattr(cache, "layers", [])[:1]:
                layer.keys, layer.values = (
                    _rows(kept, n, repeated) for kept in (layer.keys, layer.values)
                )
        return out

    return forward


def _rows(value: Any, n: int, rows: Tensor) -> Any:
    """The `rows` of all tensors with `n` of them, in tuples and dicts, too."""
    if isinstance(value, Tensor):
        return value.index_select(0, rows) if value.dim() > 1 and len(value) == n else value
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_rows(one, n, rows) for one in value)
    if type(value) is dict:
        return {name: _rows(one, n, rows) for name, one in value.items()}
    return value


def find_alike(model: Any, mlps: Sequence[Part], prompt: Sequence[int]) -> Alike | None:
    """Where the first layer's attention can be shared, proved on a `prompt`; None where it cannot.

    The attention is the one module of the layer, beside the MLP, with weights of a matrix. Proof:
    of two prompts, each under two conditions, the last logits and the cache have the same bits.
    """
    if not may_share(model, mlps) or len(prompt) < 2:
        return None
    try:
        _, layers = decoder_layers(model)
    except Unfound:
        return None
    patched = {id(mlp.module) for mlp in mlps}
    others = [
        part
        for part in layers[0].children()
        if not any(id(module) in patched for module in part.modules())
        and any(weight.dim() == 2 for weight in part.parameters())
    ]
    if len(others) != 1:
        return None
    about = model.config.get_text_config()
    sizes = [getattr(about, f"num_{kind}_heads", None) for kind in ("attention", "key_value")]
    found = Alike(others[0], [size for size in sizes if isinstance(size, int)])
    return found if _is_exact(found, model, mlps, prompt) else None


def _is_exact(alike: Alike, model: Any, mlps: Sequence[Part], prompt: Sequence[int]) -> bool:
    """Whether some prompts under two conditions have the same bits with and without it."""
    n_tokens = len(prompt)
    unclear = alike.sizes | {n_tokens}
    n = next(n for n in count(2) if n not in unclear)
    least = max(LEAST_ROWS, LEAST_TOKENS * 2)
    n_rows = next(rows for rows in count(least) if rows % n == 0 and rows not in unclear)
    lines = [[*prompt[k % n_tokens :], *prompt[: k % n_tokens]] for k in range(n)]
    which = [row % n for row in range(n_rows)]
    tokens = torch.tensor([lines[k] for k in which], device="cpu")
    first = min(mlp.layer for mlp in mlps)
    off = [(mlp.layer, "gate", i) for mlp in mlps if mlp.layer == first for i in range(8)]
    conditions = torch.tensor([row // n % 2 for row in range(n_rows)], device="cpu").int()
    seen = []
    asked = {"logits_to_keep": 2} if takes_keep(model) else {}  # as many as answers are chosen of
    try:
        with torch.no_grad(), Patch(mlps, mask_states([[], off], mlps)) as patch:
            patch.tokens = Tokens(conditions=conditions)
            for way in (nullcontext(), alike.of(which, n_tokens)):
                with way:
                    out = model(input_ids=tokens, use_cache=True, **asked)
                cache = getattr(out, "cache", None) or out.past_key_values
                seen.append([out.logits, cache.layers[0].keys, cache.layers[0].values])
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError, RelneuronError):
        return False
    return all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
