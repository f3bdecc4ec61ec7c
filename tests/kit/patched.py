"""Dynamic activation patching as its authors wrote it: one prompt, plain hooks, two KV caches.

The tests of ablation/ and bench/patching.py hold `generate --from` to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from relneuron.model.ask import cache_of

Downs = Sequence[nn.Module]  # of each layer the linear map that reads the products
Chosen = Mapping[int, Sequence[int]]  # of layers the numbers of the neurons


@torch.no_grad()
def patched_loop(
    a: Any,
    b: Any,
    downs: tuple[Downs, Downs],
    chosen: Chosen,
    prompt: Sequence[int],
    choose: Callable[[Tensor, list[int]], int],
    n_tokens: int,
    ends: Sequence[int] = (),
) -> list[int]:
    """The tokens that A says with B's products of the chosen neurons, up to one of `ends`.

    In each step B runs and its products are kept, then A with them in the place of its own.
    `choose` takes the logits (V,) and the tokens before.
    """
    kept: dict[int, Tensor] = {}
    caches: list[dict[str, Any]] = [{}, {}]
    tokens, made = torch.tensor([list(prompt)]), list(prompt)
    with ExitStack() as stack:
        for layer, index in chosen.items():

            def keep(_m: Any, inputs: Any, layer: int = layer, index: Any = index) -> None:
                kept[layer] = inputs[0][..., index]

            def put(_m: Any, inputs: Any, layer: int = layer, index: Any = index) -> Any:
                new = inputs[0].clone()
                new[..., index] = kept[layer]
                return (new,)

            stack.callback(downs[1][layer].register_forward_pre_hook(keep).remove)
            stack.callback(downs[0][layer].register_forward_pre_hook(put).remove)
        for _ in range(n_tokens):
            other = b(tokens, use_cache=True, **caches[1])
            own = a(tokens, use_cache=True, **caches[0])
            caches = [cache_of(own), cache_of(other)]
            made.append(choose(own.logits[0, -1].float(), made))
            if made[-1] in ends:
                break
            tokens = torch.tensor([made[-1:]])
    return made[len(prompt) :]


def penalised(penalty: float) -> Callable[[Tensor, list[int]], int]:
    """The most probable token, after the penalty of `generate` for those that stood before."""

    def choose(logits: Tensor, before: list[int]) -> int:
        logits = logits.clone()
        seen = torch.tensor(sorted({*before}))
        own = logits[seen]
        logits[seen] = torch.where(own < 0, own * penalty, own / penalty)
        return int(logits.argmax())

    return choose
