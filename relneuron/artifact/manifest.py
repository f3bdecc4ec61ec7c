"""What makes a study resumable: the manifest, which stages are done from which files; the lock.

Every stage calls this module; what a long stage has done so far is in journal.py.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import relneuron
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    json_bytes,
    real_path,
    refuse_unfinished,
    sha256,
    unfinished,
)
from relneuron.artifact.reading import read_json

SCHEMA = "relneuron.study/1"
_KINDS = {"count": "groups of text", "contrast": "two models"}  # of a study, by its stage


def versions() -> Json:
    """The versions that can change a number."""
    from importlib.metadata import PackageNotFoundError, version

    result = {"python": platform.python_version(), "relneuron": relneuron.__version__}
    for package in ("torch", "transformers", "tokenizers", "triton", "numpy", "scipy"):
        with suppress(PackageNotFoundError):
            result[package] = version(package)
    return result


_MANIFEST_KEYS = (
    "schema",
    "versions",
    "model",
    "model_b",
    "dtype",
    "sites",
    "threshold",
    "tokens",
    "seeds",
    "batch_plan",
    "memory",
    "fallbacks",
    "stages",
    "files",
    "earlier",
    "digest",
)


# What two descriptions of one model have in common, wherever it runs.
MODEL_KEYS = ("layers", "width", "hidden", "digest")


def same_model(described: Json) -> Json:
    """The part of a description that decides results: not by which name the model was given."""
    return {key: value for key, value in described.items() if key not in ("id", "revision")}


def json_digest(value: object) -> str:
    """The SHA-256 of a value's JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flat(value: Json, prefix: str = "") -> Json:
    """A nested dictionary with dotted keys."""
    result: Json = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        result |= _flat(item, f"{name}.") if isinstance(item, dict) else {name: item}
    return result


def differences(before: Json, now: Json) -> list[str]:
    """What differs between two descriptions of inputs, each as `key: before -> now`."""
    old, new = _flat(before), _flat(now)
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


class Manifest:
    """manifest.json of a folder: which stages are done, from what, and every file's digest.

    It holds no times and no paths of the output, so the same study gives the same bytes. It ends
    with the digest of all that stands before; a manifest without one is not checked.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "manifest.json"
        self.data: Json = {"schema": SCHEMA, "stages": {}, "files": {}}
        # Files of stages that were made again since, and are still there.
        self._earlier: Json = {}
        if self.path.exists():
            data = read_json(self.path, "manifest")
            schema = data.get("schema") if isinstance(data, dict) else None
            if schema != SCHEMA:
                raise RelneuronError(
                    f"{self.path} has the schema {schema!r}, this version reads {SCHEMA!r}",
                    "use another folder, or the version of relneuron that wrote it",
                )
            digest = data.pop("digest", None)
            if digest is not None and digest != json_digest(data):
                raise RelneuronError(
                    f"{self.path} is not as it was written (its digest differs)",
                    "restore it, or delete it and make the study again with --force",
                )
            _check_manifest(self.path, data)
            self._earlier = data.pop("earlier", {})
            self.data |= data

    def is_done(
        self, stage: str, inputs: Json, *, apart: Sequence[str] = (), force: bool = False
    ) -> bool:
        """Whether `stage` was finished from the same inputs and its files are as it left them.

        Finished from other inputs is an error that names them, unless `force` redoes the stage; so
        is a folder with one of the stages `apart`, which are of another kind of study.
        """
        entry = self.data["stages"].get(stage)
        if entry is None and self.data["stages"].keys() & {*apart} and not force:
            kind = next((k for s, k in _KINDS.items() if s in self.data["stages"]), "relations")
            raise RelneuronError(
                f"{self.path.parent} holds a study of {kind}",
                "use another output, or --force to forget what was identified and ablated there",
            )
        if entry is None:
            return False
        inputs = json.loads(json.dumps(inputs))
        changed = differences(entry["inputs"], inputs)
        if changed:
            if not force:
                raise RelneuronError(
                    f"{self.path.parent}: {stage} was made from other inputs: {'; '.join(changed)}",
                    "use another output, or --force to make it and all that follows again",
                )
            return False
        return all(self.is_intact(name, force=force) for name in entry["files"])

    def is_intact(self, name: str, *, force: bool = False) -> bool:
        """Whether a file is there as it was written; a changed one raises, unless `force`."""
        path, known = self.path.parent / name, self.data["files"].get(name)
        if known is None:
            return False
        if known.get("dropped"):
            return True
        if not path.exists() or name in unfinished(self.path.parent):
            return False
        if _is_as_noted(path, known):
            return True
        if force:
            return False
        raise self._changed(name)

    def check(self, name: str) -> None:
        """Raise if a file that is there is another one than a stage wrote; others are not known."""
        known = self.data["files"].get(name) or self._earlier.get(name)
        path = self.path.parent / name
        if known is not None and path.is_file() and not _is_as_noted(path, known):
            raise self._changed(name)

    def _changed(self, name: str) -> RelneuronError:
        stages = self.data["stages"]
        stage = next((s for s in stages if name in stages[s]["files"]), "an earlier stage")
        again = f"relneuron {stage.partition('_')[0]} ... --force" if stage in stages else "it"
        path = self.path.parent / name
        return RelneuronError(
            f"{path} is not the file that was written by {stage} (its digest differs)",
            f"restore it, or make it again with {again}; what you changed on purpose is taken as "
            "it is under another name",
        )

    def check_model(self, model: Json) -> None:
        """Refuse the folder of a study of another model, or of other weights."""
        for stage in ("record", "count", "contrast"):
            known = self.data["stages"].get(stage, {}).get("inputs", {}).get("model") or {}
            if any(key in known and known[key] != model.get(key) for key in MODEL_KEYS):
                raise RelneuronError(
                    f"{self.path.parent} holds a study of another model, or of other weights",
                    "use another output",
                    2,
                )

    def finish(
        self,
        stage: str,
        inputs: Json,
        files: Sequence[Path],
        *,
        reads: Sequence[Path] | None = None,
        apart: Sequence[str] = (),
        **details: object,
    ) -> None:
        """Record a finished stage: the digests of its files, and of those in this folder it read.

        A stage is forgotten if it read, or wrote, another file than is there now. `reads` is None
        for one that read all that the other stages wrote. In a folder with one of the stages
        `apart`, of another kind of study, all that was made from its files is forgotten.
        """
        folder, known = self.path.parent, self._earlier | self.data["files"]
        names = [path.relative_to(folder).as_posix() for path in files]
        stages, changed = self.data["stages"], set()
        for name, path in zip(names, files, strict=True):
            noted = {"sha256": sha256(path), "bytes": path.stat().st_size}
            changed |= set() if known.get(name, {}).get("sha256") == noted["sha256"] else {name}
            known[name] = noted
        is_apart = not stages.keys().isdisjoint(apart)
        for other in [s for s in stages if s != stage]:
            made_here = other not in apart and stages[other].get("reads") != {}
            if changed & {*stages[other]["files"]} or (is_apart and made_here):
                del stages[other]
        stages[stage] = {"inputs": inputs, "files": names, **details}
        if reads is not None:
            root = real_path(folder)
            inside = [real_path(path) for path in reads if real_path(path).is_relative_to(root)]
            own = {path.relative_to(root).as_posix() for path in inside} & known.keys()
            stages[stage]["reads"] = {name: known[name]["sha256"] for name in sorted(own)}
        kept = self._forget_stale(stage, known)
        self.data["stages"] = _in_order(stages)
        self.data["files"] = {name: known[name] for name in sorted(kept & known.keys())}
        left = [name for name in sorted(known.keys() - kept) if (folder / name).is_file()]
        self._earlier = {name: known[name] for name in left if not known[name].get("dropped")}
        self.save()

    def _forget_stale(self, finished: str, known: Json) -> set[str]:
        """Forget each stage that read what is no longer there; returns the files of the others."""
        stages = self.data["stages"]
        while True:
            files = {name for entry in stages.values() for name in entry["files"]}
            stale = [
                stage
                for stage, entry in stages.items()
                if stage != finished
                and any(
                    name not in files or known.get(name, {}).get("sha256") != digest
                    for name, digest in entry.get("reads", {"*": ""}).items()
                )
            ]
            if not stale:
                return files
            for stage in stale:
                del stages[stage]

    def drop(self, name: str) -> None:
        """Delete a large intermediate file and say so; the stage that made it stays done."""
        if name in self.data["files"] and not self.data["files"][name].get("dropped"):
            self.data["files"][name]["dropped"] = True
            self.save()
        (self.path.parent / name).unlink(missing_ok=True)

    def forget(self, stage: str) -> None:
        """Have `stage` made again, where a file of it that was dropped is needed again."""
        self.data["stages"].pop(stage, None)
        self.save()

    def describe(self, **facts: object) -> None:
        """Set facts of the whole study: the model, the tokens, the batch plan, ..."""
        self.data.update(facts)

    def save(self) -> None:
        data = json.loads(json.dumps(self.data))
        data |= {"earlier": self._earlier} if self._earlier else {}
        data["digest"] = json_digest(data)
        rank = {key: place for place, key in enumerate(_MANIFEST_KEYS)}
        keys = sorted(data, key=lambda key: rank.get(key, rank["files"] + 0.5))
        atomic_write(self.path, json_bytes({key: data[key] for key in keys}))


def _in_order(stages: Json) -> Json:
    """The stages so that each comes after those whose files it read; else as they were.

    The report, which shows what all others made, is the last one.
    """
    left, placed = dict(sorted(stages.items(), key=lambda one: one[0] == "report")), {}
    while left:
        waiting = [
            stage
            for stage, entry in left.items()
            if any(entry.get("reads", {}).keys() & {*left[o]["files"]} for o in left if o != stage)
        ]
        first = next((stage for stage in left if stage not in waiting), next(iter(left)))
        placed[first] = left.pop(first)
    return placed


def _check_manifest(path: Path, data: Json) -> None:
    """Raise unless each part of a manifest is what it has to be, and names files of its folder."""

    def check(holds: bool, where: str, expected: str) -> None:
        if not holds:
            raise RelneuronError(
                f"{path}: {where} is not {expected}",
                "restore it, or delete it and make the study again with --force",
            )

    parts = {key: data.get(key) or {} for key in ("stages", "files", "earlier", "model")}
    for key, part in parts.items():
        check(isinstance(part, dict), key, "an object")
    for key in MODEL_KEYS[:3]:
        size = parts["model"].get(key, 0)
        check(type(size) is int and 0 <= size < 1 << 31, f"model.{key}", "a size")
    for key in ("earlier", "files"):
        for name, noted in parts[key].items():
            where = f"{key}.{name}"
            check(isinstance(noted, dict), where, "an object")
            sizes = noted.get("bytes"), noted.get("sha256")
            check(type(sizes[0]) is int and isinstance(sizes[1], str), where, "bytes and sha256")
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            check(inside, where, "a file of this folder")
    for stage, entry in parts["stages"].items():
        where = f"stages.{stage}"
        check(isinstance(entry, dict), where, "a stage")
        check(isinstance(entry.get("inputs"), dict), f"{where}.inputs", "an object")
        files = entry.get("files")
        named = isinstance(files, list) and all(isinstance(name, str) for name in files)
        check(named, f"{where}.files", "a list of names")
        reads = entry.get("reads", {})
        digests = isinstance(reads, dict) and all(isinstance(x, str) for x in reads.values())
        check(digests, f"{where}.reads", "files and their sha256")
        commands = entry.get("commands", [])
        said = isinstance(commands, list) and all(
            isinstance(words, list) and words and all(isinstance(word, str) for word in words)
            for words in commands
        )
        check(said, f"{where}.commands", "a list of commands")


def _is_as_noted(path: Path, known: Json) -> bool:
    return bool(path.stat().st_size == known["bytes"] and sha256(path) == known["sha256"])


def checked(path: Path) -> Path:
    """`path`, if it is as the manifest beside it notes; who reads a file calls this first.

    A file that no manifest knows is the user's own. One that is not there is left to its reader.
    """
    refuse_unfinished(path)
    if _is_manifest(path.parent / "manifest.json"):
        Manifest(path.parent).check(path.name)
    return path


def _is_manifest(path: Path) -> bool:
    """Whether a manifest.json is ours: other programs write files of that name, too."""
    return path.is_file() and b'"relneuron.study/' in path.read_bytes()


# What artifact.atomic_write calls its temporary files; others' stay.
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")


@contextmanager
def locked(folder: Path, *beneath: Path) -> Iterator[None]:
    """Hold a folder for this process; a second process is refused at once. May be nested.

    What a killed writer left behind is removed there, and in the folders `beneath`.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RelneuronError(
            f"another process is writing to {folder}", "wait for it, or use another output"
        ) from error
    try:
        for place in (folder, *beneath):
            for stale in place.glob(".*.tmp"):
                if _TEMPORARY.fullmatch(stale.name) and stale.is_file():
                    stale.unlink()
        yield
    finally:
        lock.release()  # the file stays: to delete it would let two writers in
