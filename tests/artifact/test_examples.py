"""examples.safetensors: written, read whole and by neuron, added in any parts, and damaged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from relneuron.artifact.examples import Example, Examples, Windows, best, examples_of, used
from relneuron.artifact.files import RelneuronError

GROUPS = ["en", "日本語"]
LAYERS, K = 2, 3
WIDTHS = {"act": 4, "down": 5}
Array = np.ndarray[Any, Any]


class Corpus:
    """Windows of tokens of two groups, and what each neuron is at each token: whole numbers."""

    def __init__(self, n: int = 7, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.windows = {
            (g, w): rng.integers(0, 99, rng.integers(1, 6)).astype(np.int32)
            for g in range(2)
            for w in range(n + g)
        }
        self.values = {
            (key, site): rng.integers(-2, 3, (LAYERS, width, len(ids))).astype(np.float32)
            for key, ids in self.windows.items()
            for site, width in WIDTHS.items()
        }
        self.n_windows = np.array([n, n + 1], np.int64)

    def strongest(
        self, group: int, layer: int, site: str, index: int, chosen: Sequence[tuple[int, int]]
    ) -> list[tuple[float, int, int]]:
        """(value, number, position), by a loop over the tokens."""
        found = []
        for (g, number), _ in self.windows.items():
            if g == group and (g, number) in chosen:
                row = self.values[(g, number), site][layer, index].tolist()
                top = max(row)
                found.append((top, number, row.index(top)))
        return sorted(found, key=lambda one: (-one[0], one[1], one[2]))[:K]

    def examples(self, chosen: Sequence[tuple[int, int]] | None = None) -> Examples:
        """Those of some windows, as a stage makes them."""
        chosen = list(self.windows) if chosen is None else chosen
        value, number, position = {}, {}, {}
        for site, width in WIDTHS.items():
            size = (2, LAYERS, width, K)
            value[site] = np.full(size, -np.inf, np.float32)
            number[site], position[site] = np.full(size, -1), np.full(size, -1, np.int32)
            for place in itertools.product(range(2), range(LAYERS), range(width)):
                g, layer, index = place
                for rank, one in enumerate(self.strongest(g, layer, site, index, chosen)):
                    tables = (value[site], number[site], position[site])
                    for table, own in zip(tables, one, strict=True):
                        table[*place, rank] = own
        kept = Windows.of({key: self.windows[key] for key in used(number)})
        return Examples.of_numbers(GROUPS, value, number, position, kept, self.n_windows)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


def test_a_file_gives_back_what_was_written(corpus: Corpus, tmp_path: Path) -> None:
    made = corpus.examples()
    made.write(tmp_path / "e.safetensors")
    read = Examples.read(tmp_path / "e.safetensors")
    assert read.to_bytes() == made.to_bytes()
    assert (read.sites, read.k, read.groups) == (["act", "down"], K, GROUPS)


def test_a_neuron_is_read_alone(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    corpus.examples().write(path)
    every = list(corpus.windows)
    neurons = [(0, "act", 3), (1, "down", 4)]
    for neuron, found in zip(neurons, examples_of(path, neurons), strict=True):
        rows = [(e.group, e.rank, e.value, e.number, e.position) for e in found]
        assert rows == [
            (GROUPS[g], rank, *one)
            for g in range(2)
            for rank, one in enumerate(corpus.strongest(g, *neuron, every), 1)
        ]
        for one in found:
            own = corpus.windows[GROUPS.index(one.group), one.number]
            assert one.ids.tolist() == own.tolist()
            assert one.token == own[one.position]
    (only,) = examples_of(path, neurons[:1], "日本語")
    assert [e.group for e in only] == ["日本語"] * K


def test_what_a_file_does_not_have_is_said(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    corpus.examples().write(path)
    for neuron in ((2, "act", 0), (-1, "act", 0), (0, "act", 4), (0, "gate", 0)):
        with pytest.raises(RelneuronError, match="has no neuron"):
            examples_of(path, [neuron])
    with pytest.raises(RelneuronError, match="no group 'fr'"):
        examples_of(path, [(0, "act", 0)], "fr")
    with pytest.raises(RelneuronError) as caught:
        examples_of(tmp_path / "none.safetensors", [(0, "act", 0)])
    assert "--examples" in caught.value.fix


@pytest.mark.parametrize("n_parts", [2, 3])
def test_parts_of_a_corpus_add_up_to_it_in_any_order(corpus: Corpus, n_parts: int) -> None:
    whole = corpus.examples().to_bytes()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        keys = list(corpus.windows)
        own = rng.integers(0, n_parts, len(keys))
        parts = [
            corpus.examples([key for key, part in zip(keys, own, strict=True) if part == i])
            for i in range(n_parts)
        ]
        for order in itertools.permutations(parts):
            total = order[0]
            for part in order[1:]:
                total = total + part
            assert total.to_bytes() == whole


def test_a_corpus_behind_another_one_has_later_windows() -> None:
    one, other = Corpus(3, 1), Corpus(4, 2)
    both = Corpus(7)
    both.n_windows = one.n_windows + other.n_windows
    both.windows, both.values = {}, {}
    for part, before in ((one, [0, 0]), (other, one.n_windows.tolist())):
        for (g, number), ids in part.windows.items():
            both.windows[g, number + before[g]] = ids
            for site in WIDTHS:
                values = part.values[(g, number), site]
                both.values[(g, number + before[g]), site] = values
    counted = dict(zip(GROUPS, one.n_windows.tolist(), strict=True))
    total = one.examples() + other.examples().behind(counted)
    assert total.to_bytes() == both.examples().to_bytes()


def test_groups_of_one_alone_are_kept(corpus: Corpus) -> None:
    made = corpus.examples()
    total = made + replace(made, groups=["zh", "fr"])
    assert total.groups == [*GROUPS, "zh", "fr"]
    assert total.n_windows.tolist() == [7, 8, 7, 8]
    for table in (total.value, total.position):
        assert (table["act"][:2] == table["act"][2:]).all()
    assert (total.numbers("act")[:2] == total.numbers("act")[2:]).all()


def test_the_order_is_total() -> None:
    value = np.array([[-np.inf, 1, 2, 2, 2, -np.inf, -np.inf]], np.float32)
    number = np.array([[-1, 0, 5, 3, 3, 7, -1]])
    position = np.array([[9, 0, 0, 4, 2, 0, -1]], np.int32)
    first, second, third = best(value, number, position, 6)
    assert first[0].tolist() == [2, 2, 2, 1, -np.inf, -np.inf]
    assert second[0].tolist() == [3, 3, 5, 0, 7, -1]
    assert third[0].tolist() == [2, 4, 0, 0, 0, -1]


def test_others_are_not_added(corpus: Corpus) -> None:
    made = corpus.examples()
    fewer = replace(made, value={"act": made.value["act"]})
    with pytest.raises(RelneuronError, match="act"):
        made + fewer


def _set(name: str, at: tuple[int, ...], value: int) -> Callable[[dict[str, Array]], None]:
    def change(tensors: dict[str, Array]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][at] = value

    return change


def _without(*names: str) -> Callable[[dict[str, Array]], None]:
    def change(tensors: dict[str, Array]) -> None:
        for name in names:
            del tensors[name]

    return change


DAMAGE: dict[str, Callable[[dict[str, Array]], None]] = {
    "a window that is not there": _set("window.act", (0, 0, 0, 0), 99),
    "a window of another group": _set("window.act", (0, 0, 0, 0), 9),
    "a position behind the window": _set("position.act", (0, 0, 0, 0), 99),
    "a number below 0": _set("number", (0,), -1),
    "an offset behind the end": _set("offsets", (-1,), 999),
    "a group that is not there": _set("group", (0,), 2),
    "no value": _without("value.act", "value.down"),
    "no position": _without("position.act"),
    "another type": lambda tensors: tensors.update(ids=tensors["ids"].astype(np.int64)),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused(
    corpus: Corpus, tmp_path: Path, change: Callable[[dict[str, Array]], None]
) -> None:
    path = tmp_path / "e.safetensors"
    corpus.examples().write(path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"relneuron.examples": '{"groups": ["en", "日本語"]}'})
    with pytest.raises(RelneuronError, match="examples"):
        Examples.read(path)
    with pytest.raises(RelneuronError, match="examples"):
        examples_of(path, [(0, "act", 0)])


def test_an_example_is_what_its_window_says() -> None:
    one = Example("en", 1, 2.5, 1, 0, 4, np.array([7, 8, 9], np.int32))
    assert one.token == 8
