"""What a model's MLPs are to files and states: how many neurons each site of each layer has.

Every stage with a model asks; `artifact/neurons.py` gives each neuron its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.modules import layers_of
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.mlp import MLP

Part = MLP | Experts


def model_shape(mlps: Sequence[Part]) -> dict[str, Any]:
    """What files say of a model's neurons, as `artifact.neurons.Shape` reads it.

    layers, width (F, the largest) and hidden (D); `widths` of the layers where they differ, 0 where
    no forward runs an MLP; `gated` where it is false; `experts`, how many each layer has, and their
    `expert_width`; q, k, v and o where they were asked for. Of several modules `modules`, how many
    layers each has, and where the layers differ `hiddens` and a list of `gated`.
    """
    n_layers, modules = mlps[0].n_layers, dict(mlps[0].modules)
    widths, hiddens, gated = [0] * n_layers, [0] * n_layers, [False] * n_layers
    for mlp in mlps:
        hiddens[mlp.layer] = mlp.hidden
        gated[mlp.layer] |= mlp.is_gated
        if mlp.runs:
            widths[mlp.layer] = max(widths[mlp.layer], mlp.offset + mlp.n_neurons)
    width = max(mlp.offset + mlp.n_neurons for mlp in mlps)
    n_language = modules.get("language", 0) if modules else n_layers
    language = [mlp for mlp in mlps if mlp.layer < n_language]
    hidden = {mlp.hidden for mlp in language}
    kinds = {mlp.is_gated for mlp in language}
    firsts = {mlp.layer: mlp for mlp in reversed(language)}.values()
    attention = {tuple((part.site, part.width) for part in mlp.projections) for mlp in firsts}
    if len(hidden) > 1 or len(kinds) > 1 or len(attention) > 1:
        raise RelneuronError(
            "the layers differ in hidden size, attention, or in whether their MLPs are gated",
            "give a model whose layers are alike in these",
        )
    shape: dict[str, Any] = {"layers": n_layers, "width": width, "hidden": max(hiddens)}
    if min(widths) < width:
        shape["widths"] = widths
    if not all(mlp.is_gated for mlp in mlps):
        shape["gated"] = gated if any(gated) else False
    experts = [part for part in mlps if isinstance(part, Experts)]
    if experts:
        if len({part.expert_width for part in experts}) > 1:
            raise RelneuronError(
                "the layers differ in the width of their experts", "give a model of one width"
            )
        # Routed experts come before those that every token goes to.
        numbers = {part.layer: part.n_experts for part in reversed(experts)}
        shape["experts"] = [numbers.get(layer, 0) for layer in range(len(widths))]
        shape["expert_width"] = experts[0].expert_width
    if len({mlp.hidden for mlp in mlps}) > 1:
        shape["hiddens"] = hiddens
    if modules:
        shape["modules"] = modules
    return shape | dict(attention.pop() if attention else ())


def refuse_sites(shape: Mapping[str, Any], sites: Iterable[str], where: str = "") -> None:
    """Refuse sites of a gated MLP where a model has others; `where` is a module's name."""
    gated = shape.get("gated", True)
    if gated is True or (isinstance(gated, list) and all(gated)):
        return
    for site in sites:
        if site in ("up", "product"):
            raise RelneuronError(
                f"the model's MLPs{where and f' of the module {where}'} are not gated: they have "
                f"no site {site}",
                "use gate, before the activation, or act, which is what down reads",
            )


def check_sites(mlps: Sequence[Part], sites: Iterable[str]) -> None:
    """Refuse sites that the MLPs do not have."""
    sites = list(sites)
    for one in mlps:
        where = next((m for m, own in layers_of(one.modules).items() if one.layer in own), "")
        refuse_sites({"gated": one.is_gated}, sites, where)
    layers = [mlp.layer for mlp in mlps]
    if "down" in sites and len(set(layers)) < len(layers):
        raise RelneuronError(
            "layers of the model have several MLPs: what they write is no one site down",
            "leave out the site down",
        )
