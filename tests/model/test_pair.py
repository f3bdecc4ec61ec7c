"""Two models that fit together, or what is different; and what their down maps read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.options import LoadOptions
from relneuron.model.adapters import load_adapter
from relneuron.model.pair import Held, Taps, load_pair, pair_of, read_both, running
from tests.conftest import tiny_model
from tests.kit.experts import expert_model
from tests.kit.pairs import Words, moved, peft_model, save_adapter
from tests.kit.speakers import byte_level

# --- what does not fit -----------------------------------------------------------------------

DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 2}, "number of layers 3 and 2"),
    "hidden": ({"hidden_size": 64}, "hidden size 32 and 64"),
    "width": ({"intermediate_size": 64}, "width of the MLPs 48 and 64"),
    "activation": ({"hidden_act": "gelu"}, "activation silu and gelu"),
    "vocabulary": ({"vocab_size": 97}, "number of tokens 96 and 97"),
    "dtype": ({"dtype": torch.bfloat16}, "dtype float32 and bfloat16"),
}


def refused(a: Any, b: Any, *tokenizers: Any) -> str:
    tokenizers = tokenizers or (Words(),)
    with pytest.raises(RelneuronError) as error:
        pair_of(a, b, *tokenizers, names=("one", "two"))
    assert "\n" not in error.value.cause + error.value.fix
    return error.value.cause.removeprefix("one and two do not fit together: they have different ")


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_pair_that_does_not_fit_is_refused_with_the_difference(name: str) -> None:
    changes, said = DIFFERENT[name]
    assert refused(tiny_model("llama"), tiny_model("llama", **changes)) == said


def test_mlps_of_another_kind() -> None:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = GPTNeoXConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)
    ungated = AutoModelForCausalLM.from_config(config).eval()
    assert refused(tiny_model("llama"), ungated) == "kind of MLP gated and not gated"


def test_experts_are_refused() -> None:
    model = expert_model("mixtral")
    with pytest.raises(RelneuronError, match="layer 0 has experts"):
        pair_of(model, model, Words())


def test_tokenizers_of_other_tokens_or_templates() -> None:
    a, b = byte_level(["cat", "dog"]), byte_level(["dog", "cat"])
    model = tiny_model("llama", vocab_size=400)
    said = refused(model, model, a, b)
    assert said.startswith("vocabularies, in which ") and " is token " in said
    bigger = byte_level(["cat", "dog", "owl"])
    assert " and no token" in refused(model, model, bigger, a)
    chat = byte_level(["cat", "dog"])
    chat.chat_template = "{{ messages }}"
    assert refused(model, model, a, chat) == "chat templates (none and one)"
    marked = byte_level(["cat", "dog"], around="none")
    assert "rules by which text becomes tokens" in refused(model, model, a, marked)
    assert pair_of(model, model, a, byte_level(["cat", "dog"])).tokenizer is a


# --- folders ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    model = tiny_model("llama", vocab_size=400)
    for name, one in {"a": model, "b": moved(model)}.items():
        one.save_pretrained(root / name)
        byte_level(["cat"]).save_pretrained(root / name)
    save_adapter("ia3", root / "adapter", model=model)
    return {path.name: path for path in root.iterdir()}


CPU = LoadOptions(device="cpu")


def test_two_folders_or_a_folder_and_an_adapter(folders: dict[str, Path]) -> None:
    a, b = str(folders["a"]), str(folders["b"])
    pair = load_pair(a, b, CPU)
    assert pair.a is not pair.b and pair.adapter is None
    assert [described["id"] for described in pair.described] == [a, b]
    digests = {described["digest"] for described in pair.described}
    adapter = str(folders["adapter"])
    adapted = load_pair(a, adapter, CPU)
    assert adapted.a is adapted.b and adapted.adapter is not None
    assert [described["id"] for described in adapted.described] == [a, adapter]
    assert adapted.described[0]["digest"] == pair.described[0]["digest"]
    assert adapted.described[1]["digest"] not in digests
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = pair.a(ids).logits
        with adapted.only("a") as model:
            assert torch.equal(model(ids).logits, plain)
        with adapted.only("b") as model:
            assert not torch.allclose(model(ids).logits, plain)
        assert torch.equal(adapted.a(ids).logits, plain)


def test_an_adapter_of_another_model_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    import json

    folder = save_adapter("lora", tmp_path, model=tiny_model("llama", vocab_size=400))
    about = json.loads((folder / "adapter_config.json").read_text())
    text = json.dumps(about | {"base_model_name_or_path": "some/model"})
    (folder / "adapter_config.json").write_text(text)
    with pytest.warns(UserWarning, match="says that it is an adapter of some/model, not of"):
        load_pair(str(folders["a"]), str(folder), CPU)
    byte_level(["dog"]).save_pretrained(folder)
    with pytest.raises(RelneuronError, match="different vocabularies"), pytest.warns(UserWarning):
        load_pair(str(folders["a"]), str(folder), CPU)


def test_an_adapter_first_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(RelneuronError, match="no model by itself"):
        load_pair(str(folders["adapter"]), str(folders["a"]), CPU)


# --- what a down map reads -------------------------------------------------------------------


def rows(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ids, torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids)


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_taps_show_and_change_what_a_map_reads(family: str) -> None:
    model = tiny_model(family)
    mlps, seen = running(model), []

    def look(number: int, h: Tensor) -> None:
        seen.append((number, tuple(h.shape)))

    with torch.no_grad():
        plain = model(IDS).logits
        with Taps(mlps, look):
            assert torch.equal(model(IDS).logits, plain)
        assert seen == [(layer, (2, 4, 48)) for layer in range(3)]
        with Taps(mlps, lambda number, h: torch.zeros_like(h) if number == 1 else None):
            changed = model(IDS).logits
        assert torch.equal(model(IDS).logits, plain)
        model.model.layers[1].mlp.down_proj.weight.zero_()
        assert torch.equal(model(IDS).logits, changed)
    assert not torch.equal(changed, plain)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_taps_come_off_behind_an_error_and_stand_on_others() -> None:
    model = tiny_model("llama")
    mlps, order = running(model), []
    with pytest.raises(KeyError), Taps(mlps, lambda *_: order.append("outer")):
        with Taps(mlps, lambda *_: order.append("inner")), torch.no_grad():
            model(IDS)
        assert order == ["inner", "outer"] * 3
        raise KeyError
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_model_that_does_not_run_its_layers_is_refused() -> None:
    """Nothing is compared in silence where a layer is left out, or runs twice."""
    a, b = tiny_model("llama"), tiny_model("llama")
    pair = pair_of(a, b, Words())
    whole = b.model.layers
    b.model.layers = torch.nn.ModuleList([whole[0], whole[2], whole[1]])
    with pytest.raises(RelneuronError, match="runs the MLP of layer 2 out of turn"):
        read_both(pair, rows(IDS), lambda *_: None)
    b.model.layers = torch.nn.ModuleList(list(whole)[:2])
    b.model.config.num_hidden_layers = 2
    with pytest.raises(RelneuronError, match="did not call the down map of layer 2"):
        read_both(pair, rows(IDS), lambda *_: None)


def test_a_model_that_turns_its_batch_around_is_refused() -> None:
    """Its tokens would count in each other's groups."""
    a, b = tiny_model("llama"), tiny_model("llama")
    pair = pair_of(a, b, Words())
    mlp = b.model.layers[1].mlp
    plain = type(mlp).forward
    mlp.__dict__["forward"] = lambda x: plain(mlp, x.transpose(0, 1)).transpose(0, 1)
    with pytest.raises(RelneuronError, match=r"layer 1 reads \(4, 2\) tokens of a batch of \(2, 4"):
        read_both(pair, rows(IDS), lambda *_: None)


def test_an_adapted_model_in_memory_is_read_behind_its_scale(tmp_path: Path) -> None:
    """As peft holds it, in a pair of two models: the same as the adapter's rows."""
    save_adapter("ia3 of down", tmp_path)
    a, b = tiny_model("llama"), peft_model(tmp_path).get_base_model()
    adapted = tiny_model("llama")
    one = pair_of(adapted, adapted, Words())
    pairs = [
        pair_of(a, b, Words()),
        replace(one, adapter=load_adapter(adapted, str(tmp_path))),
    ]
    seen: list[list[Tensor]] = [[], []]
    for pair, found in zip(pairs, seen, strict=True):
        read_both(pair, rows(IDS), lambda _, a, b, found=found: found.extend((a, b)))
    for two, both in zip(*seen, strict=True):
        assert torch.allclose(two, both, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(seen[0][0], seen[0][1], rtol=0.1)


def test_what_a_left_is_held_in_the_same_memory_for_all_batches() -> None:
    """Of a smaller batch in a part of it; a larger one gets more."""
    a = tiny_model("llama")
    pair, held = pair_of(a, moved(a), Words()), Held()
    alone = pair_of(a, a, Words())
    places: list[list[int]] = []
    for ids in (IDS, IDS[:1], IDS, torch.cat([IDS, IDS])):
        places.append([])

        def see(_: int, one: Tensor, __: Tensor) -> None:
            places[-1].append(one.data_ptr())  # noqa: B023

        read_both(pair, rows(ids), see, held)
        # And it is A's, whatever was there before.
        read_both(alone, rows(ids), lambda _, one, two: assert_equal(one, two), held)
    assert places[0] == places[1] == places[2] and len({*places[0]}) == 3


def assert_equal(one: Tensor, two: Tensor) -> None:
    assert torch.equal(one, two) and one.data_ptr() != two.data_ptr()
