"""Models that accelerate spreads over devices or offloads: the same numbers, and all put back."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import relneuron
from relneuron.artifact.files import RelneuronError
from relneuron.methods.counts.batches import Batch
from relneuron.methods.counts.counter import Counter
from relneuron.model.identity import model_digest
from relneuron.model.layers import Projection, device_of, input_device, offloaded_weights
from relneuron.model.load import describe_model, load_model
from relneuron.model.mlps.find import find_mlps, inspect_layers
from relneuron.model.mlps.mlp import MLP
from relneuron.model.patch import Patch
from relneuron.model.states import Replacement, Tokens, mask_states
from relneuron.ops import GroupStats
from tests.conftest import tiny_model
from tests.kit.corpus_commands import call, write_texts
from tests.kit.forked import Forked

LAYERS = 3
SITES = ("gate", "up", "act", "product")
NEURONS = [
    (layer, site, 2 + layer)
    for layer in range(LAYERS)
    for site in ("gate", "up", "down", "q", "k", "v", "o")
]


def place(**layers: str) -> dict[str, str]:
    """A device map: what is not named is on the CPU."""
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    whole = dict.fromkeys([*names, *(f"model.layers.{i}" for i in range(LAYERS))], "cpu")
    return whole | {f"model.layers.{name[1:]}": where for name, where in layers.items()}


def dispatch(model: Any, folder: Path) -> Any:
    whole = place(l0="disk", l2="disk") | {"model.embed_tokens": "disk"}
    return accelerate.dispatch_model(model, whole, offload_dir=folder)


SPREAD: dict[str, Callable[[Any, Path], Any]] = {
    "on one device": lambda model, _: accelerate.dispatch_model(model, place(), force_hooks=True),
    "layers on the disk": dispatch,
    "all on the disk": lambda model, folder: accelerate.disk_offload(model, folder),
    "all on the host": lambda model, _: accelerate.cpu_offload(model, torch.device("cpu")),
    "all on the host, with buffers": lambda model, _: accelerate.cpu_offload(
        model, torch.device("cpu"), offload_buffers=True
    ),
}


@pytest.fixture(params=SPREAD)
def spread(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return SPREAD[request.param](tiny_model("llama"), tmp_path)


def ids() -> Tensor:
    return torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(5))


def entries(model: Any) -> dict[str, dict[str, object]]:
    """What a patch must leave as it was: the attributes of every module."""
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def same_entries(ours: Any, theirs: Any) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].keys() == theirs[name].keys()
        and all(ours[name][key] is theirs[name][key] for key in ours[name])
        for name in ours
    )


def counted(model: Any) -> list[Tensor]:
    """Every counter of `instrument`, and of the counting stage, of the same tokens."""
    mask = torch.ones_like(ids())
    mask[0, :3] = 0
    with torch.no_grad(), relneuron.instrument(model, 2, sites=SITES, moments=True) as probe:
        probe.batch(mask, torch.tensor([0, 1]))
        model(ids(), attention_mask=mask)
    found = [t for s in probe.stats for part in (s.count, s.sum, s.max) for t in part.values()]
    counter = Counter(model, find_mlps(model), sites=("act", "down"), moments=True)
    counter.grow(2)
    groups = torch.tensor([[0], [1]]).expand(2, 9).int().numpy().copy()
    with counter:
        counter.count(Batch(ids().int().numpy(), groups, np.array([9, 9])))
    result = counter.result(["a", "b"])
    return [*found, *map(torch.from_numpy, result.arrays.values())]


def ablated(model: Any) -> list[Tensor]:
    """Logits without neurons, with neurons scaled and set, and with rows that differ."""
    found = [model(ids()).logits]
    for mode, value in (("zero", None), ("scale", 0.5), ("mean", 2.0)):
        with relneuron.ablate(model, NEURONS, mode=mode, value=value):
            found.append(model(ids()).logits)
    mlps = find_mlps(model, attention=True)
    with Patch(mlps, mask_states([[], NEURONS], mlps)) as patch:
        patch.tokens = Tokens(conditions=torch.tensor([1, 0], dtype=torch.int32))
        found.append(model(ids()).logits)
    return found


@torch.no_grad()
def test_counters_and_logits_are_those_of_the_model_in_memory(spread: Any) -> None:
    plain = tiny_model("llama")
    before = entries(spread)
    for what in (counted, ablated):
        ours, theirs = what(spread), what(plain)
        assert len(ours) == len(theirs) > 4
        assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(ours[0], ours[1])
    # Of the row without a neuron off: the kernels' activation rounds apart from torch's.
    torch.testing.assert_close(ours[0][1], ours[-1][1])
    assert same_entries(before, entries(spread))
    accelerate.hooks.remove_hook_from_submodules(spread)
    assert torch.equal(spread(ids()).logits, plain(ids()).logits)


def test_the_digest_is_that_of_the_model_in_memory(spread: Any, tmp_path: Path) -> None:
    plain = tiny_model("llama")
    assert model_digest(spread) == model_digest(plain)
    kept = offloaded_weights(spread)
    assert all(read().equal(plain.state_dict()[name]) for name, read in kept.items())
    name = "model.layers.0.mlp.down_proj.weight"
    path = tmp_path / f"{name}.dat"
    if path.exists():
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        weight = kept[name]() if name in kept else spread.model.layers[0].mlp.down_proj.weight
        weight.detach().view(torch.uint8)[-1, -1] ^= 1
    assert model_digest(spread) != model_digest(plain)


def test_tied_weights_on_the_disk(tmp_path: Path) -> None:
    plain = tiny_model("llama", tie_word_embeddings=True)
    model = accelerate.disk_offload(tiny_model("llama", tie_word_embeddings=True), tmp_path)
    assert model_digest(model) == model_digest(plain)


def test_describing_a_model_on_the_disk(tmp_path: Path) -> None:
    plain = tiny_model("llama", torch.bfloat16)
    model = accelerate.disk_offload(tiny_model("llama", torch.bfloat16), tmp_path)
    ours, theirs = (describe_model("m", m, find_mlps(m), "auto") for m in (model, plain))
    assert ours == theirs and ours["dtype"] == "bfloat16" and ours["device"] == "cpu"


def test_what_no_hook_brings_into_memory_is_refused(tmp_path: Path) -> None:
    model = accelerate.disk_offload(tiny_model("llama"), tmp_path)
    mlp = model.model.layers[1].mlp
    accelerate.hooks.remove_hook_from_module(mlp.up_proj)
    mlp.up_proj.to("meta")
    assert "not in memory" in inspect_layers(model)[1].reason
    with pytest.raises(RelneuronError, match=r"layers\.1\.mlp\.up_proj.* not in memory"):
        model_digest(model)


# --- devices that are not there --------------------------------------------------------------


class Placed(AlignDevicesHook):
    """Moves inputs as accelerate does; the weights of these tests are placed already."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


def moved(model: Any, mlp: MLP) -> MLP:
    """An MLP of another model as the same one of this one."""

    def here(part: Projection) -> Projection:
        return replace(part, module=model.get_submodule(part.path))

    module = model.get_submodule(mlp.path)
    return replace(
        mlp,
        module=module,
        gate=here(mlp.gate),
        up=here(mlp.up),
        down_map=here(mlp.down_map),
        act=module.act_fn,
        projections=tuple(map(here, mlp.projections)),
    )


def run_on_two_devices() -> None:
    """A forward with everything that a patch can do, where torch only looks at shapes and devices.

    A fork runs it: the name of a device that Python makes is the whole process's.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("npy")
    found = find_mlps(tiny_model("llama"), attention=True)
    where = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    where |= {f"model.layers.{i}": int(i == 2) for i in range(LAYERS)}
    with FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True)), torch.no_grad():
        model = tiny_model("llama")
        for path, number in where.items():
            for part in model.get_submodule(path).modules():
                for name, weight in [*part.named_parameters("", False)]:
                    setattr(part, name, nn.Parameter(weight.to(f"npy:{number}")))
                for name, buffer in [*part.named_buffers("", False)]:
                    setattr(part, name, buffer.to(f"npy:{number}"))
                add_hook_to_module(part, Placed(number))
        first, last = torch.device("npy:0"), torch.device("npy:1")
        add_hook_to_module(model, Placed(first, io_same_device=True))
        mlps = [moved(model, mlp) for mlp in found]
        assert [device_of(mlp.module) for mlp in mlps] == [first, first, last]
        assert input_device(model) == first
        states = mask_states([[], NEURONS], mlps)
        for mlp, state in zip(mlps, states, strict=True):
            device = device_of(mlp.module)
            made: dict[str, Any] = {"groups": 2, "moments": True, "device": device}
            state.stats = GroupStats(width=mlp.width, sites=SITES, **made)
            state.stats_down = GroupStats(width=mlp.hidden, sites=("down",), **made)
            widths = {"gate": mlp.width, "up": mlp.width, "down": mlp.hidden, "q": mlp.hidden}
            state.responses = {s: torch.zeros(2, n, device=device) for s, n in widths.items()}
            chosen = torch.zeros(2, mlp.width, dtype=torch.bool, device=device)
            state.replace = {**(state.replace or {}), "act": Replacement(chosen, 0.5)}
        tokens = torch.zeros(2, 9, dtype=torch.int32, device=first)
        with Patch(mlps, states) as patch:
            patch.tokens = Tokens(tokens, tokens, tokens, counted=set())
            out = model(tokens.long(), use_cache=False)
            assert patch.tokens.counted == {(0, 0), (1, 0), (2, 0)}
            for state in patch.states:
                state.stats = state.stats_down = state.responses = None
            patch.tokens = Tokens(conditions=tokens[:, 0], n_needed=1)
            again = model(tokens.long(), use_cache=False)
        assert out.logits.device == again.logits.device == first
        assert out.logits.shape == (2, 9, 96)
    print("done")


@pytest.mark.slow  # torch's shapes without numbers take seconds to import
def test_what_a_patch_needs_lies_where_each_layer_computes() -> None:
    assert Forked(run_on_two_devices).said() == ("done\n", "")


# --- the command line ------------------------------------------------------------------------

WORDS = [
    "record {model} {d}/prompts.jsonl -o {d} --attention --quiet",
    "identify {d} -o {d}/neurons.json --top 40 --permutations 0 --bootstrap 0 --noise 0 --quiet",
    "ablate {model} {d}/neurons.json {d}/prompts.jsonl -o {d}/effects.csv --random-seeds 1 --quiet",
    "count {model} en={texts}/en.txt zh={texts}/zh.jsonl -o {d}/c --window 24 --workers 1 --quiet",
    "nll {model} {d}/neurons.json en={texts}/en.txt -o {d}/n --window 24 --workers 1 --quiet",
    "doctor {model}",
]
MADE = [
    "validated.csv",
    "responses.safetensors",
    "effects.csv",
    "c/counts.safetensors",
    "n/nll.csv",
]


def test_the_stages_of_a_model_on_the_disk(
    model_folder: Path, fact_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    write_texts(texts)
    spread = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    spread |= {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
    path = tmp_path / "map.json"
    path.write_text(json.dumps(spread))
    for name, options in (("plain", []), ("spread", ["--device-map", str(path)])):
        folder = tmp_path / name
        assert call("prompts", fact_folder, "-o", folder / "prompts.jsonl", "--eva", 4) == 0
        for line in WORDS:
            words = line.format(model=model_folder, d=folder, texts=texts).split()
            takes_device = words[0] not in ("identify", "doctor")
            assert call(*words, *(options if takes_device else [])) == 0, capsys.readouterr()
    for name in MADE:
        plain, ours = ((tmp_path / where / name).read_bytes() for where in ("plain", "spread"))
        assert plain == ours, name
    manifest = json.loads((tmp_path / "spread" / "manifest.json").read_text())
    assert manifest["model"]["device_map"] == str(path) and manifest["model"]["device"] == "cpu"
    (words,) = manifest["stages"]["record"]["commands"]
    assert words[words.index("--device-map") + 1] == str(path) and "--device" not in words


def test_a_map_that_cannot_be(model_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "map.json"

    def refused(cause: str, fix: str, **options: Any) -> None:
        with pytest.raises(RelneuronError, match=cause) as caught:
            load_model(str(model_folder), **{"device_map": str(path), **options})
        assert fix in caught.value.fix

    refused("is no file", "auto, balanced, sequential or a JSON file")
    path.write_text("[]")
    refused("no JSON object", "model.layers.0")
    path.write_text('{"": 7}')
    refused("no device 'cuda:7' here", "write disk or cpu")
    path.write_text('{"lm_head": "disk"}')
    refused("could not be loaded", "")
    refused("both say", "leave out one", device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("torchrun", "leave out --device-map", device_map="auto")


def test_a_folder_for_weights_ends_with_its_model(model_folder: Path, monkeypatch: Any) -> None:
    made: list[str] = []
    true = tempfile.TemporaryDirectory

    def noted(**options: Any) -> Any:
        made.append((folder := true(**options)).name)
        return folder

    monkeypatch.setattr("relneuron.model.load.TemporaryDirectory", noted)
    model = load_model(str(model_folder), device_map="auto")
    (folder,) = map(Path, made)
    assert folder.is_dir() and describe_model("m", model, find_mlps(model), "auto")
    del model
    gc.collect()
    assert not folder.exists()
