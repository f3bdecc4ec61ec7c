"""Quantised models, as each package that runs on a CPU packs them: counted, masked, told apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import relneuron
from relneuron.artifact.files import RelneuronError
from relneuron.methods.counts.batches import Batch
from relneuron.methods.counts.counter import Counter
from relneuron.model.canary import check_canary
from relneuron.model.identity import model_digest
from relneuron.model.layers import compute_dtype, features
from relneuron.model.load import describe_model, load_model, quantisation
from relneuron.model.mlps.find import find_mlps
from relneuron.model.patch import Patch
from relneuron.model.states import mask_states
from relneuron.model.stream.read import read_residual_model
from tests.kit.files import read_rows
from tests.kit.hooked import Hooked, Study
from tests.kit.quantised import CHECKPOINTS, METHODS

WIDTH, HIDDEN = 128, 64
NEURONS = [
    (layer, site, 3 * layer + 5) for layer in range(2) for site in ("gate", "up", "down", "q", "o")
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers that every package can pack."""
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=96,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    package = METHODS[request.param][0]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return str(request.param)


@pytest.fixture
def load(method: str, plain: Path, tmp_path: Path) -> Callable[[], Any]:
    """Makes the same quantised model again and again."""
    numbers = iter(range(9))
    return lambda: METHODS[method][1](plain, tmp_path / f"{next(numbers)}")


def ids() -> Tensor:
    return torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(5))


def hooked(model: Any, hook_of: Callable[[int, str], Any]) -> list[Any]:
    """Forward hooks on the projections that NEURONS are outputs of."""
    handles = []
    for number, layer in enumerate(model.model.layers):
        parts = {site: getattr(layer.mlp, f"{site}_proj") for site in ("gate", "up", "down")}
        parts |= {site: getattr(layer.self_attn, f"{site}_proj") for site in ("q", "o")}
        handles += [m.register_forward_hook(hook_of(number, s)) for s, m in parts.items()]
    return handles


@torch.no_grad()
def test_counts_are_those_of_hooks(load: Any) -> None:
    model = load()
    seen: dict[tuple[int, str], Tensor] = {}
    handles = hooked(model, lambda *where: lambda m, i, out: seen.update({where: out.clone()}))
    model(ids(), use_cache=False)
    for handle in handles:
        handle.remove()
    counter = Counter(model, find_mlps(model), sites=("act", "gate", "up", "product", "down"))
    with counter:
        groups = torch.zeros(2, 9).int().numpy()
        counter.count(Batch(ids().int().numpy(), groups, np.array([9, 9])))
    result = counter.result(["a"])
    assert result.tokens.tolist() == [18]
    for layer in range(2):
        sites = {site: seen[layer, site] for site in ("gate", "up", "down")}
        sites["act"] = nn.functional.silu(sites["gate"])
        sites["product"] = sites["act"] * sites["up"]
        for site, values in sites.items():
            expected = (values > 0).sum((0, 1))
            assert 0 < expected.sum() < 18 * len(expected)
            assert result.arrays[f"count.{site}"][0, layer].tolist() == expected.tolist(), site


@torch.no_grad()
def test_switched_off_neurons_are_those_of_hooks(load: Any) -> None:
    model = load()
    clean = model(ids()).logits

    def hook_of(layer: int, site: str) -> Any:
        off = [index for where, of, index in NEURONS if (where, of) == (layer, site)]

        def hook(module: Any, args: Any, out: Tensor) -> Tensor:
            new = out.clone()
            new[..., off] = 0
            return new

        return hook

    handles = hooked(model, hook_of)
    theirs = model(ids()).logits
    for handle in handles:
        handle.remove()
    mlps = find_mlps(model, attention=True)
    with Patch(mlps, mask_states([NEURONS], mlps), own_activation=True):
        assert torch.equal(model(ids()).logits, theirs)
    with relneuron.ablate(model, NEURONS):
        assert not torch.equal(model(ids()).logits, clean)
    assert torch.equal(model(ids()).logits, clean)
    check_canary(model, mlps, ids(), "auto")


@torch.no_grad()
def test_the_kernels_count_what_the_linear_maps_give(load: Any) -> None:
    model = load()
    seen: dict[tuple[int, str], Tensor] = {}
    handles = hooked(model, lambda *where: lambda m, i, out: seen.update({where: out.clone()}))
    with relneuron.instrument(model, 1, sites=("act", "up"), moments=True) as probe:
        probe.batch(torch.ones_like(ids()))
        model(ids(), use_cache=False)
    for handle in handles:
        handle.remove()
    for layer, stats in enumerate(probe.stats):
        gate, up = (seen[layer, site].reshape(-1, WIDTH) for site in ("gate", "up"))
        assert gate.dtype == up.dtype == compute_dtype(model)
        assert torch.equal(stats.count["act"][0], (nn.functional.silu(gate) > 0).sum(0))
        assert torch.equal(stats.max["up"][0], up.float().amax(0))


def parts_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a module holds, in whatever its attributes hold."""
    known: set[int] = set()

    def inside(path: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
        packed = isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__")
        where = value.data_ptr() if isinstance(value, Tensor) and not packed else id(value)
        if where in known or depth > 6 or isinstance(value, nn.Module):
            return
        known.add(where)
        if isinstance(value, Tensor) and not packed and value.numel():
            yield path, value
        held = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        if getattr(value, "packing_format_for_cpu", False):
            held = {**held, "offset": None}  # of scales that are no longer quantised
        for name, each in list(held.items()):
            yield from inside(f"{path}.{name}", each, depth + 1)

    for name, module in model.model.layers[0].named_modules():
        if hasattr(module, "in_features"):
            yield from inside(name, vars(module), 0)


@torch.no_grad()
def test_one_bit_of_any_part_of_a_weight_is_another_model(load: Any) -> None:
    model = load()
    before = {model_digest(model)}
    assert model_digest(load()) in before and len(before) == 1
    names = []
    for number, (name, part) in enumerate(parts_of(model), 2):
        names.append(name)
        part.detach().reshape(-1).view(torch.uint8)[0] ^= 1
        before.add(model_digest(model))
        assert len(before) == number, name
    assert len(names) >= 2 * 7, names  # packed numbers and scales of seven linear maps


@torch.no_grad()
def test_a_digest_changes_no_weight_and_does_not_depend_on_a_forward(load: Any) -> None:
    model = load()
    before = model_digest(model)
    clean = model(ids()).logits
    for _ in range(2):
        assert model_digest(model) == before
        assert torch.equal(model(ids()).logits, clean)
    other = load()
    assert torch.equal(other(ids()).logits, clean) and model_digest(other) == before


def test_what_a_model_says_of_its_weights(load: Any, method: str) -> None:
    model = load()
    mlps = find_mlps(model, attention=True)
    assert [(mlp.width, mlp.hidden) for mlp in mlps] == [(WIDTH, HIDDEN)] * 2
    assert features(mlps[0].module.down_proj) == (WIDTH, HIDDEN)
    described = describe_model("m", model, mlps, "auto")
    assert described.get("quantisation") == METHODS[method][2]
    with torch.no_grad():
        assert described["dtype"] == str(model(ids()).logits.dtype).removeprefix("torch.")
    json.dumps(described)


def test_attribution_says_which_weight_it_cannot_read(load: Any, method: str) -> None:
    model = load()
    with pytest.raises(RelneuronError, match=r"_proj.*quantised"):
        read_residual_model(model)


@torch.no_grad()
def test_offloaded_weights_are_those_in_memory(load: Any, method: str) -> None:
    if not method.startswith(("torchao", "bitsandbytes 8")):
        pytest.skip("accelerate cannot offload what this package packs")
    model, other = load(), accelerate.cpu_offload(load(), torch.device("cpu"))
    assert other.model.layers[0].mlp.down_proj.weight.device.type == "meta"
    assert model_digest(other) == model_digest(model)
    found = []
    for each in (model, other):
        with relneuron.ablate(each, NEURONS):
            found.append(each(ids()).logits)
    assert torch.equal(*found) and not torch.equal(found[0], model(ids()).logits)


# --- checkpoints and stages ------------------------------------------------------------------


@pytest.mark.parametrize("package", CHECKPOINTS)
def test_the_stages_say_what_hooks_say(
    package: str, model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    folder, made = tmp_path / "model", tmp_path / "study"
    CHECKPOINTS[package](model_folder, folder)
    for path in model_folder.glob("*token*"):
        shutil.copy(path, folder)
    made.mkdir()
    study = Study(folder, fact_folder, made)
    reference = Hooked(study)
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["model"]["quantisation"]["bits"] == 8
    assert manifest["model"]["dtype"] == "float32"
    validated = {row["id"]: row["prediction"] for row in read_rows(made / "validated.csv")}
    for (condition, number), row in study.ablate(tmp_path / "ablated").items():
        prompt = study.prompts[number]
        off = {"clean": []}.get(condition, study.sets.get(condition))
        if off is None:  # a random set
            continue
        with reference.changing(off):
            said, logprob = reference.answer(prompt)
        assert (row["prediction"], abs(float(row["logprob"]) - logprob) < 1e-4) == (said, True)
        if condition == "clean":
            assert validated[number] == said


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("compressed-tensors", {"quant_method": "compressed-tensors"}),
        ("torchao", {"quant_method": "torchao", "quant_type": "int8_weight_only"}),
        ("optimum", {"quant_method": "gptq", "bits": 4}),
        ("gptqmodel", {"quant_method": "awq", "bits": 4}),
    ],
)
def test_a_package_that_is_missing_is_named(
    package: str, said: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    if find_spec(package.replace("-", "_")) is not None:
        pytest.skip(f"{package} is installed")
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(RelneuronError, match="needs a package that is not here") as caught:
        load_model(str(folder), device="cpu")
    assert caught.value.fix.startswith(f"pip install {package}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_method_that_needs_a_gpu_says_so(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    said = {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    (folder / "config.json").write_text(json.dumps(config | said))
    with pytest.raises(RelneuronError, match="needs what is not here: .*GPU"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (None, None),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, {"method": "gptq", "bits": 4}),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, {"method": "fp8"}),
        (
            {"quant_method": "torchao", "quant_type": "Int8DynamicActivationInt4WeightConfig"},
            {"method": "torchao", "bits": 4},
        ),
        (
            {
                "quant_method": "x",
                "config_groups": {n: {"weights": {"num_bits": n}} for n in (4, 8)},
            },
            {"method": "x"},
        ),
    ],
)
def test_bits_are_said_where_one_number_says_them(said: Any, found: Any) -> None:
    assert quantisation(SimpleNamespace(quantization_config=said)) == found
