"""counts.safetensors: how often every neuron was active in every group, and its moments.

`count` writes it, `merge` adds several, `identify` and the report read it; no model is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from relneuron.artifact.dense import safetensors_pieces
from relneuron.artifact.files import Json, RelneuronError, atomic_write
from relneuron.artifact.modules import module_layers
from relneuron.artifact.reading import open_tensors

NAME = "counts.safetensors"
RAN, ROUTED, WEIGHT = "tokens.layer", "tokens.expert", "weight.expert"
BESIDE: dict[str, Any] = {RAN: np.int64, ROUTED: np.int64, WEIGHT: np.float64}
# Stages of other kinds of study, in whose folder no counts are begun.
APART = ("prompts", "record", "attribute", "contrast")
SITES = ("gate", "up", "act", "product", "down")
# What each statistic is made of, and with which value a group that was never seen begins.
DTYPES = {"count": np.int64, "sum": np.float64, "sum_sq": np.float64, "max": np.float32}
DTYPES |= {"n_nonfinite": np.int64}
_TYPES = {np.int64: "I64", np.float64: "F64", np.float32: "F32"}  # as safetensors calls them

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Counts:
    """Statistics of every neuron per group of tokens.

    groups     G names
    tokens     (G,) int64, the tokens that were counted; of several modules those of the one that
               ran the most
    beside     `tokens.layer` (G, L) int64, how many of them each layer ran, left out where all ran
               them all: text does not run every layer of a model that reads pictures, and where
               none ran a neuron was not inactive, it never ran. Of a mixture of experts
               `tokens.expert` (G, L, E) int64, how many the router sent to each, and
               `weight.expert` float64, the sum of the weights that it gave them
    arrays     `count.<site>` (G, L, F) int64, the tokens whose value at the site passed the
               threshold; with moments also `sum.<site>` and `sum_sq.<site>` float64 (of the finite
               values), `max.<site>` float32 and `n_nonfinite.<site>` int64. F is D at site down
    """

    groups: list[str]
    tokens: Array
    arrays: dict[str, Array]
    beside: dict[str, Array] = field(default_factory=dict)

    # What a kind of counts has of its own: the sites, and how its files call themselves.
    SITES: ClassVar[tuple[str, ...]] = SITES
    KEY: ClassVar[str] = "relneuron.counts"
    WHAT: ClassVar[str] = "file of counts"
    MADE_BY: ClassVar[str] = "count MODEL GROUP=TEXT... -o DIR"

    def tokens_at(self) -> Array:
        """(G, L) int64, the tokens that each layer ran."""
        layers = next(iter(self.arrays.values())).shape[1]
        ran: Array | None = self.beside.get(RAN)
        return np.tile(self.tokens[:, None], layers) if ran is None else ran

    @property
    def sites(self) -> list[str]:
        return [site for site in self.SITES if f"count.{site}" in self.arrays]

    @property
    def has_moments(self) -> bool:
        return any(name.startswith("sum.") for name in self.arrays)

    def mean(self, site: str) -> Array:
        """The mean of the finite values at a site over the tokens of all groups, (L, F) float64."""
        n, total, _ = self._moments(site)
        with np.errstate(invalid="ignore"):
            found: Array = total / n
        return found

    def std(self, site: str) -> Array:
        """Their unbiased standard deviation, (L, F) float64; NaN for fewer than two tokens."""
        n, total, total_sq = self._moments(site)
        with np.errstate(invalid="ignore", divide="ignore"):
            # What is left of equal values by rounding may be below 0.
            variance = np.maximum(total_sq - total * (total / n), 0) / (n - 1)
            found: Array = np.where(n > 1, np.sqrt(variance), np.nan)
        return found

    def _moments(self, site: str) -> tuple[Array, Array, Array]:
        """n, sum and sum of squares of the finite values over all groups, (L, F) float64 each."""
        tokens = self.tokens_at()[:, :, None] - self.arrays[f"n_nonfinite.{site}"]
        return (
            tokens.sum(0).astype(np.float64),
            self.arrays[f"sum.{site}"].sum(0),
            self.arrays[f"sum_sq.{site}"].sum(0),
        )

    def __add__(self, other: Self) -> Self:
        """The statistics of both inputs together; groups are matched by their names."""
        if self.arrays.keys() != other.arrays.keys():
            raise RelneuronError(
                f"the counts hold {sorted(self.arrays)} and {sorted(other.arrays)}",
                "count with the same sites and moments",
            )
        groups = [*self.groups, *(name for name in other.groups if name not in self.groups)]
        mine, theirs = self.take(groups), other.take(groups)
        arrays = {
            name: np.maximum(array, theirs.arrays[name])
            if name.startswith("max.")
            else array + theirs.arrays[name]
            for name, array in mine.arrays.items()
        }
        beside = {}
        for name in dict.fromkeys([*mine.beside, *theirs.beside]):
            parts = [one.tokens_at() if name == RAN else one.beside[name] for one in (mine, theirs)]
            beside[name] = parts[0] + parts[1]
        tokens = mine.tokens + theirs.tokens
        # Of several modules another one may have run the most.
        tokens = beside[RAN].max(axis=1) if RAN in beside else tokens
        return type(self)(groups, tokens, arrays, beside)

    def of_layers(self, layers: range) -> Self:
        """Some layers only, of a module, as if they were the whole model; padding stays."""
        inside = slice(layers.start, layers.stop)
        ran = self.tokens_at()[:, inside]
        beside = {name: array[:, inside] for name, array in self.beside.items()} | {RAN: ran}
        arrays = {name: array[:, inside] for name, array in self.arrays.items()}
        return type(self)(self.groups, ran.max(axis=1), arrays, beside)

    def take(self, groups: Sequence[str]) -> Self:
        """These groups only, in this order; one that is not here has no token."""
        rows = [self.groups.index(name) if name in self.groups else -1 for name in groups]

        def pick(array: Array, empty: float) -> Array:
            result = np.full((len(rows), *array.shape[1:]), empty, array.dtype)
            for new, row in enumerate(rows):
                if row >= 0:
                    result[new] = array[row]
            return result

        arrays = {
            name: pick(array, -np.inf if name.startswith("max.") else 0)
            for name, array in self.arrays.items()
        }
        beside = {name: pick(array, 0) for name, array in self.beside.items()}
        return type(self)(list(groups), pick(self.tokens, 0), arrays, beside)

    def pieces(self, metadata: Mapping[str, object] | None = None) -> Iterator[bytes | memoryview]:
        """The file's bytes; `metadata` is kept beside the groups."""
        text = json.dumps({"groups": self.groups, **(metadata or {})}, ensure_ascii=False)
        return safetensors_pieces(self.tensors(), {self.KEY: text})

    def to_bytes(self, metadata: Mapping[str, object] | None = None) -> bytes:
        """All of them in one."""
        return b"".join(self.pieces(metadata))

    def tensors(self) -> dict[str, Array]:
        """All that the file holds, by name."""
        return {"tokens": self.tokens, **self.beside, **self.arrays}

    @classmethod
    def of_tensors(cls, groups: list[str], tensors: dict[str, Array]) -> Self:
        """The reverse of `tensors`."""
        beside = {name: tensors.pop(name) for name in BESIDE if name in tensors}
        return cls(groups, tensors.pop("tokens"), tensors, beside)

    def write(self, path: Path) -> None:
        atomic_write(path, self.pieces())

    @classmethod
    def read(cls, path: Path, made_by: str | None = None) -> Self:
        """The counts of a file, or an error that says what is wrong with it."""
        with open_tensors(path, made_by or cls.MADE_BY, what=cls.WHAT) as file:
            about = file.about(cls.KEY)
            if not isinstance(about, dict) or "groups" not in about or "tokens" not in file.names:
                raise file.wrong("it has no groups or no tokens")
            groups = about["groups"]
            if not _are_names(groups):
                raise file.wrong(f"the groups are {groups}")
            arrays = {}
            for name in file.names:
                shape, kind = cls._form(name, len(groups))
                arrays[name] = file.get(name, shape, _TYPES[kind])
            try:
                counts = cls.of_tensors(groups, arrays)
                counts._check()
            except ValueError as error:
                raise file.wrong(str(error)) from error
        return counts

    @classmethod
    def _form(cls, name: str, n_groups: int) -> tuple[tuple[int | None, ...], Any]:
        """The shape of a tensor of the file (None: any length) and its type."""
        n_dims = {"tokens": 1, RAN: 2}.get(name, 3)
        kind = BESIDE.get(name) or DTYPES.get(name.partition(".")[0], np.int64)
        return (n_groups, None, None)[:n_dims], kind

    def _check(self) -> None:
        shapes: dict[bool, tuple[int, ...]] = {}
        for name, array in self.arrays.items():
            statistic, _, site = name.partition(".")
            if site not in self.sites or statistic not in DTYPES:
                raise ValueError(f"{name} is no statistic of the sites {self.sites}")
            # One width at the inner sites, another one at down, the same layers at all.
            shape = shapes.setdefault(site == "down", array.shape)
            layers = next(iter(shapes.values()))[:2]
            if array.shape != shape or shape[:2] != layers:
                raise ValueError(f"{name} has the shape {array.shape}")
            if statistic in ("count", "n_nonfinite") and (array < 0).any():
                raise ValueError(f"{name} is below 0")
        if not self.sites:
            raise ValueError("there is no count")
        n_layers = next(iter(self.arrays.values())).shape[1]
        for name, array in self.beside.items():
            tokens = self.tokens.reshape(-1, *(1,) * (array.ndim - 1))
            is_right = array.shape[1] == n_layers and (array >= 0).all()
            if not (is_right and (name == WEIGHT or (array <= tokens).all())):
                raise ValueError(f"{name} is not of (G, L) tokens, at most those of the group")


def tokens_of_modules(model: Json, counts: Counts) -> dict[str, list[tuple[str, int]]]:
    """Of each module of a model, (group, tokens that it ran)."""
    return {
        name: list(zip(counts.groups, counts.of_layers(own).tokens.tolist(), strict=True))
        for name, own in module_layers(model).items()
    }


def _are_names(groups: object) -> bool:
    return (
        isinstance(groups, list)
        and all(isinstance(name, str) for name in groups)
        and len(set(groups)) == len(groups)
    )
