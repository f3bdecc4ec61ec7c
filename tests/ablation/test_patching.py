"""Patching: products that become another model's, against plain hooks and two KV caches.

The reference (bench/patching.py) takes one prompt at a time; ours mixes masks and prompts in
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

from bench.patching import patched_loop
from relneuron.ablation.ablate import ablate_prompts
from relneuron.ablation.conditions import Ablation, other_places
from relneuron.ablation.continuer import Continuer
from relneuron.ablation.effect import causal_effects
from relneuron.ablation.exchange import FromMeans, puts_of
from relneuron.ablation.generate import generate
from relneuron.ablation.options import GenerateOptions
from relneuron.artifact.effects import Condition
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile, Shape
from relneuron.artifact.options import LoadOptions
from relneuron.artifact.prompts import read_prompts
from relneuron.model.exchange import Put, Rows
from relneuron.model.identity import model_digest
from relneuron.model.load import load_model, load_tokenizer
from relneuron.model.mlps.find import find_mlps
from relneuron.model.pair import Taps, load_pair, pair_of
from relneuron.model.paired import Paired
from relneuron.model.states import Tokens
from relneuron.texts.options import PromptsOptions
from relneuron.texts.prompts import write_prompts
from tests.ablation.test_generate import LAYERS, SHAPE, WIDTH, model_of
from tests.conftest import tiny_model
from tests.kit import pairs
from tests.kit.files import read_rows

NEW = 8
WORDS = ("Person1", "lives", "in a", "house and", "eats an", "apple ,", "plum", "or the", "pear")
# 40 prompts of 1 to 12 words or pairs of words.
PROMPTS = [" ".join(random.Random(i).choices(WORDS, k=1 + i * 12 // 40)) for i in range(40)]


@pytest.fixture(scope="module")
def pair(model_folder: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Two models with one tokenizer; texts differ from mask to mask."""
    a = pairs.moved(load_model(str(model_folder)), 0.2, 2, ["down_proj"])
    yield a, pairs.moved(a, 0.15, 3), load_tokenizer(str(model_folder))


@pytest.fixture(scope="module")
def sets() -> dict[str, list[tuple[int, str, int, float]]]:
    rng = np.random.default_rng(0)
    found = {}
    for name, n in (("few", 20), ("many", 40)):
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
    other = pair_of(a, b, tokenizer, names=("m", "b")) if given["mode"] == "patch" and b else None
    options = GenerateOptions(**given)
    return generate("m", a, tokenizer, *places, options, pair=other, backend=backend, quiet=True)


def penalised(penalty: float) -> Any:
    """The most probable token, after the penalty of `generate` for those that stood before."""

    def choose(logits: Tensor, before: list[list[int]]) -> list[int]:
        logits = logits.clone()
        for row, line in enumerate(before):
            seen = torch.tensor(sorted({*line}))
            own = logits[row, seen]
            logits[row, seen] = torch.where(own < 0, own * penalty, own / penalty)
        return logits.argmax(-1).tolist()

    return choose


def by_layer(neurons: Sequence[Sequence[Any]]) -> Mapping[int, list[int]]:
    layers = sorted({n[0] for n in neurons})
    return {layer: sorted({n[2] for n in neurons if n[0] == layer}) for layer in layers}


def peft_over(model: Any, folder: Path) -> Any:
    """A model with an adapter, as peft runs it; the model is changed."""
    from peft import PeftModel

    with pairs.ignoring_peft():
        return PeftModel.from_pretrained(model, folder).eval()


def downs(model: Any) -> list[Any]:
    return [mlp.down_map.module for mlp in find_mlps(model)]


def check_loop(pair: Any, made: Sequence[Any], sets: Any, maps: Any = None) -> None:
    """Each output is that of the plain loop; `maps` are the down maps of both."""
    a, b, tokenizer = pair
    maps, end = maps or (downs(a), downs(b)), tokenizer.eos_token_id
    for g in made:
        donor = g.mask == "donor"
        models, own = ((b, b), (maps[1], maps[1])) if donor else ((a, b), maps)
        chosen = by_layer(sets.get(g.mask, []))
        prompt = tokenizer(g.prompt)["input_ids"]
        [wanted] = patched_loop(*models, own, chosen, [prompt], penalised(1.1), NEW, [end])
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
    trio = (a, pairs.moved(a, 0.15, 5), tokenizer)
    made = ours(trio, study, off=("donor", "many"))
    check_loop(trio, made[36:] if family == "phi3" else made[36:50], sets)
    assert [g.output for g in made[:40]] != [g.output for g in made[40:]]


@pytest.mark.parametrize("kind", ["lora of all", "ia3 of down"])
def test_an_adapter_whose_rows_share_a_forward(
    pair: Any, study: Path, sets: Any, tmp_path: Path, kind: str
) -> None:
    """(IA)3 scales what down reads: its value is the one behind the scale."""
    a, tokenizer = copy.deepcopy(pair[0]), pair[2]
    a.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = pairs.save_adapter(kind, tmp_path / "b", model=copy.deepcopy(a))
    both = load_pair(str(tmp_path / "model"), str(folder), LoadOptions())
    assert both.a is both.b
    places = (study / "neurons.json", study / "p.jsonl", study / "o.jsonl")
    asked = {"off": ("clean", "many", "donor"), "mode": "patch", "donor": "b", "stop": ()}
    options = GenerateOptions(max_new_tokens=NEW, **asked)
    made = generate("m", both.a, tokenizer, *places, options, pair=both, quiet=True)
    b = peft_over(a, folder)
    inner = [layer.mlp.down_proj for layer in b.base_model.model.model.layers]
    own = (downs(pair[0]), [getattr(down, "base_layer", down) for down in inner])
    check_loop((pair[0], b, tokenizer), made[::4], sets, maps=own)
    texts = [tuple(g.output for g in made[40 * i :][:40]) for i in range(3)]
    assert len(set(texts)) == 3
    assert both.described[0]["digest"] == model_digest(pair[0]) != both.described[1]["digest"]


def test_two_models_that_are_the_same_change_nothing(pair: Any, study: Path) -> None:
    a, _, tokenizer = pair
    made = ours((a, copy.deepcopy(a), tokenizer), study, off=("clean", "donor", "all", "few"))
    for mask in range(1, 4):
        assert [g[1:] for g in made[40 * mask :][:40]] == [g[1:] for g in made[:40]]


def test_the_same_model_gives_the_same_bits(pair: Any, sets: Any) -> None:
    a, _, tokenizer = pair
    model = Paired(pair_of(a, copy.deepcopy(a), tokenizer))
    places = np.sort(Shape.of(SHAPE).places(sets["all"]))
    every = Ablation(Condition("all", "set"), places, range(5))
    model.puts = puts_of([every], model.mlps, SHAPE)
    assert {number: len(put.index) for number, put in model.puts.items()} == {0: WIDTH, 1: WIDTH}
    tokens = torch.randint(5, 60, (5, 9), generator=torch.Generator().manual_seed(0))
    given = {"position_ids": torch.arange(9).expand(5, 9), "use_cache": True}
    with torch.no_grad():
        clean = a(input_ids=tokens, **given).logits
        model.tokens = Tokens(conditions=torch.ones(5, dtype=torch.int32))
        yes, no = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
        model.rows = Rows(range(5), no, yes)
        assert torch.equal(model(input_ids=tokens, **given).logits, clean)
        model._pair.b.model.layers[0].mlp.up_proj.weight.data[3] += 1
        assert not torch.equal(model(input_ids=tokens, **given).logits, clean)


def test_all_neurons_of_a_model_that_differs_in_gate_and_up_say_what_it_says(
    pair: Any, study: Path
) -> None:
    """All that differs is replaced: the causal effect C is 1, of any cost."""
    a, _, tokenizer = pair
    b = pairs.moved(a, 0.3, 7, ["gate_proj", "up_proj"])
    made = ours((a, b, tokenizer), study, off=("clean", "donor", "all"))
    clean, donor, patched = (made[40 * i :][:40] for i in range(3))
    assert [g[1:] for g in patched] == [g[1:] for g in donor]
    costs = {
        mask: np.array([[g.output.count("e")] for g in some], float)
        for mask, some in (("clean", clean), ("donor", donor), ("all", patched))
    }
    (found,) = causal_effects(costs)
    assert found.effect == 1 and costs["donor"].sum() != costs["clean"].sum()


def test_vector_e3() -> None:
    """methods 3(h): the patched outputs of an MLP of three neurons."""
    weights = ([[1, 0], [0, 1], [1, 1]], [[1, 1], [1, -1], [0, 2]], [[1, 0, -1], [0.5, 1, 0]])

    def scaled(scale: Sequence[float]) -> Any:
        """A model whose one MLP it is; what down reads is scaled, as (IA)3 does it."""
        sizes = {"hidden_size": 2, "intermediate_size": 3, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        model = tiny_model("llama", **sizes, **heads)
        mlp = model.model.layers[0].mlp
        maps = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        for linear, rows in zip(maps, weights, strict=True):
            linear.weight.data = torch.tensor(rows, dtype=torch.float32)
        mlp.up_proj.weight.data *= torch.tensor(scale)[:, None]
        return model

    x, rows = torch.tensor([[[1.0, -0.5]]]), torch.ones(1, dtype=torch.bool)
    tokenizer = None

    def output(model: Any, see: Any = None) -> list[float]:
        mlp = model.model.layers[0].mlp
        with torch.no_grad(), Taps(find_mlps(model), see or (lambda number, h: None)):
            return mlp(x)[0, 0].tolist()

    pair = pair_of(scaled((1, 1, 1)), scaled((1, 2, 0.5)), tokenizer)
    assert output(pair.a) == pytest.approx([0.67675895, -0.10039086], abs=1e-7)
    assert output(pair.b) == pytest.approx([0.52114412, -0.38354636], abs=1e-7)
    model = Paired(pair)
    model.tokens = Tokens(conditions=torch.ones(1, dtype=torch.int32))
    model.rows = Rows([0], ~rows, rows)
    model.puts = {0: Put(torch.tensor([1]), torch.tensor([[False], [True]]))}
    output(pair.b, model._keep)
    assert output(pair.a, model.see) == pytest.approx([0.67675895, -0.38354636], abs=1e-7)
    zero = FromMeans(pair.a, pair.mlps[0], np.zeros((1, 3), np.float32))
    zero.tokens, zero.rows = model.tokens, model.rows
    zero.puts = {0: Put(torch.tensor([2]), torch.tensor([[False], [True]]))}
    assert output(pair.a, zero.see) == pytest.approx([0.36552929, -0.10039086], abs=1e-7)


# --- what decides the text -------------------------------------------------------------------


def test_what_is_sampled_does_not_depend_on_the_batch(pair: Any, study: Path) -> None:
    lines = (study / "p.jsonl").read_text().splitlines()
    (study / "p.jsonl").write_text("\n".join(lines[::6]) + "\n")
    asked = {"temperature": 0.9, "seeds": 2, "max_new_tokens": 5}
    made = ours(pair, study, off=("clean", "few", "donor"), **asked)
    assert len({g.output for g in made}) > len(lines[::6])
    alone = ours(pair, study, "alone.jsonl", off=("few",), batch_tokens=1, **asked)
    assert alone == made[len(alone) : 2 * len(alone)]


def test_rows_that_ended_leave_both_caches(
    pair: Any, study: Path, sets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import DynamicCache

    left: list[int] = []
    true = DynamicCache.batch_select_indices

    def select(self: Any, rows: Tensor) -> None:
        left.append(len(rows))
        true(self, rows)

    monkeypatch.setattr(DynamicCache, "batch_select_indices", select)
    made = ours(pair, study, off=("few",), stop=("a", "e"))
    assert left[::2] == left[1::2] == sorted(left[::2], reverse=True) and len(left) > 2
    monkeypatch.undo()
    owner = next(c for c in DynamicCache.__mro__ if "batch_select_indices" in vars(c))
    monkeypatch.delattr(owner, "batch_select_indices")
    assert ours(pair, study, "whole.jsonl", off=("few",), stop=("a", "e")) == made


def test_a_killed_run_goes_on_and_with_another_donor_begins_again(
    pair: Any, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _, tokenizer = pair
    asked = {"off": ("few", "donor"), "batch_tokens": 300, "max_new_tokens": 3}
    monkeypatch.setattr(Journal, "SAVE_EVERY_S", 0.0)
    true, calls, last = Continuer.go_on, 0, 0

    def dies(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return true(self, *args)

    monkeypatch.setattr(Continuer, "go_on", dies)
    whole = ours(pair, study, "whole.jsonl", **asked)
    n_batches, calls, last = calls, 0, 3
    with pytest.raises(KeyboardInterrupt):
        ours(pair, study, **asked)
    kept, last = (study / "o.jsonl.journal").read_bytes(), 0
    assert ours(pair, study, **asked) == whole
    assert calls == n_batches + 1 > 4  # that of the batch that was under way
    (study / "o.jsonl").unlink()
    (study / "o.jsonl.journal").write_bytes(kept)
    other = (a, pairs.moved(a, 0.1, 9), tokenizer)
    with pytest.warns(match=r"other inputs .inputs\.donor\.digest: .* is done again"):
        made = ours(other, study, **asked)
    assert made == ours(other, study, "other.jsonl", **asked) != whole


def test_random_sets_have_as_many_other_neurons_of_each_layer(
    pair: Any, study: Path, sets: Any
) -> None:
    order = Shape.of(SHAPE)
    own = by_layer(sets["few"])
    drawn = [
        by_layer(order.neurons(other_places(order.places(sets["few"]), SHAPE, seed, "few",
                                            products=True)))
        for seed in range(4)
    ]  # fmt: skip
    assert len({str(one) for one in drawn}) == 4
    for one in drawn:
        assert {layer: len(some) for layer, some in one.items()} == {
            layer: len(some) for layer, some in own.items()
        }
        assert not any({*some} & {*own[layer]} for layer, some in one.items())
    asked = {"random_seeds": 2, "max_new_tokens": 4}
    made = ours(pair, study, off=("clean", "few"), **asked)
    masks = list(dict.fromkeys(g.mask for g in made))
    assert masks == ["clean", "few", "random.0", "random.1"]
    # It is the set that the random neurons make.
    path = study / "neurons.json"
    data = json.loads(path.read_text())
    data["sets"]["other"] = [
        [layer, "gate", index, 0.0] for layer, some in drawn[1].items() for index in some
    ]
    path.write_text(json.dumps(data))
    again = ours(pair, study, "r.jsonl", off=("other",), max_new_tokens=4)
    assert [g[1:] for g in again] == [g[1:] for g in made[120:]]
    made = ours(pair, study, "s.jsonl", off=("few", "many"), random_seeds=1, max_new_tokens=1)
    masks = list(dict.fromkeys(g.mask for g in made))
    assert masks == ["few", "random.0.few", "many", "random.0.many"]
    with pytest.raises(RelneuronError, match="not as many others for a random set"):
        ours(pair, study, "t.jsonl", off=("all",), random_seeds=1)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        ({"mode": "zero"}, "--from and --mode patch belong together"),
        ({"donor": None}, "--from and --mode patch belong together"),
        ({"off": ("clean",)}, "--mode patch changes nothing of the model itself"),
        ({"set_to": "few"}, "beside --set or --module-sets"),
        ({"off": ("de",)}, "no set 'de'"),
        ({"off": ("donor",), "mode": "zero", "donor": None}, "no set 'donor'"),
        ({"off": ("down",)}, "has the neuron L0.down.3, which is no input of down"),
        ({"off": ("few",), "mode": "mean", "donor": None}, "counts.safetensors does not exist"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    pair: Any, study: Path, asked: dict[str, Any], cause: str
) -> None:
    data = json.loads((study / "neurons.json").read_text())
    data["sets"]["down"] = [[0, "down", 3, 0.1]]
    (study / "neurons.json").write_text(json.dumps(data))
    before = {path.name for path in study.iterdir()}
    with pytest.raises(RelneuronError, match=cause) as caught:
        ours(pair, study, **{"off": ("few",), **asked})
    assert "\n" not in caught.value.cause + caught.value.fix
    assert {path.name for path in study.iterdir()} == before


def test_models_that_do_not_fit_together(pair: Any, study: Path) -> None:
    a, _, tokenizer = pair
    other = model_of("llama", vocab_size=99, num_hidden_layers=2, intermediate_size=40)
    with pytest.raises(RelneuronError, match="width of the MLPs 48 and 40"):
        ours((a, other, tokenizer), study, off=("few",))
    with pytest.raises(RelneuronError, match="belong together"):
        ours((a, None, tokenizer), study, off=("few",))


def test_a_patch_that_puts_nothing_there_is_found(
    pair: Any, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Taps, "_forward", lambda self, number, mlp, plain, x: plain(x))
    with pytest.raises(RelneuronError, match="other products in every MLP did not change"):
        ours(pair, study, off=("few",))
    assert not (study / "o.jsonl").exists()


# --- questions with one answer ---------------------------------------------------------------


def test_ablate_answers_with_another_models_values(
    pair: Any, fact_folder: Path, tmp_path: Path
) -> None:
    """Predictions of two greedy tokens are those of the plain loop, under every condition."""
    a, b, tokenizer = pair
    write_prompts(fact_folder, tmp_path / "prompts.jsonl", PromptsOptions(eva=4))
    rng, sets = np.random.default_rng(3), {}
    for name in ("likes_fruit", "lives_in", "works_as"):
        chosen = sorted(rng.choice(LAYERS * WIDTH, 40, replace=False).tolist())
        sets[name] = [(c // WIDTH, "gate", c % WIDTH, 0.5) for c in chosen]
    neurons = tmp_path / "neurons.json"
    NeuronFile({"id": "m", **SHAPE}, "contrast", sets, {}).write(neurons)

    def asked(other: Any, folder: Path, **asked: Any) -> list[dict[str, str]]:
        files = (neurons, tmp_path / "prompts.jsonl", folder / "effects.csv")
        given = {"mode": "patch", "donor": "b", "random_seeds": 2, "splits": ("eva",)} | asked
        both = pair_of(a, other, tokenizer, names=("m", "b"))
        ablate_prompts("m", a, tokenizer, *files, pair=both, quiet=True, **given)
        return read_rows(folder / "effects.csv")

    rows = asked(b, tmp_path / "one")
    conditions = read_rows(tmp_path / "one" / "conditions.csv")
    assert [c["condition"] for c in conditions] == ["clean", *sets, "random.0", "random.1"]
    assert {c["n_neurons"] for c in conditions} == {"0", "40"}
    prompts = {p.id: p.prompt for p in read_prompts(tmp_path / "prompts.jsonl")}
    maps = (downs(a), downs(b))

    def said(chosen: Any, prompt: str) -> str:
        ids = tokenizer(prompt)["input_ids"]
        ends = [tokenizer.eos_token_id]
        [made] = patched_loop(a, b, maps, chosen, [ids], penalised(1.0), 2, ends)
        return str(tokenizer.decode(made, skip_special_tokens=True)).strip().rstrip("\ufffd")

    checked = [row for row in rows if row["condition"] in ("clean", "lives_in")]
    for row in checked[::2]:
        chosen = by_layer(sets.get(row["condition"], []))
        assert row["prediction"] == said(chosen, prompts[row["id"]]), row
    clean, own = (
        [row["prediction"] for row in rows if row["condition"] == name]
        for name in ("clean", "lives_in")
    )
    assert clean != own
    entry = Manifest(tmp_path / "one").data["stages"]["ablate"]
    words = [word for part in entry["commands"] for word in part]
    assert words[words.index("--from") + 1] == "b" and "patch" in words
    assert entry["inputs"]["donor"]["digest"] != Manifest(tmp_path / "one").data["model"]["digest"]
    # At the prompt's tokens only, and of a model that is the same: nothing changes.
    same = asked(copy.deepcopy(a), tmp_path / "same", positions="prompt", generate=3)
    found = {name: [r["prediction"] for r in same if r["condition"] == name] for name in sets}
    assert {str(some) for some in found.values()} == {
        str([r["prediction"] for r in same if r["condition"] == "clean"])
    }
    with pytest.raises(RelneuronError, match="belong together"):
        asked(b, tmp_path / "no", mode="zero", donor=None)
    with pytest.raises(RelneuronError, match="other inputs: donor.digest"):
        Manifest(tmp_path / "one").is_done(
            "ablate", entry["inputs"] | {"donor": entry["inputs"]["donor"] | {"digest": "x"}}
        )
