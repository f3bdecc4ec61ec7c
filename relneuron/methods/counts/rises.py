"""NLL of each text under each mask, and its rise against clean: what `nll` wrote, as cells.

study.py calls `read_nll`. Of G groups there are G x G cells, so all windows of many cells are taken
together, and none is held as an object of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.analyses.uncertainty import NAN, q_values, signed_rank_rows
from relneuron.artifact.reading import read_csv
from relneuron.report.tables import Array

CLEAN = "clean"
NLL = ("mask", "group", "n_windows", "n_tokens", "nll", "nll_se", "perplexity")
WINDOWS = ("mask", "group", "window", "n_tokens", "nll")
AT_ONCE = 1 << 20  # windows that are compared in one go: 8 MB of each array

Key = tuple[str, str]  # mask, group


class NllCell(NamedTuple):
    """The text of a group under a mask: mean NLL in nats per token, and its rise against clean.

    rise     mean over windows of NLL(mask) - NLL(clean) of the same window
    rise_se  sample standard deviation of these differences / sqrt(windows); NaN for one window
    p_value  Wilcoxon's signed-rank test of the differences; q_value over all cells but clean's
    """

    mask: str
    group: str
    n_windows: int
    n_tokens: int
    nll: float
    nll_se: float
    perplexity: float
    rise: float = NAN
    rise_se: float = NAN
    p_value: float = NAN
    q_value: float = NAN


@dataclass(frozen=True)
class Windows:
    """NLL of single windows: those of `keys[i]` stand from starts[i] to starts[i + 1].

    A window has the same number in `names` wherever it is read.
    """

    keys: dict[Key, int]
    starts: NDArray[np.int64]
    names: NDArray[np.int64]
    nll: Array


def read_nll(path: Path, windows: Path | None) -> list[NllCell]:
    """nll.csv with the rises against clean: paired by window if there is a file of windows."""
    cells: dict[Key, NllCell] = {}
    for row in read_csv(path, NLL):
        key = row["mask"], row["group"]
        if key in cells:
            raise ValueError(f"{path.name} holds a mask and a group twice")
        n = row.whole("n_windows"), row.whole("n_tokens")
        cells[key] = NllCell(*key, *n, *(row.real(name) for name in NLL[4:]))
    pairs = read_windows(windows) if windows else None
    if pairs is None or not pairs.keys:
        clean = {cell.group: cell.nll for cell in cells.values() if cell.mask == CLEAN}
        return [
            cell
            if cell.mask == CLEAN
            else cell._replace(rise=cell.nll - clean.get(cell.group, NAN))
            for cell in cells.values()
        ]
    rises = _rises(list(cells), pairs)
    _check_means(cells, pairs)
    tests = np.column_stack([rises, q_values(rises[:, 2])]).tolist()
    return [
        cell._replace(rise=rise, rise_se=error, p_value=p, q_value=q)
        for cell, (rise, error, p, q) in zip(cells.values(), tests, strict=True)
    ]


def read_windows(path: Path) -> Windows:
    """nll_windows.csv; a window that a mask and a group have twice raises."""
    keys: dict[Key, int] = {}
    names: dict[str, int] = {}
    cell, window, nll = array("q"), array("q"), array("d")
    for row in read_csv(path, WINDOWS):
        cell.append(keys.setdefault((row["mask"], row["group"]), len(keys)))
        window.append(names.setdefault(row["window"], len(names)))
        nll.append(row.real("nll"))
    of, which = (np.array(some, np.int64) for some in (cell, window))
    order = np.lexsort((which, of))
    if ((np.diff(of[order]) == 0) & (np.diff(which[order]) == 0)).any():
        raise ValueError(f"{path.name} holds a window of a mask and a group twice")
    order = np.argsort(of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(of, minlength=len(keys)))])
    return Windows(keys, starts, which[order], np.array(nll)[order])


def _rises(keys: Sequence[Key], pairs: Windows) -> Array:
    """(C, 3) rise, its standard error and p of each cell; NaN for clean and what is not finite."""
    found = np.full((len(keys), 3), NAN)
    cells = [place for place, (mask, _) in enumerate(keys) if mask != CLEAN]
    own = np.array([pairs.keys.get(keys[place], -1) for place in cells], np.int64)
    clean = np.array([pairs.keys.get((CLEAN, keys[place][1]), -1) for place in cells], np.int64)
    places = np.array(cells, np.int64)
    n = _lengths(pairs, own)
    for bad in np.flatnonzero(n != _lengths(pairs, clean)):
        raise _other_windows(keys[places[bad]])
    for some, length in _alike(n):
        off, before = (pairs.starts[of[some], None] + np.arange(length) for of in (own, clean))
        names = pairs.names[off], pairs.names[before]
        moved = np.flatnonzero((names[0] != names[1]).any(1))
        for row in moved:  # the same windows in another order, or others
            order, wanted = (np.argsort(one[row], kind="stable") for one in names)
            if not np.array_equal(names[0][row][order], names[1][row][wanted]):
                raise _other_windows(keys[places[some[row]]])
            off[row][wanted] = off[row][order]
        difference = pairs.nll[off] - pairs.nll[before]
        kept = np.isfinite(difference).all(1)
        difference = difference[kept]
        error = difference.std(axis=1, ddof=1) / np.sqrt(length) if length > 1 else NAN
        rows = places[some[kept]]
        found[rows, 0], found[rows, 1] = difference.mean(axis=1), error
        found[rows, 2] = signed_rank_rows(difference)
    return found


def _lengths(pairs: Windows, cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many windows cells have; -1 is one without any."""
    sizes = np.append(np.diff(pairs.starts), 0)
    return sizes[cells]


def _alike(n: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Places of cells with as many windows, some at a time, and that number; without those of 0."""
    for length in np.unique(n[n > 0]).tolist():
        places = np.flatnonzero(n == length)
        step = max(1, AT_ONCE // length)
        for start in range(0, len(places), step):
            yield places[start : start + step], length


def _other_windows(key: Key) -> ValueError:
    return ValueError(f"{key[0]}, {key[1]}: other windows than clean has")


def _check_means(found: Mapping[Key, NllCell], pairs: Windows) -> None:
    """Raise where the windows are not those that nll.csv counts, or have another mean."""
    cells = np.array([pairs.keys.get(key, -1) for key in found], np.int64)
    n, means = _lengths(pairs, cells), np.full(len(found), NAN)
    for some, length in _alike(n):
        rows = pairs.starts[cells[some], None] + np.arange(length)
        means[some] = pairs.nll[rows].mean(axis=1)
    counted = np.array([cell.n_windows for cell in found.values()], np.int64)
    wanted = np.array([cell.nll for cell in found.values()], np.float64)
    is_same = (n == counted) & np.isclose(means, wanted, 1e-6, equal_nan=True)
    for key, same in zip(found, is_same.tolist(), strict=True):
        if not same:
            raise ValueError(f"nll_windows.csv has another mean for {key[0]}, {key[1]}")
