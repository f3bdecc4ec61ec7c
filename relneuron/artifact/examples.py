"""examples.safetensors: the tokens where each neuron was the most active, with their windows.

`count --examples` writes it, `merge` adds several; what shows a neuron reads its own slice of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact.counts import SITES
from relneuron.artifact.dense import safetensors_pieces
from relneuron.artifact.files import RelneuronError, atomic_write
from relneuron.artifact.histogram import check_place, form_of
from relneuron.artifact.neurons import Neuron
from relneuron.artifact.reading import Tensors, open_tensors

NAME = "examples.safetensors"
ABOUT = "relneuron.examples"
MADE_BY = "count MODEL GROUP=TEXT... -o DIR --examples 16"

Array = np.ndarray[Any, Any]


def best(value: Array, number: Array, position: Array, k: int) -> tuple[Array, Array, Array]:
    """The first k of the last axis: by value from the largest, then number, then position.

    Places without a value have the number -1 and stand last, whatever stands there. The order is
    total, so that what is merged in parts is what is merged at once.
    """
    found = [np.empty((*a.shape[:-1], k), a.dtype) for a in (value, number, position)]
    # Row by row of the first axes, since the order takes more memory than what it is of.
    for place in np.ndindex(value.shape[:-2]):
        own = value[place], number[place], position[place]
        order = np.lexsort((own[2], own[1], -own[0], own[1] < 0), axis=-1)[..., :k]
        for whole, part in zip(found, own, strict=True):
            whole[place] = np.take_along_axis(part, order, -1)
    return found[0], found[1], found[2]


@dataclass(frozen=True)
class Windows:
    """W windows of tokens, in order of their group and of their number in it.

    ids      (N,) int32, one window behind the other
    offsets  (W + 1,) int64, where each begins
    group    (W,) int32, place of its group
    number   (W,) int64, how many windows of the group stand before it in the corpus
    """

    ids: Array
    offsets: Array
    group: Array
    number: Array

    def __len__(self) -> int:
        return len(self.number)

    @classmethod
    def of(cls, found: Mapping[tuple[int, int], Array]) -> Windows:
        """The tokens by (group, number)."""
        keys = sorted(found)
        lengths = [len(found[key]) for key in keys]
        ids = np.concatenate([np.zeros(0, np.int32), *(found[key] for key in keys)])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        group, number = np.array(keys, np.int64).reshape(-1, 2).T
        return cls(ids.astype(np.int32), offsets, group.astype(np.int32), number.copy())

    def items(self) -> dict[tuple[int, int], Array]:
        """The reverse of `of`."""
        keys = zip(self.group.tolist(), self.number.tolist(), strict=True)
        return {key: self.tokens(w) for w, key in enumerate(keys)}

    def tokens(self, window: int) -> Array:
        """(n,) int32, the tokens of a window."""
        found: Array = self.ids[self.offsets[window] : self.offsets[window + 1]]
        return found


@dataclass(frozen=True)
class Example:
    """One of the tokens where a neuron was the most active: the largest value of its window.

    rank      1 = the strongest of the group
    position  of the token in the window
    window    where the window stands in the file; two neurons may share one
    number    how many windows of the group stand before it in the corpus
    ids       the window's tokens, (n,) int32
    """

    group: str
    rank: int
    value: float
    position: int
    window: int
    number: int
    ids: Array

    @property
    def token(self) -> int:
        """The token's id."""
        return int(self.ids[self.position])


@dataclass(frozen=True)
class Examples:
    """The K strongest examples of every neuron in every group, each of another window.

    groups     G names
    value      by site, (G, L, F, K) float32 from the largest on; -inf where there are no more. F is
               D at site down
    window     by site, (G, L, F, K) int32, place in `windows`, -1 = none. Of equal values the
               earlier window stands first
    position   by site, (G, L, F, K) int32, the token in its window, the first of equal values
    windows    all that an example is of, once each
    n_windows  (G,) int64, how many windows of each group were read
    """

    groups: list[str]
    value: dict[str, Array]
    window: dict[str, Array]
    position: dict[str, Array]
    windows: Windows
    n_windows: Array

    @property
    def sites(self) -> list[str]:
        return [site for site in SITES if site in self.value]

    @property
    def k(self) -> int:
        return int(next(iter(self.value.values())).shape[-1])

    @classmethod
    def of_numbers(
        cls,
        groups: Sequence[str],
        value: Mapping[str, Array],
        number: Mapping[str, Array],
        position: Mapping[str, Array],
        windows: Windows,
        n_windows: Array,
    ) -> Examples:
        """Examples whose windows are named by their `number` in their group, -1 = none."""
        window = {}
        for site, numbers in number.items():
            places = np.full(numbers.shape, -1, np.int32)
            for group in range(len(groups)):
                first, end = np.searchsorted(windows.group, [group, group + 1])
                found = first + np.searchsorted(windows.number[first:end], numbers[group])
                places[group] = np.where(numbers[group] >= 0, found, -1)
            window[site] = places
        return cls(list(groups), dict(value), window, dict(position), windows, n_windows)

    def numbers(self, site: str) -> Array:
        """(G, L, F, K) int64, the numbers of the examples' windows in their groups, -1 = none."""
        windows = self.window[site]
        # The last one is of -1.
        found: Array = np.append(self.windows.number, np.int64(-1))[windows]
        return found

    def behind(self, before: Mapping[str, int]) -> Examples:
        """The same, of a corpus that goes on where another one with so many windows ended."""
        add = np.array([before.get(name, 0) for name in self.groups], np.int64)
        own = self.windows
        number = own.number + add[own.group]
        windows = Windows(own.ids, own.offsets, own.group, number)
        n_windows = self.n_windows + add
        return Examples(self.groups, self.value, self.window, self.position, windows, n_windows)

    def __add__(self, other: Examples) -> Examples:
        """The strongest of both, which are parts of one corpus; groups match by their names."""
        if (self.sites, self.k) != (other.sites, other.k):
            raise RelneuronError(
                f"examples: {self.k} at {self.sites} and {other.k} at {other.sites}",
                "count with the same --sites and --examples",
            )
        groups = [*self.groups, *(name for name in other.groups if name not in self.groups)]
        mine, theirs = self._of_groups(groups), other._of_groups(groups)
        value, number, position = {}, {}, {}
        for site in self.sites:
            pairs = [
                (one.value[site], one.numbers(site), one.position[site]) for one in (mine, theirs)
            ]
            v, n, p = (np.concatenate(two, axis=-1) for two in zip(*pairs, strict=True))
            value[site], number[site], position[site] = best(v, n, p, self.k)
        found = mine.windows.items() | theirs.windows.items()
        kept = {key: found[key] for key in used(number)}
        n_windows = np.maximum(mine.n_windows, theirs.n_windows)
        return self.of_numbers(groups, value, number, position, Windows.of(kept), n_windows)

    def _of_groups(self, groups: Sequence[str]) -> Examples:
        """The same with these groups, which are all of its own and others."""
        rows = [groups.index(name) for name in self.groups]

        def placed(tables: Mapping[str, Array], empty: float) -> dict[str, Array]:
            found = {}
            for site, table in tables.items():
                found[site] = np.full((len(groups), *table.shape[1:]), empty, table.dtype)
                found[site][rows] = table
            return found

        windows = {(rows[g], n): ids for (g, n), ids in self.windows.items().items()}
        n_windows = np.zeros(len(groups), np.int64)
        n_windows[rows] = self.n_windows
        number = {site: self.numbers(site) for site in self.sites}
        return self.of_numbers(
            groups,
            placed(self.value, -np.inf),
            placed(number, -1),
            placed(self.position, -1),
            Windows.of(windows),
            n_windows,
        )

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        return b"".join(self._pieces())

    def _pieces(self) -> Iterator[bytes | memoryview]:
        tables = {"value": self.value, "window": self.window, "position": self.position}
        tensors = {
            f"{kind}.{site}": array
            for kind, of_sites in tables.items()
            for site, array in of_sites.items()
        }
        tensors |= {**vars(self.windows), "n_windows": self.n_windows}
        text = json.dumps({"groups": self.groups}, ensure_ascii=False)
        return safetensors_pieces(tensors, {ABOUT: text})

    def write(self, path: Path) -> None:
        atomic_write(path, self._pieces())

    @classmethod
    def read(cls, path: Path) -> Examples:
        """All of a file, or an error that says what is wrong with it."""
        with open_tensors(path, MADE_BY, what="file of examples") as file:
            groups, sites, size = _form(file)
            tables: dict[str, dict[str, Array]] = {kind: {} for kind in _TYPES}
            for site in sites:
                for kind, dtype in _TYPES.items():
                    tables[kind][site] = file.get(f"{kind}.{site}", size[site], dtype)
            index = _index(file, len(groups))
            windows = Windows(file.get("ids", (None,), "I32"), *index)
            n_windows = file.get("n_windows", (len(groups),), "I64")
            for site in sites:
                window, position = tables["window"][site], tables["position"][site]
                _check(file, site, window, position, windows.offsets, windows.group)
        return cls(
            groups, tables["value"], tables["window"], tables["position"], windows, n_windows
        )


def used(number: Mapping[str, Array]) -> set[tuple[int, int]]:
    """(group, number) of the windows that examples are of; `number` by site, (G, L, F, K)."""
    return {
        (group, n)
        for numbers in number.values()
        for group, own in enumerate(numbers)
        for n in np.unique(own).tolist()
        if n >= 0
    }


def examples_of(
    path: Path, neurons: Sequence[Neuron], group: str | None = None
) -> list[list[Example]]:
    """Of each neuron (layer, site, index) its examples, of all groups or of one, strongest first.

    Reads their slices and their windows only. Those of several groups stand by group, in the
    order of the file.
    """
    with open_tensors(path, MADE_BY, what="file of examples") as file:
        groups, sites, size = _form(file)
        if group is not None and group not in groups:
            raise RelneuronError(f"{path} has no group {group!r}", f"it has {', '.join(groups)}", 2)
        chosen = range(len(groups)) if group is None else [groups.index(group)]
        offsets, group_of, number = _index(file, len(groups))
        windows: dict[int, Array] = {}

        def tokens(window: int) -> Array:
            if window not in windows:
                inside = slice(int(offsets[window]), int(offsets[window + 1]))
                windows[window] = file.get("ids", (None,), "I32", rows=inside)
            return windows[window]

        found = []
        for layer, site, index in neurons:
            check_place(path, (layer, site, index), {name: size[name][1:3] for name in sites})
            place = (slice(None), slice(layer, layer + 1), slice(index, index + 1))
            value, window, position = (
                file.get(f"{kind}.{site}", size[site], dtype, rows=place)[:, 0, 0]
                for kind, dtype in _TYPES.items()
            )
            _check(file, site, window, position, offsets, group_of)
            found.append(
                [
                    Example(
                        groups[g],
                        rank + 1,
                        float(value[g, rank]),
                        int(position[g, rank]),
                        int(window[g, rank]),
                        int(number[window[g, rank]]),
                        tokens(int(window[g, rank])),
                    )
                    for g in chosen
                    for rank in range(value.shape[1])
                    if window[g, rank] >= 0
                ]
            )
    return found


def sites_of(path: Path) -> list[str]:
    """The sites that a file has examples of."""
    with open_tensors(path, MADE_BY, what="file of examples") as file:
        return _form(file)[1]


_TYPES = {"value": "F32", "window": "I32", "position": "I32"}


def _form(file: Tensors) -> tuple[list[str], list[str], dict[str, tuple[int, ...]]]:
    """The groups, the sites and (G, L, F, K) by site of an open file."""
    return form_of(file, ABOUT, "value", "F32")


def _index(file: Tensors, n_groups: int) -> tuple[Array, Array, Array]:
    """offsets, group and number of the windows of an open file."""
    number: Array = file.get("number", (None,), "I64")
    group: Array = file.get("group", (len(number),), "I32")
    offsets: Array = file.get("offsets", (len(number) + 1,), "I64")
    (n_tokens,) = file.shape("ids", (None,), "I32")
    is_whole = offsets[0] == 0 and offsets[-1] == n_tokens and (np.diff(offsets) > 0).all()
    if not is_whole or not ((group >= 0) & (group < n_groups)).all() or (number < 0).any():
        raise file.wrong("its windows are not one behind the other, each of a group")
    return offsets, group, number


def _check(
    file: Tensors, site: str, window: Array, position: Array, offsets: Array, group_of: Array
) -> None:
    """Raise unless `window` and `position`, (G, ..., K), are tokens of windows of their group."""
    is_there = (window >= 0) & (window < len(group_of))
    place = np.where(is_there, window, len(group_of))
    group = np.arange(len(window)).reshape(-1, *(1,) * (window.ndim - 1))
    is_right = is_there & (np.append(group_of, -1)[place] == group)
    is_right &= (position >= 0) & (position < np.append(np.diff(offsets), 0)[place])
    if not (is_right | (window == -1)).all():
        raise file.wrong(f"window.{site} and position.{site} are not of tokens of the group")
