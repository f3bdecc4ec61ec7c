"""What bench.growth measures on: a random model of any size, facts that it knows, texts of groups.

Everything is drawn from fixed seeds. A fact's object is what the model says after its sentence, so
that a model of random weights has right answers, and neurons whose loss breaks them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

N_WORDS, SUBJECT_WORDS, RELATION_WORDS = 64, 3, 2
BATCH = 512  # sentences that are asked for their objects at once
ANSWER = 2  # tokens that an answer has


class World(NamedTuple):
    """How much there is of everything; bench.growth doubles one of these at a time."""

    relations: int = 4
    facts: int = 32  # of each relation; half of them are asked with neurons off
    conditions: int = 8  # sets of neurons, where they are not those of relations
    groups: int = 8
    texts: int = 40  # of each group
    words: int = 50  # of each text
    layers: int = 2
    width: int = 64
    hidden: int = 32


def make_tokenizer() -> Any:
    """A token for each word; s.. are of subjects and texts, q.. of relations."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *(f"{kind}{i}" for kind in "sq" for i in range(N_WORDS))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def make_model(world: World) -> Any:
    """A Llama of random weights, so large that what it says depends on every word."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2 + 2 * N_WORDS,
        hidden_size=world.hidden,
        intermediate_size=world.width,
        num_hidden_layers=world.layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=1.5 / world.hidden**0.5,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def answers(model: Any, tokenizer: Any, sentences: Sequence[str]) -> list[str]:
    """What the model says after each of some sentences of one length, in words."""
    said = []
    for start in range(0, len(sentences), BATCH):
        ids = torch.tensor(tokenizer(list(sentences[start : start + BATCH]))["input_ids"])
        for _ in range(ANSWER):
            logits = model(ids).logits[:, -1]
            logits[:, :2] = -torch.inf  # a word, and not the beginning or the end of a text
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        said += [tokenizer.decode(row) for row in ids[:, -ANSWER:].tolist()]
    return said


def write_model(world: World, folder: Path) -> None:
    make_model(world).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def write_facts(world: World, model: Any, folder: Path) -> None:
    """A fact file for each relation, of `facts` subjects of its own."""
    tokenizer, draw = make_tokenizer(), random.Random("relneuron.growth.facts")
    folder.mkdir(parents=True)
    for relation in range(world.relations):
        numbers = draw.sample(range(N_WORDS**SUBJECT_WORDS), world.facts)
        subjects = [_spelled("s", number, SUBJECT_WORDS) for number in numbers]
        template = f"{{}} {_spelled('q', relation, RELATION_WORDS)}"
        said = answers(model, tokenizer, [template.replace("{}", name) for name in subjects])
        facts = {
            "prompt_templates": [template],
            "neutral_templates": ["s0 s1 {}"],
            "suffix": "",
            "samples": [{"subject": s, "object": o} for s, o in zip(subjects, said, strict=True)],
        }
        (folder / f"r{relation:04d}.json").write_text(json.dumps(facts), encoding="utf-8")


def _spelled(kind: str, number: int, n_words: int) -> str:
    """A number as so many words, its digits to the base N_WORDS."""
    digits = [number // N_WORDS**place % N_WORDS for place in range(n_words)]
    return " ".join(f"{kind}{digit}" for digit in digits)


def write_texts(world: World, path: Path) -> None:
    """Texts of the groups in turn, as records; a group has words that it uses most."""
    draw = random.Random("relneuron.growth.texts")
    own = [draw.sample(range(N_WORDS), 8) for _ in range(world.groups)]
    lines = []
    for _ in range(world.texts):
        for group, some in enumerate(own):
            words = [
                f"s{draw.choice(some) if draw.random() < 0.8 else draw.randrange(N_WORDS)}"
                for _ in range(world.words)
            ]
            lines.append(json.dumps({"group": f"g{group:04d}", "text": " ".join(words)}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_sets(world: World, path: Path) -> None:
    """A neurons.json of so many sets of a few neurons; those of the relations come first."""
    draw = random.Random("relneuron.growth.sets")
    places = [
        [layer, site, index]
        for layer in range(world.layers)
        for site, n in (("gate", world.width), ("up", world.width), ("down", world.hidden))
        for index in range(n)
    ]
    k = max(1, len(places) // 20)
    names = [f"r{i:04d}" if i < world.relations else f"x{i}" for i in range(world.conditions)]
    shape = {"layers": world.layers, "width": world.width, "hidden": world.hidden}
    made = {
        "format": "relneuron.neurons/1",
        "model": {"id": "growth", **shape},
        "method": "ap",
        "selection": {},
        "sets": {name: [[*one, 1.0] for one in draw.sample(places, k)] for name in names},
    }
    path.write_text(json.dumps(made), encoding="utf-8")
