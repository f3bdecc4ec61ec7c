"""The probability of the next token with a neuron off, row by row, against single forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from relneuron.ablation.next_token import Asked, next_probabilities
from relneuron.model.batches import Budget
from relneuron.model.mlps.find import find_mlps

TEXTS = [(1, 5, 9, 30), (1, 7), (1, 50, 51, 52, 53)]
OFF = [(), ((0, "gate", 3),), ((1, "up", 7),), ((2, "down", 4),), ((1, "q", 2),), ((0, "k", 5),)]


def alone(model: Any, mlps: Any, asked: Asked) -> float:
    """One text in a forward of its own, its neuron at zero by a hook of torch."""
    handles = []
    for layer, site, index in asked.off:
        mlp = mlps[layer]
        maps = {part.site: part for part in (mlp.gate, mlp.up, mlp.down_map, *mlp.projections)}

        def zero(_m: Any, _x: Any, y: Any, part: Any = maps[site], index: int = index) -> Any:
            y = y.clone()
            part.of(y)[..., index] = 0
            return y

        handles.append(maps[site].module.register_forward_hook(zero))
    with torch.no_grad():
        logits = model(torch.tensor([asked.ids]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return float(logits.double().softmax(-1)[asked.target])


@pytest.mark.parametrize("batch_tokens", [1, 12, 4096])
def test_each_row_has_its_own_neuron_off(family_model: Any, batch_tokens: int) -> None:
    mlps = find_mlps(family_model, attention=True)
    asked = [Asked(ids, 11 + k, off) for k, ids in enumerate(TEXTS) for off in OFF]
    found = next_probabilities(family_model, mlps, asked, Budget(batch_tokens))
    wanted = [alone(family_model, mlps, one) for one in asked]
    assert found == pytest.approx(wanted, rel=1e-4)
    # Each of them does something to its text, but what no token reads.
    changed = [found[k] != found[k - k % len(OFF)] for k in range(len(found)) if k % len(OFF)]
    assert sum(changed) >= len(changed) - len(TEXTS)


def test_what_is_asked_twice_is_computed_once(llama: Any) -> None:
    rows: list[int] = []
    llama.register_forward_pre_hook(
        lambda _m, _a, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    mlps = find_mlps(llama)
    rows.clear()
    asked = [Asked((1, 5, 9), 4), Asked((1, 5, 9), 4, ((0, "up", 1),)), Asked((1, 5, 9), 4)]
    found = next_probabilities(llama, mlps, asked, Budget(4096))
    assert sum(rows) == 2 and found[0] == found[2] != found[1]
    assert next_probabilities(llama, mlps, [], Budget(4096)) == []
