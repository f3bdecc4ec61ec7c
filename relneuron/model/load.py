"""Load a model with its tokenizer, and say which one it is and what it runs on.

The stages and the command line call it; `model/gated.py` finds the neurons in what it loads.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from relneuron import ops
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.neurons import shape_of
from relneuron.artifact.options import LoadOptions
from relneuron.model.identity import ADAPTER, check_model_folder, model_digest
from relneuron.model.layers import first_line
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.ops.backends import MADE_FOR


def _settle_arithmetic() -> None:
    """So that the same study gives the same bits, also on a busy machine."""
    # Said aloud, the number of threads holds for MKL, too; else it may take fewer of them from call
    # to call, and sums are rounded in another order.
    torch.set_num_threads(torch.get_num_threads())
    # MKL's vector functions choose their code in the first call. If two threads make it at once,
    # one may get code of lower accuracy: cosines of rotary embeddings that were off by 4e-5 in one
    # of fifteen runs. One element is one thread.
    for function in (torch.cos, torch.sin, torch.exp, torch.tanh, torch.erf, torch.log):
        function(torch.ones(1, device="cpu"))


def choose_device(asked: str | None) -> str:
    """The device to run on: as asked for, if it is here; by default the GPU if there is one."""
    here = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count(),
    }
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = asked.partition(":")
    number = number if ":" in asked else "0"
    if not (number.isdecimal() and int(number) < here.get(kind, 0)):
        usable = [name for name, n in here.items() if n]
        why = (
            f"torch finds {here[kind]} of this kind"
            if kind in here
            else f"known are {', '.join(here)}"
        )
        raise RelneuronError(
            f"no device {asked!r} here: {why}", f"use --device {' or '.join(usable)}", 2
        )
    return "cpu" if kind == "cpu" else asked


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Any:
    """A causal language model, by anything `from_pretrained` takes, or one with pictures.

    `device` defaults to the GPU if there is one; `dtype` to float32 on a CPU and to the
    checkpoint's own on a GPU. The model comes in eval mode.
    """
    device = choose_device(device)
    dtype = dtype or ("float32" if device == "cpu" else "auto")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise RelneuronError(f"unknown dtype {dtype!r}", "use float32, bfloat16 or float16", 2)
    _settle_arithmetic()
    looks_local = check_model_folder(name)
    if looks_local and revision is not None:
        raise RelneuronError(
            f"{name} is a folder, which has no revision {revision}", "leave out --revision", 2
        )
    if looks_local and (Path(name) / ADAPTER).is_file():
        becomes = "used, as peft is installed" if find_spec("peft") else "ignored without peft"
        warnings.warn(f"{name} also holds an adapter ({ADAPTER}): it is {becomes}", stacklevel=2)
    try:
        model, info = _kind_of(name, revision).from_pretrained(
            name, revision=revision, dtype=dtype, output_loading_info=True
        )
    except ImportError as error:
        package = re.search(r"pip install ([\w.-]+)", str(error))
        raise RelneuronError(
            f"{name} needs a package that is not here: {first_line(error)}",
            package[0] if package else "install it",
        ) from error
    except Exception as error:  # a damaged config or weight raises whatever it leads to
        raise RelneuronError(
            f"{name} could not be loaded as a causal language model: {first_line(error)}",
            "give a Hugging Face model folder (config.json, weights, tokenizer) or a hub name",
        ) from error
    if info["missing_keys"]:
        raise RelneuronError(
            f"{name} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}, ...",
            "give the whole checkpoint",
        )
    return model.to(device).eval()


def _kind_of(name: str, revision: str | None) -> Any:
    """The class that loads a checkpoint: with pictures, if it has no causal language model."""
    import transformers as hf

    config = type(hf.AutoConfig.from_pretrained(name, revision=revision))
    has_pictures = config in hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if has_pictures and config not in hf.MODEL_FOR_CAUSAL_LM_MAPPING:
        return hf.AutoModelForImageTextToText
    return hf.AutoModelForCausalLM


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """The tokenizer that belongs to a model."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        if not tokenizer("a")["input_ids"]:
            raise ValueError("it makes no tokens")
    except Exception as error:
        raise RelneuronError(
            f"{name} has no usable tokenizer: {first_line(error).removesuffix(' from one of:')}",
            "save the model's tokenizer into its folder (tokenizer.save_pretrained)",
        ) from error
    return tokenizer


def load(name: str, options: LoadOptions, *, needs_text: bool = True) -> tuple[Any, Any]:
    """A model and its tokenizer, as the options say; without text to read it may lack one."""
    model = load_model(name, revision=options.revision, dtype=options.dtype, device=options.device)
    try:
        return model, load_tokenizer(name, revision=options.revision)
    except RelneuronError:
        if needs_text:
            raise
        return model, None


# --- describing ------------------------------------------------------------------------------


def describe_model(
    name: str, model: Any, mlps: Sequence[Part] | Mapping[str, int], backend: str
) -> Json:
    """What the manifest says of a model; `digest` is `identity.model_digest`.

    A model whose MLPs were not looked for gives its shape (layers, width, hidden) in their place.
    """
    parameter = next(model.parameters())
    if isinstance(mlps, Mapping):
        text = model.config.get_text_config()
        names = ("hidden_act", "hidden_activation", "activation_function")
        activation = next((getattr(text, name) for name in names if hasattr(text, name)), None)
        shape = shape_of(mlps)
    else:
        own = dict.fromkeys(mlp.activation or type(mlp.act).__name__ for mlp in mlps)
        activation, shape = ", ".join(own), model_shape(mlps)
    return {
        "id": name,
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        **shape,
        "activation": activation,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None),
        "device": parameter.device.type,
        "backend": _resolve_backend(backend, parameter.device.type, parameter.dtype),
        "digest": model_digest(model),
    }


def fallbacks(described: Json) -> list[str]:
    """What was used in place of the kernels that are made for the model's device, and why."""
    made_for = MADE_FOR.get(described["device"])
    if made_for is None or described["backend"] == made_for:
        return []
    status = ops.available_backends(getattr(torch, described["dtype"]))[made_for]
    why = "asked for" if status.works else status.detail
    return [f"backend {described['backend']} in place of {made_for}: {why}"]


def _resolve_backend(backend: str, device: str, dtype: torch.dtype) -> str:
    """The backend that "auto" means on a device; one that is asked for must work there."""
    status = ops.available_backends(dtype)
    if backend == "auto":
        made_for = MADE_FOR.get(device, "reference")
        return made_for if status[made_for].works else "reference"
    if backend not in status:
        raise RelneuronError(
            f"unknown backend {backend!r}", f"use auto, {', '.join(status)}", exit_code=2
        )
    if not status[backend].works:
        raise RelneuronError(
            f"backend {backend} does not work here: {status[backend].detail}",
            "leave out --backend, or see `relneuron doctor`",
        )
    return backend
