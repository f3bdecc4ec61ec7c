"""A model whose relation neurons are known, since they were wired in: does the study find them.

Everything else in the model is random and cannot tell one relation from another. So identification
must return just the wired neurons, and switching them off must break just their relation.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from relneuron.artifact import NeuronFile
from relneuron.study import Options, run_study

RELATIONS = ("alpha", "beta", "gamma", "delta")
N_SUBJECTS, LAYERS, WIDTH, HIDDEN = 40, 3, 64, 48
PER_RELATION = 4  # wired neurons of the gated product
# The last layer: what an earlier one writes changes the norm of the residual stream, by which every
# later neuron can tell its relation.
LAYER = LAYERS - 1
SETTINGS = {"eva": 12, "suffix": "", "random_seeds": 3, "splits": ("eva",)}


def wired(relation: int) -> set[tuple[int, str, int]]:
    """The neurons that carry a relation: inputs and output of what reads its word."""
    inner = range(relation * PER_RELATION, (relation + 1) * PER_RELATION)
    both = {(LAYER, site, index) for index in inner for site in ("gate", "up")}
    return both | {(LAYER, "down", answer_dim(relation))}


def word_dim(relation: int) -> int:
    """The residual coordinate that is large at the relation's word, and nowhere else."""
    return relation


def answer_dim(relation: int) -> int:
    """The residual coordinate that the wired neurons write and the answer's logit reads."""
    return len(RELATIONS) + relation


END_DIM = 2 * len(RELATIONS)  # large at the answers, read by the logit of </s>
N_WIRED_DIMS = END_DIM + 1


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *(f"s{i}" for i in range(N_SUBJECTS))]
    words += [word for name in RELATIONS for word in (f"{name}-is", f"{name}-answer")]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def make_model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=32,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=None,
            tie_word_embeddings=False,
        )
    )
    # No random weight reads or writes a wired coordinate.
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
            reader.weight[:, :N_WIRED_DIMS] = 0
        for reader in (mlp.gate_proj, mlp.up_proj):
            reader.weight[:, :N_WIRED_DIMS] = 0
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight[:N_WIRED_DIMS] = 0
    model.lm_head.weight[:, :N_WIRED_DIMS] = 0
    words = model.model.embed_tokens.weight
    words[:, :N_WIRED_DIMS] = 0
    ids = tokenizer.get_vocab()
    model.lm_head.weight[ids["</s>"], END_DIM] = 20
    for relation, name in enumerate(RELATIONS):
        word, answer = ids[f"{name}-is"], ids[f"{name}-answer"]
        # Outside of its own coordinate a relation's word is like any other's.
        words[word] = 0
        words[word, word_dim(relation)] = 4
        words[answer, END_DIM] = 20
        model.lm_head.weight[answer, answer_dim(relation)] = 20
        mlp = model.model.layers[LAYER].mlp
        for _, site, index in wired(relation):
            if site == "down":
                continue
            projection = mlp.gate_proj if site == "gate" else mlp.up_proj
            projection.weight[index] = 0
            projection.weight[index, word_dim(relation)] = 1
            mlp.down_proj.weight[:, index] = 0
            mlp.down_proj.weight[answer_dim(relation), index] = 1
    return model


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model folder, facts folder): all relations have the same subjects."""
    folder = tmp_path_factory.mktemp("planted")
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "facts").mkdir()
    for name in RELATIONS:
        facts = {
            "name": name,
            "prompt_templates": [f"{{}} {name}-is"],
            "prompt_templates_zs": [f"{{}} {name}-is"],
            "samples": [
                {"subject": f"s{i}", "object": f"{name}-answer"} for i in range(N_SUBJECTS)
            ],
        }
        (folder / "facts" / f"{name}.json").write_text(json.dumps(facts))
    return folder / "model", folder / "facts"


def run(planted: tuple[Path, Path], output: Path, **options: Any) -> dict[str, set[Any]]:
    model, facts = planted
    run_study(str(model), facts, output, Options(**SETTINGS, **options), quiet=True)
    sets = NeuronFile.read(output / "neurons.json").sets
    return {name: {tuple(neuron[:3]) for neuron in chosen} for name, chosen in sets.items()}


def test_the_best_neurons_are_the_wired_ones_and_carry_only_their_relation(
    planted: tuple[Path, Path], tmp_path: Path
) -> None:
    found = run(planted, tmp_path / "s", top=2 * PER_RELATION + 1)
    for relation, name in enumerate(RELATIONS):
        assert found[name] == wired(relation)
    with (tmp_path / "s" / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["condition"] for row in rows} == {
        *("clean", *RELATIONS, "random.0", "random.1", "random.2")
    }
    for row in rows:
        if row["condition"].startswith("random"):
            continue  # may hit a wired neuron
        is_broken = row["condition"] == row["relation"]
        assert float(row["accuracy"]) == (0.0 if is_broken else 1.0), row


def test_the_false_discovery_rate_finds_the_wired_ones_without_a_number(
    planted: tuple[Path, Path], tmp_path: Path
) -> None:
    found = run(planted, tmp_path / "s", fdr=0.01)
    for relation, name in enumerate(RELATIONS):
        assert wired(relation) <= found[name]
        assert len(found[name] - wired(relation)) <= 1
