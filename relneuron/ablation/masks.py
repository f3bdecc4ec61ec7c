"""The sets of a neurons.json that are named to be off, and random ones of their size.

`generate` and `eval` plan their masks here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from relneuron.ablation.conditions import Ablation, Places, other_places
from relneuron.artifact.effects import Condition
from relneuron.artifact.files import RelneuronError


def named_masks(
    sets: Mapping[str, Places],
    off: Sequence[str],
    shape: Mapping[str, int],
    *,
    models: Sequence[str],
    random_seeds: int,
    products: bool,
    prompts: Sequence[int] = (),
) -> list[Ablation]:
    """The masks that `off` names, each once; "" is the first of `models`.

    `models` are names of models themselves, with nothing off. The random sets of a set follow it:
    `random.<seed>`, of several sets `random.<seed>.<set>`; with `products` gate and up of one
    number are the same neuron (`conditions.other_places`).
    """
    for name in models:
        if name in sets:
            raise RelneuronError(f"a set is named {name}, as is a model itself", "rename the set")
    known = dict.fromkeys(models, np.empty(0, np.int64)) | dict(sets)
    names = list(dict.fromkeys(name or models[0] for name in off))
    several = sum(name not in models for name in names) > 1
    plan: dict[str, Ablation] = {}

    def add(name: str, places: Places, kind: str, **about: Any) -> None:
        if name in plan:
            raise RelneuronError(f"two masks are named {name}", "rename the set")
        condition = Condition(name, kind, n_neurons=len(places), **about)
        plan[name] = Ablation(condition, np.sort(places), prompts)

    for name in names:
        check_set(name, known)
        if name in models:
            add(name, known[name], name)
        else:
            add(name, known[name], "set", relation=name)
        for seed in range(random_seeds if name in sets else 0):
            drawn = other_places(sets[name], shape, seed, name, products=products)
            own = f"random.{seed}.{name}" if several else f"random.{seed}"
            add(own, drawn, "random", relation=name, seed=seed)
    return list(plan.values())


def check_set(name: str, known: Collection[str]) -> None:
    """Refuse a name that is no set's."""
    if name not in known:
        raise RelneuronError(
            f"the neurons have no set {name!r}", f"use some of {', '.join(known)}", 2
        )
