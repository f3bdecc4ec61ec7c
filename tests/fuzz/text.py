"""Mutations of bytes, JSON, JSON lines and csv; each takes a random generator and a file's bytes.

mutations.py puts them together by kind of file.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]

DEEP = 100_000
# What a JSON value is replaced by, as it stands in the file.
RAW = [
    *("1e999", "-1e999", "1" + "0" * 400, "1" + "0" * 5000, "-1", "NaN", "Infinity", "-Infinity"),
    *("null", "true", "0", "1", "1.5", "9223372036854775807", "18446744073709551616", "1e-400"),
    *('""', '"x"', '"-1"', '"nan"', '"\\ud800"', '"\\u0000"', '"../../x"', '"a\\nb"', '"\\u202e"'),
    *("[]", "{}", "[[]]", "[null]", "[1, 2]", '{"a": 1}', '{"": {}}', '["x"]', '"{}"', "1000000"),
    "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "0" + "}" * DEEP,
    '"' + "x" * 1_000_000 + '"',
]
CELLS = [
    *("", " ", "nan", "inf", "-inf", "-1", "1e999", "9" * 400, "9" * 5000, "1.5", "0", "x", "\0"),
    *("é", "\ud7ff", '"', '""', "=1+1", "1_0", " 1", "１", "True", "a\rb", "a\nb", "\u202e", "[1]"),
    *("../x", "0x10", "1e400", "999999999", "-0", "2", "1"),
]
_MARK = "\x01value\x01"


# --- bytes -----------------------------------------------------------------------------------


def flip_bit(rng: Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 8))):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def cut_end(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def cut_begin(rng: Random, data: bytes) -> bytes:
    return data[rng.randrange(1, len(data) + 1) :]


def cut_one(rng: Random, data: bytes) -> bytes:
    return data[:-1]


def delete_bytes(rng: Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randint(1, 64) :]


def repeat_bytes(rng: Random, data: bytes) -> bytes:
    start, n = rng.randrange(len(data)), rng.randint(1, 256)
    return data[:start] + data[start : start + n] * rng.choice((2, 50)) + data[start + n :]


def insert_bytes(rng: Random, data: bytes) -> bytes:
    start = rng.choice((0, len(data), rng.randrange(len(data))))
    return data[:start] + rng.randbytes(rng.choice((1, 7, 1000))) + data[start:]


def insert_nul(rng: Random, data: bytes) -> bytes:
    start = rng.choice((0, len(data), rng.randrange(len(data))))
    return data[:start] + bytes(rng.choice((1, 8, 5000))) + data[start:]


def only_nul(rng: Random, data: bytes) -> bytes:
    return bytes(len(data))


def empty(rng: Random, data: bytes) -> bytes:
    return b""


def double(rng: Random, data: bytes) -> bytes:
    return data + data


def other_bytes(rng: Random, data: bytes) -> bytes:
    return rng.randbytes(len(data))


BYTES = [flip_bit, flip_bit, cut_end, cut_begin, cut_one, delete_bytes, repeat_bytes, insert_bytes]
BYTES += [insert_nul, only_nul, empty, double, other_bytes]


# --- text ------------------------------------------------------------------------------------


def no_utf8(rng: Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xe9")) + data[start:]


def utf16(rng: Random, data: bytes) -> bytes:
    return data.decode().encode(rng.choice(("utf-16", "utf-16-le", "utf-32")))


def latin1(rng: Random, data: bytes) -> bytes:
    return b"\xe9" + data.decode().encode("latin-1", "replace")


def bom(rng: Random, data: bytes) -> bytes:
    return b"\xef\xbb\xbf" * rng.choice((1, 2)) + data


def cr_ends(rng: Random, data: bytes) -> bytes:
    return data.replace(b"\n", rng.choice((b"\r", b"\r\n", b"\n\n", b"\xe2\x80\xa8")))


def long_line(rng: Random, data: bytes) -> bytes:
    return data + rng.choice((b"x", b'"', b"[", b"{", b"1")) * 10_000_000


def one_line(rng: Random, data: bytes) -> bytes:
    return data.replace(b"\n", b" ")


def swap_lines(rng: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    a, b = (rng.randrange(len(lines)) for _ in range(2))
    lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


def drop_line(rng: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    del lines[rng.randrange(len(lines))]
    return b"\n".join(lines)


def twice_line(rng: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    return b"\n".join([*lines[:place], lines[place], *lines[place:]])


TEXT = [no_utf8, utf16, latin1, bom, cr_ends, long_line, one_line, swap_lines, drop_line]
TEXT += [twice_line]


# --- JSON ------------------------------------------------------------------------------------


def mutate_json(rng: Random, value: Any) -> str:
    """JSON of `value` with one part of its tree another one, gone, there twice or added."""
    box = [value]
    places = list(_places(box))
    # Few of the places are near the root, where most of the meaning is.
    near = [place for place in places if place[2] <= 2]
    holder, key, _ = rng.choice(near if rng.random() < 0.5 else places)
    raw = rng.choice(RAW)
    way = rng.choice(("replace", "replace", "replace", "delete", "twice", "add", "rename", "wrap"))
    if holder is box and way in ("delete", "twice", "rename"):
        way = "replace"
    if way == "replace":
        holder[key] = _MARK
    elif way == "delete":
        del holder[key]
    elif way == "wrap":
        holder[key] = [holder[key]]
    elif way == "add" and isinstance(holder[key], dict):
        holder[key] |= {rng.choice(("extra", "", "a.b", "__metadata__")): _MARK}
    elif way == "add" and isinstance(holder[key], list):
        holder[key].insert(rng.randint(0, len(holder[key])), _MARK)
    elif way == "twice" and isinstance(holder, dict):
        holder[_MARK + "key"] = _MARK
        text = json.dumps(box[0], ensure_ascii=False)
        return _marked(text.replace(json.dumps(_MARK + "key"), json.dumps(key)), raw)
    elif way == "rename" and isinstance(holder, dict):
        holder[rng.choice(("x", "", key.upper(), key + " "))] = holder.pop(key)
    elif isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = _MARK
    return _marked(json.dumps(box[0], ensure_ascii=False), raw)


def _marked(text: str, raw: str) -> str:
    return text.replace(json.dumps(_MARK), raw)


def _places(holder: Any, depth: int = 0) -> Any:
    """(container, key, depth) of every value in a container, itself in a list of one."""
    items = list(holder.items() if isinstance(holder, dict) else enumerate(holder))
    for key, value in items:
        yield holder, key, depth
        if isinstance(value, dict | list):
            yield from _places(value, depth + 1)


def json_tree(rng: Random, data: bytes) -> bytes:
    return mutate_json(rng, json.loads(data)).encode("utf-8", "surrogatepass")


def json_whole(rng: Random, data: bytes) -> bytes:
    return rng.choice(RAW).encode()


def jsonl_tree(rng: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    place = rng.choice([i for i, line in enumerate(lines) if line.strip()])
    lines[place] = json_tree(rng, lines[place])
    return b"\n".join(lines)


def jsonl_line(rng: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    raw = rng.choice((*RAW, "{", "[", "{}x", "'a'", "//", '{"a": 1,}', "null null"))
    lines[rng.randrange(len(lines))] = raw.encode()
    return b"\n".join(lines)


JSON = [json_tree] * 20 + [json_whole] * 2
JSONL = [jsonl_tree] * 20 + [jsonl_line] * 4


# --- csv -------------------------------------------------------------------------------------


def _rows(data: bytes, between: str = ",") -> list[list[str]]:
    return list(csv.reader(io.StringIO(data.decode(), newline=""), delimiter=between))


def _csv(rows: list[list[str]], between: str = ",", end: str = "\n") -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=between, lineterminator=end).writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


def csv_cell(rng: Random, data: bytes) -> bytes:
    rows = _rows(data)
    row = rng.choice(rows[1:] or rows)
    if row:
        row[rng.randrange(len(row))] = rng.choice(CELLS)
    return _csv(rows)


def csv_head(rng: Random, data: bytes) -> bytes:
    rows = _rows(data)
    place = rng.randrange(len(rows[0]))
    rows[0][place] = rng.choice((*CELLS[:8], rows[0][place].upper(), rows[0][0], f" {rows[0][-1]}"))
    return _csv(rows)


def csv_column(rng: Random, data: bytes) -> bytes:
    rows = _rows(data)
    place, way = rng.randrange(len(rows[0])), rng.choice(("drop", "twice", "empty", "end"))
    for number, row in enumerate(rows):
        if way == "drop":
            del row[place : place + 1]
        elif way == "twice":
            row[place:place] = row[place : place + 1]
        elif way == "end":
            row.append("more")
        elif number:
            row[place : place + 1] = [""]
    return _csv(rows)


def csv_ragged(rng: Random, data: bytes) -> bytes:
    rows = _rows(data)
    row = rng.choice(rows)
    if rng.random() < 0.5:
        del row[rng.randint(0, len(row)) :]
    else:
        row += ["more"] * rng.choice((1, 1000))
    return _csv(rows)


def csv_delimiter(rng: Random, data: bytes) -> bytes:
    return _csv(_rows(data), rng.choice((";", "\t", "|")))


def csv_ends(rng: Random, data: bytes) -> bytes:
    return _csv(_rows(data), end=rng.choice(("\r", "\r\n", "\n\n")))


def csv_quote(rng: Random, data: bytes) -> bytes:
    start = rng.choice((data.index(b"\n") + 1, rng.randrange(len(data))))
    return data[:start] + b'"' + data[start:]


def csv_huge(rng: Random, data: bytes) -> bytes:
    rows = _rows(data)
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = rng.choice("x9") * rng.choice((200_000, 10_000_000))
    return _csv(rows)


def csv_only_head(rng: Random, data: bytes) -> bytes:
    return data[: data.index(b"\n") + 1]


CSV = [csv_cell] * 12 + [csv_head] * 2 + [csv_column] * 3 + [csv_ragged] * 3
CSV += [csv_delimiter, csv_ends, csv_quote, csv_quote, csv_huge, csv_only_head]
