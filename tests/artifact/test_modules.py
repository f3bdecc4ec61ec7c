"""What files say of the modules of a model: layers, the shape of each, names of neurons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relneuron.artifact.counts import RAN, Counts, tokens_of_modules
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.modules import is_asked, layers_of, module_layers, module_shape
from relneuron.artifact.neurons import NeuronFile, Shape, check_neurons, random_neurons, shape_of

# Two gated layers of experts, three of a tower of two widths, a projector.
MODEL: dict[str, Any] = {
    "layers": 6,
    "width": 12,
    "hidden": 8,
    "widths": [12, 12, 5, 5, 7, 6],
    "hiddens": [8, 8, 4, 4, 4, 8],
    "gated": [True, True, False, False, False, False],
    "experts": [3, 3, 0, 0, 0, 0],
    "expert_width": 4,
    "modules": {"language": 2, "vision": 3, "projector": 1},
}
ALONE: dict[str, dict[str, Any]] = {
    "language": {"layers": 2, "width": 12, "hidden": 8, "experts": [3, 3], "expert_width": 4},
    "vision": {
        "layers": 3,
        "width": 7,
        "hidden": 4,
        "widths": [5, 5, 7],
        "gated": False,
        "modules": {"vision": 3},
    },
    "projector": {
        "layers": 1,
        "width": 6,
        "hidden": 8,
        "gated": False,
        "modules": {"projector": 1},
    },
}


def test_the_layers_of_each_module_are_numbered_through() -> None:
    expected = {"language": range(2), "vision": range(2, 5), "projector": range(5, 6)}
    assert module_layers(MODEL) == layers_of(MODEL["modules"].items()) == expected
    assert module_layers({"layers": 3, "width": 4, "hidden": 5}) == {"language": range(3)}


@pytest.mark.parametrize("name", MODEL["modules"])
def test_a_module_has_the_shape_that_it_would_have_alone(name: str) -> None:
    alone = module_shape(MODEL, name)
    assert alone == ALONE[name]
    whole, own = Shape.of(MODEL), Shape.of(alone)
    for inside, layer in enumerate(module_layers(MODEL)[name]):
        for site in own.widths:
            assert own.width(inside, site) == whole.width(layer, site)


def test_the_places_of_neurons() -> None:
    order = Shape.of(MODEL)
    assert order.total == 2 * (12 + 12 + 8) + 2 * (5 + 4) + (7 + 4) + (6 + 8)
    everything = order.neurons(np.arange(order.total))
    assert len(set(everything)) == order.total
    assert np.array_equal(order.places(everything), np.arange(order.total))
    assert not any(site == "up" for layer, site, _ in everything if layer > 1)
    assert check_neurons(everything, MODEL) == everything
    for neuron in [(2, "up", 0), (2, "gate", 5), (4, "down", 4), (6, "gate", 0)]:
        with pytest.raises(RelneuronError, match="is not in a model"):
            check_neurons([neuron], MODEL)
    assert set(random_neurons(MODEL, 10**6, 0)) == set(everything)


def test_names_say_the_module_and_the_layer_inside() -> None:
    order = Shape.of(MODEL)
    assert order.name(4, "gate", 6) == "vision L2.gate.6"
    assert order.name(5, "down", 7) == "projector L0.down.7"
    assert order.name(1, "up", 9) == "language L1 expert 2 up 1"
    assert Shape.of({"layers": 2, "width": 3, "hidden": 4}).name(1, "up", 2) == "L1.up.2"


def test_words_that_mean_modules() -> None:
    assert is_asked("qformer_text", "qformer") and is_asked("qformer_query", "qformer")
    assert is_asked("vision", "all") and is_asked("vision", "vision")
    assert not is_asked("vision", "qformer") and not is_asked("qformer_text", "text")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"modules": {"vision": 3, "language": 2, "projector": 1}}, "model.modules"),
        ({"modules": {"language": 2, "vision": 3}}, "model.modules"),
        ({"modules": {"language": 2, "vision": 4, "audio": 0}}, "model.modules"),
        ({"modules": {"language": 2, "vision": "3", "projector": 1}}, "model.modules"),
        ({"modules": [2, 3, 1]}, "model.modules"),
        ({"hiddens": [8, 8]}, "model.widths, .hiddens or .experts"),
        ({"hiddens": [9, 8, 4, 4, 4, 8]}, "model.widths, .hiddens or .experts"),
        ({"gated": [True]}, "model.widths, .hiddens or .experts"),
        ({"gated": [1, 1, 0, 0, 0, 0]}, "model.widths, .hiddens or .experts"),
    ],
)
def test_a_file_of_modules_that_do_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    path = tmp_path / "neurons.json"
    NeuronFile(MODEL, "lape", {"a": [(4, "gate", 6, 0.5)]}, {}).write(path)
    assert shape_of(NeuronFile.read(path).model) == MODEL
    data = json.loads(path.read_text())
    data["model"] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(RelneuronError, match=f"{says} is not"):
        NeuronFile.read(path)


def counts(*tokens: list[int]) -> Counts:
    ran = np.array(tokens, np.int64)
    arrays = {"count.act": ran[:, :, None].repeat(3, 2)}
    return Counts(["a", "b"], ran.max(1), arrays, {RAN: ran})


def test_tokens_of_counts_that_are_added_are_those_of_the_module_that_ran_the_most() -> None:
    one, two = counts([5, 9], [2, 1]), counts([10, 4], [1, 1])
    both = one + two
    assert both.tokens.tolist() == [15, 3] and both.beside[RAN].tolist() == [[15, 13], [3, 2]]
    model = {"layers": 2, "modules": {"language": 1, "vision": 1}}
    assert tokens_of_modules(model, both) == {
        "language": [("a", 15), ("b", 3)],
        "vision": [("a", 13), ("b", 2)],
    }
    vision = both.of_layers(range(1, 2))
    assert vision.tokens.tolist() == [13, 2] and vision.arrays["count.act"].shape == (2, 1, 3)
