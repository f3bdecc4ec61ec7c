"""The modules of a model that reads pictures: which of its layers belong to which.

`model/mlps/` finds them, `count` writes them into the shape of a model, `identify` and the reports
read them. The layers of all are numbered through, so that a neuron is (layer, site, index) as in
any other model.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

# In the order in which the layers are numbered. A Q-Former that reads text beside the pictures has
# in each layer one MLP for its queries and another one for the text, which see other tokens: they
# are two modules.
MODULES = ("language", "vision", "projector", "qformer_query", "qformer_text")
QFORMER = "qformer"  # stands for both of its modules
# What a command takes; "all" are those that the model has.
ASKED = ("language", "vision", "projector", QFORMER, "all")


def is_asked(module: str, asked: str) -> bool:
    """Whether a word of `ASKED` means a module."""
    return asked in (module, "all") or (asked == QFORMER and module.startswith(f"{QFORMER}_"))


def layers_of(modules: Any) -> dict[str, range]:
    """The layers of each module, of their numbers of layers in a dictionary or in pairs."""
    counts = dict(modules)
    ends = accumulate(counts.values())
    return {name: range(end - n, end) for (name, n), end in zip(counts.items(), ends, strict=True)}


def module_layers(model: Mapping[str, Any]) -> dict[str, range]:
    """Likewise of what a file says of a model; all are "language" where it names no modules."""
    return layers_of(model.get("modules") or {"language": int(model["layers"])})


def module_shape(model: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a file would say of a model's shape if that module were all that was asked for."""
    inside = module_layers(model)[name]
    n, span = len(inside), slice(inside.start, inside.stop)

    def own(key: str, of_all: Any) -> list[Any]:
        each = model.get(key, of_all)
        return each[span] if isinstance(each, list) else [each] * n

    widths, hiddens = own("widths", model["width"]), own("hiddens", model["hidden"])
    gated = own("gated", True)
    shape: dict[str, Any] = {"layers": n, "width": max(widths), "hidden": max(hiddens)}
    if min(widths) < max(widths):
        shape["widths"] = widths
    if not all(is_gated for is_gated, width in zip(gated, widths, strict=True) if width):
        shape["gated"] = gated if any(gated) else False
    if any(experts := own("experts", 0)):
        shape |= {"experts": experts, "expert_width": model["expert_width"]}
    if len({h for h in hiddens if h}) > 1:
        shape["hiddens"] = hiddens
    return shape if name == "language" else shape | {"modules": {name: n}}


def are_modules(model: Mapping[str, Any]) -> bool:
    """Whether what a file says of a model's modules fits its layers; it need not say anything."""
    modules = model.get("modules", {"language": model["layers"]})
    return (
        isinstance(modules, dict)
        and list(modules) == [name for name in MODULES if name in modules]
        and all(type(n) is int and n > 0 for n in modules.values())
        and sum(modules.values()) == model["layers"]
    )
