"""Whole studies of models that are not like Llama: experts, no gate, layers without an MLP.

Each goes through the command line, and what it wrote is held to hooks.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from relneuron.artifact.neurons import NeuronFile, Shape
from relneuron.model.load import load_model
from tests.conftest import train_model
from tests.kit.corpus_commands import call, write_texts

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": (
        "Qwen2MoeConfig",
        {
            "num_hidden_layers": 3,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [0],
        },
    ),
    "ungated": ("GPTNeoXConfig", {}),
    "hybrid": (
        "NemotronHConfig",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "mlp", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
}
TOTALS = {
    "experts": 2 * (48 + 2 * 88) + 3 * 32,
    "ungated": 2 * (48 + 32),
    "hybrid": 2 * (48 + 32),
}


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path, fact_folder: Path) -> Path:
    config, changes = MODELS[request.param]
    path = tmp_path / request.param
    path.mkdir()
    return train_model(path, fact_folder, config, **changes)


@pytest.mark.filterwarnings("ignore:few answers are right")
def test_a_study_of_relations(folder: Path, fact_folder: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    options = ["--eva", 4, "--top", 20, "--permutations", 0, "--bootstrap", 0, "--noise", 0]
    options += ["--random-seeds", 3, "--analyses", "all", "--quiet"]
    assert call("run", folder, "--facts", fact_folder, "-o", study, *options) == 0
    neurons = NeuronFile.read(study / "neurons.json")
    order = Shape.of(neurons.model)
    assert order.total == TOTALS[folder.name]
    for name, array in load_file(study / "scores.safetensors").items():
        site = name.removeprefix("ap.")
        for layer in range(order.layers):
            width = order.width(layer, site)
            assert np.isfinite(array[:, layer, :width]).all(), name
            assert np.isnan(array[:, layer, width:]).all(), name
    everything = set(order.neurons(np.arange(order.total)))
    chosen = {row[:3] for rows in neurons.sets.values() for row in rows}
    assert chosen <= everything
    manifest = json.loads((study / "manifest.json").read_text())
    widths = {site: order.widths[site] for site in manifest["sites"]}
    assert ("up" in widths) == (folder.name == "experts")
    with (study / "accuracy.csv").open(newline="") as file:
        conditions = {row["condition"] for row in csv.DictReader(file)}
    assert {"clean", "random.0", "random.2", *neurons.sets} <= conditions
    page = (study / "report.html").read_text()
    assert (" expert " in page) == (folder.name == "experts")


def counted(model: Any, ids: torch.Tensor, layer: int) -> np.ndarray[Any, Any]:
    """By hooks: how many tokens each neuron of an MLP without a gate was active at."""
    module = model.get_submodule(
        f"gpt_neox.layers.{layer}.mlp.act"
        if hasattr(model, "gpt_neox")
        else f"model.layers.{layer}.mixer.act_fn"
    )
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return (seen[0].flatten(0, 1) > 0).sum(0).numpy()


@pytest.mark.filterwarnings("ignore:.*its set has no neuron")
def test_a_study_of_a_corpus(folder: Path, tmp_path: Path) -> None:
    texts, made = tmp_path / "texts", tmp_path / "counts"
    texts.mkdir()
    write_texts(texts)
    sources = [f"en={texts}/en.txt", f"zh={texts}/zh.jsonl"]
    words = ["--window", 24, "--workers", 1, "--quiet"]
    assert call("count", folder, *sources, "-o", made, *words) == 0
    counts = load_file(made / "counts.safetensors")
    tokens, count = counts["tokens"], counts["count.act"]
    model = json.loads((made / "manifest.json").read_text())["model"]
    order = Shape.of(model)
    for layer in range(order.layers):
        assert not count[:, layer, order.width(layer, "gate") :].any()
        assert (count[:, layer].max(1) <= tokens).all()
    if folder.name == "experts":
        routed = counts["tokens.expert"]
        assert not routed[:, 0].any() and (routed[:, 1:].sum(2) == 2 * tokens[:, None]).all()
        assert np.isfinite(counts["weight.expert"]).all()
    for name in (f"{made}/neurons.json", f"{made}/other.json"):
        assert call("identify", made, "-o", name, "--method", "lape", "--top", 12) == 0
    entropy = load_file(made / "scores.safetensors")["lape.act"]
    assert np.isfinite(entropy).sum() == len(order.site_places("gate"))
    assert call("nll", folder, made / "neurons.json", *sources, "-o", made, *words) == 0
    assert call("report", made, "-o", made / "report.html") == 0


@pytest.mark.parametrize("name", ["ungated", "hybrid"])
def test_counts_are_those_of_hooks(name: str, tmp_path: Path, fact_folder: Path) -> None:
    import relneuron

    config, changes = MODELS[name]
    model = load_model(str(train_model(tmp_path, fact_folder, config, **changes)))
    ids = torch.randint(2, 100, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), relneuron.instrument(model, 1) as probe:
        probe.batch(torch.ones_like(ids))
        model(ids)
    for layer, stats in enumerate(probe.stats):
        if stats is None:
            assert name == "hybrid" and layer < 2
            continue
        assert stats.count["act"][0].tolist() == counted(model, ids, layer).tolist()
