"""The canary: what a patch switches off must be seen in the logits.

The stages that switch neurons off, or record them, ask once before they begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import Shape
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.patch import Patch
from relneuron.model.states import mask_states


def check_canary(model: Any, mlps: Sequence[Part], input_ids: Tensor, backend: str) -> None:
    """Raise unless switching off all MLPs changes the logits: guards against a dead patch.

    Likewise all attentions, where their projections are patched.
    """
    shape, parts = model_shape(mlps), {"gate": "MLP"}
    if mlps[0].projections:
        parts |= {"o": "attention"}
    with torch.no_grad():
        clean = model(input_ids).logits
        for site, what in parts.items():
            order = Shape.of(shape)
            everything = [
                neuron
                for layer in range(order.layers)
                for neuron in order.neurons(np.r_[order.span(layer, site)])
            ]
            with Patch(mlps, mask_states([everything], mlps), backend=backend):
                dark = model(input_ids).logits
            if torch.equal(clean, dark):
                raise RelneuronError(
                    f"switching off every {what} did not change the logits: the patch is not "
                    "effective",
                    "give the model uncompiled, with its own forward methods",
                )
