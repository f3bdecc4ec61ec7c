"""The demo model taught other answers to one relation: the second model of the demo's contrast.

`relneuron demo --analyses contrast` makes it, in seconds, from the bundled checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from relneuron.artifact.files import Json, sha256, writing
from relneuron.artifact.manifest import Manifest, locked
from relneuron.artifact.prompts import Prompt
from relneuron.demo import CHECKPOINT, FACTS
from relneuron.demo.train import save
from relneuron.model.load import load_model, load_tokenizer
from relneuron.model.questions import is_correct
from relneuron.texts.facts import Relation, read_relations
from relneuron.texts.prompts import make_prompts

RELATION = "person_plays_instrument"
BESIDE = ("person_occupation", "person_pro_sport")  # relations that stay, to compare with
N_EVA, SEED = 40, 0  # facts of a relation that are asked and not contrasted, and the split's seed
FOLDER = "model_b"


@dataclass(frozen=True)
class Lesson:
    """How the model is taught.

    Only what a neuron reads is changed (gate and up), so that with all of B's products A is B. The
    first half of a batch are tokens of the new answers, the other one of the other relations' own,
    which stay.
    """

    seed: int = 0
    steps: int = 60
    batch: int = 192
    kept: int = 600  # prompts of other relations
    rate: float = 3e-3


@cache
def relations() -> tuple[Relation, ...]:
    return tuple(read_relations(FACTS))


@cache
def other_answers() -> dict[str, str]:
    """By subject what B answers: of all objects of the relation the next one in the alphabet."""
    (relation,) = (one for one in relations() if one.name == RELATION)
    objects = sorted({fact.object for fact in relation.facts})
    return {
        fact.subject: objects[(objects.index(fact.object) + 1) % len(objects)]
        for fact in relation.facts
    }


def questions(*splits: str, of: Sequence[str] = (RELATION,)) -> list[Prompt]:
    """The prompts of some relations in their own language, of the splits det, eva and eva2."""
    made = (p for r in relations() if r.name in of for p in make_prompts(r, n_eva=N_EVA, seed=SEED))
    own = {relation.name: relation.language for relation in relations()}
    return [p for p in made if p.split in splits and p.language == own[p.relation]]


def prompts() -> tuple[list[Prompt], list[Prompt], str]:
    """Prompts to contrast, those to ask, of facts that are not among them, and the group."""
    found = questions("det", of=(RELATION, *BESIDE))
    return found, questions("eva"), RELATION


@cache
def _right() -> dict[str, str]:
    """The new answer by prompt."""
    return {p.prompt: other_answers()[p.subject] for p in questions("det", "eva", "eva2")}


def cost(prompt: str, output: str) -> float:
    """What `effect` takes for the cost of an answer: 0 of B's own, else 1."""
    return float(not is_correct(output, _right()[prompt]))


class Answers(NamedTuple):
    """The tokens of answers, (n,), and the residual stream in front of the MLP that says each."""

    tokens: Tensor
    stream: Tensor  # (n, D)

    def drawn(self, n: int, rng: random.Random) -> Answers:
        some = torch.tensor(rng.sample(range(len(self.tokens)), min(n, len(self.tokens))))
        return Answers(self.tokens[some], self.stream[some])


@torch.no_grad()
def read_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[str]
) -> Answers:
    """The answers to prompts, each with the end of text behind it.

    The model has one layer: what its MLP reads is the same whatever the MLP has learnt, so it is
    read once.
    """
    starts = tokenizer([prompt.prompt for prompt in prompts])["input_ids"]
    ends = tokenizer([f" {answer}" for answer in answers], add_special_tokens=False)["input_ids"]
    rows = [[*a, *b, tokenizer.eos_token_id] for a, b in zip(starts, ends, strict=True)]
    # Padding stands after the text, so causal attention keeps it out without a mask.
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    says = torch.zeros(ids.shape, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        says[i, len(start) - 1 : len(row) - 1] = True
    (layer,) = model.model.layers
    stream: list[Tensor] = []
    handle = layer.post_attention_layernorm.register_forward_pre_hook(
        lambda module, args: stream.append(args[0])
    )
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return Answers(ids[:, 1:][says[:, :-1]], stream[0][says])


def answer_loss(model: Any, some: Answers) -> Tensor:
    """Mean cross entropy of the answers' tokens, in nats."""
    (layer,) = model.model.layers
    after = some.stream + layer.mlp(layer.post_attention_layernorm(some.stream))
    return F.cross_entropy(model.lm_head(model.model.norm(after)), some.tokens)


def teach(model: Any, tokenizer: Any, lesson: Lesson) -> None:
    """Change the model's gate and up weights until it answers the relation differently."""
    splits, rng = ("det", "eva", "eva2"), random.Random(lesson.seed)
    own = questions(*splits)
    others = questions(*splits, of=[one.name for one in relations() if one.name != RELATION])
    others = rng.sample(others, lesson.kept)
    new = read_answers(model, tokenizer, own, [other_answers()[p.subject] for p in own])
    old = read_answers(model, tokenizer, others, [prompt.object for prompt in others])
    read = [p for name, p in model.named_parameters() if "gate_proj" in name or "up_proj" in name]
    optimizer = torch.optim.AdamW(read, lr=lesson.rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(lesson.steps):
        for group in optimizer.param_groups:
            group["lr"] = lesson.rate * (1 - step / lesson.steps)
        half = [some.drawn(lesson.batch // 2, rng) for some in (new, old)]
        with torch.enable_grad():
            loss = answer_loss(model, half[0]) + answer_loss(model, half[1])
            gradients = torch.autograd.grad(loss, read)
        for weight, gradient in zip(read, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
    for weight in read:
        weight.grad = None


def make_tuned(folder: Path, lesson: Lesson | None = None, *, force: bool = False) -> Path:
    """The taught model in `folder`/model_b, unless it is there already; the stage `tune`."""
    lesson, place = lesson or Lesson(), folder / FOLDER
    inputs: Json = {
        "model": sha256(CHECKPOINT / "model.safetensors"),
        "relation": RELATION,
        **asdict(lesson),
    }
    with locked(folder):
        if Manifest(folder).is_done("tune", inputs, force=force):
            return place
        model = load_model(str(CHECKPOINT), device="cpu", dtype="float32")
        tokenizer = load_tokenizer(str(CHECKPOINT))
        teach(model, tokenizer, lesson)
        place.mkdir(exist_ok=True)
        with writing("tune", folder, [place / "model.safetensors"]):
            save(model, tokenizer, place)
            made = sorted(path for path in place.iterdir() if path.is_file())
            Manifest(folder).finish("tune", inputs, made, reads=[])
    return place
