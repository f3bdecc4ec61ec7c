"""Hooks on what the patch goes around, tokens counted once, and who a patched model belongs to.

Hooks run once a forward, with the values that the model computes, whenever they were registered;
the self-check calls none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

import relneuron
from relneuron.artifact.files import RelneuronError
from relneuron.model.mlps.find import find_mlps, inspect_layers
from relneuron.model.patch import Patch, StatisticsDone
from relneuron.model.states import LayerState, Tokens
from tests.conftest import tiny_model

B, T, WIDTH, LAYERS = 2, 7, 48, 3
NEURONS = [(0, "gate", 3), (1, "up", 40), (1, "gate", 40), (2, "down", 31)]
ACTIVATIONS = {"llama": "act_fn", "phi3": "activation_fn"}

# An empty set is the model as it is, inside the patch.
pytestmark = pytest.mark.filterwarnings("ignore:ablate. no neuron is given")


@pytest.fixture(params=sorted(ACTIVATIONS))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param, initializer_range=0.3)


def ids(length: int = T) -> Tensor:
    return torch.randint(3, 90, (B, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids() if tokens is None else tokens).logits


def part(model: Any, layer: int, name: str) -> nn.Module:
    mlp = find_mlps(model)[layer]
    if name == "mlp":
        return mlp.module
    if name == "act":
        name = ACTIVATIONS[model.config.model_type]
    if name == "gate" and hasattr(mlp.module, "gate_up_proj"):
        name = "gate_up"
    return mlp.module.get_submodule(name if "act" in name else f"{name}_proj")


@contextmanager
def heard(module: nn.Module) -> Iterator[list[tuple[tuple[int, ...], Tensor]]]:
    """Shape of the input and the output of every call of a module, from both kinds of hook."""
    seen: list[Any] = []
    before: list[Any] = []

    def after(_m: Any, args: Any, out: Tensor) -> None:
        seen.append((before.pop(), out.detach().clone()))

    handles = [
        module.register_forward_pre_hook(lambda _, args: before.append(tuple(args[0].shape))),
        module.register_forward_hook(after),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def contexts(model: Any) -> dict[str, Callable[[], Any]]:
    @contextmanager
    def counting() -> Iterator[None]:
        with relneuron.instrument(model, 1) as probe:
            probe.batch(torch.ones(B, T))
            yield

    @contextmanager
    def both() -> Iterator[None]:
        with counting(), relneuron.ablate(model, []):
            yield

    return {
        "instrument": counting,
        "ablate": lambda: relneuron.ablate(model, []),
        "scaled": lambda: relneuron.ablate(model, NEURONS[:1], mode="scale", value=1.0),
        "nested": both,
    }


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("context", ["instrument", "ablate", "scaled", "nested"])
@pytest.mark.parametrize("name", ["act", "gate", "down", "mlp"])
def test_hooks_run_once_with_the_values_of_the_model(
    model: Any, name: str, context: str, when: str
) -> None:
    module = part(model, 1, name)
    with heard(module) as wanted:
        clean = logits(model)
    if when == "before":
        with heard(module) as found, contexts(model)[context]():
            ours = logits(model)
    else:
        with contexts(model)[context](), heard(module) as found:
            ours = logits(model)
    assert [shape for shape, _ in found] == [shape for shape, _ in wanted]
    for (_, out), (_, theirs) in zip(found, wanted, strict=True):
        torch.testing.assert_close(out, theirs)
    torch.testing.assert_close(ours, clean)


def test_hooks_for_all_modules_and_gradients_hear_the_activation(model: Any) -> None:
    act = part(model, 1, "act")
    calls: list[str] = []

    def hook(module: nn.Module, *_: Any) -> None:
        if module is act:
            calls.append("call")

    handle = torch_module.register_module_forward_hook(hook)
    try:
        with relneuron.ablate(model, NEURONS):
            assert calls == []  # the self-check is not heard
            logits(model)
    finally:
        handle.remove()
    assert calls == ["call"]
    handle = act.register_full_backward_hook(lambda *_: calls.append("gradient"))
    with relneuron.ablate(model, NEURONS), relneuron.ablate(model, []):
        model(ids()).logits.sum().backward()
    handle.remove()
    assert calls == ["call", "gradient"]


def test_what_a_hook_changes_is_what_the_model_computes_and_counts(model: Any) -> None:
    act = part(model, 1, "act")
    off = torch.arange(WIDTH) % 3 == 0

    def change(_m: Any, _i: Any, out: Tensor) -> Tensor:
        return torch.where(off, out.new_zeros(()), out + 0.25)

    sites = ("gate", "act", "product")
    with relneuron.instrument(model, 2, sites=sites, moments=True) as without:
        without.batch(torch.ones(B, T), [0, 1])
        logits(model)
    handle = act.register_forward_hook(change)
    with heard(act) as seen, heard(part(model, 1, "down")) as down:
        wanted = logits(model)
        with relneuron.instrument(model, 2, sites=sites, moments=True) as probe:
            probe.batch(torch.ones(B, T), [0, 1])
            ours = logits(model)
        torch.testing.assert_close(ours, wanted)
    handle.remove()
    stats = probe.stats[1]
    assert stats.tokens.tolist() == [T, T]
    for group in range(2):
        values = seen[1][1][group]
        assert torch.equal(stats.count["act"][group], (values > 0).sum(0))
        assert torch.equal(stats.max["act"][group], values.amax(0))
        near = {"rtol": 1e-5, "atol": 1e-5}  # sums of float32 first
        torch.testing.assert_close(stats.sum["act"][group], values.double().sum(0), **near)
        squares = values.double().square().sum(0)
        torch.testing.assert_close(stats.sum_sq["act"][group], squares, **near)
        assert (stats.count["product"][group, off] == 0).all()
    assert torch.equal(stats.count["gate"], without.stats[1].count["gate"])
    assert not torch.equal(stats.count["act"], without.stats[1].count["act"])
    assert down[1][0] == (B, T, WIDTH)


def test_a_forward_that_ends_early_runs_the_hooks_of_the_activation(model: Any) -> None:
    mlps = find_mlps(model)
    stats = [relneuron.ops.GroupStats(groups=1, width=WIDTH) for _ in mlps]
    patch = Patch(mlps, [LayerState(stats=s) for s in stats], only_statistics=True)
    with patch, heard(part(model, LAYERS - 1, "act")) as seen, pytest.raises(StatisticsDone):
        patch.tokens = Tokens(group_ids=torch.zeros(B, T, dtype=torch.int32))
        logits(model)
    assert [shape for shape, _ in seen] == [(B, T, WIDTH)]
    assert torch.equal(stats[-1].count["act"][0], (seen[0][1] > 0).sum((0, 1)))


@pytest.mark.parametrize("name", ["act", "gate", "down", "mlp"])
def test_the_self_check_calls_no_hook_and_leaves_them(model: Any, name: str) -> None:
    module = part(model, 0, name)
    with heard(module) as seen:
        hooks = module._forward_hooks, dict(module._forward_hooks)
        assert all(verdict.mlps for verdict in inspect_layers(model))
        assert seen == []
        assert module._forward_hooks is hooks[0] and dict(module._forward_hooks) == hooks[1]
        logits(model)
        assert len(seen) == 1


def test_hooks_on_a_part_that_is_not_called_are_refused(model: Any) -> None:
    mlp = find_mlps(model)[1].module
    mlp.dropout = nn.Dropout(0.0).eval()
    with relneuron.ablate(model, NEURONS):
        logits(model)
        handle = mlp.dropout.register_forward_hook(lambda *_: None)
        with pytest.raises(RelneuronError, match=r"mlp\.dropout has a hook"):
            logits(model)
        handle.remove()
        logits(model)


# --- counted once ----------------------------------------------------------------------------


def test_a_batch_is_counted_by_one_forward(model: Any) -> None:
    with relneuron.instrument(model, 1) as probe:
        probe.batch(torch.ones(B, T))
        logits(model)
        with pytest.raises(RelneuronError, match=r"probe\.batch\(\) were counted already"):
            logits(model)
        probe.batch(torch.ones(B, T))
        logits(model)
    assert [s.tokens.tolist() for s in probe.stats] == [[2 * B * T]] * LAYERS


def test_generate_after_a_batch_is_refused_at_its_second_forward(model: Any) -> None:
    model.generation_config.eos_token_id = None
    for length in (1, T):
        with relneuron.instrument(model, 1) as probe:
            probe.batch(torch.ones(B, length))
            with pytest.raises(RelneuronError, match="counted already") as caught:
                model.generate(ids(length), max_new_tokens=3, do_sample=False)
            assert "generate()" in caught.value.fix
        assert [s.tokens.tolist() for s in probe.stats] == [[B * length]] * LAYERS


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once_and_gives_the_same_gradients(reentrant: bool) -> None:
    model = tiny_model("llama", initializer_range=0.3)
    parameters = list(model.parameters())

    def gradients(checkpointed: bool) -> list[Tensor]:
        cls = type(model.model.layers[0])
        before = cls.forward

        def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
            def run(x: Tensor) -> Any:
                return before(self, x, **kwargs)

            return checkpoint(run, hidden_states, use_reentrant=reentrant)

        if checkpointed:
            cls.forward = forward
        try:
            for parameter in parameters:
                parameter.grad = None
            model(ids(), use_cache=False).logits.square().sum().backward()
        finally:
            cls.forward = before
        return [parameter.grad.clone() for parameter in parameters]

    with relneuron.ablate(model, NEURONS):
        wanted = gradients(False)
        with relneuron.instrument(model, 1, moments=True) as probe:
            probe.batch(torch.ones(B, T))
            found = gradients(True)
    assert [s.tokens.tolist() for s in probe.stats] == [[B * T]] * LAYERS
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_a_training_step_inside_an_ablation_is_that_of_hooks(model: Any) -> None:
    def without(x: Tensor, index: int) -> Tensor:
        return torch.where(torch.arange(x.shape[-1]) == index, 0.0, x)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids(), use_cache=False).logits.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    with relneuron.instrument(model, 1) as probe, relneuron.ablate(model, NEURONS):
        probe.batch(torch.ones(B, T))
        found = gradients()
    assert [s.tokens.tolist() for s in probe.stats] == [[B * T]] * LAYERS
    handles = [
        part(model, layer, "down").register_forward_pre_hook(
            lambda _, x, index=index: (without(x[0], index),)
        )
        for layer, index in ((0, 3), (1, 40))
    ]
    down = part(model, 2, "down")
    handles.append(down.register_forward_hook(lambda _, x, y: without(y, 31)))
    wanted = gradients()
    for handle in handles:
        handle.remove()
    plain = gradients()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(found, plain, strict=True))


def test_layers_that_share_an_mlp_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with (
        pytest.raises(RelneuronError, match="share one MLP"),
        relneuron.instrument(model, 1),
    ):
        pass
    assert "forward" not in model.model.layers[0].mlp.__dict__


# --- one thread ------------------------------------------------------------------------------


def elsewhere(run: Callable[[], Any]) -> Any:
    """What another thread returns, or raises."""
    found: list[Any] = []

    def target() -> None:
        try:
            found.append(run())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return found[0]


def test_a_forward_of_another_thread_is_refused(model: Any) -> None:
    clean = logits(model)
    for context in contexts(model).values():
        with context():
            error = elsewhere(lambda: logits(model))
            assert isinstance(error, RelneuronError) and "another thread" in error.cause
            logits(model)
        assert torch.equal(elsewhere(lambda: logits(model)), clean)


def test_a_second_patch_of_another_thread_is_refused(model: Any) -> None:
    def patch() -> None:
        with relneuron.ablate(model, NEURONS):
            pass

    with relneuron.ablate(model, NEURONS):
        before = logits(model)
        error = elsewhere(patch)
        assert isinstance(error, RelneuronError) and "another thread" in error.cause
        assert torch.equal(logits(model), before)
    assert elsewhere(patch) is None


def test_threads_with_their_own_sets_never_see_another_one(model: Any) -> None:
    sets = [[(0, "gate", i) for i in range(n, WIDTH, 3)] for n in range(3)]
    wanted = []
    for neurons in sets:
        with relneuron.ablate(model, neurons):
            wanted.append(logits(model))
    n_right = [0]

    def work(number: int) -> None:
        for _ in range(15):
            try:
                with relneuron.ablate(model, sets[number]):
                    found = logits(model)
            except RelneuronError:
                continue
            assert torch.equal(found, wanted[number])
            n_right[0] += 1

    with pytest.MonkeyPatch.context() as patch:
        failed: list[Any] = []
        patch.setattr(threading, "excepthook", failed.append)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed and n_right[0] > 0


def test_backward_may_run_in_another_thread(model: Any) -> None:
    with relneuron.ablate(model, NEURONS):
        loss = model(ids()).logits.sum()
        assert elsewhere(loss.backward) is None


# What torch loads for it at first uses a part of torch that it calls old.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_an_ablation_inside_a_transform_of_torch_is_right() -> None:
    model = tiny_model("llama", initializer_range=0.3)
    model.set_attn_implementation("eager")  # torch's fused one has no tangents
    embedded = model.model.embed_tokens(ids()).detach()

    def of(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, use_cache=False).logits.sum()

    with relneuron.ablate(model, NEURONS):
        x = embedded.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(of(x), x)
        torch.testing.assert_close(torch.func.grad(of)(embedded), wanted, rtol=1e-3, atol=1e-3)
        _, slope = torch.func.jvp(of, (embedded,), (embedded,))
        torch.testing.assert_close(slope, (wanted * embedded).sum(), rtol=1e-3, atol=1e-3)
