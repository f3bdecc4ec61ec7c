"""Counted folders that are made of other files: counts added, the authors' files in and out.

The commands `relneuron merge`, `import` and `export` call it; no model is needed. What is added are
runs on several machines, or shards of one corpus; authors_files.py reads and writes the files of
LAPE's authors, mmneuron_files.py those of MMNeuron; both need torch, so they are imported where
they are called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relneuron.artifact.counts import APART, NAME, Counts
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    refuse_output,
    refuse_overwrite,
    sha256,
    writing,
)
from relneuron.artifact.manifest import (
    Manifest,
    checked,
    differences,
    json_digest,
    locked,
    versions,
)
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.stage import STUDY, command, moved, placed

# Where and how a model runs: two counts of it can still be added.
_PLACE = ("backend", "device", "device_map", "tensor_parallel_size", "attention")
# What must be equal for two counts to mean the same.
_APART = ("shard", "batch_tokens", "processor")
_SAME = ("model", "tokenizer", "sites", "threshold", "moments", "exclude_bos", "boundaries")


def merge(folders: Sequence[Path], output: Path, *, force: bool = False) -> Counts:
    """The sum of finished counts, written to `output`; groups are matched by their names.

    Model, tokenizer, sites, threshold and what is not counted must agree; a file that is not as it
    was written, the same windows twice, and a missing shard raise. Integers are exact; sums are
    added in the order of the folders.
    """
    if len(folders) < 2:
        raise RelneuronError("there is nothing to merge", "give two or more finished counts", 2)
    runs = [_finished(folder) for folder in folders]
    first, first_folder = runs[0], folders[0]
    for folder, run in zip(folders[1:], runs[1:], strict=True):
        changed = differences(_relevant(first), _relevant(run))
        if changed:
            raise RelneuronError(
                f"{first_folder} and {folder} cannot be added: {'; '.join(changed)}",
                "merge counts of one model with the same sites, threshold and tokenizer",
            )
    _check_parts(folders, runs)
    if output.resolve() in [folder.resolve() for folder in folders]:
        raise RelneuronError(f"{output} is one of the counts", "choose another output", 2)
    inputs = {**_relevant(first), "parts": {str(i): part for i, part in enumerate(_parts(runs))}}
    with locked(output):
        manifest = Manifest(output)
        if manifest.is_done("count", inputs, apart=APART, force=force):
            return Counts.read(output / NAME)
        total = Counts.read(checked(folders[0] / NAME))
        for folder in folders[1:]:
            total = total + Counts.read(checked(folder / NAME))
        path = output / NAME
        # A run that was killed before its manifest left these bytes.
        if not path.is_file() or path.read_bytes() != total.to_bytes():
            refuse_overwrite(path, force)
            total.write(path)
        described = Manifest(first_folder).data
        kept = ("versions", "model", "dtype", "sites", "threshold", "fallbacks")
        tokens = dict(zip(total.groups, total.tokens.tolist(), strict=True))
        manifest.describe(
            **{key: described[key] for key in kept if key in described},
            groups=total.groups,
            tokens={
                "counted": tokens,
                "parts": [Manifest(folder).data.get("tokens") for folder in folders],
            },
        )
        # A part is made beside the whole, STUDY.1, STUDY.2, ..., if a command makes it.
        parts = [Manifest(folder).data["stages"]["count"].get("commands") for folder in folders]
        places = [
            f"{STUDY}.{i}" if made else placed(folder, output)
            for i, (folder, made) in enumerate(zip(folders, parts, strict=True), 1)
        ]
        made_by = [
            words
            for made, place in zip(parts, places, strict=True)
            for words in moved(made or [], place)
        ]
        made_by += command("merge", *places, "-o", STUDY)
        manifest.finish("count", inputs, [output / NAME], reads=[], apart=APART, commands=made_by)
    return total


def _finished(folder: Path) -> Json:
    """The inputs of a folder's count, which must be finished and as it was written."""
    manifest = Manifest(folder) if folder.is_dir() else None
    entry = manifest.data["stages"].get("count") if manifest else None
    if manifest is None or entry is None:
        raise RelneuronError(
            f"{folder} holds no finished count", "finish it with: relneuron count ... -o DIR"
        )
    if not manifest.is_intact(NAME):
        raise RelneuronError(f"{folder / NAME} is not there", "restore it, or count again")
    inputs: Json = entry["inputs"]
    return inputs


def _relevant(inputs: Json) -> Json:
    """What must agree; where a part was counted need not."""
    found = {key: inputs.get(key) for key in _SAME}
    found |= {"processor": inputs["processor"]} if "processor" in inputs else {}
    model = {k: v for k, v in (found["model"] or {}).items() if k not in _PLACE}
    return found | {"model": model}


def _parts(runs: Sequence[Json]) -> list[Json]:
    """What was counted, without how: merged counts are the parts that they were made of."""
    parts: list[Json] = []
    for run in runs:
        if "parts" in run:
            parts += [run["parts"][key] for key in sorted(run["parts"], key=int)]
        else:
            what = {k: v for k, v in run.items() if k not in (*_SAME, *_APART)}
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


def _check_parts(folders: Sequence[Path], runs: Sequence[Json]) -> None:
    """Refuse what would be counted twice, and a corpus of which a shard is missing."""
    shards: dict[str, dict[str, Path]] = {}
    plans: dict[str, Any] = {}
    texts: dict[str, tuple[str, Path]] = {}
    for folder, run in zip(folders, runs, strict=True):
        for part in _parts([run]):
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
                    f"{known[part['shard']]} and {folder} count the same windows",
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


# Files of the authors of LAPE and of MMNeuron


# What the authors count: SiLU(gate) > 0. MMNeuron's files also have the sums of the activations.
_EVENT: Json = {"sites": ["act"], "threshold": 0.0, "moments": False}
_SUMMED: Json = _EVENT | {"moments": "sum"}


def name_counts(files: Sequence[str]) -> dict[str, Path]:
    """`{group: file}` of texts GROUP=FILE, files named as the authors do, and folders of such.

    Empty if one of them is neither. Raises RelneuronError for a group that is there twice.
    """
    from relneuron.methods.counts.authors_files import counts_group

    found: list[tuple[str, Path]] = []
    for text in files:
        path, (name, equals, rest) = Path(text), text.partition("=")
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if p.is_file()]
            own = [(group, p) for p in inside if (group := counts_group(p)) is not None]
            found += own
            if not own:
                raise RelneuronError(
                    f"{text} holds no file activation.GROUP.train.MODEL", "give GROUP=FILE", 2
                )
        elif equals and not path.exists():
            if not name:
                raise RelneuronError("a file of counts has no group", "give GROUP=FILE", 2)
            found.append((name, Path(rest)))
        elif (group := counts_group(path)) is not None:
            found.append((group, path))
        else:
            return {}
    paths = dict(found)
    twice = [name for name, path in found if paths[name] != path]
    if twice:
        raise RelneuronError(
            f"the group {twice[0]} is there twice", "give each group once, as GROUP=FILE", 2
        )
    return paths


def name_mmneuron(files: Sequence[str]) -> tuple[dict[str, Path], dict[str, Path]]:
    """MMNeuron's masks `{module: file}` and snapshots `{domain: file}`; one of the two is empty.

    Files are named as the authors do (MODEL-MODULE, DOMAIN_K.log), or NAME=FILE, or a folder of
    such. Raises RelneuronError for a file that is neither, both kinds, and a name that is there
    twice.
    """
    from relneuron.methods.counts.mmneuron_files import domain_of_name, is_module, module_of_name

    fix = "give masks as MODEL-MODULE or MODULE=FILE, or snapshots as DOMAIN_K.log or DOMAIN=FILE"
    masks: list[tuple[str, Path]] = []
    logs: list[tuple[str, Path]] = []
    for text in files:
        path, (name, equals, rest) = Path(text), text.partition("=")
        named = bool(equals) and not path.exists()
        inside = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        before = len(masks) + len(logs)
        for one in inside:
            if named:
                (masks if is_module(name) else logs).append((name, Path(rest)))
            elif (domain := domain_of_name(one)) is not None:
                logs.append((domain, one))
            elif is_module(module := module_of_name(one)):
                masks.append((module, one))
        if len(masks) + len(logs) == before or (named and not name):
            raise RelneuronError(
                f"{text} is no mask and no snapshot of MMNeuron by its name", fix, 2
            )
    if masks and logs:
        raise RelneuronError("masks and snapshots make different files", "give one kind of them", 2)
    for found in (masks, logs):
        twice = [name for name, path in found if dict(found)[name] != path]
        if twice:
            raise RelneuronError(f"{twice[0]} is there twice", "give each module or domain once", 2)
    return dict(masks), dict(logs)


def import_counts(
    paths: Mapping[str, Path],
    shape: Json,
    folder: Path,
    *,
    model: str = "",
    mmneuron: bool = False,
    force: bool = False,
) -> Counts:
    """Make `folder` a finished count of `{group: file}`; `shape` is the model's (config_shape).

    `model` is where that shape was read. The files are those of LAPE's authors, or snapshots of
    `mmneuron`.
    """
    from relneuron.methods.counts.authors_files import read_counts_pth
    from relneuron.methods.counts.mmneuron_files import read_snapshots

    event = _SUMMED if mmneuron else _EVENT
    counts = read_snapshots(paths, shape) if mmneuron else read_counts_pth(paths, shape)
    digests = {name: sha256(path) for name, path in paths.items()}
    inputs: Json = {"model": shape, "imported": digests, **event}
    with locked(folder):
        manifest = Manifest(folder)
        if manifest.is_done("count", inputs, apart=APART, force=force):
            return counts
        path = folder / NAME
        # A run that was killed before its manifest left these bytes.
        if not path.is_file() or path.read_bytes() != counts.to_bytes():
            refuse_overwrite(path, force)
            counts.write(path)
        manifest.describe(
            versions=versions(),
            model=shape,
            sites=event["sites"],
            threshold=event["threshold"],
            groups=counts.groups,
            tokens={"counted": dict(zip(counts.groups, counts.tokens.tolist(), strict=True))},
        )
        files = [f"{name}={placed(path, folder)}" for name, path in paths.items()]
        how = {"model": model, "format": "mmneuron" if mmneuron else None}
        made_by = command("import", *files, "-o", STUDY, **how) if model else []
        manifest.finish("count", inputs, [folder / NAME], reads=[], apart=APART, commands=made_by)
    return counts


def import_neurons(
    path: Path, names: Sequence[str], model: str, output: Path, *, force: bool = False
) -> NeuronFile:
    """Make `output` a neurons.json of a .neuron.pth; `model` is where the shape is read."""
    from relneuron.methods.counts.authors_files import read_neuron_pth
    from relneuron.model.config import config_shape

    refuse_output(output, "import", force)
    chosen = read_neuron_pth(path, names, config_shape(model))
    inputs: Json = {"file": sha256(path), "names": list(names)}
    return _write_imported(chosen, inputs, [placed(path, output.parent)], names, model, output)


def import_masks(
    paths: Mapping[str, Path],
    names: Sequence[str],
    model: str,
    output: Path,
    *,
    force: bool = False,
) -> NeuronFile:
    """Make `output` a neurons.json of MMNeuron's masks `{module: file}`, of the modules given."""
    from relneuron.methods.counts.mmneuron_files import module_named, read_masks
    from relneuron.model.config import modules_shape

    refuse_output(output, "import", force)
    shape = modules_shape(model, [module_named(name) for name in paths])
    chosen = read_masks(paths, names, shape)
    digests = {name: sha256(path) for name, path in paths.items()}
    inputs: Json = {"files": digests, "names": list(names), "format": "mmneuron"}
    files = [f"{name}={placed(path, output.parent)}" for name, path in paths.items()]
    return _write_imported(chosen, inputs, files, names, model, output, format="mmneuron")


def _write_imported(
    chosen: NeuronFile,
    inputs: Json,
    files: Sequence[str],
    names: Sequence[str],
    model: str,
    output: Path,
    **how: str,
) -> NeuronFile:
    folder = output.parent
    with locked(folder), writing("import", folder, [output]):
        chosen.write(output)
        words = (*files, "-o", placed(output, folder))
        made_by = command("import", *words, model=model, names=list(names), **how)
        Manifest(folder).finish("import", inputs, [output], reads=[], commands=made_by)
    return chosen


def export_counts(
    source: Path, folder: Path, *, mmneuron: bool = False, force: bool = False
) -> list[Path]:
    """Write the counts of a counted folder as files of LAPE's authors, or of MMNeuron."""
    from relneuron.methods.counts.authors_files import write_counts_pth
    from relneuron.methods.counts.mmneuron_files import write_snapshots

    known = Manifest(source).data
    threshold = known.get("threshold")
    if threshold not in (0, None):
        raise RelneuronError(
            f"{source} counts activations above {threshold}, the authors' files those above 0",
            "count with --threshold 0",
        )
    shape, counts = known.get("model") or {}, Counts.read(checked(source / NAME))
    if mmneuron:
        return write_snapshots(counts, folder, shape, force=force)
    return write_counts_pth(counts, folder, str(shape.get("id") or "model"), force=force)
