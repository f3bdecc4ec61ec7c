"""Products of chosen neurons that become other values: another model's, a mean, or noisy ones.

`ablate` and `generate` make one source of values (`--mode patch, mean, noise`), and the evaluator
asks it for the states of each wave of conditions. What a product is: the input of down, activation
times up, after any scale of an adapter (arXiv 2406.14144, whose forms of patching these are).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from relneuron.ablation.conditions import Ablation
from relneuron.ablation.pictured import find_for
from relneuron.artifact.counts import NAME as COUNTS
from relneuron.artifact.counts import Counts
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.manifest import checked
from relneuron.artifact.neurons import NeuronFile, Shape
from relneuron.artifact.prompts import Prompt
from relneuron.model.exchange import Put, Take, Value
from relneuron.model.layers import device_of
from relneuron.model.load import describe_model
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.paired import Paired, check_pair
from relneuron.model.states import LayerState

Array = np.ndarray[Any, Any]
PRODUCTS = ("gate", "up")  # a neuron at either is the product of its number


@dataclass(frozen=True)
class Rows:
    """Of a forward that is about to run, its rows: their prompts, and what they are."""

    prompts: Sequence[int]
    is_donor: Tensor  # (b,) bool: the other model answers
    is_chosen: Tensor  # (b,) bool: some neuron of the row gets another value
    n_needed: int | None  # as `states.Tokens` has it


class Source(Protocol):
    """Where values come from; `model` is run in place of the patched one."""

    @property
    def model(self) -> Any: ...

    def begin(self) -> None:
        """Forget the values of the wave before."""

    def value(self, number: int, part: Part, index: Array) -> Value:
        """What the products `index` (K,) of the part with a number become."""

    def running(self) -> AbstractContextManager[object]:
        """Around the forwards of a batch."""

    def mark(self, rows: Rows) -> None:
        """Before each forward."""


def exchanged_states(
    members: Sequence[Ablation], parts: Sequence[Part], source: Source
) -> list[LayerState]:
    """Per part, what exchanges the products of the conditions of a wave; row 0 is clean."""
    shape = Shape.of(model_shape(parts))
    chosen = np.zeros((len(members) + 1, shape.total), bool)
    for row, ablation in enumerate(members):
        chosen[row + 1, ablation.places] = True
    source.begin()
    states = []
    for number, part in enumerate(parts):
        spans = [shape.span(part.layer, site) for site in PRODUCTS if site in shape.widths]
        sites = [chosen[:, span][:, part.inside] for span in spans if span.start < span.stop]
        own = np.logical_or.reduce(sites) if sites else chosen[:, :0]
        index = np.flatnonzero(own.any(0))
        if not len(index):
            states.append(LayerState())
            continue
        device = device_of(part.module)
        put = Put(
            torch.from_numpy(index).to(device),
            torch.from_numpy(own[:, index]).to(device),
            source.value(number, part, index),
        )
        states.append(LayerState(product=put))
    return states


def check_products(
    plan: Sequence[Ablation], parts: Sequence[Part], prompts: Sequence[Prompt], mode: str
) -> None:
    """Refuse neurons that are no product of an MLP, or of experts, which a router chooses.

    And prompts with pictures, whose text goes on in another way (model/converse.py).
    """
    if any(prompt.images for prompt in prompts):
        raise RelneuronError(
            f"--mode {mode} is for prompts of text alone, and some have pictures",
            "leave out these prompts, or use --mode zero",
            2,
        )
    order = Shape.of(model_shape(parts))
    experts = {part.layer: part for part in parts if isinstance(part, Experts)}
    for ablation in plan:
        for layer, site, index in order.neurons(ablation.places):
            if site not in PRODUCTS:
                raise RelneuronError(
                    f"--mode {mode}: {ablation.condition.name} has the neuron "
                    f"{order.name(layer, site, index)}, which is no input of down",
                    "give sets of gate and up, such as those of identify --method contrast",
                )
            part = experts.get(layer)
            if part is not None and part.inside.start <= index < part.inside.stop:
                raise RelneuronError(
                    f"--mode {mode}: {ablation.condition.name} has a neuron of an expert, which "
                    "not every token reaches",
                    "leave out the neurons of experts, or use --mode zero",
                )


# --- another model ---------------------------------------------------------------------------


class FromDonor:
    """The values of another model that reads the same tokens beside the patched one."""

    def __init__(self, model: Any, donor: Any, donor_parts: Sequence[Part], backend: str) -> None:
        self._pair = Paired(model, donor, donor_parts, backend)
        self._parts = donor_parts
        self._taken: dict[int, Take] = {}

    @property
    def model(self) -> Any:
        return self._pair

    def begin(self) -> None:
        self._taken.clear()

    def value(self, number: int, part: Part, index: Array) -> Value:
        device = device_of(self._parts[number].module)
        self._taken[number] = Take(torch.from_numpy(index).to(device))
        return self._taken[number].give

    def running(self) -> AbstractContextManager[object]:
        states = [LayerState(product=self._taken.get(i)) for i in range(len(self._parts))]
        return self._pair.keeping(states)

    def mark(self, rows: Rows) -> None:
        self._pair.begin(rows.is_donor, rows.is_chosen, rows.n_needed)


def from_donor(
    name: str | None,
    donor: Any,
    model: Any,
    parts: Sequence[Part],
    neurons: NeuronFile,
    backend: str,
) -> tuple[FromDonor, Json]:
    """The source of a donor's values, and what a manifest says of the donor.

    Raises RelneuronError where there is no donor, or one that does not fit the model.
    """
    if donor is None:
        raise RelneuronError(
            "--mode patch has no model that gives values", "give donor_model=MODEL", 2
        )
    donor_parts = find_for(donor, neurons, None)
    check_pair(model, donor, parts, donor_parts)
    described = describe_model(name or "donor", donor, donor_parts, backend)
    return FromDonor(model, donor, donor_parts, backend), described


# --- values that are stored ------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Of all products over the tokens that were read, (L, F) float32."""

    mean: Array
    std: Array  # unbiased


def stored_moments(folder: Path, shape: dict[str, int]) -> tuple[Path, Moments]:
    """The moments of the products in `folder`, over all groups, and the file that has them."""
    path = folder / COUNTS
    counts = Counts.read(
        checked(path), "count MODEL GROUP=TEXT... -o DIR --sites product --moments"
    )
    site = "product" if "sum.product" in counts.arrays or shape.get("gated", True) else "act"
    sums, squares = (counts.arrays.get(f"{name}.{site}") for name in ("sum", "sum_sq"))
    if sums is None or squares is None:
        raise RelneuronError(
            f"{path} holds no moments of the products",
            f"count with the site {site} and moments: relneuron count ... --sites {site} --moments",
        )
    if sums.shape[1:] != (shape["layers"], shape["width"]):
        raise RelneuronError(
            f"{path} is of a model with {sums.shape[1]} layers and width {sums.shape[2]}, this one "
            f"has {shape['layers']} and {shape['width']}",
            "count on this model",
        )
    n = np.maximum(counts.tokens_at().sum(0), 1)[:, None]
    mean = sums.sum(0) / n
    spread = np.maximum(squares.sum(0) - n * mean**2, 0) / np.maximum(n - 1, 1)
    return path, Moments(mean.astype(np.float32), np.sqrt(spread).astype(np.float32))


@dataclass
class FromMeans:
    """Stored means, the same at every token."""

    model: Any
    means: Array  # (L, F) float32

    def begin(self) -> None: ...

    def value(self, number: int, part: Part, index: Array) -> Value:
        row = torch.from_numpy(self.means[part.layer, part.inside][index])
        row = row.to(device_of(part.module))
        return lambda own, shape: row.to(own.dtype).expand_as(own)

    def running(self) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self, rows: Rows) -> None: ...
