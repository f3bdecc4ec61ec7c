"""Mutations of safetensors, zip files of torch, npy, gzip and parquet.

mutations.py puts them together by kind of file.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import zipfile
from random import Random
from typing import Any

import numpy as np
import torch

from tests.fuzz.text import mutate_json

DTYPES = ["F32", "F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "X", "", "f32"]
SIZES = [0, 1, -1, 2**31, 2**62, 2**63, 2**64, 10**400, 1.5]
BOMB_BYTES = 160 << 20


# --- safetensors -----------------------------------------------------------------------------


def _parts(data: bytes) -> tuple[Any, bytes]:
    """Header and body."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _whole(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    packed = text.encode("utf-8", "surrogatepass")
    return len(packed).to_bytes(8, "little") + packed + body


def _some(rng: Random, header: Any) -> Any:
    """One of the tensors, as the header describes it."""
    return header[rng.choice([name for name in header if name != "__metadata__"])]


def header_length(rng: Random, data: bytes) -> bytes:
    true = int.from_bytes(data[:8], "little")
    lies = (0, 1, true - 1, true + 1, true + 8, len(data), len(data) - 8, 2**31, 2**60, 2**64 - 1)
    return rng.choice(lies).to_bytes(8, "little") + data[8:]


def header_tree(rng: Random, data: bytes) -> bytes:
    header, body = _parts(data)
    return _whole(mutate_json(rng, header), body)


def tensor_dtype(rng: Random, data: bytes) -> bytes:
    header, body = _parts(data)
    _some(rng, header)["dtype"] = rng.choice(DTYPES)
    return _whole(header, body)


def tensor_shape(rng: Random, data: bytes) -> bytes:
    header, body = _parts(data)
    about = _some(rng, header)
    shape, way = about["shape"], rng.choice(("one", "flat", "swap", "more", "less", "none"))
    if way == "one" and shape:
        shape[rng.randrange(len(shape))] = rng.choice(SIZES)
    flat = int(np.prod(shape)) if way == "flat" else 0
    found = {"flat": [flat], "swap": shape[::-1], "more": [1, *shape], "less": shape[1:]}
    about["shape"] = found.get(way, shape if way == "one" else [])
    return _whole(header, body)


def tensor_offsets(rng: Random, data: bytes) -> bytes:
    header, body = _parts(data)
    offsets = _some(rng, header)["data_offsets"]
    offsets[rng.randrange(2)] += rng.choice((-8, -1, 1, 4, 2**31, 2**62, len(body)))
    return _whole(header, body)


def tensor_smaller(rng: Random, data: bytes) -> bytes:
    """A tensor of fewer rows, all of the file in order: valid, and of another size."""
    header, body = _parts(data)
    names = [name for name in header if name != "__metadata__"]
    chosen, packed = rng.choice(names), b""
    for name in names:
        about = header[name]
        part = body[slice(*about["data_offsets"])]
        if name == chosen and about["shape"] and about["shape"][0]:
            part = part[: len(part) // about["shape"][0] * (about["shape"][0] - 1)]
            about["shape"][0] -= 1
        about["data_offsets"] = [len(packed), len(packed) + len(part)]
        packed += part
    return _whole(header, packed)


def tensor_name(rng: Random, data: bytes) -> bytes:
    header, body = _parts(data)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    other = rng.choice((name.upper(), "", "x", name[:-1], f"{name}.0", *names))
    header[other] = header.pop(name)
    return _whole(header, body)


def metadata(rng: Random, data: bytes) -> bytes:
    header, body = _parts(data)
    about = header.get("__metadata__", {"format": "pt"})
    key = rng.choice(list(about))
    try:
        value = json.loads(about[key])
    except ValueError:
        value = about[key]
    way = rng.choice(("gone", "key", "tree", "tree", "tree", "tree", "text", "raw"))
    if way == "gone":
        header.pop("__metadata__", None)
        return _whole(header, body)
    if way == "key":
        del about[key]
    elif way == "tree":
        about[key] = mutate_json(rng, value)
    elif way == "raw":
        about[key] = value
    else:
        about[key] = rng.choice(("", "{}", "[]", "null", "[1, 2]", "{", "x", "\0"))
    return _whole(header | {"__metadata__": about}, body)


def odd_values(rng: Random, data: bytes) -> bytes:
    """NaN, infinities, huge numbers and those below zero in place of some values."""
    header, body = _parts(data)
    about, found = _some(rng, header), bytearray(body)
    start, end = about["data_offsets"]
    if end - start >= 8:
        odd = {"F32": np.float32, "F64": np.float64}.get(about["dtype"])
        values = [np.nan, np.inf, -np.inf, 1e38, -1.0, -0.0]
        integers = [-1, 2**62, -(2**63), 10**12]
        one = odd(rng.choice(values)) if odd else np.int64(rng.choice(integers))
        packed = one.tobytes()
        place = start + rng.randrange((end - start) // len(packed)) * len(packed)
        n = rng.choice((1, (end - place) // len(packed)))
        found[place : place + n * len(packed)] = packed * n
    return _whole(header, bytes(found))


def padded_header(rng: Random, data: bytes) -> bytes:
    header, body = _parts(data)
    return _whole(json.dumps(header) + rng.choice(" \n\0") * rng.choice((1, 5_000_000)), body)


def body_length(rng: Random, data: bytes) -> bytes:
    return data + bytes(rng.choice((1, 4, 4096)))


SAFETENSORS = [header_length, header_tree, header_tree, header_tree, tensor_dtype, tensor_shape]
SAFETENSORS += [tensor_offsets, tensor_smaller, tensor_name, metadata, metadata, metadata]
SAFETENSORS += [odd_values, odd_values, padded_header, body_length]


# --- zip and pickle --------------------------------------------------------------------------


class _Call:
    """What a hostile pickle calls when it is read."""

    def __reduce__(self) -> Any:
        return print, ("Traceback: a pickle was called",)


def _saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def other_object(rng: Random, data: bytes) -> bytes:
    """A whole file of torch.save that holds another object."""
    tensor = torch.arange(300) * 7 % 250
    found = [
        *(None, {}, [], [[]], 1, "x", float("nan"), {"n": tensor}, [tensor], [[tensor]], tensor),
        *(torch.tensor(1), torch.zeros(0), tensor.float(), tensor.to(torch.int32), -tensor),
        *(tensor.reshape(2, 150), torch.zeros(1, dtype=torch.int64).expand(10**10), tensor.bool()),
        *(tensor.to_sparse(), torch.empty(3, device="meta"), tensor.to(torch.complex64)),
        *(torch.full((300,), 2**62), torch.full((5,), torch.nan), [[tensor, 1], [2, tensor]]),
        *({"n": 1000, "over_zero": tensor}, {"n": -1, "over_zero": torch.zeros(2, 48)}),
        *({"n": "x", "over_zero": 1}, {"over_zero": torch.zeros(2, 48, dtype=torch.int64)}),
        {"n": 10**400, "over_zero": torch.zeros(2, 48, dtype=torch.int64)},
        {"n": 5, "over_zero": torch.full((2, 48), 2**62)},
        {"n": 5, "over_zero": torch.zeros(1, dtype=torch.int64).expand(2, 10**9)},
        *([[torch.tensor([10**9])] * 2] * 2, [[torch.tensor([-1])] * 2] * 2, _Call()),
        *([[torch.tensor([1, 1])] * 2] * 2, [[torch.tensor([1.5])] * 2] * 2, [[tensor] * 3] * 2),
    ]
    value = rng.choice(found)
    return _saved(value, _use_new_zipfile_serialization=rng.random() < 0.8)


def bare_pickle(rng: Random, data: bytes) -> bytes:
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    value = rng.choice((_Call(), {"n": 1}, deep, list(range(300))))
    return pickle.dumps(value, protocol=rng.choice((0, 2, 4)))


def _rezipped(data: bytes, change: Any, method: int = zipfile.ZIP_STORED) -> bytes:
    """The zip file with each entry's (name, bytes) changed; None drops it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", method) as new:
        for info in old.infolist():
            found = change(info.filename, old.read(info))
            if found is not None:
                new.writestr(zipfile.ZipInfo(found[0]), found[1], method)
    return file.getvalue()


def zip_entry(rng: Random, data: bytes) -> bytes:
    """One entry cut, flipped, gone, renamed or longer, with a right checksum."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        names = file.namelist()
    chosen, way = rng.choice(names), rng.choice(("cut", "flip", "drop", "name", "long", "empty"))

    def change(name: str, body: bytes) -> Any:
        if name != chosen:
            return name, body
        flipped = bytearray(body or b"\0")
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return {
            "cut": (name, body[: len(body) // 2]),
            "flip": (name, bytes(flipped)),
            "drop": None,
            "name": (f"../{name}", body),
            "long": (name, body + bytes(1000)),
            "empty": (name, b""),
        }[way]

    return _rezipped(data, change)


def zip_bomb(rng: Random, data: bytes) -> bytes:
    """Compressed entries; one of them is some hundred MB of zeros."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        chosen = rng.choice(file.namelist())
    bomb = bytes(BOMB_BYTES)
    return _rezipped(
        data, lambda name, body: (name, bomb if name == chosen else body), zipfile.ZIP_DEFLATED
    )


def zip_sizes(rng: Random, data: bytes) -> bytes:
    """An entry of the directory claims another size, compressed or not."""
    place = data.index(b"PK\x01\x02")
    found = bytearray(data)
    where = place + rng.choice((20, 24, 42))
    found[where : where + 4] = struct.pack("<I", rng.choice((0, 1, BOMB_BYTES, 2**32 - 1)))
    return bytes(found)


ZIP = [other_object] * 12 + [bare_pickle] * 2 + [zip_entry] * 5 + [zip_bomb, zip_sizes, zip_sizes]


# --- token ids, gzip, parquet ----------------------------------------------------------------


def npy_array(rng: Random, data: bytes) -> bytes:
    """A whole .npy file of another shape or type."""
    ids = np.arange(300) * 7 % 250
    found = [
        *(ids.astype(float), ids.reshape(2, 150), ids.astype(">i4"), ids.astype(bool), -ids),
        *(np.array(5), np.zeros(0, np.int64), np.array(["a", "b"]), np.array([{}], object)),
        *(np.zeros(3, [("a", "i4")]), ids.astype(complex), np.full(300, 2**62)),
        *(np.asfortranarray(ids.reshape(2, 150)), np.array([2**64 - 1], np.uint64)),
        np.array(["2020"], "datetime64[D]"),
    ]
    file = io.BytesIO()
    np.save(file, rng.choice(found), allow_pickle=True)
    return file.getvalue()


def npy_header(rng: Random, data: bytes) -> bytes:
    lies = [
        *(("(300,)", "(10**10,)"), ("(300,)", "(-1,)"), ("(300,)", "(0, 300)"), ("<i8", "<i3")),
        *(("(300,)", "(99999999999999,)"), ("(300,)", "(301,)"), ("<i8", "|O"), ("False", "True")),
        *(("(300,)", "()"), ("descr", "dexcr"), ("{", "["), ("<i8", "<M8"), ("(300,)", "300")),
        ("(300,)", "(1e9,)"),
    ]
    old, new = (text.encode() for text in rng.choice(lies))
    start = data.index(b"{")
    end = data.index(b"\n")
    text = data[start:end].replace(old, new).rstrip()
    return data[:start] + text.ljust(end - start) + data[end:]


def npy_version(rng: Random, data: bytes) -> bytes:
    return data[:6] + rng.choice((b"\x00\x00", b"\x02\x00", b"\x03\x00", b"\xff\xff")) + data[8:]


NPY = [npy_array] * 6 + [npy_header] * 6 + [npy_version]


def odd_ids(rng: Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", b"\xff\xff", b"\xff" * 3, b"\xff" * 1000))


def gzip_bomb(rng: Random, data: bytes) -> bytes:
    """Many members that are one line, together some hundred MB."""
    body = rng.choice((b" ", b"x", b"\n", b"[")) * (1 << 20)
    return data * rng.choice((0, 1)) + gzip.compress(body, mtime=0) * (BOMB_BYTES >> 20)


def gzip_parts(rng: Random, data: bytes) -> bytes:
    """Unpacked as another mutation left it; garbage behind it; packed twice; not packed."""
    plain = gzip.decompress(data)
    return rng.choice(
        (
            gzip.compress(plain[: rng.randrange(len(plain))], mtime=0),
            gzip.compress(mutated_line(rng, plain), mtime=0),
            data + b"garbage",
            data + bytes(1000),
            gzip.compress(data, mtime=0),
            plain,
            data[:-8] + bytes(8),
        )
    )


def mutated_line(rng: Random, plain: bytes) -> bytes:
    lines = plain.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    lines[place] = mutate_json(rng, json.loads(lines[place])).encode("utf-8", "surrogatepass")
    return b"".join([*lines[:place], lines[place], b"\n", *lines[place + 1 :]])


GZIP = [gzip_parts] * 8 + [gzip_bomb]


def parquet_table(rng: Random, data: bytes) -> bytes:
    """A whole parquet file with a column gone, renamed, of another type, nested or with nulls."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(data), use_threads=False)
    name = rng.choice(table.column_names)
    place, n = table.column_names.index(name), len(table)
    odd = [[None] * n, [1] * n, [1.5] * n, [["a"]] * n, [b"\xff"] * n, ["x"] * n, [{"a": 1}] * n]
    odd += [["\0"] * n, [True] * n, [float("nan")] * n, [10**18] * n, [-1] * n]
    way = rng.choice(("drop", "name", "type", "type", "type", "twice", "rows", "one"))
    if way == "drop":
        table = table.remove_column(place)
    elif way == "name":
        names = [f"{c}x" if c == name else c for c in table.column_names]
        table = table.rename_columns(names)
    elif way == "type":
        table = table.set_column(place, name, pyarrow.array(rng.choice(odd)))
    elif way == "twice":
        table = table.append_column(name, table.column(name))
    elif way == "rows":
        table = table.slice(0, rng.randrange(n))
    else:
        row = rng.randrange(n)
        table = pyarrow.concat_tables([table.slice(0, row), table.slice(row), table.slice(row, 1)])
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, compression=rng.choice(("snappy", "zstd", "none")))
    return file.getvalue()


def parquet_bomb(rng: Random, data: bytes) -> bytes:
    """One text of some hundred MB that packs well."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [rng.choice("x \n") * BOMB_BYTES]})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, compression="zstd", use_dictionary=False)
    return file.getvalue()


def parquet_foot(rng: Random, data: bytes) -> bytes:
    """The footer's length or bytes are others."""
    size = int.from_bytes(data[-8:-4], "little")
    lies = (0, 1, size - 1, size + 1, len(data), 2**31 - 1, 2**32 - 1)
    if rng.random() < 0.3:
        return data[:-8] + rng.choice(lies).to_bytes(4, "little") + data[-4:]
    found = bytearray(data)
    for _ in range(rng.choice((1, 3))):
        found[-8 - rng.randint(1, size)] ^= 1 << rng.randrange(8)
    return bytes(found)


PARQUET = [parquet_table] * 10 + [parquet_foot] * 6 + [parquet_bomb]
