"""The modules of models that read pictures: found, proved, counted as plain hooks count them."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from bench.zoo.build import seed_weights
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import Shape
from relneuron.methods.counts.batches import Pictured
from relneuron.methods.counts.counter import Counter
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import check_sites, model_shape
from relneuron.model.patch import Patch
from relneuron.model.pictures import Processor, picture_run, sent
from relneuron.model.states import Tokens, mask_states
from relneuron.texts.pictures import open_picture
from tests.conftest import tiny_model
from tests.kit import pictures
from tests.kit.pictures import KINDS, MODULES, QUESTIONS, picture, places, plain_counts, tiny

Made = tuple[str, Any, Processor]


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest) -> Made:
    model, processor = tiny(request.param)
    return request.param, model, Processor(processor)


def parts_of(made: Made, *modules: str) -> list[Any]:
    _, model, processor = made
    return find_mlps(model, modules=modules, run=picture_run(model, processor))


def examples(made: Made) -> list[tuple[dict[str, Tensor], int]]:
    """Pictures of two sizes with questions of several lengths, in two groups."""
    found = []
    for i in range(5):
        image = picture(i, 16 + 8 * (i % 2))
        found.append((made[2].inputs([image], QUESTIONS[i], f"line {i}"), i % 2))
    return found


# --- found -----------------------------------------------------------------------------------


def test_the_modules_of_a_model_are_found(made: Made) -> None:
    kind, model, _ = made
    parts = parts_of(made, "all")
    shape = model_shape(parts)
    assert shape["modules"] == MODULES[kind] and shape["layers"] == sum(MODULES[kind].values())
    assert [part.layer for part in parts] == list(range(shape["layers"]))
    layer = 0
    for name, n in MODULES[kind].items():
        for number, place in enumerate(places(model, kind, name)):
            own = parts[layer]
            found = own.gate.module if name == "language" else own.down_map.module
            assert found is place, (name, number)
            assert own.is_gated == (name == "language")
            assert own.hidden == own.down_map.module.out_features == shape["hiddens"][layer]
            layer += 1
        assert n == number + 1
    assert layer == shape["layers"]
    order = Shape.of(shape)
    assert order.name(layer - 1, "gate", 5) == f"{name} L{n - 1}.gate.5"
    assert order.total == sum(
        (3 if p.is_gated else 2) * p.width - p.width + p.hidden for p in parts
    )


def test_a_module_alone_has_its_own_layers(made: Made) -> None:
    kind, *_ = made
    for asked in ("vision", "projector", "qformer"):
        own = {m: n for m, n in MODULES[kind].items() if m.startswith(asked)}
        if own:
            parts = parts_of(made, asked)
            assert model_shape(parts)["modules"] == own
            assert [part.layer for part in parts] == list(range(sum(own.values())))
            continue
        with pytest.raises(RelneuronError, match=f"has no module {asked}") as raised:
            parts_of(made, asked)
        assert raised.value.fix == f"it has {', '.join(MODULES[kind])}"
    language = model_shape(parts_of(made, "language"))
    assert "modules" not in language and language["layers"] == MODULES[kind]["language"]


def test_a_model_is_left_as_it_was(made: Made) -> None:
    """Transformers hooks a tower's layers in its first forward, for good: that must not be lost."""
    kind, *_ = made
    model, processor = tiny(kind)
    inputs = Processor(processor).inputs([picture(1)], "what?", "a")
    parts_of((kind, model, Processor(processor)), "all")
    fresh, _ = tiny(kind)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)


def test_other_modules_need_a_picture_and_have_no_attention() -> None:
    llama = tiny_model("llama")
    with pytest.raises(RelneuronError, match="need a forward with a picture"):
        find_mlps(llama, modules=("vision",))
    with pytest.raises(RelneuronError, match="attention"):
        find_mlps(llama, modules=("vision",), run=lambda: None, attention=True)
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(RelneuronError, match="has no module vision") as raised:
        find_mlps(llama, modules=("vision",), run=lambda: llama(ids))
    assert raised.value.fix == "it has language"


def test_a_site_that_only_some_modules_have_is_refused(made: Made) -> None:
    parts = parts_of(made, "all")
    for site in ("up", "product"):
        with pytest.raises(RelneuronError, match=f"module vision are not gated.* site {site}"):
            check_sites(parts, [site])
    check_sites(parts, ["gate", "act", "down"])
    check_sites(parts_of(made, "language"), ["up", "product"])


def test_an_mlp_that_the_language_model_never_sees_is_no_projector() -> None:
    model, processor = tiny("llava")

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(24, 20), nn.Linear(20, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(nn.functional.gelu(self.first(x)))  # type: ignore[no-any-return]

    model.model.aside = Aside().eval()
    true = model.model.multi_modal_projector.forward
    model.model.multi_modal_projector.forward = lambda x: (model.model.aside(x), true(x))[1]
    shape = model_shape(parts_of(("llava", model, Processor(processor)), "all"))
    assert shape["modules"] == MODULES["llava"]


_TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def qwen3_vl() -> tuple[Any, dict[str, Tensor]]:
    """Its second and third projector write into later layers of the language model only."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 40}
    vision |= {"num_heads": 2, "patch_size": 4, "num_position_embeddings": 64}
    config = transformers.Qwen3VLConfig(
        text_config=_TEXT | {"rope_parameters": rope, "rope_scaling": rope},
        vision_config=vision | {"deepstack_visual_indexes": [0, 1]},
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=6,
    )
    ids = torch.tensor([[10, 3, 5, 5, 5, 5, 4, 11, 12]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(16, 96)}
    inputs |= {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    model = transformers.Qwen3VLForConditionalGeneration(config)
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == 5).int()
    return model, inputs


def idefics2() -> tuple[Any, dict[str, Tensor]]:
    """Its learned queries read the pictures and themselves through the same maps."""
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    reader = {"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 2}
    reader |= {"resampler_head_dim": 8, "num_key_value_heads": 1, "hidden_size": 32}
    config = transformers.Idefics2Config(
        text_config=_TEXT | {"model_type": "mistral"},
        vision_config=vision,
        perceiver_config=reader,
        image_token_id=5,
    )
    ids = torch.tensor([[10, 5, 5, 5, 5, 11, 12]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 1, 3, 16, 16)}
    return transformers.Idefics2ForConditionalGeneration(config), inputs


@pytest.mark.parametrize(
    ("make", "modules"),
    [
        (qwen3_vl, {"language": 2, "vision": 3, "projector": 3}),
        (idefics2, {"language": 2, "vision": 2, "projector": 1, "qformer_query": 2}),
    ],
)
def test_modules_of_other_shapes(make: Any, modules: dict[str, int]) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    seed_weights(model.eval())
    parts = find_mlps(model, modules=("all",), run=lambda: model(**inputs))
    assert model_shape(parts)["modules"] == modules


# --- counted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["all", "vision", "language"])
def test_counts_are_those_of_plain_hooks(made: Made, asked: str) -> None:
    kind, model, _ = made
    given = examples(made)
    expected = plain_counts(model, kind, [(sent(model, x), g) for x, g in given], 2)
    counter = Counter(model, parts_of(made, asked), sites=("act", "gate"), moments=True)
    counter.grow(2)
    with counter:
        for inputs, group in given:
            counter.count(Pictured(inputs, group))
    found = counter.result(["a", "b"])
    layer = 0
    for name, n in MODULES[kind].items():
        if asked not in ("all", name):
            continue
        count, tokens = expected[name]
        inside = slice(layer, layer + n)
        for site in ("act", "gate"):  # each activation is above 0 where its input is
            ours = found.arrays[f"count.{site}"][:, inside]
            np.testing.assert_array_equal(ours[:, :, : count.shape[2]], count, err_msg=name)
            assert not ours[:, :, count.shape[2] :].any()
        np.testing.assert_array_equal(found.tokens_at()[:, inside], tokens, err_msg=name)
        layer += n
    assert found.arrays["count.act"].shape[1] == layer
    assert found.tokens.tolist() == found.tokens_at().max(axis=1).tolist()


class _Given(nn.Linear):
    """A map that gives E6's z for three tokens."""

    Z = torch.tensor([[1, -1, 0, 2], [0.5, 3, -2, -0.1], [-4, 0.2, 1, 0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.Z if len(x) == 3 else super().forward(x)


def test_the_published_vector_e6() -> None:
    """related_methods, section 6(h): three tokens, four neurons, SiLU."""
    model, processor = tiny("qwen2_vl")
    mlp = model.model.visual.merger.mlp
    mlp[0], mlp[1], mlp[2] = _Given(64, 4), nn.SiLU(), nn.Linear(4, 32)
    made = ("qwen2_vl", model.eval(), Processor(processor))
    inputs = made[2].inputs([picture(1, 24, 8)], "what?", "a")  # three tokens
    parts = parts_of(made, "projector")
    assert model_shape(parts)["width"] == 4 and parts[0].activation == "silu"
    counter = Counter(model, parts, moments=True)
    with counter:
        counter.count(Pictured(inputs, 0))
    found = counter.result(["a"])
    assert found.tokens.tolist() == [3]
    assert found.arrays["count.act"][0, 0].tolist() == [2, 2, 1, 1]
    sums = {
        "sum": [0.9703434, 2.6987478, 0.4926527, 1.7140921],
        "sum_sq": [0.6364866, 8.2509994, 0.5912840, 3.1054704],
        "max": [0.7310586, 2.8577224, 0.7310586, 1.7615942],
    }
    for name, values in sums.items():
        np.testing.assert_allclose(found.arrays[f"{name}.act"][0, 0], values, atol=1e-6)
    seen: list[Tensor] = []
    handle = mlp[2].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    patch = Patch(parts, mask_states([[(0, "gate", 1)]], parts))
    patch.tokens = Tokens(conditions=torch.tensor(0, dtype=torch.int32))
    with patch, torch.no_grad():
        model(**sent(model, inputs))
    handle.remove()
    assert (seen[0] > 0).sum(0).tolist() == [2, 0, 1, 1] and float(seen[0][:, 1].sum()) == 0


def test_neurons_of_every_module_are_switched_off(made: Made) -> None:
    """One condition for all tokens of a forward, in every module: as hooks that zero them."""
    kind, model, processor = made
    parts = parts_of(made, "all")
    inputs = sent(model, processor.inputs([picture(3)], QUESTIONS[0], "a"))
    chosen = [(part.layer, site, i) for part in parts for site in ("gate", "down") for i in (1, 7)]
    patch = Patch(parts, mask_states([[], chosen], parts))
    off = []
    for number in (0, 1):
        patch.tokens = Tokens(conditions=torch.tensor(number, dtype=torch.int32))
        with patch, torch.no_grad():
            off.append(model(**inputs).logits)

    def zero(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., [1, 7]] = 0
        return x

    with torch.no_grad():
        clean = model(**inputs).logits
        handles = []
        for part in parts:
            down = part.down_map.module
            handles.append(down.register_forward_pre_hook(lambda _, x: (zero(x[0]),)))
            handles.append(down.register_forward_hook(lambda _, x, y: zero(y)))
        expected = model(**inputs).logits
        for handle in handles:
            handle.remove()
    assert torch.allclose(off[0], clean, atol=1e-5) and torch.allclose(off[1], expected, atol=1e-4)
    assert not torch.allclose(clean, expected, atol=1e-2)


# --- processors ------------------------------------------------------------------------------


def test_a_picture_stands_before_the_text(made: Made) -> None:
    kind, _, processor = made
    token = {"llava": "<image>", "qwen2_vl": "<|image_pad|>", "instructblip": ""}[kind]
    marker = {"qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>"}.get(kind, token)
    assert processor.marker == marker
    alone = processor.inputs([picture(1)], "what?", "a")
    assert all(isinstance(value, Tensor) for value in alone.values()) and "pixel_values" in alone
    if not marker:
        assert (alone["input_ids"] == 3).sum() == 4  # its queries, put there by the processor
        return
    written = processor.inputs([picture(1)], f"{marker}\nwhat?", "a")
    assert alone.keys() == written.keys()
    assert all(torch.equal(alone[name], written[name]) for name in alone)
    with pytest.raises(RelneuronError, match="^line 7: the text has 2 .*, the record 1 pictures"):
        processor.inputs([picture(1)], 2 * marker, "line 7")
    two = processor.inputs([picture(1), picture(2)], "both?", "a")
    own = processor.tokenizer.convert_tokens_to_ids(token)
    assert (two["input_ids"] == own).sum() == 2 * (alone["input_ids"] == own).sum()


def test_what_a_processor_does_not_take_is_an_error_that_names_the_line() -> None:
    _, processor = tiny("instructblip")
    made = Processor(processor)

    def refuse(**_: Any) -> None:
        raise ValueError("the Q-Former needs a text")

    made.processor = refuse
    with pytest.raises(RelneuronError, match="^a.jsonl, line 3: the processor does not take it"):
        made.inputs([picture(1)], "", "a.jsonl, line 3")


def test_a_text_that_is_padded_is_refused() -> None:
    """Its padding would be counted."""
    _, processor = tiny("llava")
    made = Processor(processor)
    true = processor.__call__

    def padded(**asked: Any) -> Any:
        return true(**asked, padding="max_length", max_length=40)

    made.processor = padded
    with pytest.raises(RelneuronError, match="^line 3: the processor pads a text that is alone"):
        made.inputs([picture(1)], "what?", "line 3")


def test_a_processor_is_known_by_its_content(tmp_path: Any, made: Made) -> None:
    kind, _, processor = made
    pictures.register()
    digests = []
    for name in ("one", "two"):
        pictures.save(kind, tmp_path / name)
        loaded = transformers.AutoProcessor.from_pretrained(tmp_path / name)
        digests.append(Processor(loaded).digest())
    assert digests[0] == digests[1]
    loaded.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert Processor(loaded).digest() != digests[0]


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Any) -> None:
    image, exif = picture(1, 20, 12), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image.convert("RGBA").save(tmp_path / "plain.png")
    assert open_picture(tmp_path / "turned.jpg", "a").size == (12, 20)
    plain = open_picture(tmp_path / "plain.png", "a")
    assert (plain.mode, plain.size) == ("RGB", (20, 12))
    assert plain.tobytes() == open_picture((tmp_path / "plain.png").read_bytes(), "a").tobytes()
