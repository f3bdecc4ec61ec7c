"""The LAPE authors' files as artifacts of ours: counts, as a counted folder and back; neurons.

The commands `relneuron import` and `relneuron export` call it; lape_files.py reads and writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from relneuron.artifact import Json, NeuronFile, RelneuronError, refuse_overwrite, sha256
from relneuron.command import STUDY, command, placed
from relneuron.counts import NAME, Counts
from relneuron.lape_files import (
    config_shape,
    read_counts_pth,
    read_neuron_pth,
    write_counts_pth,
)
from relneuron.manifest import Manifest, checked, locked, versions

# What the authors count: SiLU(gate) > 0.
_EVENT: Json = {"sites": ["act"], "threshold": 0.0, "moments": False}


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
        if manifest.is_done("count", inputs, force=force):
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
        manifest.finish("count", inputs, [folder / NAME], commands=made_by)
    return counts


def import_neurons(
    path: Path, names: Sequence[str], model: str, output: Path, *, force: bool = False
) -> NeuronFile:
    """Make `output` a neurons.json of a .neuron.pth; `model` is where the shape is read."""
    refuse_overwrite(output, force)
    chosen = read_neuron_pth(path, names, config_shape(model))
    folder = output.parent
    with locked(folder):
        chosen.write(output)
        manifest = Manifest(folder)
        for stage, entry in list(manifest.data["stages"].items()):
            if output.name in entry["files"] and stage != "import":
                manifest.forget(stage)  # its neurons are no longer there
        words = (placed(path, folder), "-o", placed(output, folder))
        manifest.finish(
            "import",
            {"file": sha256(path), "names": list(names)},
            [output],
            commands=command("import", *words, model=model, names=list(names)),
        )
    return chosen


def export_counts(source: Path, folder: Path, *, force: bool = False) -> list[Path]:
    """Write the counts of a counted folder as files of the authors' format."""
    threshold = Manifest(source).data.get("threshold")
    if threshold not in (0, None):
        raise RelneuronError(
            f"{source} counts activations above {threshold}, the authors' files those above 0",
            "count with --threshold 0",
        )
    return write_counts_pth(Counts.read(checked(source / NAME)), folder, force=force)
