"""What a model says of a prompt with pictures, token by token, by transformers' own `generate`.

`ask.py` and `ablation/continuer.py` call it. How positions go on behind a picture, what of it
enters again with the next token, and which of a model's parts is asked then, each kind of model
knows in its own `generate`; here only the choice of tokens is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relneuron.model.pictures import sent


@dataclass(frozen=True)
class Step:
    """A forward that is about to run, for those who mark its tokens."""

    rows: Tensor  # (b,) int64: its rows among the prompts asked
    mask: Tensor  # (b, t) 1 for the tokens that enter it, 0 for padding
    # How many of its t columns, the last ones, are tokens of the answer: of all rows, or (b, 1).
    n_answer: int | Tensor
    n_needed: int  # of how many columns, the last ones, the logits are looked at
    has_pictures: bool = False  # of each row the same, beside its tokens


# Of the number of a forward and its logits (B, V) float32 the next tokens (B,), None for the end.
Choose = Callable[[int, Tensor], Tensor | None]


@torch.no_grad()
def go_through(
    model: Any,
    inputs: Mapping[str, Tensor],
    n_rows: int,
    n_tokens: int,
    choose: Choose,
    before_step: Callable[[Step], None],
) -> None:
    """Run a prompt in `n_rows` equal rows, then at most `n_tokens` tokens as `choose` says.

    `inputs` are those of one prompt (B = 1), as a processor makes them: all that it makes, pixels
    too, stands in `n_rows` copies one behind the other, so that each row has a vision forward of
    its own. Nothing is padded. Before each forward `before_step` hears of it.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    rows = {name: torch.cat([x] * n_rows) for name, x in sent(model, inputs).items()}
    device = rows["input_ids"].device
    everyone = torch.arange(n_rows, device=device)
    state = {"number": 0, "is_done": False}

    def chosen(_: Tensor, logits: Tensor) -> Tensor:
        """Logits of which the argmax is what was chosen."""
        tokens = None
        if not state["is_done"]:
            tokens = choose(state["number"], logits)
        state["number"] += 1
        if tokens is None:
            state["is_done"] = True
            return logits
        step = torch.ones(n_rows, 1, dtype=torch.long, device=device)
        before_step(Step(everyone, step, 1, 1))
        only = torch.full_like(logits, float("-inf"))
        return only.scatter_(1, tokens.to(logits.device)[:, None], 0.0)

    def is_done(ids: Tensor, _: Any, **__: Any) -> Tensor:
        return torch.full((len(ids),), bool(state["is_done"]), device=ids.device)

    before = rows["input_ids"].shape[1]
    mask = torch.ones(n_rows, before, dtype=torch.long, device=device)
    before_step(Step(everyone, mask, 0, before, has_pictures=True))
    with _plain_generation(model):
        model.generate(
            **rows,
            generation_config=GenerationConfig(
                max_new_tokens=n_tokens, do_sample=False, use_cache=True, pad_token_id=0
            ),
            logits_processor=LogitsProcessorList([chosen]),
            stopping_criteria=StoppingCriteriaList([is_done]),
        )


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Without what a model's own configuration asks of `generate`: penalties, its end, a length."""
    from transformers import GenerationConfig

    kept = [(m, m.generation_config) for m in model.modules() if hasattr(m, "generation_config")]
    try:
        for module, _ in kept:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, own in kept:
            module.generation_config = own
