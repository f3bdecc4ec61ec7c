"""What is kept of values beside counts, in models whose neurons are not those of a plain Llama."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.methods.counts.batches import make_batch
from relneuron.methods.counts.counter import Counter
from relneuron.model.mlps.find import find_mlps
from relneuron.model.peaks import Asked, Looked, Segments, bytes_a_group
from relneuron.model.states import Tokens
from relneuron.texts.windows import Window
from tests.conftest import FAMILIES, tiny_model
from tests.kit.experts import (
    CASES,
    PAD,
    SITES,
    WIDTH,
    counting,
    expert_model,
    experts_of,
    in_plain_torch,
    padded,
)

GROUPS = (0, 1, 0)  # of the rows of PAD


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_an_expert_is_strongest_at_the_tokens_that_it_gets(
    family: str, implementation: str
) -> None:
    model = expert_model(family, implementation=implementation)
    found = experts_of(model)
    seen: list[Any] = [{} for _ in found]
    with in_plain_torch(family, model, seen=seen):
        padded(model)
    rows = torch.arange(3, dtype=torch.int32)
    ids = torch.where(PAD == 1, rows[:, None], -1).int()
    segments = Segments(ids, torch.tensor([5, 0, 2]), torch.tensor(GROUPS).int(), rows * 7)
    group_ids = segments.group_ids().view(3, 7)
    patch = counting(found, 2, Tokens(group_ids=group_ids, segments=segments), sites=SITES)
    for experts, state in zip(found, patch.states, strict=True):
        state.looked = Looked.nothing(experts, 2, SITES, Asked(k=2), {})
    with patch:
        padded(model)
    n_none = 0
    for experts, state, sites_of in zip(found, patch.states, seen, strict=True):
        assert state.looked is not None
        for site in SITES:
            best = state.looked.best[site]
            for group, f in np.ndindex(2, experts.width):
                wanted = strongest(sites_of, site, f // WIDTH, f % WIDTH, group, segments)
                numbers = best.number[group, f].tolist()
                assert numbers == [w[1] for w in wanted] + [-1] * (2 - len(wanted))
                n_none += numbers.count(-1)
                assert best.position[group, f].tolist()[: len(wanted)] == [w[2] for w in wanted]
                ours = best.value[group, f][: len(wanted)].double()
                torch.testing.assert_close(
                    ours, torch.tensor([w[0] for w in wanted]).double(), rtol=1e-4, atol=1e-5
                )
    assert n_none  # some expert gets no token of a window


def strongest(
    seen: Any, site: str, expert: int, f: int, group: int, segments: Segments
) -> list[tuple[float, int, int]]:
    """(value, number, position) in each window of the group, by a loop over the pairs."""
    found: dict[int, tuple[float, int]] = {}
    for (e, token), (sites, _) in seen.items():
        window = int(segments.ids.view(-1)[token])
        if e == expert and window >= 0 and GROUPS[window] == group:
            one = (float(sites[site][f]), -(token % 7))
            found[window] = max(found.get(window, (-np.inf, 0)), one)
    numbers = segments.numbers.tolist()
    rows = [(value, numbers[window], -place) for window, (value, place) in found.items()]
    return sorted(rows, key=lambda row: (-row[0], row[1]))[:2]


@pytest.mark.parametrize("how", ["phi3", "hooked", "phi", "no formula"])
def test_the_largest_of_the_examples_is_the_largest_that_was_counted(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a layer whose values come to the kernels in another way; the bins have each value once."""
    monkeypatch.setitem(FAMILIES, "phi", ("PhiConfig", {}))  # not gated
    model = tiny_model(how if how in FAMILIES else "llama")
    acts = [] if how in FAMILIES else [layer.mlp.act_fn for layer in model.model.layers]
    if how == "no formula":
        for layer in model.model.layers:
            layer.mlp.act_fn = Cubed().eval()
    elif acts:
        for act in acts:
            act.register_forward_hook(lambda _m, _i, out: out * 0.5 + 1)
    mlps, sites = find_mlps(model), ("gate", "act", "down")
    counter = Counter(model, mlps, sites=sites, moments=True, asked=Asked(2, 16))
    rng = np.random.default_rng(0)
    windows = [
        Window(n % 2, rng.integers(3, 90, 4 + n).astype(np.int32), np.zeros(4 + n, bool), n // 2)
        for n in range(6)
    ]
    counter.set_edges(counter.sample(lambda: counter.look_at(make_batch(windows))))
    counter.clear()
    counter.grow(2)
    with counter:
        counter.count(make_batch(windows[:4]))
        counter.count(make_batch(windows[4:]))
    found = counter.result(["a", "b"])
    for site in sites:
        tables = found.arrays
        assert np.array_equal(tables[f"peak.{site}"][..., 0], tables[f"max.{site}"]), site
        n = tables[f"bin.{site}"].sum(-1) + tables[f"n_nonfinite.{site}"]
        assert (n == found.tokens[:, None, None]).all()
        assert len(np.unique(tables[f"window.{site}"])) > 1


class Cubed(torch.nn.Module):
    """An activation that no kernel knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x**3


def test_histograms_of_experts_are_refused() -> None:
    model = expert_model("qwen3")
    with pytest.raises(RelneuronError, match="--histogram") as caught:
        Counter(model, find_mlps(model), asked=Asked(bins=16))
    assert "--examples" in caught.value.fix
    Counter(model, find_mlps(model), asked=Asked(k=2))


def test_what_is_said_to_be_needed_is_what_is_held() -> None:
    model = tiny_model("llama")
    counter = Counter(model, find_mlps(model), sites=("act", "down"), asked=Asked(3, 16))
    counter.set_edges(counter.sample(lambda: None))
    counter.clear()
    counter.grow(5)
    looked = [state.looked for state in counter.states]
    held = sum(
        table.untyped_storage().nbytes()
        for one in looked
        if one is not None
        for name, table in one.tables().items()
        if not name.startswith(("exponent", "first"))
    )
    assert held == 5 * bytes_a_group(counter.mlps, ("act", "down"), Asked(3, 16)) > 0
