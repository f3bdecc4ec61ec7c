"""A model with a LoRA adapter of peft on all of its linear maps, merged and not.

Counts, ablations and gains are held to plain hooks on the adapted model itself.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

import relneuron
from tests.kit.attributed import HIDDEN, N_LAYERS, WIDTH, attributed_model
from tests.kit.attribution_runs import OPTIONS, Attributed
from tests.kit.pairs import config_of

pytest.importorskip("peft")
IDS = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(2))
STATES = ("apart", "merged", "unloaded")


def adapted(state: str) -> Any:
    """The attributed Llama with an adapter of drawn numbers; the same function in each state."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.24 by a name that it gives up.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(attributed_model("llama"), config_of("lora of all"))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight) * 0.1)
    if state == "merged":
        model.merge_adapter()
    return (model.merge_and_unload() if state == "unloaded" else model).eval()


def layers_of(model: Any) -> Any:
    return (model.base_model.model if hasattr(model, "peft_config") else model).model.layers


def module_of(layer: Any, site: str) -> Any:
    inner = layer.mlp if site in ("gate", "up", "down") else layer.self_attn
    return getattr(inner, f"{site}_proj")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@contextmanager
def heard(model: Any) -> Iterator[dict[tuple[int, str], Tensor]]:
    """What each map of a forward gives, and, as `product`, what down reads."""
    found: dict[tuple[int, str], Tensor] = {}
    handles = []
    for number, layer in enumerate(layers_of(model)):
        for site in ("gate", "up", "down"):

            def hear(_: Any, x: Any, y: Tensor, key: tuple[int, str] = (number, site)) -> None:
                found[key] = y.detach()
                if key[1] == "down":
                    found[key[0], "product"] = x[0].detach()

            handles.append(module_of(layer, site).register_forward_hook(hear))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("state", STATES)
def test_counts_are_those_of_hooks(state: str) -> None:
    model = adapted(state)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    groups = torch.tensor([0, 1, 1])
    with torch.no_grad(), relneuron.instrument(model, 2, sites=("gate", "up", "product")) as probe:
        probe.batch(mask, groups)
        model(input_ids=IDS, attention_mask=mask)
    with torch.no_grad(), heard(model) as found:
        model(input_ids=IDS, attention_mask=mask)
    for number in range(N_LAYERS):
        for site in ("gate", "up", "product"):
            active = (found[number, site] > 0) & mask[..., None].bool()
            expected = torch.stack([active[groups == g].sum((0, 1)) for g in range(2)])
            assert torch.equal(probe.stats[number].count[site], expected)


NEURONS = [
    *((0, "gate", i) for i in range(0, WIDTH, 3)),
    *((1, "up", i) for i in range(0, WIDTH, 5)),
    *((2, "down", i) for i in range(0, HIDDEN, 4)),
    *((1, site, i) for site in "qvo" for i in range(3)),
    *((0, "k", i) for i in range(5)),
]


def hooked(model: Any) -> Tensor:
    """The logits with the outputs of NEURONS at zero, by hooks on the adapted maps."""
    handles = []
    for number, layer in enumerate(layers_of(model)):
        for site in {site for at, site, _ in NEURONS if at == number}:
            places = [i for at, name, i in NEURONS if (at, name) == (number, site)]

            def zero(_: Any, __: Any, y: Tensor, places: list[int] = places) -> Tensor:
                return y.index_fill(-1, torch.tensor(places), 0.0)

            handles.append(module_of(layer, site).register_forward_hook(zero))
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("state", STATES)
def test_an_ablation_is_that_of_hooks(state: str) -> None:
    model = adapted(state)
    clean, expected = logits(model), hooked(model)
    with relneuron.ablate(model, NEURONS):
        torch.testing.assert_close(logits(model), expected)
    assert torch.equal(logits(model), clean)
    assert (expected - clean).abs().max() > 0.1


def columns_of(module: Any) -> Tensor:
    """What a map without a bias writes for each unit vector, (in, out) float64."""
    with torch.no_grad():
        found: Tensor = copy.deepcopy(module).double()(torch.eye(WIDTH, dtype=torch.float64))
    return found


@pytest.mark.parametrize("state", STATES)
def test_gains_are_those_of_what_hooks_hear(state: str, tmp_path: Path) -> None:
    """log p(w | x + m v) - log p(w | x), the final norm's scale frozen, of every FFN neuron."""
    model = adapted(state)
    run = Attributed("llama", tmp_path, model=model)
    gains = load_file(run.attribute(tmp_path / "out", OPTIONS) / "gains.safetensors")
    base = model.base_model.model if hasattr(model, "peft_config") else model
    vectors = [columns_of(layer.mlp.down_proj) for layer in layers_of(model)]
    for row in (0, 3, 7):
        norms = [layer.post_attention_layernorm for layer in layers_of(model)]
        read: dict[Any, Tensor] = {}

        def hear(norm: Any, x: Any, read: dict[Any, Tensor] = read) -> None:
            read[norm] = x[0].detach()[0, -1].double()

        handles = [one.register_forward_pre_hook(hear) for one in (*norms, base.model.norm)]
        with torch.no_grad(), heard(model) as found:
            model(torch.tensor([run.ids[row]]))
        for handle in handles:
            handle.remove()
        end = read[base.model.norm]
        scale = 1 / (end.square().mean() + base.config.rms_norm_eps).sqrt()
        weight = base.lm_head.weight.double() * base.model.norm.weight.double()

        def log_p(x: Tensor) -> Tensor:
            return (x * scale @ weight.T).log_softmax(-1)[..., run.targets[row]]  # noqa: B023

        for number in range(N_LAYERS):
            x, m = read[norms[number]], found[number, "product"][0, -1].double()
            expected = log_p(x + m[:, None] * vectors[number]) - log_p(x)
            ours = torch.from_numpy(gains[f"ffn.{number}"][row]).double()
            assert (ours - expected.detach()).abs().max() < 1e-5  # attribute's own tolerance
            assert expected.abs().max() > 1e-2


def test_an_adapter_that_multiplies_is_refused_until_it_is_merged() -> None:
    from peft import get_peft_model

    from relneuron.artifact.files import RelneuronError
    from relneuron.model.stream.read import read_residual_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(attributed_model("llama"), config_of("ia3")).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ia3_" in name:
                weight.uniform_(0.5, 1.5)
    with pytest.raises(RelneuronError, match="cannot be attributed"):
        read_residual_model(model)
    model.merge_adapter()
    read_residual_model(model)
