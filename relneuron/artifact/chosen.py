"""Neurons in any form that one has them in: a file, its path, a data frame, or rows.

`relneuron.ablate` takes them; a data frame is anything with columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import checked
from relneuron.artifact.neurons import Neuron, NeuronFile, Shape, check_neurons

COLUMNS = ("layer", "site", "index")
SET = "set"  # a frame's column with the name of each row's set


class Chosen(NamedTuple):
    """(layer, site, index, ...) rows, and the file that they come from, if one does."""

    rows: list[Sequence[Any]]
    file: NeuronFile | None = None


def choose_neurons(given: Any, sets: str | Sequence[str] | None = None) -> Chosen:
    """The neurons of a NeuronFile, of the path of one, of a frame, or of rows.

    A frame has the columns layer, site and index: a pandas.DataFrame, or a dict of columns. `sets`
    names sets of a file, or of a frame's column `set`; of a frame without it all rows are taken, a
    file must have one set only then.
    """
    names = None if sets is None else [sets] if isinstance(sets, str) else list(sets)
    if isinstance(given, str | Path):
        given = NeuronFile.read(checked(Path(given)))
    if isinstance(given, NeuronFile):
        return _of_file(given, names)
    if isinstance(given, Mapping) or hasattr(given, "columns"):
        return Chosen(_of_frame(given, names))
    if names is not None:
        raise RelneuronError(
            "sets does something only with a file or a frame of neurons",
            "leave it out, or give a NeuronFile",
            2,
        )
    return Chosen(list(given))


def _of_file(file: NeuronFile, names: list[str] | None) -> Chosen:
    if names is None and len(file.sets) != 1:
        raise RelneuronError(
            f"the neurons are {len(file.sets)} sets: {_some(file.sets)}",
            "say which: sets='...', or a list of names",
            2,
        )
    names = list(file.sets) if names is None else names
    _check_names(names, file.sets)
    return Chosen([row for name in names for row in file.sets[name]], file)


def _of_frame(frame: Any, names: list[str] | None) -> list[Sequence[Any]]:
    columns = [str(name) for name in (frame if isinstance(frame, Mapping) else frame.columns)]
    lacking = [name for name in COLUMNS if name not in columns]
    if lacking:
        raise RelneuronError(
            f"the frame of neurons lacks the column {', '.join(lacking)}",
            f"give the columns {', '.join(COLUMNS)}",
            2,
        )
    layer, index = (_whole(frame[name], name) for name in ("layer", "index"))
    rows = list(zip(layer, map(str, frame["site"]), index, strict=True))
    if names is None:
        return list(rows)
    if SET not in columns:
        raise RelneuronError(
            f"sets names sets, and the frame of neurons has no column {SET!r}",
            "leave sets out, or choose the rows of the frame",
            2,
        )
    of = [str(name) for name in frame[SET]]
    _check_names(names, dict.fromkeys(of))
    return [row for row, name in zip(rows, of, strict=True) if name in names]


def _whole(column: Any, name: str) -> list[int]:
    """A column of numbers as integers; one that holds others raises."""
    values = np.asarray(column)
    is_number = values.dtype.kind in "iuf" and bool((values == np.floor(values)).all())
    if not is_number and len(values):
        raise RelneuronError(
            f"the column {name} of the frame of neurons holds what is no whole number",
            "leave those rows out",
            2,
        )
    return [int(value) for value in values]


def _check_names(names: Iterable[str], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise RelneuronError(f"no set {name!r}", f"there are {_some(known)}", 2)


def _some(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:12]) + (", ..." if len(every) > 12 else "")


# --- names -----------------------------------------------------------------------------------

# Sites that are made of the gate and switched off with it.
MADE = ("act", "product")
_NAME = re.compile(
    r"(?:(?P<module>[a-z]\w*) )?L?(?P<layer>\d{1,9})"
    r"(?:\.(?P<site>[a-z]+)\.(?P<index>\d{1,9})"
    r"|(?: expert (?P<expert>\d{1,9})| shared) (?P<of>[a-z]+) (?P<inner>\d{1,9}))"
)


def read_name(name: str, shape: Mapping[str, Any]) -> Neuron:
    """The neuron (layer, site, index) of a name: 3.up.345, L3.up.345, and as `Shape.name` has it.

    Those are L3 expert 12 up 345, L3 shared up 345 and vision L3.gate.345. Sites are those of the
    model, and `act` and `product`, which have as many neurons as gate. Another name, or one of a
    neuron that the model has not, raises RelneuronError.
    """
    order, found = Shape.of(shape), _NAME.fullmatch(name.strip())
    if found is None:
        raise RelneuronError(
            f"{name!r} is no name of a neuron", "write layer.site.index, such as 12.gate.345", 2
        )
    layer = int(found["layer"])
    if module := found["module"]:
        sizes = dict(order.modules)
        if module not in sizes:
            known = ", ".join(sizes) or "no module with a name"
            raise RelneuronError(
                f"{name!r}: the model has no module {module!r}", f"it has {known}", 2
            )
        layer += sum(n for _, n in order.modules[: list(sizes).index(module)])
    site, index = found["site"] or found["of"], int(found["index"] or found["inner"])
    if found["site"] is None:
        numbers, width = order.experts
        n_experts = numbers[layer] if layer < len(numbers) else 0
        expert = n_experts if found["expert"] is None else int(found["expert"])
        if not n_experts or expert > n_experts or (found["expert"] and not index < width):
            raise RelneuronError(
                f"{name!r}: layer {layer} has {n_experts} experts of {width} neurons",
                "give neurons of this model; they count from zero",
                2,
            )
        index += expert * width
    check_neurons([(layer, switched(site), index)], shape)
    return layer, site, index


def switched(site: str) -> str:
    """The site at which a neuron is switched off: the gate, where it is made of that."""
    return "gate" if site in MADE else site
