"""The process beside the model that reads, tokenises and packs sources: feed.py starts it.

Requests come in on its standard input, blocks of windows go out on its standard output, in order.
The same `Server` runs in a thread for what cannot leave the feed's process.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import IO, Any

import numpy as np

from relneuron.artifact.files import Json, RelneuronError
from relneuron.texts.sources import File, Source
from relneuron.texts.windows import Block, Encode, Packing, Window, make_blocks

_LENGTH = struct.Struct("<Q")

Array = np.ndarray[Any, Any]


# --- frames ----------------------------------------------------------------------------------


def send(stream: IO[bytes], header: Json, arrays: Sequence[Array] = ()) -> None:
    """Write one frame: the header's length, the header as JSON, the bytes of the arrays."""
    shapes = [[array.dtype.str, len(array)] for array in arrays]
    text = json.dumps(header | {"arrays": shapes}).encode()
    stream.write(_LENGTH.pack(len(text)) + text)
    for array in arrays:
        stream.write(array.data)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[Json, list[Array]] | None:
    """The next frame; None at the end of the stream, also in the middle of a frame."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    size = _LENGTH.unpack(head)[0]
    text = stream.read(size)
    if len(text) < size:
        return None
    header: Json = json.loads(text)
    arrays = []
    for dtype, length in header.pop("arrays"):
        array = np.empty(length, dtype)
        if length and stream.readinto(array.view(np.uint8)) < array.nbytes:  # type: ignore[attr-defined]
            return None
        arrays.append(array)
    return header, arrays


def block_frame(block: Block) -> tuple[Json, list[Array]]:
    """A block as a header and four arrays: all ids, all first marks, lengths, groups."""
    header = {
        "groups": block.groups,
        "start": block.start,
        "n_tokens": block.n_tokens,
        "fraction": block.fraction,
    }
    return header, [
        np.concatenate([window.ids for window in block.windows]),
        np.concatenate([window.first for window in block.windows]),
        np.array([len(window.ids) for window in block.windows], np.int64),
        np.array([window.group for window in block.windows], np.int32),
    ]


def frame_block(header: Json, arrays: Sequence[Array]) -> Block:
    """The block of a frame; its windows share the frame's memory."""
    ids, first, lengths, groups = arrays
    ends = np.cumsum(lengths).tolist()
    windows = [
        Window(group, ids[begin:end], first[begin:end])
        for group, begin, end in zip(groups.tolist(), [0, *ends], ends, strict=False)
    ]
    return Block(windows, header["groups"], header["start"], header["n_tokens"], header["fraction"])


# --- the server ------------------------------------------------------------------------------


def fast_encoder(text: str, splits_special_tokens: bool) -> Encode:
    """What tokenises with a tokenizer that the tokenizers library has written as JSON."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = splits_special_tokens

    def encode(texts: list[str]) -> list[list[int]]:
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    return encode


def source_header(source: Source) -> Json:
    """A source of files as JSON."""
    fields = {name: value for name, value in vars(source).items() if name != "dataset"}
    return fields | {"files": [[file.path, file.kind] for file in source.files]}


def header_source(header: Json) -> Source:
    files = tuple(File(path, kind) for path, kind in header["files"])
    groups = None if header["groups"] is None else tuple(header["groups"])
    return Source(**(header | {"files": files, "groups": groups}))


class Server:
    """Makes the blocks of some sources, each when it is asked for."""

    def __init__(self, encode: Encode, packing: Packing, vocabulary: int | None) -> None:
        self.encode, self.packing, self.vocabulary = encode, packing, vocabulary
        self._blocks: dict[int, Iterator[Block | Json]] = {}
        self._names: dict[int, str] = {}
        self._ends: dict[int, Json | RelneuronError] = {}

    def open(self, number: int, source: Source, state: Json | None) -> None:
        self._names[number] = source.name
        self._blocks[number] = make_blocks(
            source, self.packing, self.encode, state=state, vocabulary=self.vocabulary
        )

    def next(self, number: int) -> Block | Json | RelneuronError:
        """The next block; after the last one the notes of the source; or what went wrong."""
        if number in self._ends:
            return self._ends[number]
        answer = self._make(number)
        if not isinstance(answer, Block):
            self._ends[number] = answer
        return answer

    def _make(self, number: int) -> Block | Json | RelneuronError:
        try:
            return next(self._blocks[number])
        except RelneuronError as error:
            return error
        except MemoryError:
            return RelneuronError(
                f"no memory is left to read {self._names[number]}", "use shorter documents"
            )
        except Exception as error:
            line = " ".join(str(error).split())
            return RelneuronError(
                f"reading {self._names[number]} failed: {type(error).__name__}: {line}",
                "correct the file, or report it with the text that it stopped at",
            )


def _answer(answer: Block | Json | RelneuronError) -> tuple[Json, list[Array]]:
    if isinstance(answer, Block):
        return block_frame(answer)
    if isinstance(answer, RelneuronError):
        return {"error": [answer.cause, answer.fix, answer.exit_code]}, []
    return {"notes": answer}, []


def read_answer(header: Json, arrays: Sequence[Array]) -> Block | Json | RelneuronError:
    """What `Server.next` gave at the other end."""
    if "error" in header:
        return RelneuronError(*header["error"])
    if "notes" in header:
        notes: Json = header["notes"]
        return notes
    return frame_block(header, arrays)


def _serve(requests: SimpleQueue[Json], out: IO[bytes]) -> None:
    begin = requests.get()
    encode = fast_encoder(**begin["tokenizer"]) if begin["tokenizer"] else _no_encoder
    server = Server(encode, Packing(**begin["packing"]), begin["vocabulary"])
    while True:
        request = requests.get()
        if "source" in request:
            server.open(request["number"], header_source(request["source"]), request["state"])
            continue
        header, arrays = _answer(server.next(request["number"]))
        send(out, header | {"number": request["number"]}, arrays)


def _no_encoder(texts: list[str]) -> list[list[int]]:
    raise RelneuronError("the corpus holds text, but there is no tokenizer", "give one", 2)


def main() -> None:
    """Serve until the standard input ends, which it does however the process at the other end does.

    The input is read by a thread of its own, so that this process ends in the middle of its work.
    """
    requests: SimpleQueue[Json] = SimpleQueue()
    source, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand between the frames

    def listen() -> None:
        while (frame := receive(source)) is not None:
            requests.put(frame[0])
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    try:
        _serve(requests, out)
    except BrokenPipeError:
        os._exit(0)
