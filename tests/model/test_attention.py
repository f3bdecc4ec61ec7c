"""Outputs of the attention's projections as neurons: recorded, ranked and ablated like an MLP's.

Every number against plain hooks on the projections, of the trained model and of many families.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

import relneuron
from relneuron.ablation.conditions import matched_places
from relneuron.ablation.expertise import export_expertise
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import NeuronFile, Shape, random_neurons
from relneuron.model.layers import find_projections
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.states import mask_states
from tests.conftest import tiny_model
from tests.kit.files import read_rows
from tests.kit.hooked import RELATIONS, SHAPE, TOP, Hooked, Study, zero

SITES = ("gate", "up", "down", "q", "k", "v", "o")
WHOLE = SHAPE | {"q": 32, "k": 16, "v": 16, "o": 32}


@pytest.fixture(scope="module")
def study(
    model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Study]:
    folder = tmp_path_factory.mktemp("attention")
    yield Study(model_folder, fact_folder, folder, attention=True)


# --- structure -------------------------------------------------------------------------------


def outputs_of(model: Any, layer: int) -> dict[str, tuple[nn.Module, slice]]:
    """Each projection's module and its outputs there, by the family's own code."""
    attention = model.model.layers[layer].self_attn
    if hasattr(attention, "qkv_proj"):  # Phi-3: 4 heads of 8, 2 of keys and values
        parts = {"q": slice(0, 32), "k": slice(32, 48), "v": slice(48, 64)}
        found = {site: (attention.qkv_proj, where) for site, where in parts.items()}
    else:
        found = {s: (getattr(attention, f"{s}_proj"), slice(None)) for s in ("q", "k", "v")}
    return found | {"o": (attention.o_proj, slice(None))}


def hook(change: Callable[[Tensor], None], where: slice) -> Any:
    def act(_m: Any, _i: Any, out: Tensor) -> Tensor:
        new = out.clone()
        change(new[..., where])
        return new

    return act


def test_neurons_off_are_off_in_every_family(family_model: Any) -> None:
    model = family_model
    mlps = find_mlps(model, attention=True)
    shape = model_shape(mlps)
    assert {s: shape[s] for s in "qkvo"} == {"q": 32, "k": 16, "v": 16, "o": 32}
    assert model_shape(find_mlps(model)).keys() == {"layers", "width", "hidden"}
    tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    chosen = [(layer, s, i) for layer in (0, 2) for s in "qkvo" for i in range(0, shape[s], 3)]
    plain = model(tokens).logits
    # The MLPs' kernels round in their own way.
    with torch.no_grad(), relneuron.ablate(model, [(0, "q", 0)], mode="scale", value=1.0):
        clean = model(tokens).logits
    for sites in ("q", "k", "v", "o", "qkvo"):
        neurons = [n for n in chosen if n[1] in sites]
        handles = []
        for layer in (0, 2):
            for site, (module, where) in outputs_of(model, layer).items():
                if site in sites:

                    def silence(part: Tensor) -> None:
                        part[..., ::3] = 0

                    handles.append(module.register_forward_hook(hook(silence, where)))
        with torch.no_grad(), relneuron.ablate(model, [(0, "q", 0)], mode="scale", value=1.0):
            wanted = model(tokens).logits
        for handle in handles:
            handle.remove()
        with torch.no_grad(), relneuron.ablate(model, neurons):
            ours = model(tokens).logits
        assert torch.equal(ours, wanted) and not torch.equal(ours, clean), sites
    assert torch.equal(model(tokens).logits, plain)
    patched = [m for m in model.modules() if "forward" in m.__dict__]
    assert not patched  # it came off exactly


def test_patches_nest_and_take_values(llama: Any) -> None:
    tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    one, two = [(1, "v", 3), (1, "gate", 5)], [(1, "v", 4), (0, "o", 7)]
    with torch.no_grad():
        with relneuron.ablate(llama, [*one, *two]):
            wanted = llama(tokens).logits
        with relneuron.ablate(llama, one), relneuron.ablate(llama, two):
            assert torch.equal(llama(tokens).logits, wanted)
        with relneuron.ablate(llama, two, mode="mean", value=[0.5, -2.0]):
            ours = llama(tokens).logits

    def set_to(index: int, value: float) -> Any:
        def change(part: Tensor) -> None:
            part[..., index] = value

        return hook(change, slice(None))

    layers = llama.model.layers
    handles = [layers[1].self_attn.v_proj.register_forward_hook(set_to(4, 0.5))]
    handles += [layers[0].self_attn.o_proj.register_forward_hook(set_to(7, -2.0))]
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, ours, rtol=0, atol=1e-6)
    for handle in handles:
        handle.remove()


def test_what_is_no_attention_is_named() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[1]
    del layer.self_attn.k_proj
    with pytest.raises(RelneuronError, match=r"model.layers.1 has 0 attentions") as caught:
        find_projections("model.layers.1", layer)
    assert "without --attention" in caught.value.fix
    packed = tiny_model("phi3").model.layers[0]
    packed.self_attn.qkv_proj = nn.Linear(32, 65)
    with pytest.raises(RelneuronError, match="65 outputs, which are no q of 32, k and v"):
        find_projections("model.layers.0", packed)
    with pytest.raises(RelneuronError, match="neuron .layer 0, site 'q', index 32. is not in"):
        mask_states([[(0, "q", 32)]], find_mlps(tiny_model("llama"), attention=True))


def test_places_of_all_sites() -> None:
    assert list(Shape.of(WHOLE).widths) == list(SITES) and Shape.of(WHOLE).total == 2 * (128 + 96)
    everything = np.arange(Shape.of(WHOLE).total)
    names = Shape.of(WHOLE).neurons(everything)
    assert Shape.of(WHOLE).places(names).tolist() == everything.tolist()
    assert sorted(p for s in SITES for p in Shape.of(WHOLE).site_places(s)) == everything.tolist()
    some = Shape.of(WHOLE).places([(0, "k", 3), (0, "k", 4), (1, "o", 0), (1, "gate", 1)])
    drawn = Shape.of(WHOLE).neurons(matched_places(some, WHOLE, 0, "x"))
    assert sorted(n[:2] for n in drawn) == sorted(n[:2] for n in Shape.of(WHOLE).neurons(some))


# --- stages ----------------------------------------------------------------------------------


def test_responses_and_scores_are_those_of_plain_hooks(study: Study, tmp_path: Path) -> None:
    recorded = load_file(study.folder / "responses.safetensors")
    assert set(recorded) == {f"{site}.{layer}" for site in SITES for layer in range(2)}
    hooked = Hooked(study)
    det = [p for p in study.prompts.values() if p.split == "det"]
    seen: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(
            lambda _m, _i, out, key=f"{site}.{layer}": seen.update({key: out[0].mean(0)})
        )
        for (layer, site), module in hooked.modules.items()
    ]
    for row, prompt in enumerate(det):
        with torch.no_grad():
            study.model(torch.tensor([study.tokenizer(prompt.prompt)["input_ids"]]))
        for key, values in seen.items():
            np.testing.assert_allclose(recorded[key][row], values.numpy(), rtol=0, atol=2e-6)
    for handle in handles:
        handle.remove()
    order = [p.id for p in det]
    scores = load_file(study.folder / "scores.safetensors")
    labels = [r for r in read_rows(study.folder / "labels.csv") if r["relation"] == "lives_in"]
    rows, y = [order.index(r["id"]) for r in labels], [int(r["label"]) for r in labels]
    for site in "qkvo":
        values = recorded[f"{site}.1"][rows]
        ap = [average_precision_score(y, column) for column in values.T]
        np.testing.assert_allclose(scores[f"ap.{site}"][1, 1], np.float32(ap), rtol=2e-7)
    manifest = json.loads((study.folder / "manifest.json").read_text())
    assert manifest["sites"] == list(SITES)
    assert manifest["modules"]["k"] == ["model.layers.{}.self_attn.k_proj", 0]
    sets = NeuronFile.read(study.folder / "neurons.json")
    assert {n[1] for chosen in sets.sets.values() for n in chosen} & {*"qkvo"}
    assert {s: sets.model[s] for s in "qkvo"} == {s: WHOLE[s] for s in "qkvo"}
    table, info = export_expertise(study.folder, tmp_path / "expertise.csv")
    names = json.loads(info.read_text())[0]["layer_names"]
    assert len(read_rows(table)) == 3 * 448 and names == sorted(names) and len(names) == 14
    assert "model.layers.1.self_attn.o_proj:0" in names


@pytest.mark.parametrize("mode", ["zero", "mean", "p50"])
def test_ablated_sets_are_those_of_plain_hooks(study: Study, tmp_path: Path, mode: str) -> None:
    # Half of each set is of the attention, so that it matters.
    half = {
        name: [n[:3] for n in chosen][: TOP // 2]
        + [(1, s, i) for s in "qkvo" for i in range(place, 16, 4)]
        for place, (name, chosen) in enumerate(study.sets.items())
    }
    path = study.write_sets(tmp_path / "n" / "neurons.json", half)
    for name in ("responses.safetensors", "labels.csv", "prompts.jsonl"):
        (path.parent / name).write_bytes((study.folder / name).read_bytes())
    rows = study.ablate(tmp_path / "o", neurons=path, mode=mode, batch_tokens=300)
    recorded = load_file(study.folder / "responses.safetensors")
    det = [p for p in study.prompts.values() if p.split == "det"]
    of = {r["id"] for r in read_rows(study.folder / "labels.csv")}
    used = [i for i, p in enumerate(det) if p.id in of]
    size = max(map(len, half.values()))
    sets = {**half, "random.0": random_neurons(WHOLE, size, 0)}
    hooked, differ = Hooked(study), 0
    for condition, neurons in sets.items():
        labels = read_rows(study.folder / "labels.csv")
        on = {r["id"] for r in labels if r["relation"] == condition and r["label"] == "1"}
        own = [i for i, p in enumerate(det) if p.id in on] if condition in RELATIONS else used

        def change(
            out: Tensor, where: tuple[int, str], index: Tensor, own: list[int] = own
        ) -> Tensor:
            values = recorded[f"{where[1]}.{where[0]}"].astype(np.float64)
            new = values.mean(0) if mode == "mean" else np.median(values[own], axis=0)
            return torch.from_numpy(new.astype(np.float32))[index]

        with hooked.changing(neurons, zero if mode == "zero" else change):
            for (name, key), row in rows.items():
                if name == condition:
                    text, logprob = hooked.answer(study.prompts[key], cached=True)
                    assert row["prediction"] == text, (condition, key)
                    assert abs(float(row["logprob"]) - logprob) <= 2e-5, (condition, key)
                    differ += row["logprob"] != rows["clean", key]["logprob"]
    assert differ > len(rows) / 2


def test_sets_of_one_site_are_an_analysis(study: Study, tmp_path: Path) -> None:
    rows = study.ablate(tmp_path, analyses=("sites", "matched"), random_seeds=1)
    asked = {condition for condition, _ in rows}
    assert {f"{name}@{site}" for name in RELATIONS for site in SITES} <= asked
