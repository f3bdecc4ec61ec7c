"""NLL of each text under each mask, and its rise against clean: what `nll` wrote, as columns.

study.py calls `read_nll`. Of G groups there are G x G cells, and more windows, so neither are
objects of their own: a column is an array, and a name is the place that it has among all names.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relneuron.analyses.uncertainty import NAN, q_values, signed_rank_rows
from relneuron.artifact.reading import read_csv
from relneuron.report.tables import Array, Places

CLEAN = "clean"
NLL = ("mask", "group", "n_windows", "n_tokens", "nll", "nll_se", "perplexity")
WINDOWS = ("mask", "group", "window", "n_tokens", "nll")
NUMBERS = (*NLL[2:], "rise", "rise_se", "p_value", "q_value")
AT_ONCE = 1 << 17  # windows that are compared in one go: 1 MB of each array


@dataclass(frozen=True, eq=False)
class NllCells:
    """The texts of groups under masks: mean NLL in nats per token, and its rise against clean.

    All but the names are (C,), a number a cell; cell i is the text groups[group[i]] under
    masks[mask[i]]. Names are in the order in which they come first.

    rise     mean over windows of NLL(mask) - NLL(clean) of the same window
    rise_se  sample standard deviation of these differences / sqrt(windows); NaN for one window
    p_value  Wilcoxon's signed-rank test of the differences; q_value over all cells but clean's
    """

    masks: list[str]
    groups: list[str]
    mask: Places
    group: Places
    n_windows: Places
    n_tokens: Places
    nll: Array
    nll_se: Array
    perplexity: Array
    rise: Array
    rise_se: Array
    p_value: Array
    q_value: Array

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def is_clean(self) -> NDArray[np.bool_]:
        return self.of([name == CLEAN for name in self.masks])

    @property
    def is_own(self) -> NDArray[np.bool_]:
        """Whether a cell is of the text that its mask is named after."""
        place = {name: i for i, name in enumerate(self.groups)}
        own = np.array([place.get(name, -1) for name in self.masks], np.int64)
        return np.asarray(own[self.mask] == self.group)

    def of(self, masks: list[bool]) -> NDArray[np.bool_]:
        """Whether each cell is under one of some masks, which are said one by one."""
        return np.array(masks, np.bool_)[self.mask]

    def at(self, cells: Places | NDArray[np.bool_] | slice) -> NllCells:
        """Some of the cells."""
        columns = ("mask", "group", *NUMBERS)
        return replace(self, **{name: getattr(self, name)[cells] for name in columns})


_NONE: list[Any] = [*[np.empty(0, np.int64)] * 4, *[np.empty(0)] * 7]
NO_CELLS = NllCells([], [], *_NONE)


@dataclass(frozen=True)
class Windows:
    """NLL of single windows: those of the cell `cells[i]` stand from starts[i] to starts[i + 1].

    A cell is mask * n_groups + group, ascending; a window has the same number in `names` wherever
    it is read.
    """

    n_groups: int
    cells: Places
    starts: Places
    names: Places
    nll: Array

    def places(self, mask: Places, group: Places) -> Places:
        """Where cells stand in `cells`; -1 for one without windows."""
        wanted = mask * self.n_groups + group
        found = np.searchsorted(self.cells, wanted).clip(max=len(self.cells) - 1)
        return np.where((self.cells[found] == wanted) & (mask >= 0), found, -1)


def read_nll(path: Path, windows: Path | None) -> NllCells:
    """nll.csv with the rises against clean: paired by window if there is a file of windows."""
    masks: dict[str, int] = {}
    groups: dict[str, int] = {}
    whole = {name: array("q") for name in NLL[:4]}
    real = {name: array("d") for name in NLL[4:]}
    for row in read_csv(path, NLL):
        whole["mask"].append(masks.setdefault(row["mask"], len(masks)))
        whole["group"].append(groups.setdefault(row["group"], len(groups)))
        for name in NLL[2:4]:
            whole[name].append(row.whole(name))
        for name, some in real.items():
            some.append(row.real(name))
    columns: dict[str, Any] = {name: np.array(some) for name, some in (whole | real).items()}
    unknown = np.full(len(columns["mask"]), NAN)
    tests = dict.fromkeys(NUMBERS[5:], unknown)
    cells = NllCells(list(masks), list(groups), **columns, **tests)
    if len(np.unique(cells.mask * len(groups) + cells.group)) < len(cells):
        raise ValueError(f"{path.name} holds a mask and a group twice")
    pairs = read_windows(windows, masks, groups) if windows else None
    if pairs is None or not len(pairs.cells):
        clean, is_clean = np.full(len(groups), NAN), cells.is_clean
        clean[cells.group[is_clean]] = cells.nll[is_clean]
        with np.errstate(invalid="ignore"):  # of two that are infinite
            rise = cells.nll - clean[cells.group]
        return replace(cells, rise=np.where(is_clean, NAN, rise))
    rise, error, p = _rises(cells, pairs)
    _check_means(cells, pairs)
    return replace(cells, rise=rise, rise_se=error, p_value=p, q_value=q_values(p))


def read_windows(path: Path, masks: Mapping[str, int], groups: Mapping[str, int]) -> Windows:
    """nll_windows.csv, masks and groups by the numbers that they have, others after those.

    A window that a mask and a group have twice raises.
    """
    masks, groups, names = dict(masks), dict(groups), dict[str, int]()
    masked, grouped, window, nll = array("q"), array("q"), array("q"), array("d")
    for row in read_csv(path, WINDOWS):
        masked.append(masks.setdefault(row["mask"], len(masks)))
        grouped.append(groups.setdefault(row["group"], len(groups)))
        window.append(names.setdefault(row["window"], len(names)))
        nll.append(row.real("nll"))
    of, which = np.array(masked) * len(groups) + np.array(grouped), np.array(window)
    order = np.lexsort((which, of))
    if ((np.diff(of[order]) == 0) & (np.diff(which[order]) == 0)).any():
        raise ValueError(f"{path.name} holds a window of a mask and a group twice")
    order = np.argsort(of, kind="stable")
    cells, n = np.unique(of, return_counts=True)
    starts = np.concatenate([[0], np.cumsum(n)])
    return Windows(len(groups), cells, starts, which[order], np.array(nll)[order])


def _rises(found: NllCells, pairs: Windows) -> tuple[Array, Array, Array]:
    """Rise, its standard error and p of each cell; NaN for clean and what is not finite."""
    rises = np.full((3, len(found)), NAN)
    places = np.flatnonzero(~found.is_clean)
    mask, group = found.mask[places], found.group[places]
    clean_mask = found.masks.index(CLEAN) if CLEAN in found.masks else -1
    own = pairs.places(mask, group)
    clean = pairs.places(np.full(len(places), clean_mask), group)
    n = _lengths(pairs, own)
    for bad in np.flatnonzero(n != _lengths(pairs, clean)):
        raise _other_windows(found, places[bad])
    for some, length in _alike(n):
        off, before = (pairs.starts[of[some], None] + np.arange(length) for of in (own, clean))
        names = pairs.names[off], pairs.names[before]
        moved = np.flatnonzero((names[0] != names[1]).any(1))
        for row in moved:  # the same windows in another order, or others
            order, wanted = (np.argsort(one[row], kind="stable") for one in names)
            if not np.array_equal(names[0][row][order], names[1][row][wanted]):
                raise _other_windows(found, places[some[row]])
            off[row][wanted] = off[row][order]
        with np.errstate(invalid="ignore"):  # of two that are infinite
            difference = pairs.nll[off] - pairs.nll[before]
        kept = np.isfinite(difference).all(1)
        difference = difference[kept]
        error = difference.std(axis=1, ddof=1) / np.sqrt(length) if length > 1 else NAN
        rows = places[some[kept]]
        rises[0, rows], rises[1, rows] = difference.mean(axis=1), error
        rises[2, rows] = signed_rank_rows(difference)
    return rises[0], rises[1], rises[2]


def _lengths(pairs: Windows, cells: Places) -> Places:
    """How many windows cells have; -1 is one without any."""
    sizes = np.append(np.diff(pairs.starts), 0)
    return sizes[cells]


def _alike(n: Places) -> Iterator[tuple[Places, int]]:
    """Places of cells with as many windows, some at a time, and that number; without those of 0."""
    for length in np.unique(n[n > 0]).tolist():
        places = np.flatnonzero(n == length)
        step = max(1, AT_ONCE // length)
        for start in range(0, len(places), step):
            yield places[start : start + step], length


def _other_windows(found: NllCells, cell: np.int64) -> ValueError:
    return ValueError(f"{_name(found, cell)}: other windows than clean has")


def _name(found: NllCells, cell: np.int64) -> str:
    return f"{found.masks[found.mask[cell]]}, {found.groups[found.group[cell]]}"


def _check_means(found: NllCells, pairs: Windows) -> None:
    """Raise where the windows are not those that nll.csv counts, or have another mean."""
    cells = pairs.places(found.mask, found.group)
    n, means = _lengths(pairs, cells), np.full(len(found), NAN)
    for some, length in _alike(n):
        rows = pairs.starts[cells[some], None] + np.arange(length)
        means[some] = pairs.nll[rows].mean(axis=1)
    is_same = (n == found.n_windows) & np.isclose(means, found.nll, 1e-6, equal_nan=True)
    for cell in np.flatnonzero(~is_same):
        raise ValueError(f"nll_windows.csv has another mean for {_name(found, cell)}")
