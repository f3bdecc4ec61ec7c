"""The sources of a corpus: which files, folders and datasets are the text of which group.

The command line parses them, `count` and `nll` put their fingerprint into the manifest, and
texts.read reads them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relneuron.artifact.files import Json, RelneuronError, hashing_threads, real_path, sha256
from relneuron.artifact.installed import need
from relneuron.artifact.reading import max_record_mib
from relneuron.artifact.stage import placed

KINDS = {
    ".txt": "text",
    ".txt.gz": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson": "jsonl",
    ".ndjson.gz": "jsonl",
    ".parquet": "parquet",
    ".pt": "pt",
    ".npy": "npy",
    ".bin": "bin",
}
ID_KINDS = ("pt", "npy", "bin")
NO_FIELDS = {"text", *ID_KINDS}
ID_DTYPES = ("uint16", "uint32", "int32", "int64")
HF = "hf:"
MIB = 1 << 20

GZIP = b"\x1f\x8b"
_HEADS = {b"\x93NUMPY": "npy", b"PAR1": "parquet"}
# The pickled magic number of torch.save before it wrote zip files.
_HEADS[b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."] = "pt"
_HEAD_BYTES = 1 << 16
_NO_TEXT = (".csv", ".tsv")  # tables whose lines are no documents

_NAME = re.compile(r"[^\s/\\=:][^/\\=:\n]*")
_IDS_NAME = re.compile(r"id\.([^.]+)\.[^.]+\..+")  # id.zh.train.llama, as the LAPE authors call it


@dataclass(frozen=True)
class File:
    """One file of a source, or `hf:PATH[:CONFIG[:SPLIT]]`, and how it is read."""

    path: str
    kind: str  # text, jsonl, parquet, pt, npy, bin, hf


@dataclass(frozen=True)
class Source:
    """Text or token ids that are read one after the other.

    group          the name of all of it; None if `group_column` names the group of each record
    groups         with a group column: only these, in this order
    ids_dtype      of .bin files; default: uint16 if the vocabulary has at most 65,536 tokens,
                   else uint32
    dataset        in place of files: a Python iterable of records, as a Hugging Face dataset
    given          the paths that the files were found at, as they were given
    max_record_mib the largest record that is read, in MiB: more is an error
    image_column   of records with pictures, the field that holds them
    """

    group: str | None = None
    files: tuple[File, ...] = ()
    text_column: str = "text"
    group_column: str | None = None
    groups: tuple[str, ...] | None = None
    ids_dtype: str | None = None
    dataset: Any = None
    given: tuple[str, ...] = ()
    max_record_mib: int = field(default_factory=max_record_mib)
    image_column: str | None = None

    @property
    def is_ids(self) -> bool:
        """Whether it holds token ids only, so that no tokenizer is needed."""
        return bool(self.files) and all(file.kind in ID_KINDS for file in self.files)

    @property
    def name(self) -> str:
        """What messages call it."""
        if self.group is not None:
            return self.group
        return Path(self.files[0].path).name if self.files else type(self.dataset).__name__


def parse_sources(
    texts: Sequence[str],
    *,
    text_column: str | None = None,
    group_column: str | None = None,
    groups: Sequence[str] | None = None,
    ids_dtype: str | None = None,
    image_column: str | None = None,
) -> list[Source]:
    """The sources that `NAME=PATH` texts name; all paths of a name are one source, in order.

    With `group_column` the paths have no name, are one source, and every record names its group;
    `groups` keeps only these; `text_column` (default: text) needs files with fields, `ids_dtype` a
    .bin file. With `image_column` records have pictures. A folder stands for its files of known
    suffixes and those that are token ids or tables by their content, sorted by name. Of a file
    without a known suffix only the begin is read. Raises `RelneuronError` for what does not exist
    or cannot be read as a corpus.
    """
    if not texts:
        raise RelneuronError("no corpus was given", "name it as GROUP=PATH", 2)
    _check_options(group_column, groups, ids_dtype)
    found: dict[str | None, list[File]] = {}
    given: dict[str | None, list[str]] = {}
    for text in texts:
        name, path = _split(text)
        if name is None and group_column is None:
            named = _IDS_NAME.fullmatch(Path(path).name)
            name = named[1] if named else None
        if name is None and group_column is None:
            raise RelneuronError(
                f"{text} has no group", "write GROUP=PATH, or name its field with --group-column", 2
            )
        if name is not None and group_column is not None:
            raise RelneuronError(
                f"{text} names a group, and so does --group-column", "leave out one of them", 2
            )
        found.setdefault(name, []).extend(_files(path))
        given.setdefault(name, []).append(path)
    everything = [file for files in found.values() for file in files]
    _check_files(everything, group_column)
    kinds = {file.kind for file in everything}
    if text_column is not None and kinds <= NO_FIELDS:
        raise RelneuronError("--text-column, but no file with fields", "leave out --text-column", 2)
    if ids_dtype is not None and "bin" not in kinds:
        raise RelneuronError("--ids-dtype, but no .bin file", "leave out --ids-dtype", 2)
    return [
        Source(
            name,
            tuple(files),
            text_column or "text",
            group_column,
            None if groups is None else tuple(groups),
            ids_dtype,
            given=tuple(given[name]),
            image_column=image_column,
        )
        for name, files in found.items()
    ]


def source_words(sources: Sequence[Source], folder: Path) -> tuple[list[str], Json] | None:
    """The arguments and options that name these sources in a command whose study is in `folder`.

    None if none does: a Python dataset, or sources that are not read alike. Files that were given
    in Python go by their names, without their folders.
    """
    read_by = ("text_column", "group_column", "groups", "ids_dtype", "image_column")
    options = [{name: getattr(source, name) for name in read_by} for source in sources]
    if any(source.dataset is not None for source in sources) or options[1:] != options[:-1]:
        return None
    words = []
    for source in sources:
        for path in source.given or [Path(file.path).name for file in source.files]:
            where = path if path.startswith(HF) else placed(path, folder)
            words.append(where if source.group is None else f"{source.group}={where}")
    kinds = {file.kind for source in sources for file in source.files}
    read = options[0] | ({"text_column": None} if kinds <= NO_FIELDS else {})
    return words, read


def _check_options(
    group_column: str | None, groups: Sequence[str] | None, ids_dtype: str | None
) -> None:
    if ids_dtype not in (None, *ID_DTYPES):
        raise RelneuronError(f"unknown --ids-dtype {ids_dtype!r}", f"use {', '.join(ID_DTYPES)}", 2)
    if groups is None:
        return
    if group_column is None:
        raise RelneuronError("--groups needs --group-column", "name the field with the group", 2)
    if not groups or len(set(groups)) < len(groups):
        raise RelneuronError(f"--groups {','.join(groups)!r}", "name each group once", 2)


def _split(text: str) -> tuple[str | None, str]:
    """The group and the path of a text; a path may hold `=` itself."""
    name, equals, path = text.partition("=")
    if equals and _NAME.fullmatch(name):
        if not path:
            raise RelneuronError(f"{text} names no path", "write GROUP=PATH", 2)
        return name, path
    if text.startswith(HF) or Path(text).exists() or not equals:
        return None, text
    raise RelneuronError(f"{name!r} is no name of a group, {text} no path", "write GROUP=PATH", 2)


def _files(path: str) -> list[File]:
    if path.startswith(HF):
        need(path, "datasets")
        if not split_hf(path)[0]:
            raise RelneuronError(f"{path} names no dataset", "write hf:PATH[:CONFIG[:SPLIT]]", 2)
        return [File(path, "hf")]
    place = Path(path)
    if place.is_dir():
        inside = sorted(p for p in place.iterdir() if p.name[0] != "." and p.is_file())
        # A README beside the data is no corpus: text needs its suffix here.
        files = [
            File(str(p), kind)
            for p in inside
            if (kind := _kind(p)) or (kind := content_kind(p)) in (*ID_KINDS, "parquet")
        ]
        if not files:
            raise RelneuronError(f"{path} holds no file of a corpus", f"known are {_known()}", 2)
        return files
    if not place.exists():
        raise RelneuronError(f"{path} does not exist", "correct the path of the corpus", 2)
    kind = _kind(place)
    if kind is None and place.suffix.lower() not in _NO_TEXT:
        kind = content_kind(place)
    if kind is None:
        raise RelneuronError(
            f"{path} has an unknown suffix, and by its content it is no text, table or token ids",
            f"known are {_known()}",
            2,
        )
    return [File(path, kind)]


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), None)


def content_kind(path: Path) -> str | None:
    """How a file is to be read by the bytes that it begins with; None: it is no corpus.

    A torch, numpy or parquet file by its magic number; else UTF-8 text, or JSON with an object a
    line, also compressed by gzip.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for magic, kind in _HEADS.items():
        if head.startswith(magic):
            return kind
    try:
        if head.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(path) as archive:
                return "pt" if any(n.endswith("/data.pkl") for n in archive.namelist()) else None
        if head.startswith(GZIP):
            with gzip.open(path) as unpacked:
                head = unpacked.read(_HEAD_BYTES)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile):
        return None
    return _text_kind(head)


def _text_kind(head: bytes) -> str | None:
    """text or jsonl, by the first lines; None: neither."""
    try:
        # The last character may be cut.
        text = head.decode("utf-8-sig", "strict" if len(head) < _HEAD_BYTES else "ignore")
    except UnicodeDecodeError:
        return None
    if "\0" in text or (len(head) == _HEAD_BYTES and len(text.encode()) < _HEAD_BYTES - 8):
        return None
    line, newline, _ = text.lstrip().partition("\n")
    if not line.startswith(("{", "[")):
        return "text"
    try:
        return "jsonl" if isinstance(json.loads(line), dict) else None
    except (ValueError, RecursionError):
        if line.strip() in ("{", "["):
            return None  # JSON over several lines
        return "text" if newline or not line.startswith('{"') else "jsonl"


def _known() -> str:
    return ", ".join(KINDS)


def _check_files(files: Sequence[File], group_column: str | None) -> None:
    """Refuse a file that stands there twice, lacks its package, or cannot name a group."""
    seen = set()
    for file in files:
        key = file.path if file.kind == "hf" else str(real_path(file.path))
        if key in seen:
            raise RelneuronError(f"{file.path} is in the corpus twice", "name it once", 2)
        seen.add(key)
        if file.kind == "parquet":
            need(file.path, "pyarrow")
        if group_column is not None and file.kind in NO_FIELDS:
            raise RelneuronError(
                f"{file.path} has no fields, --group-column needs them", "write GROUP=PATH", 2
            )


def split_hf(path: str) -> tuple[str, str | None, str]:
    """`hf:PATH[:CONFIG[:SPLIT]]` as what load_dataset takes: path, config, split."""
    place, config, split = (path.removeprefix(HF).split(":", 2) + ["", ""])[:3]
    return place, config or None, split or "train"


def describe_sources(sources: Sequence[Source]) -> Json:
    """A fingerprint of every source, by its place."""
    return {str(i): describe_source(source) for i, source in enumerate(sources)}


def describe_source(source: Source) -> Json:
    """A fingerprint for the manifest: what a source is and what its files hold; no times, no paths.

    Of each file the name, the bytes and the SHA-256 of all of it: reading that takes a second for
    each GB, far less than a model takes to read the text. Of a data set on the hub only its name
    is known; of a Python object the digest of a list's or tuple's records, or the fingerprint that
    a Hugging Face dataset has.
    """
    has_fields = source.dataset is not None or not {f.kind for f in source.files} <= NO_FIELDS
    result: Json = {
        "group": source.group,
        "text_column": source.text_column if has_fields else None,
    }
    if source.group_column is not None:
        groups = None if source.groups is None else list(source.groups)
        result |= {"group_column": source.group_column, "groups": groups}
    if source.image_column is not None:
        result["image_column"] = source.image_column
    if any(file.kind == "bin" for file in source.files):
        result["ids_dtype"] = source.ids_dtype
    if source.dataset is not None:
        result["dataset"] = _describe_dataset(source.dataset)
    result["files"] = {str(i): entry for i, entry in enumerate(_describe_files(source.files))}
    return result


def _describe_dataset(dataset: Any) -> Json:
    length = len(dataset) if hasattr(dataset, "__len__") else None
    found: Json = {"type": type(dataset).__name__, "records": length}
    if isinstance(dataset, list | tuple):
        digest = hashlib.sha256()
        for record in dataset:
            digest.update(json.dumps(record, default=_as_text).encode() + b"\n")
        found["sha256"] = digest.hexdigest()
    elif isinstance(fingerprint := getattr(dataset, "_fingerprint", None), str):
        found["fingerprint"] = fingerprint
    return found


def _as_text(value: Any) -> str:
    """A value of a record as text: of a picture its pixels, not where it lies in memory."""
    return hashlib.sha256(value.tobytes()).hexdigest() if hasattr(value, "convert") else repr(value)


def _describe_files(files: Sequence[File]) -> list[Json]:
    """Of each file, and of each within a data set's folder; hashed side by side."""
    found: list[Json] = []
    paths: dict[int, Path] = {}  # by their places in what was found
    for file in files:
        if file.kind != "hf":
            paths[len(found)] = Path(file.path)
            found.append({"name": Path(file.path).name, "kind": file.kind})
            continue
        folder, config, split = split_hf(file.path)
        local = Path(folder).is_dir()
        name = Path(folder).name if local else folder
        found.append({"kind": "hf", "name": name, "config": config, "split": split})
        inside = (p for p in Path(folder).rglob("*") if p.is_file()) if local else ()
        for path in sorted(inside):
            paths[len(found)] = path
            found.append({"name": path.name, "kind": "hf"})
    with hashing_threads() as pool:
        for place, digest in zip(paths, pool.map(sha256, paths.values()), strict=True):
            found[place] |= {"bytes": paths[place].stat().st_size, "sha256": digest}
    return found
