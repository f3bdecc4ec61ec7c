"""The files that stages hand to each other: written atomically, digested, described by a manifest.

Every stage calls this module to read and write a study directory; nothing here needs a model.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = "relneuron.study/1"
NEURONS_FORMAT = "relneuron.neurons/1"
SITES = ("gate", "up", "down")  # the order that breaks ties in a ranking
RESPONSE_ROWS = "relneuron.responses"  # the key of what responses.safetensors says of its rows
ATTENTION = ("q", "k", "v", "o")  # after them, where they were recorded

Json = dict[str, Any]


class RelneuronError(Exception):
    """An error a user can mend: one line of cause, one line of fix, and the exit code."""

    def __init__(self, cause: str, fix: str, exit_code: int = 1) -> None:
        super().__init__(cause)
        self.cause, self.fix, self.exit_code = cause, fix, exit_code


# --- bytes -----------------------------------------------------------------------------------


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part.

    Temporary file in the same folder, fsync, rename, fsync of the folder; on any error the
    temporary file is removed and the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Digests of files that were read to their end: by what the file system says of them.
_HASHED: dict[tuple[int, ...], str] = {}
# A file that was written so lately may be written again with the same time; no clock is coarser.
_SETTLED_NS = 2_000_000_000


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes (about 1 GB a second).

    A process reads a file once, as long as its inode, size and times stay as they are.
    """
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        times = about.st_mtime_ns, about.st_ctime_ns
        key = (about.st_dev, about.st_ino, about.st_size, *times)
        if key in _HASHED:
            return _HASHED[key]
        is_settled = max(times) < time.time_ns() - _SETTLED_NS
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if is_settled:
        _HASHED[key] = digest
    return digest


def hashing_threads() -> ThreadPoolExecutor:
    """Threads that hash side by side: hashlib lets others run meanwhile."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def check_place(path: Path) -> None:
    """Raise if nothing can be written at `path`: what should be its folder is a file, or closed."""
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise RelneuronError(
            f"{folder} is a file, {path} cannot be written in it", "choose another output", 2
        )
    if not path.exists() and not os.access(folder, os.W_OK | os.X_OK):
        raise RelneuronError(
            f"{folder} cannot be written to", "choose a folder you have the right to write to", 2
        )


def refuse_overwrite(path: Path, force: bool) -> None:
    """Raise if `path` is a folder or under a file, or exists and `--force` was not given."""
    check_place(path)
    if path.is_dir():
        raise RelneuronError(f"{path} is a folder", "name a file in it", 2)
    if path.exists() and not force:
        raise RelneuronError(f"{path} exists", "choose another output or add --force", 2)


def require(path: Path, made_by: str) -> Path:
    """Return `path`, or say which command makes it: anew, where a study is that has lost it."""
    if not path.is_file():
        is_lost = (path.parent / "manifest.json").is_file() and made_by.partition(" ")[0] != "run"
        again = " --force" if is_lost and "--force" not in made_by else ""
        raise RelneuronError(
            f"{path} does not exist", f"make it with: relneuron {made_by}{again}", 2
        )
    return path


ADAPTER = "adapter_config.json"  # of a folder that peft writes


def check_model_folder(name: str) -> bool:
    """Whether `name` is a folder, not a name of the hub; one that holds no model raises."""
    folder = Path(name)
    if not (name.startswith((".", "/", "~")) or folder.exists()):
        return False
    if (folder / "config.json").is_file():
        return True
    if (folder / ADAPTER).is_file():
        about = read_json(folder / ADAPTER, ADAPTER)
        base = about.get("base_model_name_or_path") if isinstance(about, dict) else None
        raise RelneuronError(
            f"{name} is an adapter ({ADAPTER}) of {base or 'another model'}, no model by itself",
            "merge it into that model (peft: model.merge_and_unload().save_pretrained(FOLDER)), "
            "save the tokenizer there and give FOLDER",
        )
    raise RelneuronError(
        f"{name} is no model folder: it has no config.json",
        "give a Hugging Face model folder (config.json, weights, tokenizer) or a hub name",
    )


# --- tables ----------------------------------------------------------------------------------


def json_bytes(value: object) -> bytes:
    """`value` as indented UTF-8 JSON with a closing newline, keys in the order given."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def csv_bytes(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A header and `rows` as UTF-8 csv with Unix line ends; no cell of text acts as a formula.

    A spreadsheet runs text that begins like a formula. An apostrophe before it, as OWASP advises
    (CSV injection), makes it text; `read_csv` takes it off. Numbers are as they are.
    """
    lines = _UnixLines()
    writer = csv.writer(lines, lineterminator="\r\n")
    writer.writerows([_as_cell(value) for value in row] for row in (columns, *rows))
    return "".join(lines).encode()


# With any apostrophes before it, so that a text that has its own comes back whole.
_FORMULA = re.compile(r"'*(?:\s*[=+\-@＝＋－＠]|[\t\r])")


def _is_formula(text: str) -> bool:
    """Whether a spreadsheet runs `text` once its apostrophes are off: it begins so, no number."""
    if not _FORMULA.match(text):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return text[0] not in "+-"


def _as_cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and _is_formula(value) else value


def cell_text(cell: str) -> str:
    """The text that `csv_bytes` wrote as `cell`."""
    return cell[1:] if cell[:1] == "'" and _is_formula(cell[1:]) else cell


class _UnixLines(list[str]):
    """Takes a csv writer's lines, and their carriage returns off.

    The writer only quotes a carriage return inside of a cell if it also ends the lines with one.
    """

    def write(self, line: str) -> None:
        self.append(line.removesuffix("\r\n") + "\n")


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of a csv file that must have `columns`."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            header = ",".join(reader.fieldnames or [])
            is_other = all(column in header for column in columns) and ";" in header
            raise RelneuronError(
                f"{path} lacks the column {', '.join(missing)}"
                + (": its columns are separated by semicolons" if is_other else ""),
                "save it with commas between the columns"
                if is_other
                else "make the file anew with the stage that writes it",
            )
        for row in reader:
            yield {k: cell_text(v) if isinstance(v, str) else v for k, v in row.items()}


def read_json(path: Path, what: str) -> Any:
    """The value of a JSON file, or an error that names the file and the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RelneuronError(f"{path} is not JSON: {error}", f"give a valid {what}") from error


def fold(text: str) -> str:
    """`text` as names are compared: outer space off, case folded, composed (NFC).

    So "Łódź" is "łódź" however its marks are encoded, and "Straße" is "STRASSE" (Unicode's
    canonical caseless matching).
    """
    return composed(unicodedata.normalize("NFD", text.strip()).casefold())


def composed(text: str) -> str:
    """`text` in NFC: each letter one with its marks, as far as there is such a letter."""
    return unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class Prompt:
    """One line of prompts.jsonl: a question about a fact, and where it belongs.

    `objects` are all right answers, the first is `object`: those of another first one do not count.
    A concept's sentence asks nothing: it has no object. `negative_of`: the concepts that it is not
    about; what they rank it against. `group`: what kind of concept it is, as its file says.
    """

    id: str
    relation: str
    split: str  # det: neurons are found with it; neg: against it; eva, eva2: effects are measured
    language: str
    template: str
    subject: str
    object: str
    prompt: str
    objects: tuple[str, ...] = ()
    negative_of: tuple[str, ...] = ()
    group: str = ""

    def __post_init__(self) -> None:
        if self.objects[:1] != (self.object,):
            object.__setattr__(self, "objects", (self.object,))

    @property
    def right(self) -> str:
        """The right answers as people read them."""
        return " / ".join(self.objects)


RECORDED = ("det", "neg")  # the splits whose prompts have responses, in the order of the file


def prompts_bytes(prompts: Iterable[Prompt]) -> bytes:
    """prompts.jsonl: one JSON object a line; `objects` stands there if there are several.

    What only concepts have stands there if it is said.
    """
    lines = []
    for prompt in prompts:
        record = asdict(prompt)
        if len(prompt.objects) == 1:
            del record["objects"]
        for name in ("negative_of", "group"):
            if not record[name]:
                del record[name]
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a prompts.jsonl, in the file's order.

    A line's right answers are those of `object` and `objects`, each a text or a list of them, and
    those of the lines that ask the same: one text in one relation.
    """
    plain = [field.name for field in fields(Prompt) if field.default is MISSING]
    names = [name for name in plain if name != "object"]
    prompts = []
    for values in read_records(path, names, "prompt", objects=True):
        right = values.pop("objects")
        prompts.append(Prompt(**values, object=right[0], objects=right))
    asked: dict[tuple[str, str], list[str]] = {}
    for p in prompts:
        asked.setdefault((p.relation, p.prompt), []).extend(p.objects)
    return [
        replace(p, objects=distinct((*p.objects, *asked[p.relation, p.prompt]))) for p in prompts
    ]


def distinct(names: Iterable[str]) -> tuple[str, ...]:
    """Names that differ by `fold`, each as it is written first."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(fold(name), name)
    return tuple(found.values())


def right_answers(record: Json) -> tuple[str, ...]:
    """The texts of `object` and `objects` in a JSON object, each a text or a list of them."""
    given = [record[key] for key in ("object", "objects") if key in record]
    names = [name for some in given for name in (some if isinstance(some, list) else [some])]
    if not names:
        raise KeyError("object")
    if not all(isinstance(name, str) for name in names):
        raise TypeError("an object is not a string")
    return distinct(names)


def _of_concepts(record: Json) -> Json:
    """What a prompt says of concepts, where it says it."""
    found: Json = {}
    if record.get("group"):
        found["group"] = record["group"]
    if record.get("negative_of"):
        found["negative_of"] = tuple(record["negative_of"])
    texts = [found.get("group", ""), *found.get("negative_of", ())]
    if isinstance(record.get("negative_of"), str) or not all(isinstance(t, str) for t in texts):
        raise TypeError("negative_of is no list of strings, or group no string")
    return found


def read_records(
    path: Path, names: Sequence[str], what: str, *, objects: bool = False
) -> list[Json]:
    """The `names` of every line of a JSONL file that `relneuron prompts` writes: texts, own ids.

    With `objects` also the right answers of a line, under that name, and what it says of concepts.
    """
    records = []
    with require(path, "prompts FACTS_DIR -o prompts.jsonl").open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                values = {name: record[name] for name in names}
                if not all(isinstance(value, str) for value in values.values()):
                    raise TypeError("a field is not a string")
                if objects:
                    values |= {"objects": right_answers(record)} | _of_concepts(record)
                records.append(values)
            except (ValueError, KeyError, TypeError) as error:
                also = ", object or objects" if objects else ""
                raise RelneuronError(
                    f"{path}, line {number}: not a {what} ({error})",
                    f"give one JSON object a line with the fields {', '.join(names)}{also}",
                ) from error
    if not records:
        fix = f"make it anew with: relneuron prompts FACTS_DIR -o {path} --force"
        raise RelneuronError(f"{path} holds no {what}", fix)
    if len({values["id"] for values in records}) < len(records):
        raise RelneuronError(f"{path} has two {what}s with the same id", "give each its own id")
    return records


def relation_names(prompts: Iterable[Prompt]) -> list[str]:
    """The relations of some prompts, in order of their names."""
    return sorted({prompt.relation for prompt in prompts})


# --- neuron sets -----------------------------------------------------------------------------

Neuron = tuple[int, str, int]  # (layer, site, index), layer and index from zero


@dataclass(frozen=True)
class NeuronFile:
    """neurons.json: named sets of neurons, best first, and the model they belong to."""

    model: Json
    method: str
    sets: dict[str, list[tuple[int, str, int, float]]]
    selection: Json

    def write(self, path: str | Path) -> None:
        rows = {name: [list(neuron) for neuron in chosen] for name, chosen in self.sets.items()}
        head = {"format": NEURONS_FORMAT, "model": self.model, "method": self.method}
        text = json.dumps(head | {"selection": self.selection, "sets": {}}, indent=1)
        lines = [
            f"  {json.dumps(name)}: [\n   "
            + ",\n   ".join(json.dumps(row) for row in chosen)
            + "\n  ]"
            for name, chosen in rows.items()
        ]
        body = '"sets": {\n' + ",\n".join(lines) + "\n }"
        atomic_write(Path(path), (text.replace('"sets": {}', body) + "\n").encode())

    @classmethod
    def read(cls, path: str | Path) -> NeuronFile:
        path = Path(path)
        data = read_json(require(path, "identify DIR -o neurons.json"), "neurons.json")
        try:
            if data["format"] != NEURONS_FORMAT:
                raise ValueError(f"format {data['format']!r}")
            sets = {
                str(name): [(int(la), str(s), int(i), float(score)) for la, s, i, score in chosen]
                for name, chosen in data["sets"].items()
            }
            return cls(data["model"], data["method"], sets, data.get("selection", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RelneuronError(
                f"{path} is no neuron file of format {NEURONS_FORMAT} ({error!r})",
                "make it anew with: relneuron identify DIR -o neurons.json --force",
            ) from error

    def check_model(self, shape: Mapping[str, object]) -> None:
        """Refuse neurons of another model: layers, width and hidden must be the same."""
        ours = {key: self.model.get(key) for key in ("layers", "width", "hidden")}
        theirs = {key: shape.get(key) for key in ours}
        if ours != theirs:
            raise RelneuronError(
                f"the neurons are of a model of shape {ours}, this model has {theirs}",
                "identify the neurons on this model, or give the model they come from",
            )


def site_widths(shape: Mapping[str, Any]) -> dict[str, int]:
    """How many neurons each site of a layer has, in the order that breaks ties.

    gate, up and down, and those attention projections whose width `shape` says.
    """
    widths = {"gate": shape["width"], "up": shape["width"], "down": shape["hidden"]}
    widths |= {site: shape[site] for site in ATTENTION if site in shape}
    return {site: int(width) for site, width in widths.items()}


def check_neurons(neurons: Iterable[Sequence[Any]], shape: Mapping[str, int]) -> list[Neuron]:
    """Neurons as (layer, site, index), each once, in order; out of the model's range raises."""
    widths = site_widths(shape)
    result: dict[Neuron, None] = {}
    for neuron in neurons:
        layer, site, index = int(neuron[0]), str(neuron[1]), int(neuron[2])
        if site not in widths or not 0 <= layer < shape["layers"] or not 0 <= index < widths[site]:
            raise RelneuronError(
                f"neuron (layer {layer}, site {site!r}, index {index}) is not in a model with "
                f"{shape['layers']} layers, width {shape['width']}, hidden {shape['hidden']}",
                f"layers and indices count from zero; sites are {', '.join(widths)}",
            )
        result[layer, site, index] = None
    return list(result)


# --- dense arrays ----------------------------------------------------------------------------


def create_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Make a float32 safetensors file of zeros and return its tensors as writable memory maps.

    The space is reserved at once, so that a full disk is an error here and not a crash later.
    An existing file with the same header is opened as it is; what it lacks at its end is zeros.
    """
    header: Json = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    head = len(text).to_bytes(8, "little") + text
    path.parent.mkdir(parents=True, exist_ok=True)
    existing = b""
    if path.exists():
        with path.open("rb") as file:
            existing = file.read(len(head))
    if existing != head or path.stat().st_size != len(head) + offset:
        with path.open("r+b" if existing == head else "wb") as file:
            try:
                file.truncate(len(head) + offset)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, len(head) + offset)
                file.write(head)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    result = {}
    for name, shape in shapes.items():
        start = len(head) + header[name]["data_offsets"][0]
        result[name] = np.memmap(path, np.float32, "r+", start, shape)
    return result


def rows_digest(arrays: Sequence[np.ndarray[Any, Any]], rows: Sequence[int]) -> str:
    """The SHA-256 of some rows of all arrays, which are hashed side by side."""
    places = list(rows)
    with hashing_threads() as pool:
        parts = pool.map(lambda array: hashlib.sha256(array[places]).digest(), arrays)
        return hashlib.sha256(b"".join(parts)).hexdigest()


def check_rows(path: Path, key: str, ids: Sequence[str]) -> None:
    """Raise if a safetensors file says under `key` that its rows are of others than `ids`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {}).get(key, "{}"))
        others = about.get("ids", list(ids)) != list(ids)
    except (SafetensorError, ValueError, AttributeError) as error:
        raise RelneuronError(f"{path} is damaged ({error})", "make it anew") from error
    if others:
        raise RelneuronError(
            f"the rows of {path} are of other prompts than those beside it", "make it anew"
        )
