"""Files of the authors of safety neurons (arXiv 2406.14144): their change scores, in and out.

The commands `import` and `export` call it. A file is a pickle of torch, a tuple of six tensors
(THU-KEG/SafetyNeuron); it is read with `weights_only`, so nothing in it is ever run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from relneuron.artifact.contrast import NAME, A, B
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    refuse_output,
    refuse_overwrite,
    sha256,
    writing,
)
from relneuron.artifact.manifest import Manifest, locked
from relneuron.artifact.neurons import NeuronFile, ScoredNeuron
from relneuron.artifact.stage import command, placed
from relneuron.artifact.torch_files import FLOATS, dense, load_torch, saved
from relneuron.methods.contrast.choices import RATE
from relneuron.methods.contrast.rank import ALL, change, kept_layers, ranking, read_contrast
from relneuron.model.config import config_shape

Array = np.ndarray[Any, Any]
_FIX = (
    "give a .pt of safety neurons: (change_scores, neuron_ranks, mean_first, std_first, "
    "mean_second, std_second)"
)


class Scores(NamedTuple):
    """What a file holds, in its order; L' are the layers that it has rows for.

    change_scores  (L', F) float32, the root mean square of the difference
    neuron_ranks   (L' F, 2) int64, (row, index) of every neuron, the largest change first
    mean_first     (L', F) float32, and `std_first` (unbiased): of the model that did not generate
    mean_second    ... and of the one that wrote the completions
    """

    change_scores: Array
    neuron_ranks: Array
    mean_first: Array
    std_first: Array
    mean_second: Array
    std_second: Array


def read_scores(path: Path) -> Scores:
    """The tensors of a file, which must fit together; anything else raises RelneuronError."""
    data = load_torch(path, _FIX)
    if type(data) is not tuple or len(data) != len(Scores._fields):
        has_size = isinstance(data, list | tuple | dict)
        kind = type(data).__name__ + (f" of {len(data)}" if has_size else "")
        raise RelneuronError(f"{path} holds a {kind}, no tuple of six tensors", _FIX)
    found = []
    for name, value in zip(Scores._fields, data, strict=True):
        kinds = (torch.int64,) if name == "neuron_ranks" else FLOATS
        what = "int64" if name == "neuron_ranks" else "floats"
        found.append(dense(f"{path}: {name}", value, 2, _FIX, kinds, what).numpy())
    scores = Scores(*found)
    shape = scores.change_scores.shape
    for name, value in scores._asdict().items():
        wanted = (shape[0] * shape[1], 2) if name == "neuron_ranks" else shape
        if value.shape != wanted:
            raise RelneuronError(f"{path}: {name} is {value.shape}, not {wanted}", _FIX)
    _check_ranks(path, scores)
    return scores


def _check_ranks(path: Path, scores: Scores) -> None:
    """Raise unless the ranks name every neuron once, by descending change."""
    shape, (rows, columns) = scores.change_scores.shape, scores.neuron_ranks.T
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
    flat = rows * shape[1] + columns
    if not inside.all() or np.unique(flat).size < flat.size:
        raise RelneuronError(f"{path}: neuron_ranks does not name every neuron once", _FIX)
    ranked = scores.change_scores.reshape(-1)[flat]
    if not np.isfinite(ranked).all() or (ranked < 0).any() or (np.diff(ranked) > 0).any():
        raise RelneuronError(f"{path}: neuron_ranks is not by descending change_scores", _FIX)


def import_scores(
    path: Path,
    model: str,
    output: Path,
    *,
    top: int | None = None,
    without_layers: Sequence[int] = (),
    force: bool = False,
) -> NeuronFile:
    """Make `output` a neurons.json of the first `top` neurons of a file's own ranking.

    By default 5 % of those that it ranks, as `identify --method contrast` takes. The file does not
    say which layers its rows are: `without_layers` are those that the authors' code left out, the
    last one of a Llama-2-7B. Of `model` only the configuration is read.
    """
    refuse_output(output, "import", force)
    shape = config_shape(model)
    layers = kept_layers(int(shape["layers"]), without_layers)
    scores = read_scores(path)
    n_rows, width = scores.change_scores.shape
    if width != int(shape["width"]) or n_rows != len(layers):
        n_left = int(shape["layers"]) - len(layers)
        raise RelneuronError(
            f"{path} has {n_rows} layers of {width} neurons, the model {shape['layers']} of "
            f"{shape['width']}" + (f" with {n_left} left out" if n_left else ""),
            "name the layers that the file leaves out with --without-layers, or give its model",
        )
    k = round(n_rows * width * RATE) if top is None else top
    rows = scores.neuron_ranks[:k].tolist()
    chosen: list[ScoredNeuron] = [
        (layers[row], "gate", index, float(scores.change_scores[row, index])) for row, index in rows
    ]
    selection: Json = {
        "file": path.name,
        "sha256": sha256(path),
        "ranked": n_rows * width,
        "without_layers": sorted({*without_layers}),
    }
    neurons = NeuronFile(shape, "imported", {ALL: chosen}, selection)
    folder = output.parent
    words = (placed(path, folder), "-o", placed(output, folder))
    how = {"top": top, "without_layers": sorted({*without_layers}), "format": "safety"}
    with locked(folder), writing("import", folder, [output]):
        neurons.write(output)
        Manifest(folder).finish(
            "import",
            {"file": sha256(path), **how},
            [output],
            reads=[],
            commands=command("import", *words, model=model, **how),
        )
    return neurons


def scores_of(folder: Path, without_layers: Sequence[int] = ()) -> Scores:
    """The scores of a folder's contrast, over the tokens of all groups.

    The second model is the one that wrote the completions, A unless the manifest says B.
    """
    described = Manifest(folder).data
    contrast, model = read_contrast(folder, described)
    widths = model.get("widths") or [model["width"]]
    if len({*widths}) > 1:
        raise RelneuronError(
            f"the layers of {folder / NAME} differ in width: a .pt has one for all",
            "use scores.safetensors of relneuron identify --method contrast",
        )
    layers = kept_layers(int(model["layers"]), without_layers)
    score = change(contrast, str(folder / NAME))[layers].astype(np.float32)
    places = ranking(score, np.ones(score.shape, bool))
    second = _generated(described["stages"].get("contrast", {}).get("inputs", {}))
    first = B if second == A else A
    moments = (
        getattr(contrast, kind)(site)[layers].astype(np.float32)
        for site in (first, second)
        for kind in ("mean", "std")
    )
    ranks = np.stack(np.divmod(places, score.shape[1]), axis=1).astype(np.int64)
    return Scores(score, ranks, *moments)


def _generated(inputs: Mapping[str, Any]) -> str:
    return B if inputs.get("completion_by") == B else A


def export_scores(
    folder: Path, output: Path, *, without_layers: Sequence[int] = (), force: bool = False
) -> None:
    """Write the tuple of a folder's contrast, without some layers."""
    scores = scores_of(folder, without_layers)
    refuse_overwrite(output, force)
    with locked(output.parent):
        atomic_write(output, saved(tuple(torch.from_numpy(value) for value in scores)))
