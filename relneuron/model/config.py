"""What a model's configuration says of its neurons, for files that come without their model.

`import` asks it for neurons and counts of other authors.
"""

from __future__ import annotations

from typing import Any

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.reading import one_line
from relneuron.model.identity import check_model_folder


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
        "width": _width(config),
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
# What configurations call the width of an MLP, and models that do not say it where it is 4 D.
_WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff", "dff")
_FOUR_TIMES = ("bloom", "codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt")


def _width(config: Any) -> Any:
    """F by a configuration: by its name there, MPT's ratio, or what the architecture has."""
    found = (getattr(config, name, None) for name in _WIDTHS)
    width = next((value for value in found if value is not None), None)
    hidden = getattr(config, "hidden_size", None)
    if width is None and type(hidden) is int:
        if type(ratio := getattr(config, "expansion_ratio", None)) is int:
            return ratio * hidden
        if config.model_type in _FOUR_TIMES:
            return 4 * hidden
    return width
