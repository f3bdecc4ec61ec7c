"""Finished counts added: runs on several machines, or shards of one corpus; contrasts likewise.

The command `relneuron merge` calls it; no model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from relneuron.artifact import contrast, examples, histogram
from relneuron.artifact.counts import APART, NAME, Counts
from relneuron.artifact.examples import Examples
from relneuron.artifact.files import Json, RelneuronError, real_path, refuse_overwrite
from relneuron.artifact.histogram import Histogram
from relneuron.artifact.manifest import Manifest, checked, differences, json_digest, locked
from relneuron.artifact.stage import STUDY, command, moved, placed

# Where and how a model runs: two counts of it can still be added.
_PLACE = ("backend", "device", "device_map", "tensor_parallel_size", "attention")
_APART = ("shard", "batch_tokens", "processor")  # of the inputs, those that say no text
# What a count may have beside its counts, by the input that asked for it.
_BESIDE = {"examples": examples.NAME, "histogram": histogram.NAME}


class _Kind(NamedTuple):
    """What is merged: by its stage, its file, and what must be equal to mean the same."""

    stage: str
    name: str
    apart: tuple[str, ...]
    read: type[Counts]
    same: tuple[str, ...]
    counted: str  # as the manifest says it
    twice: str  # what two of the same shard do


_COUNTS = _Kind(
    *("count", NAME, APART, Counts),
    (
        *("model", "tokenizer", "sites", "threshold", "moments", "exclude_bos", "boundaries"),
        *_BESIDE,
    ),
    "counted",
    "count the same windows",
)
_CONTRASTS = _Kind(
    *("contrast", contrast.NAME, contrast.APART, contrast.Contrast),
    (
        *("model", "model_b", "tokenizer", "tokens", "completion_by", "positions"),
        *("max_new_tokens", "template", "chat_template"),
    ),
    "compared",
    "compare the same prompts",
)


def merge(folders: Sequence[Path], output: Path, *, force: bool = False) -> Counts:
    """The sum of finished counts, written to `output`; groups are matched by their names.

    Model, tokenizer, sites, threshold, what is not counted and how many examples and bins are kept
    must agree; a file that is not as it
    was written, the same windows twice, and a missing shard raise. Integers are exact; sums are
    added in the order of the folders. Contrasts of the same two models are added likewise.
    """
    if len(folders) < 2:
        raise RelneuronError("there is nothing to merge", "give two or more finished counts", 2)
    kind = _kind_of(folders[0])
    runs = [_finished(folder, kind) for folder in folders]
    first, first_folder = runs[0], folders[0]
    for folder, run in zip(folders[1:], runs[1:], strict=True):
        changed = differences(_relevant(first, kind), _relevant(run, kind))
        if changed:
            raise RelneuronError(
                f"{first_folder} and {folder} cannot be added: {'; '.join(changed)}",
                "merge counts of one model with the same sites, threshold and tokenizer"
                if kind is _COUNTS
                else "merge contrasts of the same two models, asked for in the same way",
            )
    _check_parts(folders, runs, kind)
    if real_path(output) in [real_path(folder) for folder in folders]:
        raise RelneuronError(f"{output} is one of the counts", "choose another output", 2)
    parts = {str(i): part for i, part in enumerate(_parts(runs, kind))}
    inputs = {**_relevant(first, kind), "parts": parts}
    with locked(output):
        manifest = Manifest(output)
        path = output / kind.name
        if manifest.is_done(kind.stage, inputs, apart=kind.apart, force=force):
            return kind.read.read(path)
        total = kind.read.read(checked(folders[0] / kind.name))
        for folder in folders[1:]:
            total = total + kind.read.read(checked(folder / kind.name))
        found: dict[Path, Counts | Examples | Histogram] = {path: total}
        if inputs.get("examples"):
            found[output / examples.NAME] = _examples(folders, runs)
        if inputs.get("histogram"):
            found[output / histogram.NAME] = _histogram(folders)
        for place, own in found.items():
            # A run that was killed before its manifest left these bytes.
            if not place.is_file() or place.read_bytes() != own.to_bytes():
                refuse_overwrite(place, force)
                own.write(place)
        described = Manifest(first_folder).data
        kept = ("versions", "model", "model_b", "dtype", "sites", "threshold", "fallbacks")
        tokens = dict(zip(total.groups, total.tokens.tolist(), strict=True))
        manifest.describe(
            **{key: described[key] for key in kept if key in described},
            groups=total.groups,
            tokens={
                kind.counted: tokens,
                "parts": [Manifest(folder).data.get("tokens") for folder in folders],
            },
        )
        # A part is made beside the whole, STUDY.1, STUDY.2, ..., if a command makes it.
        stages = [Manifest(folder).data["stages"] for folder in folders]
        making = [found[kind.stage].get("commands") for found in stages]
        places = [
            f"{STUDY}.{i}" if made else placed(folder, output)
            for i, (folder, made) in enumerate(zip(folders, making, strict=True), 1)
        ]
        made_by = [
            words
            for made, place in zip(making, places, strict=True)
            for words in moved(made or [], place)
        ]
        made_by += command("merge", *places, "-o", STUDY)
        manifest.finish(
            kind.stage, inputs, list(found), reads=[], apart=kind.apart, commands=made_by
        )
    return total


def _examples(folders: Sequence[Path], runs: Sequence[Json]) -> Examples:
    """The strongest examples of all, the windows of a corpus numbered behind those before it."""
    total: Examples | None = None
    before: dict[str, dict[str, int]] = {}  # of each corpus, the windows of each group
    for folder, run in zip(folders, runs, strict=True):
        corpus = ",".join(part["corpus"] for part in _parts([run], _COUNTS))
        seen = [] if total is None else zip(total.groups, total.n_windows.tolist(), strict=True)
        own = Examples.read(checked(folder / examples.NAME)).behind(
            before.setdefault(corpus, dict(seen))
        )
        total = own if total is None else total + own
    assert total is not None
    return total


def _histogram(folders: Sequence[Path]) -> Histogram:
    """The values of all in bins that all can tell apart."""
    first, *others = (Histogram.read(checked(folder / histogram.NAME)) for folder in folders)
    total = first
    for other in others:
        total = total + other
    return total


def _kind_of(folder: Path) -> _Kind:
    """What a folder holds; counts where it holds neither."""
    stages = Manifest(folder).data["stages"] if folder.is_dir() else {}
    return _CONTRASTS if _CONTRASTS.stage in stages else _COUNTS


def _finished(folder: Path, kind: _Kind) -> Json:
    """The inputs of a folder's pass, which must be finished and as it was written."""
    manifest = Manifest(folder) if folder.is_dir() else None
    entry = manifest.data["stages"].get(kind.stage) if manifest else None
    if manifest is None or entry is None:
        raise RelneuronError(
            f"{folder} holds no finished {kind.stage}",
            f"finish it with: relneuron {kind.stage} ... -o DIR",
        )
    inputs: Json = entry["inputs"]
    for name in (kind.name, *(file for asked, file in _BESIDE.items() if inputs.get(asked))):
        if not manifest.is_intact(name):
            fix = f"restore it, or {kind.stage} again"
            raise RelneuronError(f"{folder / name} is not there", fix)
    return inputs


def _relevant(inputs: Json, kind: _Kind) -> Json:
    """What must agree; where a part was counted need not."""
    found = {key: inputs.get(key) for key in kind.same}
    found |= {"processor": inputs["processor"]} if "processor" in inputs else {}
    for name in (key for key in ("model", "model_b") if key in found):
        found[name] = {k: v for k, v in (found[name] or {}).items() if k not in _PLACE}
    return found


def _parts(runs: Sequence[Json], kind: _Kind) -> list[Json]:
    """What was counted, without how: merged counts are the parts that they were made of."""
    parts: list[Json] = []
    for run in runs:
        if "parts" in run:
            parts += [run["parts"][key] for key in sorted(run["parts"], key=int)]
        else:
            what = {k: v for k, v in run.items() if k not in (*kind.same, *_APART)}
            shard = run.get("shard", "1/1")
            part = {"corpus": json_digest(what), "shard": shard, "texts": _texts(run)}
            # The plan of batches decides which windows a shard has; the whole has all.
            parts.append(part | ({} if shard == "1/1" else {"plan": run.get("batch_tokens")}))
    return parts


def _texts(run: Json) -> Json:
    """Each text of a corpus by a digest of its group and what is in it, whatever it is called."""
    found: Json = {}
    for source in run.get("sources", {}).values():
        about = [source.get(key) for key in ("group", "group_column", "groups", "text_column")]
        files = source["files"].values()
        for file in (file for file in files if file["kind"] != "hf"):
            found[json_digest([*about, file["sha256"]])] = file["name"]
        # The splits of a data set can lie in the same files.
        if dataset := [file for file in files if file["kind"] == "hf"]:
            found[json_digest([*about, dataset])] = dataset[0]["name"]
    return found


def _check_parts(folders: Sequence[Path], runs: Sequence[Json], kind: _Kind) -> None:
    """Refuse what would be counted twice, and a corpus of which a shard is missing."""
    shards: dict[str, dict[str, Path]] = {}
    plans: dict[str, Any] = {}
    texts: dict[str, tuple[str, Path]] = {}
    for folder, run in zip(folders, runs, strict=True):
        for part in _parts([run], kind):
            corpus = part["corpus"]
            for text, name in part["texts"].items():
                if texts.setdefault(text, (corpus, folder))[0] != corpus:
                    raise RelneuronError(
                        f"{texts[text][1]} and {folder} both count {name}",
                        "count each text once",
                    )
            if "plan" in part and plans.setdefault(corpus, part["plan"]) != part["plan"]:
                raise RelneuronError(
                    f"{folder} and another shard of its corpus have not the same batches",
                    "count all shards with the same --batch-tokens",
                )
            known = shards.setdefault(part["corpus"], {})
            if part["shard"] in known:
                raise RelneuronError(
                    f"{known[part['shard']]} and {folder} {kind.twice}",
                    "give each count once",
                )
            known[part["shard"]] = folder
    for known in shards.values():
        sizes = {shard.partition("/")[2] for shard in known}
        if len(sizes) > 1:
            names = ", ".join(f"{folder} ({shard})" for shard, folder in known.items())
            raise RelneuronError(f"shards of different numbers: {names}", "count them again")
        of = int(sizes.pop())
        missing = [f"{i}/{of}" for i in range(1, of + 1) if f"{i}/{of}" not in known]
        if missing:
            one = next(iter(known.values()))
            raise RelneuronError(
                f"shard {', '.join(missing)} of the corpus of {one} is missing",
                "count it with --shard and merge all of them",
            )
