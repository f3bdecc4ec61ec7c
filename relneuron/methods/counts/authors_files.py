"""Files of the authors of LAPE (arXiv 2402.16438): their neurons and their counts, in and out.

The commands `relneuron import` and `relneuron export` call it. The files are pickles of torch:
they are read with `weights_only`, so nothing in them is ever run.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch
from torch import Tensor

from relneuron.artifact.counts import Counts
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    refuse_output,
    refuse_overwrite,
    sha256,
    writing,
)
from relneuron.artifact.manifest import locked
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.torch_files import dense, load_torch, saved

GATE_SITES = ("gate", "act", "up", "product")  # zeroing any of them is the same ablation
_COUNT_NAME = re.compile(r"activation\.([^.]+)\.train\..+")
_NEURON_FIX = "give a .neuron.pth: a list of groups, each a list of layers of index tensors"
_COUNT_FIX = "give a torch file of {'n': tokens, 'over_zero': integers of layers x width}"


# --- neurons ---------------------------------------------------------------------------------


def read_neuron_pth(path: Path, names: Sequence[str], shape: Json) -> NeuronFile:
    """The neurons of a .neuron.pth as sets at site gate, with the score 0.

    The file is a list of G lists of L integer tensors (n,), the neurons of a group in a layer.
    `names` names the groups in the file's order; the sets of names beyond the file's lists are
    empty (the authors' code leaves out the last groups if they have no neuron). `shape` gives
    layers, width, hidden and id of the model. An index that is there twice counts once, with a
    warning. Any other content raises, as does a file of more than 1 GiB.
    """
    sizes = [int(shape["width"])] * int(shape["layers"])
    lists, n_groups = read_lists(path, names, sizes)
    sets: dict[str, list[tuple[int, str, int, float]]] = {name: [] for name in names}
    n_doubles = 0
    for name, layer, indices, doubles in lists:
        n_doubles += doubles
        sets[name] += [(layer, "gate", index, 0.0) for index in indices]
    warn_doubles(path, n_doubles)
    model: Json = {key: shape[key] for key in ("id", "layers", "width", "hidden") if key in shape}
    selection = {
        "file": path.name,
        "sha256": sha256(path),
        "groups_in_file": n_groups,
        "duplicates": n_doubles,
        "score": "none: the file has no scores",
    }
    return NeuronFile(model, "imported", sets, selection)


def read_lists(
    path: Path, names: Sequence[str], sizes: Sequence[int]
) -> tuple[list[tuple[str, int, list[int], int]], int]:
    """(group, layer, indices, doubles) of a file of G lists of L integer tensors, and its G.

    `names` names the groups in the file's order, of which the last may be missing; `sizes` are the
    widths of the L layers. Indices are ascending, each once.
    """
    if not names or len(set(names)) < len(names):
        raise RelneuronError(
            f"the names {', '.join(names) or '(none)'} are not one for each group",
            "give each group its own name, in the file's order",
            2,
        )
    data = load_torch(path, _NEURON_FIX)
    if type(data) is not list:
        raise RelneuronError(f"{path} holds a {type(data).__name__}, no list", _NEURON_FIX)
    if len(data) > len(names):
        raise RelneuronError(
            f"{path} has {len(data)} groups, there are {len(names)} names",
            f"give {len(data)} names, in the file's order",
            2,
        )
    found = []
    for name, layers in zip(names, data, strict=False):
        if type(layers) is not list:
            kind = type(layers).__name__
            raise RelneuronError(f"{path}: group {name!r} is a {kind}, no list", _NEURON_FIX)
        if len(layers) != len(sizes):
            raise RelneuronError(
                f"{path} has {len(layers)} layers, the model {len(sizes)}",
                "give the model that the neurons were found in",
            )
        for layer, (tensor, width) in enumerate(zip(layers, sizes, strict=True)):
            indices = _indices(f"{path}: group {name!r}, layer {layer}", tensor, width)
            distinct = torch.unique(indices)  # sorted
            doubles = indices.numel() - distinct.numel()
            found.append((name, layer, distinct.tolist(), doubles))
    return found, len(data)


def warn_doubles(path: Path, n_doubles: int) -> None:
    """Say that a file names neurons twice."""
    if n_doubles:
        warnings.warn(f"{path} names {n_doubles} neurons twice: each counts once", stacklevel=3)


def write_neuron_pth(neurons: NeuronFile, path: Path, *, force: bool = False) -> None:
    """Write the sets as a .neuron.pth: G lists of L int64 tensors, indices ascending.

    The groups are in the order of the sets; their names and the scores are not in the file. Every
    group and layer is there, also without neurons. A neuron of site down raises: it is none of
    the hidden layer, which the format is about.
    """
    refuse_overwrite(path, force)
    try:
        n_layers, width = (int(neurons.model[key]) for key in ("layers", "width"))
    except (KeyError, TypeError, ValueError) as error:
        raise RelneuronError(
            f"the neurons do not say the layers and the width of their model ({error!r})",
            "make them with relneuron identify or import",
        ) from error
    lists: list[list[Tensor]] = []
    for name, chosen in neurons.sets.items():
        layers: list[set[int]] = [set() for _ in range(n_layers)]
        for layer, site, index, _ in chosen:
            if site not in GATE_SITES:
                raise RelneuronError(
                    f"set {name!r} has a neuron of site {site!r}: a .neuron.pth cannot hold it",
                    "export neurons of the sites gate and up",
                )
            if not (0 <= layer < n_layers and 0 <= index < width):
                raise RelneuronError(
                    f"set {name!r}: (layer {layer}, index {index}) is not in a model with "
                    f"{n_layers} layers of width {width}",
                    "identify the neurons again",
                )
            layers[layer].add(index)
        lists.append(
            [torch.tensor(sorted(indices), dtype=torch.int64, device="cpu") for indices in layers]
        )
    with locked(path.parent):
        atomic_write(path, saved(lists))


def _indices(where: str, found: object, width: int) -> Tensor:
    """The integer tensor (n,) of a layer as int64, or an error that says what it is instead."""
    tensor = dense(where, found, 1, _NEURON_FIX).to(torch.int64)
    if tensor.numel():
        low, high = (int(value) for value in torch.aminmax(tensor))
        if low < 0 or high >= width:
            raise RelneuronError(
                f"{where} has the index {low if low < 0 else high}, the model's width is {width}",
                "give the model that the neurons were found in",
            )
    return tensor


# --- counts ----------------------------------------------------------------------------------


def read_counts_pth(paths: Mapping[str, Path], shape: Json | None = None) -> Counts:
    """The counts of several files, `{group: path}`, as `count.act` (G, L, F) int64.

    Each file is a dictionary of `n`, the tokens, and `over_zero` (L, F), how many of them had an
    activation above zero; what else is in it is not read. All files must have the same shape, with
    `shape` the model's. Negative counts (an int32 that overflowed) and counts above n raise.
    """
    if not paths:
        raise RelneuronError("there is no file of counts", "give GROUP=FILE...", 2)
    expected = None if shape is None else (int(shape["layers"]), int(shape["width"]))
    whose = "the model"
    tokens, rows = [], []
    for name, path in paths.items():
        n, count = _read_count(path)
        if expected is not None and count.shape != expected:
            raise RelneuronError(
                f"{path} ({name}) has counts of the shape {count.shape}, {whose} has {expected}",
                "give counts of one model",
            )
        expected, whose = count.shape, whose if expected is not None else str(path)
        tokens.append(n)
        rows.append(count)
    return Counts(list(paths), np.array(tokens, np.int64), {"count.act": np.stack(rows)})


def counts_path(folder: Path, group: str, model: str) -> Path:
    """`activation.{group}.train.{model}`, as the authors name it.

    What could end a part of the name, or leave the folder, stands there as %2F and the like.
    """
    own = quote(group, safe="").replace(".", "%2E")
    return folder / f"activation.{own}.train.{quote(model.rstrip('/').split('/')[-1], safe='')}"


def counts_group(path: Path) -> str | None:
    """The group that the name of a file of counts says; None for another name."""
    found = _COUNT_NAME.fullmatch(path.name)
    return unquote(found[1]) if found else None


def write_counts_pth(
    counts: Counts, folder: Path, model: str, *, force: bool = False
) -> list[Path]:
    """Write each group's counts at site act to a file of its own; return the files' paths.

    `activation.{group}.train.{model}` holds `{"n": int, "over_zero": (L, F)}`, int32 as the
    authors have it; int64, with a warning, if a count does not fit. `model` is a name or a path,
    of which the last part counts.
    """
    if "count.act" not in counts.arrays:
        raise RelneuronError(
            f"the counts are of {', '.join(counts.sites) or 'no site'}, not of act",
            "count with --sites act",
        )
    count = counts.arrays["count.act"]
    paths = [counts_path(folder, group, model) for group in counts.groups]
    # Some file systems do not tell EN from en.
    if len({path.name.casefold() for path in paths}) < len(paths):
        raise RelneuronError(
            f"of the groups {', '.join(counts.groups)} some differ in their case only",
            "count under other names: their files could be one",
        )
    for path in paths:
        refuse_output(path, "export", force)
    fits = not count.size or int(count.max()) <= np.iinfo(np.int32).max
    if not fits:
        warnings.warn("a count is above 2^31 - 1: the files hold int64", stacklevel=2)
    kept = np.int32 if fits else np.int64
    with locked(folder), writing("export", folder, paths):
        for path, n, rows in zip(paths, counts.tokens.tolist(), count, strict=True):
            atomic_write(path, saved({"n": n, "over_zero": torch.from_numpy(rows.astype(kept))}))
    return paths


def _read_count(path: Path) -> tuple[int, np.ndarray[Any, Any]]:
    """The tokens and the counts (L, F) int64 of one file."""
    data = load_torch(path, _COUNT_FIX)
    if type(data) is not dict or not {"n", "over_zero"} <= data.keys():
        what = f"a dictionary of {list(data)[:5]}" if type(data) is dict else type(data).__name__
        raise RelneuronError(
            f"{path} holds {what}, no n and over_zero".replace("\n", " "), _COUNT_FIX
        )
    n = data["n"]
    if type(n) is not int or not 0 <= n < 1 << 63:
        raise RelneuronError(f"{path}: n is no number of tokens", _COUNT_FIX)
    count = dense(f"{path}: over_zero", data["over_zero"], 2, _COUNT_FIX).to(torch.int64)
    if not count.numel():
        raise RelneuronError(f"{path}: over_zero is empty", _COUNT_FIX)
    low, high = (int(value) for value in torch.aminmax(count))
    if low < 0:
        raise RelneuronError(
            f"{path} has the count {low}: an integer overflowed, or the file is damaged",
            "count again: relneuron count keeps 64 bits",
        )
    if high > n:
        raise RelneuronError(
            f"{path} has a count of {high} for {n} tokens", "count again: the file is damaged"
        )
    return n, count.numpy()
