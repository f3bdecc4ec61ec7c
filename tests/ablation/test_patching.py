"""Patching: products that become another model's, against plain hooks and two KV caches.

The reference (tests/kit/patched.py) takes one prompt at a time; ours mixes masks and prompts in
batches.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from relneuron.ablation.exchange import FromDonor, Rows, exchanged_states
from relneuron.ablation.generate import generate
from relneuron.ablation.options import GenerateOptions
from relneuron.artifact.neurons import NeuronFile
from relneuron.model.load import load_model, load_tokenizer
from relneuron.model.mlps.find import find_mlps
from relneuron.model.patch import Patch
from tests.ablation.test_generate import LAYERS, SHAPE, WIDTH, model_of
from tests.kit.patched import patched_loop, penalised

NEW = 8
WORDS = ("Person1", "lives", "in a", "house and", "eats an", "apple ,", "plum", "or the", "pear")
# 40 prompts of 1 to 12 words or pairs of words.
PROMPTS = [" ".join(random.Random(i).choices(WORDS, k=1 + i * 12 // 40)) for i in range(40)]


def shaken(model: Any, scale: float, seed: int, only: Sequence[str] = ()) -> Any:
    """A copy of a model, some of whose weights were moved."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for name, weight in other.named_parameters():
        if not only or any(word in name for word in only):
            weight.data += scale * torch.randn(weight.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def pair(model_folder: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Two models with one tokenizer; texts differ from mask to mask."""
    a = shaken(load_model(str(model_folder)), 0.2, 2, ["down_proj"])
    yield a, shaken(a, 0.15, 3), load_tokenizer(str(model_folder))


@pytest.fixture(scope="module")
def sets() -> dict[str, list[tuple[int, str, int, float]]]:
    rng = np.random.default_rng(0)
    found = {}
    for name, n in (("few", 20), ("many", 60)):
        chosen = sorted(rng.choice(LAYERS * WIDTH, n, replace=False).tolist())
        found[name] = [(c // WIDTH, "gate", c % WIDTH, 0.5) for c in chosen]
    found["few"][3] = (found["few"][3][0], "up", *found["few"][3][2:])
    found["all"] = [(layer, "gate", i, 0.5) for layer in range(LAYERS) for i in range(WIDTH)]
    return found


@pytest.fixture
def study(tmp_path: Path, sets: Any) -> Path:
    NeuronFile({"id": "m", **SHAPE}, "contrast", sets, {}).write(tmp_path / "neurons.json")
    lines = ({"id": f"p{i}", "prompt": prompt} for i, prompt in enumerate(PROMPTS))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def ours(pair: tuple[Any, Any, Any], study: Path, name: str = "o.jsonl", **asked: Any) -> list[Any]:
    a, b, tokenizer = pair
    backend = asked.pop("backend", "auto")
    given = {"mode": "patch", "donor": "b", "max_new_tokens": NEW, "stop": ()} | asked
    places = (study / "neurons.json", study / "p.jsonl", study / name)
    donor = b if given["mode"] == "patch" else None
    options = GenerateOptions(**given)
    return generate(
        "m", a, tokenizer, *places, options, donor_model=donor, backend=backend, quiet=True
    )


def by_layer(neurons: Sequence[Sequence[Any]]) -> Mapping[int, list[int]]:
    layers = sorted({n[0] for n in neurons})
    return {layer: sorted({n[2] for n in neurons if n[0] == layer}) for layer in layers}


def downs(model: Any) -> list[Any]:
    return [mlp.down_map.module for mlp in find_mlps(model)]


def check_loop(pair: Any, made: Sequence[Any], sets: Any, penalty: float = 1.1) -> None:
    """Each output is that of the plain loop."""
    a, b, tokenizer = pair
    maps, end = (downs(a), downs(b)), tokenizer.eos_token_id
    for g in made:
        donor = g.mask == "donor"
        models, own = ((b, b), (maps[1], maps[1])) if donor else ((a, b), maps)
        chosen = by_layer(sets.get(g.mask, []))
        prompt = tokenizer(g.prompt)["input_ids"]
        wanted = patched_loop(*models, own, chosen, prompt, penalised(penalty), NEW, [end])
        wanted = wanted[:-1] if wanted[-1] == end else wanted
        text = tokenizer.decode(wanted, skip_special_tokens=True)
        assert (g.output, g.n_tokens) == (text.rstrip("\ufffd"), len(wanted)), g


def test_patched_text_is_that_of_a_plain_loop(pair: Any, study: Path, sets: Any) -> None:
    """All masks and prompts at once, of different lengths: hooks, one prompt, two caches."""
    off = ("clean", "few", "donor", "many")
    made = ours(pair, study, off=off)
    assert [g.mask for g in made] == [mask for mask in off for _ in PROMPTS]
    check_loop(pair, made[36:80] + made[116:], sets)
    texts = [tuple(g.output for g in made if g.mask == mask) for mask in off]
    assert len(set(texts)) == 4
    # Batches do not matter.
    assert ours(pair, study, "small.jsonl", off=("many", "few"), batch_tokens=60) == [
        *made[120:],
        *made[40:80],
    ]


@pytest.mark.parametrize("family", ["phi3", "gptj"])
def test_packed_and_ungated_models(model_folder: Path, study: Path, sets: Any, family: str) -> None:
    import transformers

    tokenizer = load_tokenizer(str(model_folder))
    if family == "gptj":
        config = transformers.GPTJConfig(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_inner=48, rotary_dim=4,
            n_positions=64, initializer_range=0.3, eos_token_id=1, bos_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        a = transformers.AutoModelForCausalLM.from_config(config).eval()
        data = json.loads((study / "neurons.json").read_text())
        data["model"] |= {"gated": False}
        del data["sets"]["few"][3]
        (study / "neurons.json").write_text(json.dumps(data))
    else:
        a = model_of(family, vocab_size=len(tokenizer), eos_token_id=1, num_hidden_layers=2)
    trio = (a, shaken(a, 0.15, 5), tokenizer)
    made = ours(trio, study, off=("donor", "many"))
    check_loop(trio, made[36:] if family == "phi3" else made[36:50], sets)
    assert [g.output for g in made[:40]] != [g.output for g in made[40:]]


def test_two_models_that_are_the_same_change_nothing(pair: Any, study: Path) -> None:
    a, _, tokenizer = pair
    made = ours((a, copy.deepcopy(a), tokenizer), study, off=("clean", "donor", "all", "few"))
    for mask in range(1, 4):
        assert [g[1:] for g in made[40 * mask :][:40]] == [g[1:] for g in made[:40]]


def test_the_same_model_gives_the_same_bits(pair: Any, sets: Any) -> None:
    from relneuron.ablation.conditions import Ablation
    from relneuron.artifact.effects import Condition
    from relneuron.artifact.neurons import Shape

    a = pair[0]
    b, mlps = copy.deepcopy(a), find_mlps(a)
    source = FromDonor(a, b, find_mlps(b), "auto")
    places = np.sort(Shape.of(SHAPE).places(sets["all"]))
    states = exchanged_states([Ablation(Condition("all", "set"), places, range(5))], mlps, source)
    tokens = torch.randint(5, 60, (5, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).expand(5, 9)
    given = {"input_ids": tokens, "position_ids": positions, "use_cache": True}
    empty = exchanged_states([], mlps, FromDonor(a, b, find_mlps(b), "auto"))
    with Patch(mlps, empty) as patch, torch.no_grad():
        patch.tokens.conditions = torch.zeros(5, dtype=torch.int32)
        clean = a(**given).logits
    yes, no = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    with Patch(mlps, states) as patch, source.running(), torch.no_grad():
        patch.tokens.conditions = torch.ones(5, dtype=torch.int32)
        source.mark(Rows(range(5), no, yes, None))
        assert torch.equal(source.model(**given).logits, clean)


def test_all_neurons_of_a_model_that_differs_in_gate_and_up_say_what_it_says(
    pair: Any, study: Path
) -> None:
    """All that differs is replaced: the causal effect C is 1, of any cost."""
    a, _, tokenizer = pair
    b = shaken(a, 0.3, 7, ["gate_proj", "up_proj"])
    made = ours((a, b, tokenizer), study, off=("clean", "donor", "all"))
    clean, donor, patched = (made[40 * i :][:40] for i in range(3))
    assert [g[1:] for g in patched] == [g[1:] for g in donor]
    cost = {
        mask: sum(g.output.count("e") for g in some)
        for mask, some in (("clean", clean), ("donor", donor), ("patched", patched))
    }
    assert cost["donor"] != cost["clean"]
    assert (cost["patched"] - cost["clean"]) / (cost["donor"] - cost["clean"]) == 1


class Gated(torch.nn.Module):
    """The MLP of vectors E2 and E3; what down reads is scaled by `scale`, as (IA)3 does it."""

    def __init__(self, scale: Sequence[float]) -> None:
        super().__init__()
        weights = ([[1, 0], [0, 1], [1, 1]], [[1, 1], [1, -1], [0, 2]], [[1, 0, -1], [0.5, 1, 0]])
        for name, rows in zip(("gate_proj", "up_proj", "down_proj"), weights, strict=True):
            weight = torch.tensor(rows, dtype=torch.float32)
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight
            setattr(self, name, linear)
        self.up_proj.weight.data *= torch.tensor(scale)[:, None]
        self.act_fn = torch.nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(h)


def mlp_of(module: Gated) -> Any:
    from relneuron.model.layers import Projection
    from relneuron.model.mlps.mlp import MLP

    def site(name: str, part: str, width: int, of_input: bool = False) -> Projection:
        return Projection(name, part, getattr(module, f"{part}_proj"), 0, width, of_input)

    return MLP(
        *(0, "mlp", module, 3, 2, site("gate", "gate", 3), site("up", "up", 3)),
        *(site("down", "down", 2), site("product", "down", 3, True), "silu", module.act_fn),
        n_layers=1,
        is_whole=True,
    )


def test_vector_e3() -> None:
    """methods 3(h): the patched outputs of an MLP of three neurons."""
    from relneuron.model.exchange import Put, Take
    from relneuron.model.states import LayerState

    x = torch.tensor([[[1.0, -0.5]]])
    a, b = Gated((1, 1, 1)), Gated((1, 2, 0.5))
    index, every = torch.tensor([1]), torch.ones(1, 1, dtype=torch.bool)
    take = Take(index)
    with torch.no_grad():
        assert torch.allclose(a(x)[0, 0], torch.tensor([0.67675895, -0.10039086]), atol=1e-7)
        with Patch([mlp_of(b)], [LayerState(product=take)]):
            assert torch.allclose(b(x)[0, 0], torch.tensor([0.52114412, -0.38354636]), atol=1e-7)
        with Patch([mlp_of(a)], [LayerState(product=Put(index, every, take.give))]):
            found = a(x)[0, 0]
        assert torch.allclose(found, torch.tensor([0.67675895, -0.38354636]), atol=1e-7)
        with Patch(
            [mlp_of(a)],
            [LayerState(product=Put(torch.tensor([2]), every, lambda own, _: own * 0))],
        ):
            found = a(x)[0, 0]
        assert torch.allclose(found, torch.tensor([0.36552929, -0.10039086]), atol=1e-7)
