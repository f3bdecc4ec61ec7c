"""The LAPE authors' files as artifacts of ours: counts, as a counted folder and back; neurons.

The commands `relneuron import` and `relneuron export` call it; methods/counts/authors_files.py
reads and writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from relneuron.artifact.command import STUDY, command, placed
from relneuron.artifact.counts import APART, NAME, Counts
from relneuron.artifact.files import Json, RelneuronError, refuse_overwrite, sha256
from relneuron.artifact.manifest import Manifest, checked, locked, versions
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.writing import refuse_output, writing
from relneuron.methods.counts.authors_files import (
    config_shape,
    counts_group,
    read_counts_pth,
    read_neuron_pth,
    write_counts_pth,
)

# What the authors count: SiLU(gate) > 0.
_EVENT: Json = {"sites": ["act"], "threshold": 0.0, "moments": False}


def name_counts(files: Sequence[str]) -> dict[str, Path]:
    """`{group: file}` of texts GROUP=FILE, files named as the authors do, and folders of such.

    Empty if one of them is neither. Raises RelneuronError for a group that is there twice.
    """
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


def import_counts(
    paths: Mapping[str, Path], shape: Json, folder: Path, *, model: str = "", force: bool = False
) -> Counts:
    """Make `folder` a finished count of `{group: file}`; `shape` is the model's (config_shape).

    `model` is where that shape was read.
    """
    counts = read_counts_pth(paths, shape)
    digests = {name: sha256(path) for name, path in paths.items()}
    inputs: Json = {"model": shape, "imported": digests, **_EVENT}
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
            sites=_EVENT["sites"],
            threshold=_EVENT["threshold"],
            groups=counts.groups,
            tokens={"counted": dict(zip(counts.groups, counts.tokens.tolist(), strict=True))},
        )
        files = [f"{name}={placed(path, folder)}" for name, path in paths.items()]
        made_by = command("import", *files, "-o", STUDY, model=model) if model else []
        manifest.finish("count", inputs, [folder / NAME], reads=[], commands=made_by)
    return counts


def import_neurons(
    path: Path, names: Sequence[str], model: str, output: Path, *, force: bool = False
) -> NeuronFile:
    """Make `output` a neurons.json of a .neuron.pth; `model` is where the shape is read."""
    refuse_output(output, "import", force)
    chosen = read_neuron_pth(path, names, config_shape(model))
    folder = output.parent
    with locked(folder), writing("import", folder, [output]):
        chosen.write(output)
        manifest = Manifest(folder)
        words = (placed(path, folder), "-o", placed(output, folder))
        manifest.finish(
            "import",
            {"file": sha256(path), "names": list(names)},
            [output],
            reads=[],
            commands=command("import", *words, model=model, names=list(names)),
        )
    return chosen


def export_counts(source: Path, folder: Path, *, force: bool = False) -> list[Path]:
    """Write the counts of a counted folder as files of the authors' format."""
    known = Manifest(source).data
    threshold = known.get("threshold")
    if threshold not in (0, None):
        raise RelneuronError(
            f"{source} counts activations above {threshold}, the authors' files those above 0",
            "count with --threshold 0",
        )
    model = str((known.get("model") or {}).get("id") or "model")
    return write_counts_pth(Counts.read(checked(source / NAME)), folder, model, force=force)
