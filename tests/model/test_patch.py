"""The patch on tiny models of ten families: structure, bit-equality, masks, exact removal.

Every supported path has a canary: switching off a live neuron must change the logits.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relneuron
from relneuron.artifact.files import RelneuronError
from relneuron.model.canary import check_canary
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.mlp import MLP
from relneuron.model.patch import Patch
from relneuron.model.states import mask_states, pack_keep, unpack_keep
from tests.conftest import tiny_model

NEURONS = [(0, "gate", 3), (1, "up", 40), (2, "down", 5), (1, "gate", 40), (2, "down", 31)]


def ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids() if tokens is None else tokens).logits


def attributes(model: nn.Module) -> list[dict[str, object]]:
    """Every module's `__dict__`, hook dictionaries by their content."""
    return [
        {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in m.__dict__.items()
        }
        for m in model.modules()
    ]


def set_rows_and_columns_to_zero(mlps: list[MLP], neurons: Any) -> None:
    """The static edit that switches neurons off: rows of gate, up or down weights."""
    for layer, site, index in neurons:
        module: Any = mlps[layer].module
        if site == "down":
            module.down_proj.weight.data[index] = 0
        elif hasattr(module, "gate_up_proj"):
            offset = 0 if site == "gate" else mlps[layer].width
            module.gate_up_proj.weight.data[offset + index] = 0
        else:
            getattr(module, f"{site}_proj").weight.data[index] = 0


def test_every_layer_is_found_by_structure(family_model: Any) -> None:
    mlps = find_mlps(family_model)
    assert [(mlp.layer, mlp.width, mlp.hidden) for mlp in mlps] == [(i, 48, 32) for i in range(3)]


@pytest.mark.filterwarnings("ignore:ablate. no neuron")
def test_nothing_off_is_bit_equal_in_the_reference_backend(family_model: Any) -> None:
    clean = logits(family_model)
    with relneuron.ablate(family_model, [], backend="reference"):
        assert torch.equal(logits(family_model), clean)
    with relneuron.instrument(family_model, 2, backend="reference") as probe:
        probe.batch(torch.ones(2, 7, dtype=torch.int64), [0, 1])
        assert torch.equal(logits(family_model), clean)
        assert int(probe.stats[2].count["act"].sum()) > 0


@pytest.mark.filterwarnings("ignore:ablate. no neuron")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_other_backends_agree_with_the_model(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    clean = logits(model).float()
    with relneuron.ablate(model, []):
        assert torch.allclose(logits(model).float(), clean, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_masks_equal_edited_weights(family_model: Any, backend: str) -> None:
    edited = copy.deepcopy(family_model)
    set_rows_and_columns_to_zero(find_mlps(edited), NEURONS)
    clean = logits(family_model)
    with relneuron.ablate(family_model, NEURONS, backend=backend):
        ours = logits(family_model)
    assert not torch.equal(ours, clean)
    if backend == "reference":
        assert torch.equal(ours, logits(edited))
    assert torch.allclose(ours, logits(edited), atol=1e-5)


@pytest.mark.filterwarnings("ignore:ablate. no neuron")
def test_a_condition_per_row_equals_one_condition_at_a_time(llama: Any) -> None:
    mlps = find_mlps(llama)
    conditions: list[list[Any]] = [[], NEURONS, [(1, "down", 0), (0, "up", 1)], [(2, "gate", 7)]]
    tokens = ids(1, 9)
    patch = Patch(mlps, mask_states(conditions, mlps))
    with patch:
        patch.tokens.conditions = torch.arange(4, dtype=torch.int32)
        together = logits(llama, tokens.expand(4, 9))
    for row, neurons in enumerate(conditions):
        with relneuron.ablate(llama, neurons):
            assert torch.allclose(together[row], logits(llama, tokens)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "value", "becomes"),
    [
        ("zero", None, lambda out, i: 0 * out),
        ("scale", -0.5, lambda out, i: -0.5 * out),
        ("mean", 0.75, lambda out, i: 0 * out + 0.75),
        ("mean", [0.1, 0.2, 0.3, 0.4, 0.5], lambda out, i: 0 * out + (i + 1) / 10),
    ],
)
def test_ablate_gives_what_hooks_on_the_outputs_give(
    family_model: Any, mode: str, value: Any, becomes: Callable[[Tensor, int], Tensor]
) -> None:
    mlps = find_mlps(family_model)
    handles = []
    for i, (layer, site, index) in enumerate(NEURONS):
        mlp = mlps[layer]
        name = (
            "gate_up_proj"
            if hasattr(mlp.module, "gate_up_proj") and site != "down"
            else f"{site}_proj"
        )
        place = index + mlp.width * (hasattr(mlp.module, "gate_up_proj") and site == "up")

        def change(_m: Any, _x: Any, out: Tensor, i: int = i, place: int = place) -> None:
            out[..., place] = becomes(out[..., place], i)

        handles.append(getattr(mlp.module, name).register_forward_hook(change))
    want = logits(family_model)
    for handle in handles:
        handle.remove()
    clean = logits(family_model)
    with relneuron.ablate(family_model, NEURONS, mode=mode, value=value):
        found = logits(family_model)
    torch.testing.assert_close(found, want)
    assert not torch.allclose(found, clean)


def test_ablate_refuses_a_mode_that_does_not_fit_its_value(llama: Any) -> None:
    for mode, value in (("zero", 1.0), ("scale", None), ("mean", None), ("median", 1.0)):
        with (
            pytest.raises(RelneuronError, match="with the value"),
            relneuron.ablate(llama, NEURONS, mode=mode, value=value),
        ):
            pass
    with (
        pytest.raises(RelneuronError, match="one value"),
        relneuron.ablate(llama, NEURONS, mode="scale", value=[1, 2, 3, 4, 5]),
    ):
        pass


def test_exit_and_errors_leave_every_module_as_it_was(family_model: Any) -> None:
    before, clean = attributes(family_model), logits(family_model)
    with relneuron.ablate(family_model, NEURONS):
        logits(family_model)
    assert attributes(family_model) == before
    for mlp in find_mlps(family_model):
        for error in (RuntimeError, KeyboardInterrupt):

            def explode(*_: object, kind: type[BaseException] = error) -> None:
                raise kind

            with pytest.raises(error), relneuron.ablate(family_model, NEURONS):
                down: Any = mlp.module.down_proj
                handle = down.register_forward_pre_hook(explode)
                try:
                    logits(family_model)
                finally:
                    handle.remove()
            assert attributes(family_model) == before
    assert torch.equal(logits(family_model), clean)


def test_an_own_forward_of_the_instance_comes_back(llama: Any) -> None:
    module = find_mlps(llama)[1].module
    own = module.forward
    module.forward = own
    with relneuron.ablate(llama, NEURONS):
        assert module.__dict__["forward"] is not own
    assert module.__dict__["forward"] is own


def test_accelerate_hooks_survive(llama: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    hooked = find_mlps(llama)[0].module
    accelerate.hooks.add_hook_to_module(hooked, accelerate.hooks.ModelHook())
    before = hooked.__dict__["forward"]
    with relneuron.ablate(llama, NEURONS):
        logits(llama)
    assert hooked.__dict__["forward"] is before
    assert hooked._hf_hook is not None


def test_nested_patches_act_together(llama: Any) -> None:
    first, second = NEURONS[:2], NEURONS[2:]
    with relneuron.ablate(llama, NEURONS):
        both = logits(llama)
    with relneuron.ablate(llama, first):
        with relneuron.ablate(llama, second):
            assert torch.allclose(logits(llama), both, atol=1e-6)
        once = logits(llama)
    with relneuron.ablate(llama, first):
        assert torch.equal(logits(llama), once)
    # Statistics around an ablation see the values before masking, of the ablated model.
    with relneuron.instrument(llama, 1) as probe, relneuron.ablate(llama, NEURONS):
        probe.batch(torch.ones(2, 7))
        logits(llama)
    assert int(probe.stats[0].tokens) == 14


def test_leaving_out_of_order_restores_and_raises(llama: Any) -> None:
    before = attributes(llama)
    outer, inner = relneuron.ablate(llama, NEURONS), relneuron.ablate(llama, NEURONS)
    outer.__enter__()
    inner.__enter__()
    for context in (outer, inner):
        with pytest.raises(RelneuronError, match="last-in first-out"):
            context.__exit__(None, None, None)
        assert attributes(llama) == before


def greedy(model: Any, tokens: Tensor, n: int) -> list[int]:
    """Greedy decoding without a cache."""
    for _ in range(n):
        tokens = torch.cat([tokens, logits(model, tokens)[:, -1:].argmax(-1)], 1)
    return tokens[0].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_generate_with_the_cache_is_ablated_at_every_step(family: str) -> None:
    model = tiny_model(family, initializer_range=0.3)
    model.generation_config.eos_token_id = None
    off = [(layer, "gate", i) for layer in range(3) for i in range(0, 48, 2)]
    tokens = ids(1, 5)
    with relneuron.ablate(model, off):
        made = model.generate(tokens, max_new_tokens=6, do_sample=False)[0].tolist()
        assert made == greedy(model, tokens, 6)
    assert made != greedy(model, tokens, 6)


@pytest.mark.parametrize("order", ["compile, run, patch", "compile, patch", "patch, compile"])
def test_canary_under_compile(llama: Any, order: str) -> None:
    edited = copy.deepcopy(llama)
    set_rows_and_columns_to_zero(find_mlps(edited), NEURONS)
    torch.compiler.reset()
    clean, wanted = logits(llama), logits(edited)
    run: Any = llama if order.startswith("patch") else torch.compile(llama, backend="aot_eager")
    if "run" in order:
        assert torch.allclose(logits(run), clean, atol=1e-5)
    with relneuron.ablate(llama, NEURONS):
        run = torch.compile(llama, backend="aot_eager") if order.startswith("patch") else run
        ours = logits(run)
    assert torch.allclose(ours, wanted, atol=1e-5)
    assert not torch.allclose(ours, clean, atol=1e-3)
    assert torch.allclose(logits(run), clean, atol=1e-5)


def test_statistics_under_compile(llama: Any) -> None:
    torch.compiler.reset()
    mask = torch.ones(2, 7)
    with relneuron.instrument(llama, 2, sites=("gate", "up")) as eager:
        eager.batch(mask, [0, 1])
        logits(llama)
    compiled: Any = torch.compile(llama, backend="aot_eager")
    with relneuron.instrument(llama, 2, sites=("gate", "up")) as probe:
        probe.batch(mask, [0, 1])
        logits(compiled)
    for ours, theirs in zip(probe.stats, eager.stats, strict=True):
        for site in ("gate", "up"):
            assert torch.equal(ours.count[site], theirs.count[site])


def test_gradients_flow_through_an_ablation(llama: Any) -> None:
    edited = copy.deepcopy(llama)
    set_rows_and_columns_to_zero(find_mlps(edited), NEURONS)
    with relneuron.ablate(llama, NEURONS):
        ours = torch.autograd.grad(llama(ids()).logits.sum(), llama.model.embed_tokens.weight)
    theirs = torch.autograd.grad(edited(ids()).logits.sum(), edited.model.embed_tokens.weight)
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)


@pytest.mark.parametrize("padding", [0, 1, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_counts(llama: Any, side: str, padding: int) -> None:
    lines = [ids(1, n)[0] for n in (3, 5, 8)]

    def count(rows: list[Tensor], width: int) -> list[Tensor]:
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, line in enumerate(rows):
            place = slice(width - len(line), width) if side == "left" else slice(len(line))
            tokens[row, place], mask[row, place] = line, 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        sites = ("gate", "act", "up", "product")
        with torch.no_grad(), relneuron.instrument(llama, 3, sites=sites) as probe:
            probe.batch(mask, list(range(len(rows))))
            llama(input_ids=tokens, attention_mask=mask, position_ids=positions)
        found = [s.count[site] for s in probe.stats for site in sites]
        return [*found, *(s.tokens for s in probe.stats)]

    together = count(lines, 8 + padding)
    for row, line in enumerate(lines):
        for ours, alone in zip(together, count([line], len(line)), strict=True):
            assert torch.equal(ours[row], alone[0])


def test_a_forward_without_batch_is_refused(llama: Any) -> None:
    with relneuron.instrument(llama, 2) as probe:
        with pytest.raises(ValueError, match="group_ids"):
            logits(llama)
        with pytest.raises(ValueError, match=r"\[-1, 2\)"):
            probe.batch(torch.ones(2, 7), [0, 2])


def test_copies_and_pickles_inside_are_refused_and_saving_is_clean(
    llama: Any, tmp_path: Any
) -> None:
    with relneuron.ablate(llama, NEURONS):
        with pytest.raises(RelneuronError, match="copied"):
            copy.deepcopy(llama)
        with pytest.raises(RelneuronError, match="pickled"):
            pickle.dumps(llama)
        llama.save_pretrained(tmp_path)
    saved = type(llama).from_pretrained(tmp_path)
    assert torch.equal(logits(saved), logits(llama))


def test_canary_raises_when_the_patch_has_no_effect(llama: Any) -> None:
    mlps = find_mlps(llama)
    check_canary(llama, mlps, ids(), "auto")
    for mlp in mlps:
        mlp.module.down_proj.weight.data.zero_()  # type: ignore[union-attr]
    with pytest.raises(RelneuronError, match="did not change the logits"):
        check_canary(llama, mlps, ids(), "auto")


@pytest.mark.parametrize(
    "neuron", [(3, "gate", 0), (0, "gate", 48), (0, "down", 32), (0, "act", 0), (-1, "up", 0)]
)
def test_neurons_out_of_range_are_refused(llama: Any, neuron: Any) -> None:
    with (
        pytest.raises(RelneuronError, match="is not in a model"),
        relneuron.ablate(llama, [neuron]),
    ):
        pass


def test_keep_packs_and_unpacks() -> None:
    for width in (1, 31, 32, 33, 100):
        keep = torch.rand(4, width) > 0.5
        packed = pack_keep(keep.numpy())
        assert packed.dtype == torch.int32
        assert torch.equal(unpack_keep(packed, width), keep)
