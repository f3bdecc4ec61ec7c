"""Counted folders that are made of other files, and other files of them.

The commands `relneuron import` and `export` call it; no model is needed. authors_files.py reads and
writes the files of LAPE's authors, mmneuron_files.py those of MMNeuron; both need torch, so they
are imported where they are called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

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
    locked,
    versions,
)
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.stage import STUDY, command, placed

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
