"""Load a model with its tokenizer, and say which one it is and what it runs on.

The stages and the command line call it; `model/mlps/` finds the neurons in what it loads.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch

from relneuron import ops
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.neurons import shape_of
from relneuron.artifact.options import PartsOptions, PlaceOptions
from relneuron.artifact.reading import read_json
from relneuron.model.identity import ADAPTER, check_model_folder, model_digest
from relneuron.model.layers import compute_dtype, first_line, input_device
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.ranks import local_device
from relneuron.model.shards import check_parts, loading_options, n_parts
from relneuron.ops.backends import MADE_FOR

_SPREAD: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # what --device-map said of a model


def settle_arithmetic() -> None:
    """So that the same study gives the same bits, also on a busy machine."""
    # Said aloud, the number of threads holds for MKL, too; else it may take fewer of them from call
    # to call, and sums are rounded in another order.
    torch.set_num_threads(torch.get_num_threads())
    # MKL's vector functions choose their code in the first call. If two threads make it at once,
    # one may get code of lower accuracy: cosines of rotary embeddings that were off by 4e-5 in one
    # of fifteen runs. One element is one thread.
    for function in (torch.cos, torch.sin, torch.exp, torch.tanh, torch.erf, torch.log):
        function(torch.ones(1, device="cpu"))


def choose_device(asked: str | None, how: str = "use --device") -> str:
    """The device to run on: as asked for, if it is here; by default the GPU if there is one.

    `how` another one is asked for stands before those that are here in the error's fix.
    """
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
        raise RelneuronError(f"no device {asked!r} here: {why}", f"{how} {' or '.join(usable)}", 2)
    return "cpu" if kind == "cpu" else asked


def asked_map(asked: str) -> str | dict[str, Any]:
    """A way to spread, or {module: device} of a file, of any devices."""
    if asked in ("auto", "balanced", "sequential"):
        return asked
    path = Path(asked)
    if not path.is_file():
        raise RelneuronError(
            f"--device-map {asked} is no file", "use auto, balanced, sequential or a JSON file", 2
        )
    found = read_json(path, asked)
    if not (isinstance(found, dict) and found):
        raise RelneuronError(f"{asked} is no JSON object", 'write {"model.layers.0": 0, ...}', 2)
    return found


def read_device_map(asked: str, device: str | None) -> str | dict[str, Any]:
    """What accelerate takes of `--device-map`: a way to spread, or {module: device} of a file."""
    if device is not None:
        raise RelneuronError(
            "--device and --device-map both say where the model goes", "leave out one of them", 2
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RelneuronError(
            "each of torchrun's processes would spread the model over all devices",
            "leave out --device-map, or run one process",
            2,
        )
    found = asked_map(asked)
    if isinstance(found, str):
        return found
    for place in {*map(str, found.values())} - {"disk"}:
        choose_device(f"cuda:{place}" if place.isdecimal() else place, f"in {asked} write disk or")
    return found


def check_loading(
    name: str,
    *,
    revision: str | None,
    dtype: str | None,
    device: str | None,
    device_map: str | None,
    tensor_parallel_size: int | None,
) -> tuple[str, str | dict[str, Any] | None]:
    """The device, and what `read_device_map` gives; raises for what cannot be loaded so."""
    places = read_device_map(device_map, device) if device_map is not None else None
    if tensor_parallel_size is not None:
        if device is not None or device_map is not None:
            raise RelneuronError(
                "--tensor-parallel-size says where the model goes: each process takes a GPU",
                f"leave out {'--device' if device is not None else '--device-map'}",
                2,
            )
        check_parts(tensor_parallel_size)
    else:
        device = local_device(device)
    found = choose_device(device)
    if dtype not in (None, "auto", "float32", "bfloat16", "float16"):
        raise RelneuronError(f"unknown dtype {dtype!r}", "use float32, bfloat16 or float16", 2)
    looks_local = check_model_folder(name)
    if looks_local and revision is not None:
        raise RelneuronError(
            f"{name} is a folder, which has no revision {revision}", "leave out --revision", 2
        )
    return found, places


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    device_map: str | None = None,
    tensor_parallel_size: int | None = None,
) -> Any:
    """A causal language model, by anything `from_pretrained` takes, or one with pictures.

    `device` defaults to the GPU if there is one, of torchrun's processes to one each; `dtype` to
    float32 on a CPU and to the checkpoint's own on a GPU, or where it is quantised. With
    `device_map` (`read_device_map`) accelerate spreads its layers over devices. With
    `tensor_parallel_size` N each of torchrun's N processes gets a part of it, on a GPU of its own
    where there are GPUs. The model comes in eval mode.
    """
    device, places = check_loading(
        name,
        revision=revision,
        dtype=dtype,
        device=device,
        device_map=device_map,
        tensor_parallel_size=tensor_parallel_size,
    )
    settle_arithmetic()
    looks_local = Path(name).is_dir()
    if looks_local and (Path(name) / ADAPTER).is_file():
        becomes = "used, as peft is installed" if find_spec("peft") else "ignored without peft"
        warnings.warn(f"{name} also holds an adapter ({ADAPTER}): it is {becomes}", stacklevel=2)
    try:
        with ExitStack() as stack:
            model, info = _read_model(
                name, revision, dtype, device, places, tensor_parallel_size, stack
            )
            finalize(model, stack.pop_all().close)
    except RelneuronError:
        raise
    except Exception as error:  # a damaged config or weight raises whatever it leads to
        if tensor_parallel_size is not None:
            raise RelneuronError(
                f"{name} could not be loaded in {tensor_parallel_size} parts: {first_line(error)}",
                "leave it out, or use --device-map auto in its place, in one process",
            ) from error
        told = re.search(r"pip install (?:-\S+ )*'?(\w[\w.-]*)", str(error))
        package = told[1] if told else error.name if isinstance(error, ImportError) else None
        if package:
            raise RelneuronError(
                f"{name} needs a package that is not here: {first_line(error)}",
                f"pip install {package}",
            ) from error
        if isinstance(error, ImportError) or "GPU" in str(error):
            raise RelneuronError(
                f"{name} needs what is not here: {first_line(error)}",
                "load it where that is, or give a model that needs less",
            ) from error
        raise RelneuronError(
            f"{name} could not be loaded as a causal language model: {first_line(error)}",
            "give a Hugging Face model folder (config.json, weights, tokenizer) or a hub name",
        ) from error
    if info["missing_keys"]:
        raise RelneuronError(
            f"{name} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}, ...",
            "give the whole checkpoint",
        )
    if device_map is not None:
        _SPREAD[model] = device_map
    return model.eval()


def _read_model(
    name: str,
    revision: str | None,
    dtype: str | None,
    device: str,
    places: str | dict[str, Any] | None,
    parts: int | None,
    stack: ExitStack,
) -> tuple[Any, Json]:
    """The model where it belongs, and what loading it said; `stack` outlives the model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, revision=revision)
    kind = model_kind(config)
    is_quantised = getattr(config, "quantization_config", None) is not None
    asked: Json = {"revision": revision, "output_loading_info": True}
    asked["dtype"] = dtype or ("float32" if device == "cpu" and not is_quantised else "auto")
    if places is not None:
        # For weights on the disk that do not lie in the checkpoint as they are used.
        folder = stack.enter_context(TemporaryDirectory(prefix="relneuron-"))
        asked |= {"device_map": places, "offload_folder": folder}
    elif parts is not None:
        if is_quantised:
            raise RelneuronError(
                f"{name} is quantised, and is held in parts only as it was trained",
                "leave out --tensor-parallel-size, or use --device-map auto",
            )
        asked |= loading_options(parts, stack)
    elif is_quantised:
        asked["device_map"] = {"": device}  # not every package can move what it has packed
    is_here = not {"device_map", "distributed_config"} & asked.keys()
    model, info = kind.from_pretrained(name, **asked)
    return (model.to(device) if is_here else model), info


def model_kind(config: Any) -> Any:
    """The class that makes a model of a configuration.

    It is that for models with pictures, if there is no causal language model of its kind.
    """
    import transformers as hf

    has_pictures = type(config) in hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if has_pictures and type(config) not in hf.MODEL_FOR_CAUSAL_LM_MAPPING:
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


def load(name: str, options: PlaceOptions, *, needs_text: bool = True) -> tuple[Any, Any]:
    """A model and its tokenizer, as the options say; without text to read it may lack one."""
    model = load_model(
        name,
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        device_map=options.device_map,
        tensor_parallel_size=(
            options.tensor_parallel_size if isinstance(options, PartsOptions) else None
        ),
    )
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
    The dtype is what the model computes in; `quantisation`, the method and bits of its weights,
    `device_map`, as it was asked for, and `tensor_parallel_size`, the number of processes that hold
    it, are there only where there is one. All of those processes must call it.
    """
    dtype, device = compute_dtype(model), input_device(model).type
    parts = n_parts(model)
    special = {
        "quantisation": quantisation(model.config),
        "device_map": _SPREAD.get(model),
        "tensor_parallel_size": parts if parts > 1 else None,
    }
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
        "dtype": str(dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None),
        "device": device,
        **{key: value for key, value in special.items() if value is not None},
        "backend": _resolve_backend(backend, device, dtype),
        "digest": model_digest(model),
    }


def quantisation(config: Any) -> Json | None:
    """How a model's weights are quantised: the method, and its bits where one number says them.

    As `config.quantization_config` says it, a dict or an object with `to_dict`; None without it.
    """
    said = getattr(config, "quantization_config", None)
    if said is None:
        return None
    said = dict(said if isinstance(said, Mapping) else said.to_dict())
    told = [said.get(key) for key in ("bits", "nbits", "weights")]  # quanto's weights are "int8"
    told += [n for n in (4, 8) if said.get(f"load_in_{n}bit")]  # bitsandbytes
    groups = (said.get("config_groups") or {}).values()  # compressed-tensors
    told += [(group.get("weights") or {}).get("num_bits") for group in groups]
    # torchao: "Int8DynamicActivationInt4WeightConfig" are weights of 4 bits.
    told += re.findall(r"(?:int|float)(\d+)_?weight", str(said.get("quant_type")).lower())
    bits = {int(n) for each in told for n in re.findall(r"\d+", str(each))}
    method = said.get("quant_method")
    found: Json = {"method": str(getattr(method, "value", method))}
    return found | ({"bits": bits.pop()} if len(bits) == 1 else {})


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
