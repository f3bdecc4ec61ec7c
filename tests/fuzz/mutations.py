"""Which mutations a file gets, by its name, and what becomes of the digests that guard it.

run.py calls `mutate` on a copy of a folder; text.py and binary.py hold the mutations.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from relneuron.artifact.files import sha256
from relneuron.artifact.manifest import json_digest
from tests.fuzz import binary, text
from tests.fuzz.text import Mutation

# Of seconds and more: what is small and unpacks to much, texts of 10 MB.
HEAVY = (binary.zip_bomb, binary.gzip_bomb, binary.parquet_bomb, text.long_line)
# What stands at the file's place instead of it.
PLACES = ("a folder", "a dangling link", "a link to itself", "nothing")
# What guards a file: as it was; made again over the mutated file; gone.
MODES = ("left", "left", "refreshed", "refreshed", "refreshed", "bare")

_JSON = [*text.JSON, *text.JSON, *text.TEXT, *text.BYTES]
_JSONL = [*text.JSONL, *text.JSONL, *text.TEXT, *text.BYTES]
_CSV = [*text.CSV, *text.CSV, *text.TEXT, *text.BYTES]
BY_SUFFIX: dict[str, list[Mutation]] = {
    ".json": _JSON,
    ".jsonl": _JSONL,
    ".csv": _CSV,
    ".tsv": _CSV,
    ".txt": text.TEXT + text.BYTES,
    ".safetensors": binary.SAFETENSORS * 2 + text.BYTES,
    ".pt": binary.ZIP * 2 + text.BYTES,
    ".pth": binary.ZIP * 2 + text.BYTES,
    "": binary.ZIP * 2 + text.BYTES,  # counts of LAPE
    ".npy": binary.NPY * 2 + text.BYTES,
    ".bin": [binary.odd_ids] * 4 + text.BYTES,
    ".gz": binary.GZIP * 2 + text.BYTES,
    ".parquet": binary.PARQUET * 2 + text.BYTES,
    ".journal": text.BYTES + text.TEXT,
    ".1": text.BYTES + text.TEXT,  # the journal of another process
    ".checkpoint": text.BYTES,
}


@dataclass(frozen=True)
class Mutated:
    """What was done to a file, and what guards it now."""

    path: str
    mode: str
    mutation: str
    size: int

    @property
    def is_place(self) -> bool:
        return self.mutation in PLACES


def mutate(rng: Random, root: Path, name: str, *, guarded: bool, quick: bool = False) -> Mutated:
    """Mutate the file `name` of `root`; a user's own is guarded by nothing.

    With `quick` no heavy mutation is drawn.
    """
    path = root / name
    mode = rng.choice(MODES) if guarded else "none"
    if rng.random() < 0.04:
        kind = rng.choice(PLACES)
        _put(path, kind)
        size = 0
    else:
        data = path.read_bytes()
        kind, found = _mutated(rng, path, data, mode, quick)
        path.write_bytes(found)
        size = len(found)
    if path.name != "manifest.json":
        _guard(path, mode)
    return Mutated(name, mode, kind, size)


def _put(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a dangling link":
        path.symlink_to("not-there")
    elif kind == "a link to itself":
        path.symlink_to(path.name)


def _mutated(rng: Random, path: Path, data: bytes, mode: str, quick: bool) -> tuple[str, bytes]:
    """The mutation's name and what it makes; of files with a digest of their own, see `mode`."""
    if path.suffix == ".checkpoint" and mode == "refreshed":
        function = rng.choice(binary.SAFETENSORS)
        body = function(rng, data.partition(b"\n")[2])
        return function.__name__, hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    function = rng.choice([f for f in BY_SUFFIX[path.suffix] if not quick or f not in HEAVY])
    found = function(rng, data)
    if path.name == "manifest.json" and mode != "left":
        found = _signed(found, keep=mode == "refreshed")
    return function.__name__, found


def _signed(data: bytes, *, keep: bool) -> bytes:
    """A manifest with the digest of what it holds now, or none; what is no JSON stays."""
    try:
        value = json.loads(data)
        value.pop("digest", None)
        if keep:
            value["digest"] = json_digest(value)
        return json.dumps(value).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data


def _guard(path: Path, mode: str) -> None:
    """Refresh what the manifest beside a file says of it, or delete the manifest."""
    manifest = path.parent / "manifest.json"
    if not manifest.is_file() or mode in ("left", "none"):
        return
    if mode == "bare":
        manifest.unlink()
        return
    value = json.loads(manifest.read_bytes())
    for files in (value["files"], value.get("earlier", {})):
        if path.name in files and path.is_file():
            files[path.name] |= {"sha256": sha256(path), "bytes": path.stat().st_size}
    value.pop("digest")
    manifest.write_text(json.dumps(value | {"digest": json_digest(value)}))
