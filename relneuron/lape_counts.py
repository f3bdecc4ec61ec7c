"""Counts in the LAPE authors' files, as a counted folder and back.

The commands `relneuron import` and `relneuron export` call it; lape_files.py reads and writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from relneuron.artifact import Json, RelneuronError, refuse_overwrite, sha256
from relneuron.counts import NAME, Counts
from relneuron.lape_files import read_counts_pth, write_counts_pth
from relneuron.manifest import Manifest, checked, locked, versions

# What the authors count: SiLU(gate) > 0.
_EVENT: Json = {"sites": ["act"], "threshold": 0.0, "moments": False}


def import_counts(
    paths: Mapping[str, Path], shape: Json, folder: Path, *, force: bool = False
) -> Counts:
    """Make `folder` a finished count of `{group: file}`; `shape` is the model's (config_shape)."""
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
        manifest.finish("count", inputs, [folder / NAME])
    return counts


def export_counts(source: Path, folder: Path, *, force: bool = False) -> list[Path]:
    """Write the counts of a counted folder as files of the authors' format."""
    threshold = Manifest(source).data.get("threshold")
    if threshold not in (0, None):
        raise RelneuronError(
            f"{source} counts activations above {threshold}, the authors' files those above 0",
            "count with --threshold 0",
        )
    return write_counts_pth(Counts.read(checked(source / NAME)), folder, force=force)
