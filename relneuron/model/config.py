"""What a model's configuration says of its neurons, for files that come without their model.

`import` asks it for neurons and counts of other authors; `widths.py` knows the names of widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.modules import MODULES
from relneuron.artifact.reading import one_line
from relneuron.model.identity import check_model_folder
from relneuron.model.widths import mlp_width


def read_config(name_or_path: str) -> Any:
    """A model's configuration; no weights are read."""
    from transformers import AutoConfig

    check_model_folder(name_or_path)
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        config.get_text_config()
    except Exception as error:  # a damaged one raises whatever its values lead to
        raise RelneuronError(
            f"{name_or_path} has no configuration: {one_line(error)}",
            "give a model folder with a config.json, or a hub name",
        ) from error
    return config


def config_shape(name_or_path: str) -> Json:
    """layers, width, hidden and id of a model by its configuration alone; no weights are read."""
    config = read_config(name_or_path).get_text_config()
    sizes = {
        "layers": getattr(config, "num_hidden_layers", None),
        "width": mlp_width(config),
        "hidden": getattr(config, "hidden_size", None),
    }
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise RelneuronError(
                f"the configuration of {name_or_path} does not say {_SAID[key]}",
                "give a decoder-only model whose layers have MLPs of one width",
            )
    return {"id": name_or_path, **sizes}


_SAID = {"layers": "how many layers it has", "hidden": "its hidden size"}
_SAID["width"] = "the one width of its MLPs"


# --- of models that read pictures ---------------------------------------------------------------


def modules_shape(name_or_path: str, modules: Sequence[str] | None = None) -> Json:
    """What files say of the shape of some modules of a model (`model_shape`), default: of all.

    The language model's, the vision tower's and the Q-Former's are in the configurations of their
    own; the projector of a LLaVA is one MLP, as wide as the language model's hidden size. Raises
    RelneuronError for a module that the configuration does not know.
    """
    known = _sizes(name_or_path)
    asked = [name for name in MODULES if name in (known if modules is None else modules)]
    for name in asked:
        if name not in known:
            raise RelneuronError(
                f"the configuration of {name_or_path} has no module {name}",
                f"it has {', '.join(known)}: give the model that the files were made with",
            )
    shape = config_shape(name_or_path)
    if asked == ["language"]:
        return shape
    widths, hiddens = (
        [size[i] for name in asked for size in [known[name]] * known[name][0]] for i in (1, 2)
    )
    found: Json = {"id": shape["id"], "layers": len(widths)}
    found |= {"width": max(widths), "hidden": max(hiddens)}
    if min(widths) < max(widths):
        found["widths"] = widths
    if min(hiddens) < max(hiddens):
        found["hiddens"] = hiddens
    return found | {"modules": {name: known[name][0] for name in asked}}


def _sizes(name_or_path: str) -> dict[str, tuple[int, int, int]]:
    """By module its layers, and the width and the hidden size of its MLPs."""
    config = read_config(name_or_path)
    text = config_shape(name_or_path)
    found = {"language": (text["layers"], text["width"], text["hidden"])}
    vision = _own(getattr(config, "vision_config", None))
    if vision is not None:
        found["vision"] = vision
    if hasattr(config, "projector_hidden_act"):
        found["projector"] = (1, text["hidden"], text["hidden"])
    qformer = _own(getattr(config, "qformer_config", None))
    if qformer is not None:
        found |= {"qformer_query": qformer}
        # BLIP-2's reads no text.
        if config.model_type.startswith("instructblip"):
            found |= {"qformer_text": qformer}
    return found


def _own(config: Any) -> tuple[int, int, int] | None:
    """The sizes of a module that has a configuration of the usual names."""
    names = ("num_hidden_layers", "intermediate_size", "hidden_size")
    sizes = [getattr(config, name, None) for name in names]
    known = [size for size in sizes if type(size) is int and size > 0]
    return (known[0], known[1], known[2]) if len(known) == len(names) else None
