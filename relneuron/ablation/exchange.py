"""Products of chosen neurons that become other values: another model's, a mean, or noisy ones.

`ablate` and `generate` run such a model in place of their own (`--mode patch, mean, noise`), and
the evaluator tells it the neurons of each wave of conditions. A product is what down reads,
activation times up (arXiv 2406.14144, whose forms of patching these are).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from relneuron.ablation.conditions import Ablation
from relneuron.artifact.contrast import NAME as CONTRAST
from relneuron.artifact.contrast import Contrast
from relneuron.artifact.counts import NAME as COUNTS
from relneuron.artifact.counts import Counts
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import checked
from relneuron.artifact.neurons import Shape
from relneuron.artifact.prompts import Prompt
from relneuron.model.exchange import Exchanged, Put
from relneuron.model.layers import device_of
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.pair import Pair
from relneuron.model.paired import Paired

Array = np.ndarray[Any, Any]
PRODUCTS = ("gate", "up")  # a neuron at either is the product of its number


def puts_of(
    members: Sequence[Ablation], mlps: Sequence[MLP], shape: dict[str, Any]
) -> dict[int, Put]:
    """The products that the conditions of a wave exchange, by the place of the MLP."""
    order = Shape.of(shape)
    chosen = np.zeros((len(members) + 1, order.total), bool)
    for row, ablation in enumerate(members):
        chosen[row + 1, ablation.places] = True
    puts = {}
    for number, mlp in enumerate(mlps):
        spans = [order.span(mlp.layer, site) for site in PRODUCTS if site in order.widths]
        sites = [chosen[:, span][:, mlp.inside] for span in spans if span.start < span.stop]
        own = np.logical_or.reduce(sites)
        index = np.flatnonzero(own.any(0))
        if len(index):
            device = device_of(mlp.module)
            both = (torch.from_numpy(x).to(device) for x in (index, own[:, index]))
            puts[number] = Put(*both)
    return puts


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
                    f"--mode {mode}: {ablation.condition.name} has the neuron "
                    f"{order.name(layer, site, index)}, which not every token reaches",
                    "leave out the neurons of experts, or use --mode zero",
                )


def from_donor(pair: Pair | None, donor: str | None, mode: str) -> Paired | None:
    """The model A of a pair with values of B, where the mode is `patch`.

    Raises RelneuronError for a donor's name without a pair, and the reverse.
    """
    if (pair is None) != (donor is None):
        raise RelneuronError(
            "a mode patch, the name of a donor and a pair of models belong together",
            f"give mode='patch', donor=NAME and pair=pair_of(...), and not with mode {mode!r}",
            2,
        )
    return Paired(pair) if pair else None


# --- values that are stored ------------------------------------------------------------------


class Moments(NamedTuple):
    """Of all products over the tokens that were read, (L, F) float32."""

    mean: Array  # of the donor, where there are two models
    std: Array  # unbiased, of the model that is patched


def stored_moments(folder: Path, shape: dict[str, Any]) -> tuple[Path, Moments]:
    """The moments of the products in `folder`, over all groups, and the file that has them.

    That is a contrast, or counts of the site product with moments (act, of MLPs without a gate).
    """
    path = folder / CONTRAST
    found: Counts
    if path.exists():
        found, sites = Contrast.read(checked(path)), ("b", "a")
    else:
        path, site = folder / COUNTS, "product" if shape.get("gated", True) else "act"
        made_by = f"count MODEL GROUP=TEXT... -o DIR --sites {site} --moments"
        found, sites = Counts.read(checked(path), made_by), (site, site)
        if f"sum_sq.{site}" not in found.arrays:
            raise RelneuronError(
                f"{path} holds no moments of the site {site}", f"make it with: relneuron {made_by}"
            )
    if found.tokens.sum() < 2:
        raise RelneuronError(f"{path} is of fewer than two tokens", "read more text")
    mean, std = found.mean(sites[0]), found.std(sites[1])
    if mean.shape != (shape["layers"], shape["width"]):
        raise RelneuronError(
            f"{path} is of a model with {mean.shape[0]} layers and width {mean.shape[1]}, this one "
            f"has {shape['layers']} and {shape['width']}",
            "count or contrast this model",
        )
    # No token runs some layers of some models, and nothing is put there.
    return path, Moments(*(np.nan_to_num(x).astype(np.float32) for x in (mean, std)))


class FromMeans(Exchanged):
    """Stored means (L, F) float32, the same at every token."""

    def __init__(self, model: Any, mlps: Sequence[MLP], means: Array) -> None:
        super().__init__(model, mlps)
        self._means = means

    def values(self, number: int, own: Tensor) -> Tensor:
        mlp = self.mlps[number]
        means = torch.from_numpy(self._means[mlp.layer, mlp.inside]).to(own.device)
        return means[self.puts[number].index]
