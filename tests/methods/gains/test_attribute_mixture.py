"""The stage `attribute` on a model with experts, and what `identify` and `ablate` make of it."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import relneuron
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile, Shape
from relneuron.methods.gains.rank import identify_gains
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from tests.kit.attributed import VOCABULARY
from tests.kit.attribution_runs import Attributed, files_of, rows_by
from tests.kit.experts import WIDTH, expert_model
from tests.kit.files import read_rows

N_EXPERTS, DENSE = 8, 2 * WIDTH


def uneven_model() -> Any:
    """A DeepSeek whose first layer has no experts, the second 8 and a shared one."""
    import transformers

    config = copy.deepcopy(expert_model("deepseek").config)
    config.first_k_dense_replace, config.n_shared_experts = 1, 1
    config.mlp_layer_types = ["dense", "sparse"]
    config.vocab_size, config.intermediate_size = VOCABULARY, DENSE
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Attributed:
    made = Attributed("deepseek", tmp_path_factory.mktemp("experts"), model=uneven_model())
    made.attribute(made.folder / "out")
    return made


def gain_by_hand(run: Attributed, ids: list[int], target: int) -> dict[int, float]:
    """log p(target) with what each routed neuron of layer 1 adds at the end, minus that without."""
    seen: dict[str, Any] = {}
    layer, experts = run.model.model.layers[1], run.model.model.layers[1].mlp.experts
    handles = [
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: seen.update(r=args[0][0, -1].double())
        ),
        experts.register_forward_pre_hook(lambda _, args: seen.update(given=args)),
        run.model.model.norm.register_forward_pre_hook(
            lambda _, args: seen.update(end=args[0][0, -1].double())
        ),
    ]
    with torch.no_grad():
        run.model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    eps, gain = run.model.config.rms_norm_eps, run.model.model.norm.weight.double()
    scale = 1 / (seen["end"].square().mean() + eps).sqrt()
    head = run.model.lm_head.weight.double() * gain

    def log_p(y: torch.Tensor) -> float:
        return float((scale * (head @ y)).log_softmax(0)[target])

    x, index, weights = (part.reshape(-1, part.shape[-1])[-1] for part in seen["given"])
    found = {}
    for e, weight in zip(index.tolist(), weights.double().tolist(), strict=True):
        gate, up = (experts.gate_up_proj[e].double() @ x.double()).split(WIDTH)
        h = torch.nn.functional.silu(gate) * up * weight
        vectors = experts.down_proj[e].double() * h
        for i in range(WIDTH):
            found[e * WIDTH + i] = log_p(seen["r"] + vectors[:, i]) - log_p(seen["r"])
    return found


@torch.no_grad()
def test_the_files_hold_the_gains_of_each_expert_s_neurons(run: Attributed) -> None:
    folder = run.folder / "out"
    gains = load_file(folder / "gains.safetensors")
    width = (N_EXPERTS + 1) * WIDTH
    assert gains["ffn.0"].shape == (12, DENSE) and gains["ffn.1"].shape == (12, width)
    best: dict[int, list[int]] = {}
    for row, (line, target) in enumerate(zip(run.ids, run.targets, strict=True)):
        want = gain_by_hand(run, line, target)
        ours = gains["ffn.1"][row]
        for index, gain in want.items():
            assert ours[index] == pytest.approx(gain, abs=3e-5)
        idle = set(range(N_EXPERTS * WIDTH)) - want.keys()
        assert len(want) == 2 * WIDTH and not ours[sorted(idle)].any()
        best[row] = sorted(want, key=lambda k: -want[k])
    rows = rows_by(folder / "attributions.csv", "id", "kind")
    for row, name in enumerate(run.names):
        tops = [int(r["index"]) for r in rows[name, "ffn_neuron"] if r["layer"] == "1"]
        routed = [k for k in tops if k < N_EXPERTS * WIDTH]
        assert len(routed) > 3 and routed[0] == best[row][0] and set(routed) <= set(best[row])


def test_the_manifest_names_the_model_as_other_stages_do(run: Attributed) -> None:
    described = Manifest(run.folder / "out").data["model"]
    shape = model_shape(find_mlps(run.model))
    assert {key: described[key] for key in shape} == shape
    assert shape["widths"] == [DENSE, (N_EXPERTS + 1) * WIDTH]
    assert (shape["experts"], shape["expert_width"]) == ([0, N_EXPERTS], WIDTH)


def test_the_best_of_each_relation_are_neurons_of_the_model(run: Attributed) -> None:
    folder = run.folder / "out"
    chosen = identify_gains(folder, run.folder / "chosen.json", top=150, quiet=True)
    chosen.check_model(model_shape(find_mlps(run.model)))
    order = Shape.of(chosen.model)
    gains = load_file(folder / "gains.safetensors")
    every = [gains[f"ffn.{layer}"] for layer in range(2)]
    for kind, neurons in chosen.sets.items():
        rows = [i for i, other in enumerate(run.types) if other == kind]
        mean = np.concatenate([part[rows].mean(0, dtype=np.float64) for part in every])
        assert [score for *_, score in neurons] == pytest.approx(
            np.sort(mean)[::-1][:150].tolist(), abs=1e-6
        )
        for layer, site, index, _ in neurons:
            assert site == "gate" and index < order.width(layer, site)
        assert any(layer == 1 and index >= DENSE for layer, _, index, _ in neurons)
    assert len(identify_gains(folder, run.folder / "all.json", top=10**6, quiet=True).sets) == 3
    everything = NeuronFile.read(run.folder / "all.json").sets["capital"]
    assert len(everything) == DENSE + (N_EXPERTS + 1) * WIDTH
    with relneuron.ablate(run.model, [neuron[:3] for neuron in everything]), torch.no_grad():
        run.model(torch.tensor([run.ids[0]]))


@torch.no_grad()
def test_interventions_are_those_of_models_without_the_value_vectors(run: Attributed) -> None:
    folder, kept = run.folder / "out", [i for i, known in enumerate(run.known()) if known]
    rows = rows_by(folder / "attributions.csv", "id", "kind")
    asked = rows_by(folder / "interventions.csv", "condition", "id")
    n_off = Manifest(folder).data["stages"]["attribute"]["zeroed"]["method"]
    for sentence in kept[:4]:
        name, edited = run.names[sentence], copy.deepcopy(run.model)
        dense, mixed = (layer.mlp for layer in edited.model.layers)
        for row in rows[name, "ffn_neuron"][:n_off]:
            expert, place = divmod(int(row["index"]), WIDTH)
            if row["layer"] == "0":
                dense.down_proj.weight[:, int(row["index"])] = 0
            elif expert == N_EXPERTS:
                mixed.shared_experts.down_proj.weight[:, place] = 0
            else:
                mixed.experts.down_proj[expert, :, place] = 0
        want = run.logits(run.ids[sentence], edited).log_softmax(0)[run.targets[sentence]]
        (found,) = asked["log_prob_gain", name]
        assert float(found["logprob"]) == pytest.approx(float(want), abs=1e-4)
        assert float(found["logprob"]) < float(asked["clean", name][0]["logprob"]) - 0.01
    drops = {r["condition"]: r for r in read_rows(folder / "comparison.csv") if not r["relation"]}
    lost = {name: float(row["logprob_drop"]) for name, row in drops.items()}
    assert lost["log_prob_gain"] > lost["random.0"] and lost["value"] > lost["random_value.0"]


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    run: Attributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relneuron.methods.gains import scorer

    left, own = [2], scorer.Scorer.score

    def some(self: Any, rows: list[int], keep: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return own(self, rows, keep)

    monkeypatch.setattr(scorer.Scorer, "score", some)
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run.attribute(folder)
    monkeypatch.setattr(scorer.Scorer, "score", own)
    run.attribute(folder)
    assert files_of(folder) == files_of(run.folder / "out")
    shutil.rmtree(folder)
