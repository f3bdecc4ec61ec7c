"""The records with pictures of all sources, in their order, from any position reached before.

`count` takes them where the sources have an `image_column`, in the place of `feed.py`'s windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.parquet import open_parquet
from relneuron.artifact.reading import MIB, decoded, parse_json
from relneuron.texts.pictures import COLUMN, Record, picture_digests
from relneuron.texts.read import check_all, lines_of, load_dataset_of, read_file
from relneuron.texts.sources import File, Source


class PictureFeed:
    """The records of some sources, one source behind the other.

    `most` is how many of each group are given out; None: all. `state` is what `state()` gave:
    exactly the records after it follow. A record of a group that is not asked for is passed over.

    groups  names, in the order of the sources; those of a column when they are first taken
    """

    expected_tokens: float | None = None  # nobody knows before the processor has seen them
    waited_s = 0.0

    def __init__(
        self, sources: Sequence[Source], *, most: int | None = None, state: Json | None = None
    ) -> None:
        self.sources, self.most = sources, most
        begin: Json = {"source": 0, "at": None, "records": {}, "others": 0}
        self._state = begin | (state or {})
        named = [source.groups or (source.group,) for source in sources]
        self._named = [name for names in named for name in names if name is not None]
        self.groups: list[str] = list((state or {}).get("groups", dict.fromkeys(self._named)))
        self._records = self._read()

    def __enter__(self) -> PictureFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self._records.close()

    def take(self, n: int) -> list[Record]:
        """The next `n` records; fewer only at the end of all sources."""
        return list(islice(self._records, n))

    def place(self, group: str) -> int:
        """The number of a group."""
        return self.groups.index(group)

    def _read(self) -> Any:
        """The records; before each is given out the state is the one behind it."""
        state = self._state
        while state["source"] < len(self.sources):
            source = self.sources[state["source"]]
            if not self._is_full(source):
                for record, at in read_records(source, state["at"]):
                    state["at"] = at
                    n = state["records"].get(record.group, 0)
                    if source.groups is not None and record.group not in source.groups:
                        state["others"] += 1
                    elif self.most is None or n < self.most:
                        state["records"] = state["records"] | {record.group: n + 1}
                        if record.group not in self.groups:
                            self.groups.append(record.group)
                        yield record
                    if self._is_full(source):
                        break
            state |= {"source": state["source"] + 1, "at": None}

    def _is_full(self, source: Source) -> bool:
        """Whether no more records of a source's groups are wanted."""
        names = source.groups or ((source.group,) if source.group is not None else ())
        counts = [self._state["records"].get(name, 0) for name in names]
        return self.most is not None and bool(counts) and min(counts) >= self.most

    def state(self) -> Json:
        """Where to go on after the last record taken, as JSON."""
        return {**self._state, "groups": list(self.groups)}

    @property
    def notes(self) -> Json:
        """Facts for the manifest: records of each group, and of groups that were not asked for."""
        state = self._state
        return {"records": state["records"], "records_of_other_groups": state["others"]}


def describe_pictures(sources: Sequence[Source], most: int | None) -> Json:
    """A fingerprint of the pictures that would be read: how many, and one SHA-256 of all in order.

    Every record is read and every picture file that it names, but no picture is decoded: a second
    for each GB. What is wrong with a record shows here, before anything is counted. Data sets of
    Hugging Face are left out: what is known of them `describe_sources` says.
    """
    if any(s.dataset is not None and iter(s.dataset) is s.dataset for s in sources):
        raise RelneuronError(
            "a dataset of pictures can be read only once", "give a list or a data set of datasets"
        )
    digest, n = hashlib.sha256(), 0
    known: dict[Path, bytes] = {}
    with PictureFeed([s for s in sources if _is_at_hand(s)], most=most) as feed:
        for record in _all(feed):
            for own in picture_digests(record.pictures, known):
                digest.update(own)
                n += 1
    return {"pictures": n, "sha256": digest.hexdigest()}


def _is_at_hand(source: Source) -> bool:
    """Whether reading a source loads and decodes nothing."""
    if source.dataset is not None:
        return isinstance(source.dataset, list | tuple)
    return all(file.kind != "hf" for file in source.files)


def _all(feed: PictureFeed) -> Iterator[Record]:
    while records := feed.take(1):
        yield records[0]


def have_pictures(sources: Sequence[Source], column: str = COLUMN) -> bool:
    """Whether the first record of each source has the field; raises where only some have."""
    found = [column in first_fields(source) for source in sources]
    if any(found) and not all(found):
        without = next(s.name for s, has in zip(sources, found, strict=True) if not has)
        raise RelneuronError(
            f"{without} has no field {column!r}, other sources have pictures there",
            "count text and pictures apart, or name the field with --image-column",
        )
    return all(found)


def read_records(source: Source, position: Json | None) -> Iterator[tuple[Record, Json]]:
    """The records with pictures of a source after `position` (None: all), each with its own."""
    if source.dataset is None:
        check_all(source, None)
    files = source.files or (File("", "dataset"),)
    number, inside = (position["file"], position["at"]) if position else (0, None)
    for place in range(number, len(files)):
        steps = read_file(source, files[place], inside if place == number else None, None)
        with closing(steps):
            for piece, after, _ in steps:
                yield piece.content, {"file": place, "at": after}


def first_fields(source: Source) -> list[str]:
    """The names of the fields of a source's first record; none where it has no fields or record."""
    file = (source.files or (File("", "dataset"),))[0]
    if file.kind == "parquet":
        with closing(open_parquet(file.path)) as opened:
            return list(opened.schema_arrow.names)
    record: Any = None
    if file.kind == "jsonl":
        for data, _, number, *_ in lines_of(file, None, source.max_record_mib * MIB):
            if line := data.strip():
                record = parse_json(decoded(line, file.path), f"{file.path}, line {number}", "")
                break
    elif file.kind in ("hf", "dataset"):
        dataset = source.dataset if source.dataset is not None else load_dataset_of(file)
        # An iterator gives each record once.
        record = None if iter(dataset) is dataset else next(iter(dataset), None)
    return list(record) if isinstance(record, dict) else []
