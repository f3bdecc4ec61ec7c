"""The patch at site `act`, and the forward that ends with its statistics.

What it gives must be what plain forward hooks on the activation and on down_proj give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from relneuron import ops
from relneuron.model.ask import cache_of
from relneuron.model.mlps.find import find_mlps
from relneuron.model.patch import Patch, StatisticsDone
from relneuron.model.states import LayerState, Replacement, Tokens, pack_keep
from tests.conftest import tiny_model

LAYERS, WIDTH, HIDDEN = 3, 48, 32
B, T, C = 4, 7, 3
NAMES = {"llama": "act_fn", "phi3": "activation_fn"}  # Phi-3 has one packed gate_up_proj

Change = Callable[[int, Tensor], Tensor]


@pytest.fixture(scope="module", params=sorted(NAMES))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param, initializer_range=0.3)


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def ids(batch: int = B, length: int = T) -> Tensor:
    return torch.randint(3, 90, (batch, length), generator=drawn())


def logits(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


@contextmanager
def hooked(model: Any, change: Change) -> Iterator[None]:
    """Every layer's activation output (B, T, F) becomes `change(layer, output)`."""
    with ExitStack() as stack:
        for layer, mlp in enumerate(find_mlps(model)):
            activation = getattr(mlp.module, NAMES[model.config.model_type])

            def hook(_m: Any, _i: Any, out: Tensor, layer: int = layer) -> Tensor:
                return change(layer, out)

            stack.callback(activation.register_forward_hook(hook).remove)
        yield


class Steering:
    """Random neurons and values of C conditions in every layer, and the same as plain tensors."""

    def __init__(self, *, factor: float | None = None, with_keep: bool = False) -> None:
        shape = (LAYERS, C, WIDTH)
        self.factor = factor
        self.chosen = torch.rand(shape, generator=drawn()) < 0.4
        self.shift = 2 * torch.randn(shape, generator=drawn())
        # Of the chosen neurons some are off, too.
        self.keep = torch.rand(shape, generator=drawn().manual_seed(6)) < 0.6
        self.keep |= torch.tensor(not with_keep)
        self.with_keep = with_keep

    def states(self) -> list[LayerState]:
        return [
            LayerState(
                keep=pack_keep(self.keep[layer].numpy()) if self.with_keep else None,
                replace={
                    "act": Replacement(self.chosen[layer], shift=self.shift[layer])
                    if self.factor is None
                    else Replacement(self.chosen[layer], self.factor)
                },
            )
            for layer in range(LAYERS)
        ]

    def change(self, conditions: Tensor) -> Change:
        """For conditions (B, T): off first, then set or scaled."""

        def changed(layer: int, out: Tensor) -> Tensor:
            new = out.clone()
            for b in range(conditions.shape[0]):
                for t in range(conditions.shape[1]):
                    c = conditions[b, t]
                    new[b, t, ~self.keep[layer, c]] = 0
                    here = self.chosen[layer, c]
                    if self.factor is None:
                        new[b, t, here] = self.shift[layer, c, here].to(out.dtype)
                    else:
                        new[b, t, here] *= self.factor
            return new

        return changed


PER_ROW = torch.tensor([2, 0, 1, 2])
PER_TOKEN = torch.randint(0, C, (B, T), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("with_keep", [False, True])
@pytest.mark.parametrize("factor", [None, -0.5])
@pytest.mark.parametrize("given", [None, PER_ROW, PER_TOKEN], ids=["none", "row", "token"])
def test_a_replaced_activation_is_a_hook_on_the_activation(
    model: Any, given: Tensor | None, factor: float | None, with_keep: bool
) -> None:
    steering = Steering(factor=factor, with_keep=with_keep)
    conditions = torch.zeros(B, T, dtype=torch.long) if given is None else given
    everywhere = conditions if conditions.dim() == 2 else conditions[:, None].expand(B, T)
    clean = logits(model, ids())
    with hooked(model, steering.change(everywhere)):
        wanted = logits(model, ids())
    with Patch(find_mlps(model), steering.states()) as patch:
        patch.tokens = Tokens(conditions=None if given is None else given.int())
        ours = logits(model, ids())
    assert torch.allclose(ours, wanted, atol=1e-4)
    assert (ours - clean).abs().amax(dim=(1, 2)).min() > 0.1
    assert torch.equal(logits(model, ids()), clean)


def test_activations_stay_set_through_the_cache_and_where_outputs_are_left_out(model: Any) -> None:
    steering = Steering(with_keep=True)
    with hooked(model, steering.change(PER_TOKEN)):
        wanted = logits(model, ids())
    with Patch(find_mlps(model), steering.states()) as patch:
        patch.tokens = Tokens(conditions=PER_TOKEN.int(), n_needed=2)
        assert torch.allclose(logits(model, ids())[:, -2:], wanted[:, -2:], atol=1e-4)
        patch.tokens = Tokens(conditions=PER_TOKEN[:, :-1].int())
        with torch.no_grad():
            cache = cache_of(model(ids()[:, :-1], use_cache=True))
        patch.tokens = Tokens(conditions=PER_TOKEN[:, -1:].int())
        last = logits(model, ids()[:, -1:], use_cache=True, **cache)
        assert torch.allclose(last[:, -1], wanted[:, -1], atol=1e-4)


def test_with_gradients_the_same_and_a_set_neuron_has_none_from_its_gate(model: Any) -> None:
    steering = Steering()
    steering.chosen[:] = True
    mlps = find_mlps(model)
    with Patch(mlps, steering.states()):
        without = logits(model, ids())
        out = model(ids()).logits
        assert torch.allclose(out, without, atol=1e-4)
        weights = [
            mlp.module.get_parameter(_gate(hasattr(mlp.module, "gate_up_proj"))) for mlp in mlps
        ]
        grads = torch.autograd.grad(out.square().sum(), weights)
    for grad, mlp in zip(grads, mlps, strict=True):
        assert (grad[:WIDTH] == 0).all()
        assert not hasattr(mlp.module, "gate_up_proj") or grad[WIDTH:].abs().max() > 0


def _gate(packed: bool) -> str:
    return "gate_up_proj.weight" if packed else "gate_proj.weight"


def test_in_bfloat16_the_value_is_rounded_first() -> None:
    model = tiny_model("llama", torch.bfloat16, initializer_range=0.3)
    steering = Steering(with_keep=True)
    everywhere = PER_ROW[:, None].expand(B, T)
    with hooked(model, steering.change(everywhere)):
        wanted = logits(model, ids())
    with Patch(find_mlps(model), steering.states(), backend="reference") as patch:
        patch.tokens = Tokens(conditions=PER_ROW.int())
        assert torch.equal(logits(model, ids()), wanted)


# --- a forward that ends with its statistics -------------------------------------------------

GROUPS = torch.tensor([[0] * T, [1] * T, [2] * T, [0] * 3 + [-1] * (T - 3)]).int()


def counting(*, down: bool = False) -> list[LayerState]:
    def stats(width: int, *sites: str) -> ops.GroupStats:
        return ops.GroupStats(groups=3, width=width, sites=sites, moments=True)

    return [
        LayerState(stats=stats(WIDTH, "act", "up"), stats_down=stats(HIDDEN, "down"))
        if down
        else LayerState(stats=stats(WIDTH, "act", "up"))
        for _ in range(LAYERS)
    ]


def same_stats(ours: ops.GroupStats, theirs: ops.GroupStats) -> None:
    assert torch.equal(ours.tokens, theirs.tokens)
    assert ours.tokens.tolist() == [T + 3, T, T]
    for name in ("count", "sum", "sum_sq", "max", "n_nonfinite"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine.keys() == other.keys() and mine
        for site, values in mine.items():
            assert torch.equal(values, other[site]), (name, site)


@contextmanager
def calls(model: Any) -> Iterator[dict[str, int]]:
    """How often the parts behind the last layer's products run, and the first down_proj."""
    mlps = find_mlps(model)
    parts = {
        "first down": mlps[0].module.down_proj,
        "last down": mlps[-1].module.down_proj,
        "norm": model.model.norm,
        "lm_head": model.lm_head,
    }
    seen = dict.fromkeys(parts, 0)
    with ExitStack() as stack:
        for name, module in parts.items():

            def hook(*_: Any, name: str = name) -> None:
                seen[name] += 1

            stack.callback(module.register_forward_hook(hook).remove)
        yield seen


def modules(model: Any) -> list[set[str]]:
    return [set(module.__dict__) for module in model.modules()]


def run(model: Any, patches: list[Patch]) -> Tensor:
    """One forward inside of all patches, the first is the outermost; their groups are GROUPS."""
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch).tokens = Tokens(group_ids=GROUPS)
        return logits(model, ids())


def test_only_statistics_are_those_of_a_whole_forward_and_nothing_runs_behind(model: Any) -> None:
    mlps = find_mlps(model)
    whole, short = Patch(mlps, counting()), Patch(mlps, counting(), only_statistics=True)
    before = modules(model)
    with calls(model) as seen:
        run(model, [whole])
    assert seen == {"first down": 1, "last down": 1, "norm": 1, "lm_head": 1}
    with calls(model) as seen, pytest.raises(StatisticsDone):
        run(model, [short])
    assert seen == {"first down": 1, "last down": 0, "norm": 0, "lm_head": 0}
    assert modules(model) == before
    for ours, theirs in zip(short.states, whole.states, strict=True):
        assert ours.stats is not None and theirs.stats is not None
        same_stats(ours.stats, theirs.stats)
        assert 0 < int(ours.stats.count["act"].sum()) < WIDTH * GROUPS.numel()


def test_statistics_of_down_run_to_the_last_one_and_count_its_output(model: Any) -> None:
    mlps = find_mlps(model)
    patch = Patch(mlps, counting(down=True), only_statistics=True)
    seen: list[np.ndarray[Any, Any]] = []
    with ExitStack() as stack:
        for mlp in mlps:
            handle = mlp.module.down_proj.register_forward_hook(
                lambda _m, _i, out: seen.append(out.numpy().copy())
            )
            stack.callback(handle.remove)
        run(model, [patch])
    groups = GROUPS.numpy()
    for state, out in zip(patch.states, seen, strict=True):
        assert state.stats_down is not None
        for group in range(3):
            rows = out[groups == group]
            assert state.stats_down.tokens[group] == len(rows)
            assert np.array_equal(state.stats_down.count["down"][group], (rows > 0).sum(0))
            sums = state.stats_down.sum["down"][group].numpy()
            assert np.allclose(sums, rows.astype(np.float64).sum(0), rtol=1e-5, atol=1e-5)
            assert np.array_equal(state.stats_down.max["down"][group], rows.max(0))


@pytest.mark.parametrize("first", ["whole", "short"])
def test_a_nested_patch_that_needs_the_forward_has_it(model: Any, first: str) -> None:
    mlps = find_mlps(model)
    alone = Patch(mlps, counting())
    wanted = run(model, [alone])
    whole, short = Patch(mlps, counting()), Patch(mlps, counting(), only_statistics=True)
    before = modules(model)
    with calls(model) as seen:
        ours = run(model, [whole, short] if first == "whole" else [short, whole])
    assert seen == {"first down": 1, "last down": 1, "norm": 1, "lm_head": 1}
    assert torch.equal(ours, wanted)
    assert modules(model) == before
    for i in range(LAYERS):
        for patch in (whole, short):
            same_stats(patch.states[i].stats, alone.states[i].stats)


def test_two_nested_patches_for_statistics_alone_end_the_forward(model: Any) -> None:
    mlps = find_mlps(model)
    both = [Patch(mlps, counting(), only_statistics=True) for _ in range(2)]
    with calls(model) as seen, pytest.raises(StatisticsDone):
        run(model, both)
    assert seen["last down"] == 0
    for ours, theirs in zip(both[0].states, both[1].states, strict=True):
        same_stats(ours.stats, theirs.stats)


def test_a_patch_goes_on_after_a_forward_that_ended(model: Any) -> None:
    mlps = find_mlps(model)
    short, twice = Patch(mlps, counting(), only_statistics=True), Patch(mlps, counting())
    with short:
        short.tokens = Tokens(group_ids=GROUPS)
        for _ in range(2):
            with pytest.raises(StatisticsDone):
                logits(model, ids())
    with twice:
        twice.tokens = Tokens(group_ids=GROUPS)
        for _ in range(2):
            logits(model, ids())
    for ours, theirs in zip(short.states, twice.states, strict=True):
        assert torch.equal(ours.stats.count["act"], theirs.stats.count["act"])
        assert torch.equal(ours.stats.sum["up"], theirs.stats.sum["up"])
