"""Files of MMNeuron (arXiv 2406.11193): its masks and its snapshots of counts, in and out.

The commands `relneuron import` and `relneuron export` call it with `--format mmneuron`. They are
pickles of torch, one mask a module and one snapshot a domain; `torch_files.py` reads them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
import torch
from torch import Tensor

from relneuron.artifact.counts import RAN, Counts
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    refuse_output,
    sha256,
    writing,
)
from relneuron.artifact.manifest import locked
from relneuron.artifact.modules import module_layers
from relneuron.artifact.neurons import NeuronFile, Shape
from relneuron.artifact.torch_files import FLOATS, dense, load_torch, saved
from relneuron.methods.counts.authors_files import GATE_SITES, read_lists, warn_doubles

DOMAINS = ("ad", "med", "rs", "com", "doc")  # of their five lists, in their order
STEP = 100_000  # vision tokens of a snapshot: it is `{domain}_{k}.log` when k * STEP have been seen
# What they call a module: of LLaVA, and of InstructBLIP where it is called otherwise.
NAMES = {
    "language": "lang",
    "vision": "vision",
    "projector": "mmproj",
    "qformer_query": "query",
    "qformer_text": "qformer",
}
ENCODER = "encoder"  # InstructBLIP's vision tower
_MODULES = {theirs: ours for ours, theirs in NAMES.items()} | {ENCODER: "vision"}
_LOG_FIX = "give a snapshot DOMAIN_K.log: a dictionary of MODULE_log, MODULE_value and MODULE_len"


class Place(NamedTuple):
    """Where a module stands in a model, and what their files call it."""

    module: str
    theirs: str
    layers: range
    width: int


def places(shape: Json) -> list[Place]:
    """The modules of a model's shape; layers of one module must be of one width in their files."""
    order, modules = Shape.of(shape), module_layers(shape)
    found = []
    for module, layers in modules.items():
        widths = {order.width(layer, "gate") for layer in layers} - {0}
        if len(widths) != 1:
            raise RelneuronError(
                f"the layers of the module {module} are of the widths {sorted(widths)}",
                "MMNeuron's files hold modules of one width only",
            )
        own = ENCODER if module == "vision" and "qformer_query" in modules else NAMES[module]
        found.append(Place(module, own, layers, widths.pop()))
    return found


def _place_of(path: Path, theirs: str, known: Sequence[Place]) -> Place:
    """The module of a model that one of their names means."""
    module = module_named(theirs) if is_module(theirs) else ""
    for place in known:
        if place.module == module:
            return place
    names = ", ".join(dict.fromkeys((*_MODULES, *NAMES)))
    has = ", ".join(place.module for place in known)
    raise RelneuronError(
        f"{path} is of the module {theirs!r}; the model has {has}",
        f"name files MODEL-MODULE, or give MODULE=FILE; modules are {names}",
        2,
    )


def is_module(name: str) -> bool:
    """Whether a name is a module's, theirs or ours."""
    return name in NAMES or name in _MODULES


def module_named(name: str) -> str:
    """Our name of a module that they or we call so."""
    return name if name in NAMES else _MODULES[name]


def module_of_name(path: Path) -> str:
    """The module that a mask's name says: `llava-v1.6-lang` is of lang."""
    return path.name.rpartition("-")[2]


# --- masks -----------------------------------------------------------------------------------


def read_masks(paths: Mapping[str, Path], names: Sequence[str], shape: Json) -> NeuronFile:
    """The neurons of the masks of several modules, `{module: file}`, as sets at site gate, score 0.

    Each file is a list of at most G lists of L integer tensors (n,), the neurons of a domain in a
    layer of the module; the sets of names beyond a file's lists have none of its neurons: their
    code leaves out the last domains of a module in which they have no neuron. `names` names the
    domains in the files' order. Modules may be called as they call them or as we do.
    """
    known = places(shape)
    sets: dict[str, list[tuple[int, str, int, float]]] = {name: [] for name in names}
    files, seen = {}, set()
    for theirs, path in paths.items():
        place = _place_of(path, theirs, known)
        if place.module in seen:
            raise RelneuronError(
                f"{path} is a second file of the module {place.module}", "give one a module", 2
            )
        seen.add(place.module)
        lists, n_groups = read_lists(path, names, [place.width] * len(place.layers))
        n_doubles = 0
        for name, layer, indices, doubles in lists:
            sets[name] += [(place.layers[layer], "gate", index, 0.0) for index in indices]
            n_doubles += doubles
        warn_doubles(path, n_doubles)
        files[place.module] = {"file": path.name, "sha256": sha256(path), "groups": n_groups}
    sets = {name: sorted(rows) for name, rows in sets.items()}
    selection = {"files": files, "score": "none: the files have no scores"}
    return NeuronFile(dict(shape), "imported", sets, selection)


def write_masks(neurons: NeuronFile, folder: Path, *, force: bool = False) -> list[Path]:
    """Write `{model}-{module}` of each module: G lists of L int64 tensors, ascending.

    All G domains stand in every file, also without neurons. The sets' names and the scores are in
    none of them. A neuron of site down raises.
    """
    known = places(neurons.model)
    model = quote(str(neurons.model.get("id") or "model").rstrip("/").split("/")[-1], safe="")
    paths = [folder / f"{model}-{place.theirs}" for place in known]
    for path in paths:
        refuse_output(path, "export", force)
    data = []
    for place in known:
        lists: list[list[Tensor]] = []
        for name, chosen in neurons.sets.items():
            layers: list[set[int]] = [set() for _ in place.layers]
            for layer, site, index, _ in chosen:
                if site not in GATE_SITES:
                    raise RelneuronError(
                        f"set {name!r} has a neuron of site {site!r}: a mask cannot hold it",
                        "export neurons of the sites gate and up",
                    )
                if layer in place.layers:
                    if not 0 <= index < place.width:
                        raise RelneuronError(
                            f"set {name!r}: index {index} of {place.module} is none of "
                            f"{place.width}",
                            "identify the neurons again",
                        )
                    layers[layer - place.layers.start].add(index)
            lists.append(
                [torch.tensor(sorted(own), dtype=torch.int64, device="cpu") for own in layers]
            )
        data.append(saved(lists))
    with locked(folder), writing("export", folder, paths):
        for path, one in zip(paths, data, strict=True):
            atomic_write(path, one)
    return paths


# --- snapshots -------------------------------------------------------------------------------


def domain_of_name(path: Path) -> str | None:
    """The domain that a snapshot's name says: `ad_1.log` is of ad; None for another name."""
    domain, bar, number = path.stem.rpartition("_")
    is_one = path.suffix == ".log" and bar and domain and number.isdecimal()
    return unquote(domain) if is_one else None


def read_snapshots(paths: Mapping[str, Path], shape: Json) -> Counts:
    """The counts of a snapshot of each domain, `{domain: file}`.

    Of each module MOD of the model `MOD_log` (L, F) integers, the tokens at which a neuron was
    above 0; `MOD_value` (L, F) floats, the sum of its activations; `MOD_len`, the tokens that the
    module saw. They become `count.act` and `sum.act` (G, all layers, the largest F), and
    `tokens.layer`; a domain's `tokens` are those of the module that saw most. What else is in a
    file is not read. A module that a file lacks, other shapes, counts below 0 or above the tokens
    (an int32 that overflowed) and sums that are not finite raise.
    """
    if not paths:
        raise RelneuronError("there is no snapshot", "give DOMAIN_K.log, or DOMAIN=FILE", 2)
    known = places(shape)
    dims = (len(paths), int(shape["layers"]), int(shape["width"]))
    count, total = np.zeros(dims, np.int64), np.zeros(dims, np.float64)
    ran = np.zeros(dims[:2], np.int64)
    for g, path in enumerate(paths.values()):
        data = load_torch(path, _LOG_FIX)
        if type(data) is not dict:
            raise RelneuronError(f"{path} holds a {type(data).__name__}, no dictionary", _LOG_FIX)
        for place in known:
            rows = slice(place.layers.start, place.layers.stop)
            n, counts, sums = _module(path, data, place)
            count[g, rows, : place.width] = counts
            total[g, rows, : place.width] = sums
            ran[g, rows] = n
    arrays = {"count.act": count, "sum.act": total}
    beside = {} if (ran == ran[:, :1]).all() else {RAN: ran}
    return Counts(list(paths), ran.max(1), arrays, beside)


def _module(path: Path, data: Mapping[str, Any], place: Place) -> tuple[int, Any, Any]:
    """The tokens, counts (L, F) int64 and sums (L, F) float64 of a module in a snapshot."""
    names = [f"{place.theirs}_{what}" for what in ("log", "value", "len")]
    if missing := [name for name in names if name not in data]:
        has = ", ".join(str(key) for key in list(data)[:9])
        raise RelneuronError(
            f"{path} lacks {missing[0]}; it has {has}".replace("\n", " "), _LOG_FIX
        )
    log, value, length = (data[name] for name in names)
    if type(length) is Tensor:
        length = int(dense(f"{path}: {names[2]}", length, 0, _LOG_FIX))
    if type(length) is not int or not 0 <= length < 1 << 63:
        raise RelneuronError(f"{path}: {names[2]} is no number of tokens", _LOG_FIX)
    counts = dense(f"{path}: {names[0]}", log, 2, _LOG_FIX).to(torch.int64)
    sums = dense(f"{path}: {names[1]}", value, 2, _LOG_FIX, FLOATS, "floats").to(torch.float64)
    for name, tensor in zip(names, (counts, sums), strict=False):
        if tensor.shape != (len(place.layers), place.width):
            raise RelneuronError(
                f"{path}: {name} has the shape {tuple(tensor.shape)}, the model's {place.module} "
                f"{(len(place.layers), place.width)}",
                "give the model that was counted",
            )
    low, high = (int(x) for x in torch.aminmax(counts))
    if low < 0 or high > length:
        raise RelneuronError(
            f"{path}: {names[0]} has a count of {low if low < 0 else high} for {length} tokens",
            "count again: an integer overflowed, or the file is damaged",
        )
    if not sums.isfinite().all():
        raise RelneuronError(f"{path}: {names[1]} is not finite", "count again")
    return length, counts.numpy(), sums.numpy()


def write_snapshots(
    counts: Counts, folder: Path, shape: Json, *, force: bool = False
) -> list[Path]:
    """Write `{group}_{k}.log` of each group, as `read_snapshots` reads it; return the paths.

    k is how often STEP vision tokens were seen, at least 1: their code reads the files of one k.
    Counts are int32, int64 with a warning if one does not fit; the sums need moments.
    """
    for what, how in (("count.act", "--sites act"), ("sum.act", "--moments")):
        if what not in counts.arrays:
            raise RelneuronError(f"the counts hold no {what}", f"count with {how}")
    known, ran = places(shape), counts.tokens_at()
    vision = next((place for place in known if place.module == "vision"), known[0])
    steps = np.maximum(1, ran[:, vision.layers.start] // STEP).tolist()
    names = [quote(group, safe="") for group in counts.groups]
    paths = [folder / f"{name}_{k}.log" for name, k in zip(names, steps, strict=True)]
    if len({path.name.casefold() for path in paths}) < len(paths):
        raise RelneuronError(
            f"of the groups {', '.join(counts.groups)} some differ in their case only",
            "count under other names: their files could be one",
        )
    for path in paths:
        refuse_output(path, "export", force)
    count, total = counts.arrays["count.act"], counts.arrays["sum.act"]
    fits = not count.size or int(count.max()) <= np.iinfo(np.int32).max
    if not fits:
        warnings.warn("a count is above 2^31 - 1: the files hold int64", stacklevel=2)
    kind = np.int32 if fits else np.int64
    with locked(folder), writing("export", folder, paths):
        for g, path in enumerate(paths):
            data: dict[str, Tensor] = {}
            for place in known:
                own = (g, slice(place.layers.start, place.layers.stop), slice(0, place.width))
                length = int(ran[g, place.layers.start])
                data |= {
                    f"{place.theirs}_log": torch.from_numpy(count[own].astype(kind)),
                    f"{place.theirs}_value": torch.from_numpy(total[own].astype(np.float64)),
                    f"{place.theirs}_len": torch.tensor(length, device="cpu"),
                }
            atomic_write(path, saved(data))
    return paths
