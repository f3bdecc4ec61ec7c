"""A small random Llama in which the relation neurons are known, since they were planted.

`bench.truth` asks how well they are found again, tests/test_truth.py whether the study finds them.

Two models have the same seed: one is random throughout, in the other the neurons are wired. With
the planting strength s every weight is

    W(s) = (1 - s) * W(random) + s * W(wired)

so that at s = 0 a planted neuron is one of many random ones. Only what is wired differs: the words
of the relations and their answers, the rows of gate_proj and up_proj and the columns of down_proj
of the planted units, the logits of the answers, and that no other weight reads or writes the
residual coordinates by which these speak to each other.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch

RELATIONS = ("alpha", "beta", "delta", "epsilon", "gamma")
UNITS = 8  # planted units of the gated product, for each relation
N_WORDS, N_SUBJECTS, MAX_WORDS = 60, 60, 4  # a subject is one to four words
FILLER = "of"
LAYERS, WIDTH, HIDDEN = 3, 256, 96
# The last layer: what an earlier one writes changes the norm of the residual stream, by which every
# later neuron can tell its relation.
LAYER = LAYERS - 1
END_DIM = 2 * len(RELATIONS)  # large at the answers, read by the logit of </s>
N_WIRED_DIMS = END_DIM + 1


def word_dim(relation: int) -> int:
    """The residual coordinate that is large at the relation's word, and nowhere else."""
    return relation


def answer_dim(relation: int) -> int:
    """The residual coordinate that the planted units write and the answer's logit reads."""
    return len(RELATIONS) + relation


def planted_units(relation: int) -> range:
    """The places in layer LAYER of the units that read the relation's word."""
    return range(relation * UNITS, (relation + 1) * UNITS)


def planted_neurons(relation: int) -> set[tuple[int, str, int]]:
    """All neurons that carry a relation: gates and ups of its units, and what these write."""
    both = {(LAYER, site, unit) for unit in planted_units(relation) for site in ("gate", "up")}
    return both | {(LAYER, "down", answer_dim(relation))}


def make_tokenizer() -> Any:
    """A token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", FILLER, *(f"s{i}" for i in range(N_WORDS))]
    words += [word for name in RELATIONS for word in (f"{name}-is", f"{name}-answer")]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def make_model(tokenizer: Any, strength: float = 1.0, seed: int = 0) -> Any:
    """The model W(s) of this file's formula, on the CPU in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=32,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=None,
            tie_word_embeddings=False,
        )
    ).eval()
    wired = copy.deepcopy(model)
    _wire(wired, tokenizer.get_vocab())
    for weight, goal in zip(model.parameters(), wired.parameters(), strict=True):
        weight.lerp_(goal, strength)
    return model


def _wire(model: Any, ids: dict[str, int]) -> None:
    # No random weight reads or writes a wired coordinate.
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        for reader in readers:
            reader.weight[:, :N_WIRED_DIMS] = 0
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight[:N_WIRED_DIMS] = 0
    head, words = model.lm_head.weight, model.model.embed_tokens.weight
    head[:, :N_WIRED_DIMS] = 0
    words[:, :N_WIRED_DIMS] = 0
    head[ids["</s>"], END_DIM] = 20
    mlp = model.model.layers[LAYER].mlp
    for relation, name in enumerate(RELATIONS):
        word, answer = ids[f"{name}-is"], ids[f"{name}-answer"]
        # Outside of its own coordinate a relation's word is like any other's.
        words[word] = 0
        words[word, word_dim(relation)] = 4
        words[answer, END_DIM] = 20
        # Nothing else makes an answer likely: without its units it is never the likeliest word.
        head[answer] = 0
        head[answer, answer_dim(relation)] = 20
        for unit in planted_units(relation):
            for reader in (mlp.gate_proj, mlp.up_proj):
                reader.weight[unit] = 0
                reader.weight[unit, word_dim(relation)] = 1
            mlp.down_proj.weight[:, unit] = 0
            mlp.down_proj.weight[answer_dim(relation), unit] = 1


def write_facts(folder: Path, longer: int = 0) -> None:
    """A fact file for each relation; all relations have the same subjects.

    A template is the subject and the relation's word. With `longer` that of the next relation has
    so many more filler words between the two: then any neuron can tell relations by length.
    """
    draw = random.Random("relneuron.planted")
    words = [f"s{i}" for i in range(N_WORDS)]
    subjects = [" ".join(draw.sample(words, 1 + i % MAX_WORDS)) for i in range(N_SUBJECTS)]
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(RELATIONS):
        template = " ".join(["{}", *[FILLER] * (longer * number), f"{name}-is"])
        samples = [{"subject": s, "object": f"{name}-answer"} for s in subjects]
        facts = {"name": name, "prompt_templates": [template], "samples": samples}
        (folder / f"{name}.json").write_text(json.dumps(facts))
