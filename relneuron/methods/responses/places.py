"""Where responses are: in responses.safetensors, in memory, or on the devices of their layers.

`record` fills a place, `identify` ranks what is in it (`rank.py`), `look` shows columns of it. Only
the file outlives the process. `room.py` chooses the place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron.artifact.dense import create_safetensors, rows_digest
from relneuron.artifact.files import Json
from relneuron.artifact.journal import has_rows
from relneuron.artifact.neurons import Neuron, Shape
from relneuron.artifact.reading import RESPONSE_ROWS
from relneuron.methods.responses.sums import Section
from relneuron.model.meeting import distributed
from relneuron.model.ranks import Ranks

Array = np.ndarray[Any, Any]


def n_response_bytes(order: Shape, n_rows: int) -> int:
    """Of the responses of `n_rows` prompts: float32, one a prompt and neuron."""
    return 4 * n_rows * sum(width for _, _, width in order.blocks())


@dataclass(frozen=True)
class Prompts:
    """Whose responses are recorded.

    order     the neurons of the model
    rows      the prompts' places among all prompts, in the order of the responses
    divisors  over how many tokens each of them is pooled
    about     what is said of them beside: `ids`, the pooling, digests
    """

    order: Shape
    rows: Sequence[int]
    divisors: Sequence[int]
    about: Json

    @property
    def n_bytes(self) -> int:
        return n_response_bytes(self.order, len(self.rows))


class Place:
    """Responses while they are recorded: a matrix (N, F) or (N, D) float32 a layer and site."""

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts
        self._place = {row: place for place, row in enumerate(prompts.rows)}
        self._divisors = np.array(prompts.divisors, np.float32)

    @property
    def on_host(self) -> bool:
        """Whether sums are brought to the host to be stored."""
        return True

    def room(self, n_rows: int) -> Mapping[str, Tensor]:
        """Zeros (n_rows, .) of each block, by its name, where the next batch may be summed up.

        They are the place's own memory, in which `store` leaves what is already there. {} where
        there is none.
        """
        return {}

    def wants(self, rows: Sequence[int]) -> bool:
        """Whether the prompts of a batch are recorded: all of them are, or none."""
        return rows[0] in self._place

    def places(self, rows: Sequence[int]) -> list[int]:
        """Which rows of the responses some prompts have."""
        return [self._place[row] for row in rows if row in self._place]

    def lacks(self, rows: Sequence[int], noted: Json) -> bool:
        """Whether a batch that the journal has as `noted` left responses that are not here."""
        raise NotImplementedError

    def store(self, sections: Sequence[Section], rows: Sequence[int]) -> None:
        """Keep a batch's means: its sums, which are divided where they lie, by their numbers."""
        raise NotImplementedError

    def noted(self, rows: Sequence[int]) -> Json:
        """What the journal says of a batch that is stored."""
        return {}

    def flush(self) -> None:
        """Have what is stored outlive the process, if the place does."""


class OnDisk(Place):
    """responses.safetensors, as memory maps."""

    def __init__(self, prompts: Prompts, path: Path) -> None:
        super().__init__(prompts)
        self.path = path
        self._maps = create_safetensors(
            path,
            {
                f"{site}.{layer}": (len(prompts.rows), width)
                for layer, site, width in prompts.order.blocks()
            },
            # One key only, as in every file: safetensors writes several in any order.
            {RESPONSE_ROWS: json.dumps(prompts.about, ensure_ascii=False)},
        )

    def lacks(self, rows: Sequence[int], noted: Json) -> bool:
        return self.wants(rows) and not has_rows(noted)

    def store(self, sections: Sequence[Section], rows: Sequence[int]) -> None:
        places = self.places(rows)
        by = _column(self._divisors, places)
        for section in sections:
            self._maps[section.name][places, section.inside] = section.matrix().div_(by).numpy()

    def noted(self, rows: Sequence[int]) -> Json:
        places = self.places(rows)
        return {"rows": places, "digest": self.digest(places)}

    def digest(self, places: Sequence[int]) -> str | None:
        """Of some rows as they are in the file; None where there is none."""
        return rows_digest(list(self._maps.values()), places) if places else None

    def flush(self) -> None:
        for array in self._maps.values():
            array.flush()


class Kept(Place):
    """Responses that end with the process: in memory, or each block where its layer computes.

    `device_of` says where a layer's blocks lie. A block's memory is taken when it is filled. Its
    rows lie in the order in which they came: a batch is summed up in those that are free next, and
    nothing is copied. `rows` (N,) int64 says which row each prompt has; -1: none yet.
    """

    def __init__(self, prompts: Prompts, device_of: Callable[[int], torch.device]) -> None:
        super().__init__(prompts)
        self.rows = np.full(len(prompts.rows), -1)
        self._n = self._n_touched = 0  # rows that are filled; those that are no zeros any more
        self._blocks = {
            f"{site}.{layer}": _zeros(len(prompts.rows), width, device_of(layer))
            for layer, site, width in prompts.order.blocks()
        }

    @property
    def on_host(self) -> bool:
        return all(block.device.type == "cpu" for block in self._blocks.values())

    @property
    def ids(self) -> list[str]:
        """The prompts, in the order of `rows`."""
        found: list[str] = self.prompts.about["ids"]
        return found

    def lacks(self, rows: Sequence[int], noted: Json) -> bool:
        return self.wants(rows) and bool((self.rows[self.places(rows)] < 0).any())

    def room(self, n_rows: int) -> Mapping[str, Tensor]:
        end = self._n + n_rows
        found = {name: block[self._n : end] for name, block in self._blocks.items()}
        if self._n < self._n_touched:  # a batch that failed was summed up here
            for block in found.values():
                block.zero_()
        self._n_touched = max(self._n_touched, end)
        return found

    def store(self, sections: Sequence[Section], rows: Sequence[int]) -> None:
        places = self.places(rows)
        own = slice(self._n, self._n + len(places))
        by = _column(self._divisors, places)
        sent: dict[torch.device, Tensor] = {}  # once a batch and device
        for section in sections:
            block = self._blocks[section.name]
            if block.device not in sent:
                sent[block.device] = by.to(block.device, non_blocking=True)
            values = section.matrix().div_(sent[block.device])
            if not section.is_there:
                block[own, section.inside] = values
        self.rows[places] = np.arange(own.start, own.stop)
        self._n = own.stop

    def block(self, layer: int, site: str) -> Tensor:
        """(N, F) or (N, D) float32 of one layer and site, where it lies, in the order it came."""
        return self._blocks[f"{site}.{layer}"]

    def column(self, neuron: Neuron) -> Array | None:
        """(N,) of one neuron, by prompt; None of a site that was not recorded."""
        layer, site, index = neuron
        block = self._blocks.get(f"{site}.{layer}")
        return None if block is None else block[:, index].cpu().numpy()[self.rows]

    def gather(self, ranks: Ranks) -> None:
        """Have the rows of all processes at the first one, block by block; the others' are gone."""
        if ranks.shares == 1:
            return
        found: list[Any] = [None] * ranks.size
        distributed.all_gather_object(found, (self._n, self.rows))
        for name in list(self._blocks):
            if ranks.rank:
                block = self._blocks.pop(name)
                if self._n:
                    distributed.send(block[: self._n], 0)
                continue
            start = self._n
            for rank in range(1, ranks.size):
                end = start + found[rank][0]
                if end > start:
                    distributed.recv(self._blocks[name][start:end], rank)
                start = end
        if not ranks.rank:
            for n, rows in found[1:]:
                self.rows = np.where(rows < 0, self.rows, rows + self._n)
                self._n += n


def _zeros(n_rows: int, width: int, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(n_rows, width, device=device)
    # Of numpy's large pages, which are taken, and zeros, when they are first written to.
    return torch.from_numpy(np.zeros((n_rows, width), np.float32))


def _column(divisors: Array, places: list[int]) -> Tensor:
    return torch.from_numpy(divisors[places, None])


@dataclass
class Store:
    """Responses that nobody keeps, from `record` to who ranks and shows them.

    asked  the place: auto, device, memory or disk
    kept   what `record` has filled; None where that is on the disk
    """

    asked: str = "auto"
    kept: Kept | None = field(default=None, compare=False)


def blocks_of(kept: Kept, advance: Callable[[], object]) -> Iterator[tuple[int, str, Tensor]]:
    """(layer, site, values) of all blocks, in the order of the neurons."""
    for layer, site, _ in kept.prompts.order.blocks():
        yield layer, site, kept.block(layer, site)
        advance()
