"""Documents to windows of tokens: tokenised, packed, and restartable at the start of every block.

worker.py makes blocks, feed.py hands their windows on; `count` and `nll` choose the packing.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.reading import MIB, too_large
from relneuron.texts.read import read_chunks
from relneuron.texts.records import Piece
from relneuron.texts.sources import ID_KINDS, Source
from relneuron.texts.tokens import read_policy

BLOCK_WINDOWS = 64  # a block ends at the first chunk that completes so many windows,
BLOCK_TOKENS = 1 << 20  # or so many tokens
# The bytes of the 4-byte ids of a group's open window stand in each block's state.
_IDS = np.dtype("<i4")

Array = np.ndarray[Any, Any]
Encode = Callable[[list[str]], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Packing:
    """How documents become windows of tokens.

    window      tokens of a window; in mode `documents` at most so many
    mode        `packed`: the documents of a group one after the other, cut into full windows, the
                last incomplete one dropped; `documents`: one a window, longer ones cut
    bos         where `bos_id` is put: `document` (before each document), `window` (first in every
                window, so that window - 1 tokens follow) or `none`; never into token ids
    max_tokens  of each group, BOS tokens included: windows are taken while they fit
    join        text that joins the documents of a group, empty ones too, to one that is tokenised
                as a whole; None: each document is tokenised by itself
    """

    window: int
    mode: str = "packed"
    bos: str = "none"
    bos_id: int | None = None
    max_tokens: int | None = None
    join: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("packed", "documents"):
            raise RelneuronError(f"unknown packing {self.mode!r}", "use packed or documents", 2)
        if self.bos not in ("document", "window", "none"):
            raise RelneuronError(f"unknown BOS policy {self.bos!r}", "document, window or none", 2)
        if self.bos != "none" and self.bos_id is None:
            raise RelneuronError(
                f"the BOS policy {self.bos!r} needs a BOS token", "use the policy none", 2
            )
        least = 2 if self.bos == "window" else 1
        most = "all" if self.max_tokens is None else self.max_tokens
        if self.window < least or (self.max_tokens is not None and self.max_tokens < 1):
            raise RelneuronError(
                f"--window {self.window}, --max-tokens {most}",
                f"a window has at least {least} tokens, a group at least 1",
                2,
            )

    def recorded(self) -> Json:
        """What a manifest says of it."""
        said = asdict(self)
        if self.join is None:
            del said["join"]
        return said

    @property
    def step(self) -> int:
        """Tokens of a full window that come from documents."""
        return self.window - (self.bos == "window")


class Window(NamedTuple):
    """Tokens that the model sees at once.

    group   place of its group in `Feed.groups`
    ids     (n,) int32
    first   (n,) bool, the first token of each document: the BOS if one stands before it
    number  how many windows of its group a `Feed` gave before it
    """

    group: int
    ids: Array
    first: Array
    number: int = 0


@dataclass(frozen=True)
class Block:
    """Windows of one source in their order, and the state from which they are made again.

    groups, window.group   the names of the block's groups, and places in them
    n_tokens               of the source up to the block's end
    fraction               of the source that is read by then; None if unknown
    """

    windows: list[Window]
    groups: list[str]
    start: Json | None
    n_tokens: int
    fraction: float | None


def default_bos(tokenizer: Any) -> tuple[str, int | None]:
    """The policy a tokenizer follows by itself: `document` and its BOS token, or `none`."""
    bos_id = getattr(tokenizer, "bos_token_id", None)
    if bos_id is None or read_policy(tokenizer).before[:1] != (bos_id,):
        return "none", None
    return "document", int(bos_id)


@dataclass
class _Packer:
    """The open window of one group, and what was made of the group so far."""

    packing: Packing
    n_windows: int = 0
    n_tokens: int = 0
    is_full: bool = False
    kept: Array = field(default_factory=lambda: np.zeros(0, np.int32))
    flat: list[int] = field(default_factory=list)  # tokens after `kept`
    starts: list[int] = field(default_factory=list)  # places of documents in both

    def __post_init__(self) -> None:
        self._look()

    def __len__(self) -> int:
        return len(self.kept) + len(self.flat)

    def _look(self) -> None:
        """Note when no further window fits."""
        limit, next_one = self.packing.max_tokens, self.packing.window
        if self.packing.mode == "documents":
            next_one = 1
        if limit is not None and self.n_tokens + next_one > limit:
            self._close()

    def _close(self) -> None:
        self.is_full = True
        self.kept, self.flat, self.starts = self.kept[:0], [], []

    def add(self, tokens: Any, begins: bool, bos_id: int | None) -> None:
        """Append tokens of a document, at its begin after `bos_id` if there is one."""
        if begins:
            self.starts.append(len(self))
            if bos_id is not None:
                self.flat.append(bos_id)
        if isinstance(tokens, np.ndarray):
            self.kept, self.flat = np.concatenate([self._fold(), tokens]), []
        else:
            self.flat.extend(tokens)

    def _fold(self) -> Array:
        if self.flat:
            self.kept = np.concatenate([self.kept, np.array(self.flat, np.int32)])
            self.flat = []
        return self.kept

    def cut(self, bos_id: int | None, *, all_of_it: bool = False) -> Iterator[tuple[Array, Array]]:
        """(ids, first) of the full windows, `all_of_it`: also of the last one.

        `bos_id`: what every window begins with.
        """
        step = self.packing.step
        if len(self) < step and not (all_of_it and len(self)):
            return
        ids = self._fold()
        first = np.zeros(len(ids), bool)
        first[self.starts] = True
        end = len(ids) if all_of_it else len(ids) // step * step
        self.kept = ids[end:].copy()
        self.starts = []  # what is kept is of the last document, whose first token was cut off
        for place in range(0, end, step):
            row, marks = ids[place : min(place + step, end)], first[place : min(place + step, end)]
            if bos_id is not None:
                row = np.concatenate([np.array([bos_id], np.int32), row])
                # The BOS is the first token of a document that begins right after it.
                marks = np.concatenate([marks[:1], [False], marks[1:]])
            limit = self.packing.max_tokens
            if limit is not None and self.n_tokens + len(row) > limit:
                self._close()
            if self.is_full:
                return
            self.n_windows += 1
            self.n_tokens += len(row)
            yield row, marks
            self._look()

    def state(self) -> Json:
        return {
            "n_windows": self.n_windows,
            "n_tokens": self.n_tokens,
            "is_full": self.is_full,
            "ids": base64.b64encode(self._fold().astype(_IDS).tobytes()).decode(),
            "starts": list(self.starts),
        }

    @classmethod
    def from_state(cls, packing: Packing, state: Json) -> _Packer:
        ids = np.frombuffer(base64.b64decode(state["ids"]), _IDS).astype(np.int32)
        counted = (state["n_windows"], state["n_tokens"], state["is_full"])
        return cls(packing, *counted, ids, [], list(state["starts"]))


class _Windows:
    """The windows of one source while its pieces come in."""

    def __init__(self, source: Source, packing: Packing, state: Json | None) -> None:
        has_ids = any(file.kind in ID_KINDS for file in source.files)
        if has_ids and packing.bos == "window":
            packing = replace(packing, bos="none")
        self.source, self.packing = source, packing
        groups = (state or {}).get("groups", {})
        self.packers = {name: _Packer.from_state(packing, s) for name, s in groups.items()}
        # The group of the open document, and whether none of its tokens came yet.
        self.open: str | None = state["open"] if state else None
        self.is_bare: bool = state["is_bare"] if state else False
        self.n_empty: int = state["n_empty"] if state else 0
        self.n_skipped: int = state["n_skipped"] if state else 0
        self.n_textless: int = (state or {}).get("n_textless", 0)
        self.window_bos = packing.bos_id if packing.bos == "window" else None
        self.made: list[tuple[str, Array, Array]] = []
        self.waiting: dict[str, list[str]] = {}  # texts of each group, and what joins them
        self.n_waiting = 0  # characters

    def state(self, position: Json) -> Json:
        return {
            "position": position,
            "groups": {name: packer.state() for name, packer in self.packers.items()},
            "open": self.open,
            "is_bare": self.is_bare,
            "n_empty": self.n_empty,
            "n_skipped": self.n_skipped,
            "n_textless": self.n_textless,
        }

    def packer(self, group: str) -> _Packer:
        if group not in self.packers:
            self.packers[group] = _Packer(self.packing)
        return self.packers[group]

    @property
    def is_full(self) -> bool:
        """Whether all groups that the source can have are full."""
        names = self.source.groups if self.source.group is None else (self.source.group,)
        return names is not None and all(self.packer(name).is_full for name in names)

    def add(self, pieces: Sequence[Piece], encode: Encode) -> None:
        wanted = [piece for piece in pieces if self._is_wanted(piece)]
        if self.packing.join is not None:
            self._wait(wanted, self.packing.join)
            return
        texts = [piece.content for piece in wanted if isinstance(piece.content, str)]
        encoded = iter(encode(texts) if texts else [])
        for piece in wanted:
            is_text = isinstance(piece.content, str)
            self._add(piece, next(encoded) if is_text else piece.content, is_text)

    def _is_wanted(self, piece: Piece) -> bool:
        if self.source.groups is not None and piece.group not in self.source.groups:
            self.n_skipped += 1
            return False
        is_kept = self.packing.join is not None and piece.content == ""
        if not isinstance(piece.content, np.ndarray) and not piece.content and not is_kept:
            self.n_textless += piece.content is None
            self.n_empty += piece.content is not None
            return False
        return not self.packer(piece.group).is_full

    def _wait(self, pieces: Sequence[Piece], join: str) -> None:
        """Keep texts until all that they are joined with is there."""
        for piece in pieces:
            texts = self.waiting.setdefault(piece.group, [])
            texts += [join, piece.content] if piece.begins and texts else [piece.content]
            self.n_waiting += len(piece.content) + len(join)
        limit = self.source.max_record_mib
        if self.n_waiting > limit * MIB:
            raise too_large(self.source.name, "a text of joined documents", limit)

    def end(self, encode: Encode) -> None:
        """No more pieces come."""
        for group, texts in self.waiting.items():
            text = "".join(texts)
            self._add(Piece(group, text, True), encode([text])[0], True)
        self.waiting = {}
        self.end_document()

    def _add(self, piece: Piece, tokens: Any, is_text: bool) -> None:
        if piece.begins:
            self.end_document()
            self.open, self.is_bare = piece.group, True
        packer = self.packer(piece.group)
        if not len(tokens) or packer.is_full:
            return
        has_bos = tokens[0] == self.packing.bos_id  # a text may begin with it itself
        put_bos = is_text and self.packing.bos == "document" and not has_bos
        packer.add(tokens, self.is_bare, self.packing.bos_id if put_bos else None)
        self.is_bare = False
        self._take(packer, piece.group)

    def end_document(self) -> None:
        """No more of the open document comes: in mode `documents` its last window ends here."""
        if self.open is None:
            return
        self.n_empty += self.is_bare
        if self.packing.mode == "documents":
            self._take(self.packer(self.open), self.open, all_of_it=True)
        self.open, self.is_bare = None, False

    def _take(self, packer: _Packer, group: str, *, all_of_it: bool = False) -> None:
        windows = packer.cut(self.window_bos, all_of_it=all_of_it)
        self.made.extend((group, ids, first) for ids, first in windows)

    def is_block(self) -> bool:
        many = len(self.made) >= BLOCK_WINDOWS
        return many or sum(len(ids) for _, ids, _ in self.made) >= BLOCK_TOKENS

    def block(self, start: Json | None, fraction: float | None) -> Block:
        """What was made since the last block."""
        groups = list(dict.fromkeys(group for group, _, _ in self.made))
        place = {group: i for i, group in enumerate(groups)}
        windows = [Window(place[group], ids, first) for group, ids, first in self.made]
        self.made = []
        n_tokens = sum(packer.n_tokens for packer in self.packers.values())
        return Block(windows, groups, start, n_tokens, self._fraction(fraction))

    def _fraction(self, read: float | None) -> float | None:
        limit, group = self.packing.max_tokens, self.source.group
        if limit is None or group is None:
            return read
        return min(1.0, max(read or 0.0, self.packer(group).n_tokens / limit))

    def notes(self) -> Json:
        """What no window shows; of the whole source, once all of it is read."""
        dropped = {name: len(packer) for name, packer in self.packers.items() if len(packer) > 0}
        return {
            "dropped_tokens": dropped,
            "empty_documents": self.n_empty,
            "records_without_text": self.n_textless,
            "records_of_other_groups": self.n_skipped,
        }


def make_blocks(
    source: Source,
    packing: Packing,
    encode: Encode,
    *,
    state: Json | None = None,
    vocabulary: int | None = None,
) -> Iterator[Block | Json]:
    """The blocks of a source from the start state of one of them on (None: all), then its notes.

    `encode` gives the token ids of some texts, without special tokens. A start state is JSON:
    where the source is read on, and the tokens that wait for the rest of their window.
    """
    windows = _Windows(source, packing, state)
    start = state
    fraction: float | None = None
    if not windows.is_full:
        for chunk in read_chunks(source, state["position"] if state else None, vocabulary):
            fraction = chunk.fraction
            windows.add(chunk.pieces, encode)
            if windows.is_full:
                break
            if windows.is_block():
                yield windows.block(start, fraction)
                start = windows.state(chunk.position)
    windows.end(encode)
    if windows.made:
        yield windows.block(start, fraction)
    yield windows.notes()
