"""The canary: what a patch switches off must be seen in the logits.

The stages that switch neurons off, or record them, ask once before they begin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.modules import module_layers
from relneuron.artifact.neurons import Shape
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.pair import Taps
from relneuron.model.patch import Patch
from relneuron.model.pictures import sent
from relneuron.model.states import mask_states


def check_canary(
    model: Any, mlps: Sequence[Part], inputs: Tensor | Mapping[str, Tensor], backend: str
) -> None:
    """Raise unless switching off all MLPs changes the logits: guards against a dead patch.

    Likewise all attentions, where their projections are patched. `inputs` are token ids (B, T), or
    what a processor makes of a prompt with pictures: then each module of the model must change
    them, else the language model must.
    """
    shape, order = model_shape(mlps), Shape.of(model_shape(mlps))
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else sent(model, inputs)
    modules = module_layers(shape)
    if isinstance(inputs, Tensor):
        modules = {"language": modules["language"]} if "language" in modules else {}
    parts = [("gate", f"MLP of {name}", layers) for name, layers in modules.items()]
    if len(modules) == 1:
        parts = [("gate", "MLP", layers) for layers in modules.values()]
    if mlps[0].projections:
        parts += [("o", "attention", range(order.layers))]
    with torch.no_grad():
        clean = model(**given).logits
        for site, what, layers in parts:
            everything = [
                neuron
                for layer in layers
                for neuron in order.neurons(np.r_[order.span(layer, site)])
            ]
            with Patch(mlps, mask_states([everything], mlps), backend=backend):
                dark = model(**given).logits
            if torch.equal(clean, dark):
                raise RelneuronError(
                    f"switching off every {what} did not change the logits: the patch is not "
                    "effective",
                    "give the model uncompiled, with its own forward methods",
                )


def check_exchange(model: Any, mlps: Sequence[MLP], tokens: Tensor) -> None:
    """Raise unless other products change the logits: guards against a model that reads none.

    Every product of the MLPs becomes one more than it is. `tokens` (B, T).
    """
    with torch.no_grad():
        clean = model(input_ids=tokens).logits
        with Taps(mlps, lambda number, h: h + 1):
            other = model(input_ids=tokens).logits
    if torch.equal(clean, other):
        raise RelneuronError(
            "other products in every MLP did not change the logits: the patch is not effective",
            "give the model uncompiled, with its own forward methods",
        )
