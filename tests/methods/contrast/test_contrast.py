"""Two models on the same tokens: S and its like against plain hooks, one prompt after the other."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.artifact.contrast import NAME, Contrast
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.methods.contrast.contrast import contrast
from relneuron.methods.contrast.options import ContrastOptions
from relneuron.model.adapters import load_adapter
from relneuron.model.pair import Pair, pair_of, running
from tests.conftest import tiny_model
from tests.kit.contrasted import contrast_of
from tests.kit.pairs import (
    ADAPTERS,
    Words,
    ignoring_peft,
    moved,
    peft_model,
    read_by,
    save_adapter,
    write_prompts,
    written_by,
)

N_NEW = 7
FAMILIES = ("llama", "phi3", "gpt_neox", *ADAPTERS)  # gated, packed, not gated


def ungated() -> Any:
    import transformers

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = transformers.GPTNeoXConfig(
        **sizes, num_attention_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pair, prompts, and what the two as plain models read of them."""
    folder = tmp_path_factory.mktemp(request.param)
    prompts = write_prompts(folder / "p.jsonl")
    if request.param not in ADAPTERS:
        a = ungated() if request.param == "gpt_neox" else tiny_model(request.param)
        b = moved(a)
        maps = [mlp.product.path for mlp in running(a)]
        return pair_of(a, b, Words()), prompts, read_by_hand((a, b), (maps, maps), prompts)
    save_adapter(request.param, folder)
    a, b = tiny_model("llama"), peft_model(folder)
    maps = [mlp.product.path for mlp in running(a)]
    return adapted(folder), prompts, read_by_hand((a, b), (maps, innermost(b, maps)), prompts)


def adapted(folder: Path) -> Pair:
    model = tiny_model("llama")
    one = pair_of(model, model, Words())
    adapter = load_adapter(model, str(folder))
    return Pair(model, model, Words(), one.mlps, adapter, one.described)


def innermost(peft: Any, maps: list[str]) -> list[str]:
    """The paths of the maps beneath their adapters: behind the scale of an (IA)3."""
    paths = [f"base_model.model.{path}" for path in maps]
    names = dict(peft.named_modules())
    return [f"{path}.base_layer" if f"{path}.base_layer" in names else path for path in paths]


def run(pair: Pair, prompts: Path, folder: Path, **asked: Any) -> Contrast:
    options = ContrastOptions(**{"max_new_tokens": N_NEW, "batch_tokens": 70} | asked)
    made = contrast(pair, prompts, folder, options, quiet=True)
    assert made is not None
    written = Contrast.read(folder / NAME)
    for name, array in made.contrast.tensors().items():
        assert np.array_equal(array, written.tensors()[name], equal_nan=True), name
    return written


Values = np.ndarray[Any, Any]
Read = dict[str, list[tuple[str, int, list[Values]]]]  # by the writer: group, n, (T, L, F) of both


def read_by_hand(models: tuple[Any, Any], maps: Any, prompts: Path) -> tuple[Read, Read]:
    """Every prompt and its completion, one at a time, as both models read it; and in float64."""
    exact = [deepcopy(model).double() for model in models]
    found: tuple[Read, Read] = ({}, {})
    for line in map(json.loads, prompts.read_text().splitlines()):
        ids = [1, *map(int, line["prompt"].split())]
        for name, writer in zip("ab", models, strict=True):
            whole = ids + written_by(writer, ids, N_NEW)
            for readers, read in zip((models, exact), found, strict=True):
                both = [
                    read_by(m, own, whole).numpy() for m, own in zip(readers, maps, strict=True)
                ]
                read.setdefault(name, []).append((line["group"], len(ids), both))
    return found


def compared(read: Read, asked: dict[str, Any]) -> dict[str, tuple[Values, Values]]:
    """Of each group the values (T, L, F) of both models that are compared, by a plain loop."""
    found: dict[str, Any] = {}
    for group, n, both in read[asked.get("completion_by", "a")]:
        kept = {
            "completion": [t for t in range(len(both[0])) if t >= n],
            "predicting": [t for t in range(len(both[0])) if n <= t + 1 < len(both[0])],
            "prompt": [t for t in range(len(both[0])) if t < n],
            "last": [n - 1],
        }[asked.get("positions", asked.get("tokens", "completion"))]
        for side, values in enumerate(both):
            found.setdefault(group, ([], []))[side].append(values[kept])
    return {g: (np.concatenate(a), np.concatenate(b)) for g, (a, b) in found.items()}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"positions": "predicting"},
        {"completion_by": "b"},
        {"tokens": "prompt"},
        {"tokens": "last", "batch_tokens": 8192},
    ],
    ids=lambda asked: "-".join(map(str, asked.values())),
)
def test_statistics_are_those_of_plain_hooks(case: Any, tmp_path: Path, asked: Any) -> None:
    """S, means and deviations to the accuracy rule, counts and tokens exactly, in each group."""
    pair, prompts, (single, exact) = case
    ours = run(pair, prompts, tmp_path, **asked)
    values = compared(exact, asked)
    plain, truth = contrast_of(compared(single, asked)), contrast_of(values)
    assert ours.groups == plain.groups == ["x", "y", "z"]
    assert ours.tokens.tolist() == truth.tokens.tolist() and ours.tokens.min() > 0
    for name in ("count.a", "count.b"):
        assert np.array_equal(ours.arrays[name], truth.arrays[name]), name
    whole = [np.concatenate([values[g][side] for g in ours.groups]) for side in (0, 1)]
    # The terms of a difference are those that it is made of.
    terms = np.sqrt(((np.abs(whole[0]) + np.abs(whole[1])) ** 2).mean(0))
    check(ours.rms(), truth.rms(), plain.rms(), terms)
    for site in ("a", "b"):
        check(ours.mean(site), truth.mean(site), plain.mean(site), terms)
        check(ours.std(site), truth.std(site), plain.std(site), terms)
    assert truth.rms().max() > 1e-3


def check(ours: Values, truth: Values, plain: Values, scale: Values) -> None:
    """As near to the truth as plain hooks are in float32, and one rounding of each layer.

    Of each layer the worst neuron: batches of another shape round elsewhere.
    """
    worst, base = (np.abs(x - truth).max(1) for x in (ours, plain))
    rounded = np.arange(1, len(ours) + 1) * np.finfo(np.float32).eps * scale.max(1)
    assert (worst <= 2 * base + rounded).all(), (worst, base)


# --- what must be exact ----------------------------------------------------------------------


def test_two_equal_models_do_not_differ_at_all(tmp_path: Path) -> None:
    """S = 0 of every neuron, exactly; also of an adapter that adds nothing."""
    from peft import LoraConfig, get_peft_model

    prompts = write_prompts(tmp_path / "p.jsonl")
    found = run(pair_of(tiny_model("llama"), tiny_model("llama"), Words()), prompts, tmp_path / "o")
    assert found.tokens.sum() > 30 and found.arrays["sum_sq.a"].all()
    for name, array in found.arrays.items():
        if name.endswith("difference"):
            assert not array.any(), name
        if name.endswith(".a"):
            assert np.array_equal(array, found.arrays[f"{name[:-1]}b"]), name
    assert not found.rms().any()
    fresh = LoraConfig(target_modules=["q_proj", "down_proj"], r=2)
    with ignoring_peft():
        get_peft_model(tiny_model("llama"), fresh).save_pretrained(str(tmp_path / "fresh"))
    found = run(adapted(tmp_path / "fresh"), prompts, tmp_path / "adapted")
    assert found.tokens.sum() > 30 and not found.rms().any()


def test_sums_are_those_of_what_the_maps_read(tmp_path: Path) -> None:
    """Of the very forwards of the pass: differences are summed, and never moments subtracted."""
    a = tiny_model("llama")
    b, seen = moved(a, scale=1e-6), [[], []]  # type: ignore[var-annotated]
    for side, model in enumerate((a, b)):
        for layer in model.model.layers:
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _, x, side=side: seen[side].append(x[0])
            )
    prompts = write_prompts(tmp_path / "p.jsonl", 4, groups="x")
    pair = pair_of(a, b, Words())
    for side in seen:
        side.clear()
    found = run(pair, prompts, tmp_path / "o", tokens="prompt", batch_tokens=8192)
    one, other_one = (torch.stack(side).double() for side in seen)  # (L, B, T, F)
    inside = torch.zeros(one.shape[1:3], dtype=torch.bool)
    for row, line in enumerate(prompts.read_text().splitlines()):
        inside[row, -len(json.loads(line)["prompt"].split()) - 1 :] = True
    gap = (one - other_one).float().double()[:, inside]
    assert np.allclose(found.rms(), gap.square().mean(1).sqrt().numpy(), rtol=1e-6, atol=0)
    assert 0 < found.rms().max() < 1e-5 < found.mean("a").max()


def test_every_batch_is_one_or_two_forwards_without_the_end(tmp_path: Path) -> None:
    """Of an adapter one of twice the rows; of two models one each; none reaches the last map."""
    save_adapter("ia3", tmp_path / "ia3")
    prompts = write_prompts(tmp_path / "p.jsonl", 6)
    a = tiny_model("llama")
    pairs = {"adapter": adapted(tmp_path / "ia3"), "models": pair_of(a, moved(a), Words())}
    rows: list[tuple[str, int]] = []
    for name, pair in pairs.items():
        for side, model in {"a": pair.a, "b": pair.b}.items():
            model.model.embed_tokens.register_forward_hook(
                lambda _, x, y, side=side: rows.append((side, len(x[0])))
            )
            model.model.norm.register_forward_hook(lambda *_: rows.append(("norm", 0)))
        rows.clear()
        run(pair, prompts, tmp_path / name, tokens="last", batch_tokens=8192)
        # The one forward of an adapter is seen by the hooks of both names.
        n = {"adapter": 12, "models": 6}[name]
        assert rows == [("a", n), ("b", n)]


# --- prompts ---------------------------------------------------------------------------------


def test_templates_and_chat_templates(tmp_path: Path) -> None:
    """The model reads the template's text, and the chat template's around it."""
    pair = pair_of(tiny_model("llama"), moved(tiny_model("llama")), Chat())
    (tmp_path / "p.txt").write_text("5 6\n7\n")
    read: list[list[int]] = []
    pair.b.model.embed_tokens.register_forward_hook(lambda _, x, y: read.extend(x[0].tolist()))
    asked = {"tokens": "prompt", "template": "30 {prompt} 31", "batch_tokens": 1}
    found = run(pair, tmp_path / "p.txt", tmp_path / "o", **asked)
    assert read == [[1, 30, 5, 6, 31], [1, 30, 7, 31]] and found.groups == ["prompts"]
    read.clear()
    run(pair, tmp_path / "p.txt", tmp_path / "chat", chat_template=True, **asked)
    assert read == [[1, 40, 30, 5, 6, 31, 41], [1, 40, 30, 7, 31, 41]]


class Chat(Words):
    chat_template = "40 ... 41"

    def apply_chat_template(self, turns: Any, **_: Any) -> str:
        return f"40 {turns[0]['content']} 41"


def test_a_completion_that_ends_at_once(tmp_path: Path) -> None:
    """It has no token: none is compared, and a contrast of such alone is refused."""
    a = tiny_model("llama")
    a.generation_config.eos_token_id = list(range(96))
    pair = pair_of(a, moved(a), Words())
    prompts = write_prompts(tmp_path / "p.jsonl", 3)
    with pytest.raises(RelneuronError, match="no completion has a token") as error:
        run(pair, prompts, tmp_path / "o")
    assert "--tokens prompt" in error.value.fix
    assert not (tmp_path / "o" / NAME).exists()
    first = written_by(tiny_model("llama"), [1, 5], 1)[0]
    pair.a.generation_config.eos_token_id = first
    (tmp_path / "two.jsonl").write_text(
        '{"prompt": "5", "group": "none"}\n{"prompt": "9 11", "group": "some"}\n'
    )
    with pytest.warns(UserWarning, match="group 'none' has no token that was compared"):
        found = run(pair, tmp_path / "two.jsonl", tmp_path / "two")
    assert found.tokens[0] == 0 < found.tokens[1]


def test_the_manifest_names_both_models(tmp_path: Path) -> None:
    a = tiny_model("llama")
    prompts = write_prompts(tmp_path / "p.jsonl")
    found = run(pair_of(a, moved(a), Words(), names=("one", "two")), prompts, tmp_path)
    manifest = Manifest(tmp_path).data
    assert (manifest["model"]["id"], manifest["model_b"]["id"]) == ("one", "two")
    assert manifest["model"]["digest"] != manifest["model_b"]["digest"]
    assert manifest["tokens"]["compared"] == dict(zip("xyz", found.tokens.tolist(), strict=True))
    [[name, *words]] = manifest["stages"]["contrast"]["commands"]
    assert name == "contrast" and words[:4] == ["one", "two", "STUDY/p.jsonl", "-o"]
    assert "--positions" in words
