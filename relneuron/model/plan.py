"""What a model takes before its weights are there: what lies where, in how many bytes.

`relneuron doctor MODEL --dry-run` prints it. The model is built from its config alone, its weights
on torch's meta device, which has shapes and no numbers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.identity import check_model_folder
from relneuron.model.layers import Unfound, decoder_layers, first_line
from relneuron.model.widths import last_map, told_widths

Device = int | str  # a GPU's number, "cpu", "disk", "mps"

_COUNTER_BYTES = 8  # of each neuron in a group at a site: int64
_KEYS = ("k_proj", "qkv_proj", "query_key_value")  # maps whose heads are shared out
_WORD_BITS, _WORD_BYTES = 32, 4  # of a mask: a bit for each neuron in a condition


@dataclass
class Place:
    """What lies on a device, or in one of the processes that hold a model in parts; bytes.

    layers    those whose weights lie here
    others    paths of the modules besides, the outermost of which all lies here
    weights   with the buffers
    cache     keys and values of a token of a sequence, of the layers that compute here
    counters  of a group of tokens at a site as wide as the MLP, of these layers
    masks     of a condition, of these layers
    memory    of the device; None where it is not limited
    """

    device: Device
    layers: list[int] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    weights: int = 0
    cache: int = 0
    counters: int = 0
    masks: int = 0
    memory: int | None = None

    @property
    def missing(self) -> int:
        """Bytes of weights that the device has no memory for."""
        return 0 if self.memory is None else max(0, self.weights - self.memory)


@dataclass(frozen=True)
class Plan:
    """Where a model's weights would lie. `widths` are F of each layer as the config tells them.

    `no_cache` says why a forward does not tell the keys and values, if so.
    """

    places: list[Place]
    dtype: torch.dtype
    n_parameters: int
    widths: list[int]
    no_cache: str | None


def read_memory(parts: Sequence[str]) -> dict[Device, int]:
    """{device: bytes} of texts such as 0=80GiB and cpu=200GB."""
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    units |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
    found: dict[Device, int] = {}
    for text in parts:
        match = re.fullmatch(
            r"(\d{1,4}|cpu|disk|mps)=(\d{1,15}(?:\.\d+)?) ?([kmgt]?i?)b", text.lower()
        )
        unit = units.get(match[3].upper()) if match else None
        if match is None or unit is None:
            raise RelneuronError(f"unknown --memory {text!r}", "use 0=80GiB,1=80GiB,cpu=200GiB", 2)
        device = int(match[1]) if match[1].isdecimal() else match[1]
        if device in found:
            raise RelneuronError(f"--memory names {match[1]} twice", "name each device once", 2)
        found[device] = int(float(match[2]) * unit)
    return found


def memory_here() -> dict[Device, int]:
    """{device: free bytes} of this machine, as accelerate finds it."""
    from accelerate.utils import get_max_memory

    found: dict[Device, int] = get_max_memory()
    return found


# --- the model without numbers ---------------------------------------------------------------


def meta_model(name: str, revision: str | None, dtype: str | None) -> Any:
    """A model of a config alone, its weights on the meta device.

    `dtype` "auto" is the checkpoint's own, as the config says it; float32 where it does not.
    """
    from transformers import AutoConfig

    from relneuron.model.load import model_kind

    check_model_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        if getattr(config, "quantization_config", None) is not None:
            raise RelneuronError(
                f"{name} is quantised: its config does not say how many bytes its weights take",
                "take the size of its files; the table is of models that are not quantised",
            )
        own = getattr(config, "dtype", None) or config.get_text_config().dtype or torch.float32
        kind = model_kind(config)
        wanted = own if dtype in (None, "auto") else getattr(torch, str(dtype))
        with torch.device("meta"):
            model = kind.from_config(config, dtype=wanted)
        model.tie_weights()  # transformers 5.0 leaves it to loading
    except RelneuronError:
        raise
    except Exception as error:  # a damaged config raises whatever its values lead to
        raise RelneuronError(
            f"{name} gives no model by its config alone: {first_line(error)}",
            "give a model folder with a config.json, or a hub name",
        ) from error
    return model.eval()


def stored(model: Any) -> dict[str, int]:
    """The bytes of every weight and buffer by its name; of tied ones by the first.

    transformers loads some weights in float32 whatever the dtype.
    """
    kept: list[str] = []
    with suppress(Exception):
        kept = list(model._get_dtype_plan(model.dtype))
    found, seen = {}, set()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            wide = any(re.search(pattern, name) for pattern in kept) and tensor.is_floating_point()
            found[name] = tensor.numel() * (4 if wide else tensor.element_size())
    return found


def cache_bytes(model: Any) -> list[int]:
    """Of each layer, the bytes of keys and values of a token: those of three less those of two."""
    with suppress(Exception):  # the one that runs without looking at numbers
        model.set_experts_implementation("batched_mm")

    def kept(n_tokens: int) -> list[int]:
        ids = torch.zeros(1, n_tokens, dtype=torch.int64, device="meta")
        with torch.no_grad(), torch.device("meta"):
            cache = model(input_ids=ids, use_cache=True).past_key_values
        tensors = [
            [v for v in vars(layer).values() if isinstance(v, Tensor)] for layer in cache.layers
        ]
        return [sum(t.numel() * t.element_size() for t in own) for own in tensors]

    own = model.config.get_text_config().pad_token_id
    try:
        with suppress(Exception):  # some look for padding in the ids, others need to
            model.config.pad_token_id = model.config.get_text_config().pad_token_id = None
        few = kept(2)
    except Exception:
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = own
        few = kept(2)
    return [three - two for two, three in zip(few, kept(3), strict=True)]


# --- what lies where -------------------------------------------------------------------------


def plan(
    name: str,
    *,
    memory: Mapping[Device, int],
    revision: str | None = None,
    dtype: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    n_parts: int | None = None,
) -> Plan:
    """Where the weights of a model would lie, as transformers and accelerate decide it.

    `device_map` is what `--device-map` takes, with the devices of `memory` {device: bytes}; without
    it all goes to the first of them. In `n_parts` parts each process has its own, on the device of
    its number where `memory` has it.
    """
    model = meta_model(name, revision, dtype)
    try:
        path, layers = decoder_layers(model)
    except Unfound as error:
        raise RelneuronError(f"{name} has {error}", "give a decoder-only model") from None
    widths = told_widths(model, list(layers))
    cache: list[int] = []
    no_cache = None
    try:
        cache = cache_bytes(model)
        if len(cache) != len(layers):
            no_cache = f"its cache has {len(cache)} layers, the model {len(layers)}"
    except Exception as error:
        no_cache = f"a forward without numbers fails: {first_line(error)}"
    cache = [0] * len(layers) if no_cache else cache
    numbers = _Numbers(path, list(layers), widths, cache)
    if n_parts is not None:
        places = _parts(model, numbers, n_parts, memory)
    else:
        where = device_map if device_map is not None else {"": next(iter(memory))}
        places = _spread(model, numbers, _resolved(model, where, memory), memory)
    n_parameters = sum(p.numel() for p in model.parameters())
    return Plan(places, model.dtype, n_parameters, widths, no_cache)


@dataclass(frozen=True)
class _Numbers:
    """The layers, and of each its width and the bytes of keys and values of a token."""

    path: str
    layers: list[nn.Module]
    widths: list[int]
    cache: list[int]

    def number(self, name: str) -> int | None:
        """The layer that a weight belongs to."""
        rest = name.removeprefix(f"{self.path}.")
        return int(rest.partition(".")[0]) if rest != name else None

    def compute(self, place: Place, number: int, width: int, share: int = 1) -> None:
        """Add what a layer needs where it computes, with so many of its neurons."""
        place.cache += self.cache[number] // share
        place.counters += _COUNTER_BYTES * width
        place.masks += _WORD_BYTES * -(-width // _WORD_BITS)


def _resolved(model: Any, asked: str | dict[str, Any], memory: Mapping[Device, int]) -> Any:
    """{module: device} of a way to spread, as `from_pretrained` decides it, or of a file."""
    if isinstance(asked, str):
        from transformers.integrations.accelerate import _get_device_map

        logger = logging.getLogger("accelerate.utils.modeling")  # of devices that are not here
        level = logger.level
        try:
            logger.setLevel(logging.ERROR)
            return _get_device_map(model, asked, dict(memory), None)
        finally:
            logger.setLevel(level)
    known = {str(place).removeprefix("cuda:") for place in asked.values()}
    for place in sorted(known):
        if not (place.isdecimal() or place in ("cpu", "disk", "mps", "cuda")):
            raise RelneuronError(f"no device {place!r}", "name GPUs by number, cpu or disk", 2)
    places = {n: str(p).removeprefix("cuda:").replace("cuda", "0") for n, p in asked.items()}
    return {n: int(p) if p.isdecimal() else p for n, p in places.items()}


def _spread(
    model: Any, numbers: _Numbers, where: Mapping[str, Device], memory: Mapping[Device, int]
) -> list[Place]:
    """What lies on each device; what is kept on the host or the disk beside GPUs runs on one."""
    order = sorted({*where.values(), *memory}, key=_order)
    places = {device: Place(device, memory=memory.get(device)) for device in order}
    computing = [device for device in order if device not in ("cpu", "disk")]
    ran: dict[int, Device] = {}
    for name, n_bytes in stored(model).items():
        device = _device(name, where)
        place, number = places[device], numbers.number(name)
        place.weights += n_bytes
        if number is None:
            _add_other(place, name, where)
        elif number not in place.layers:
            place.layers.append(number)
            ran.setdefault(number, device)
    for number, device in ran.items():
        runs = device if device in computing else (computing or ["cpu"])[0]
        numbers.compute(places.setdefault(runs, Place(runs)), number, numbers.widths[number])
    return [p for p in places.values() if p.weights or p.memory is not None]


def _order(device: Device) -> tuple[int, str]:
    """GPUs by number, then the host, then the disk."""
    return (device, "") if isinstance(device, int) else (1 << 30, device)


def _device(name: str, where: Mapping[str, Device]) -> Device:
    parts = name.split(".")
    for n in range(len(parts), -1, -1):
        if (prefix := ".".join(parts[:n])) in where:
            return where[prefix]
    raise RelneuronError(
        f"the device map says nothing of {name}", "name every module, or one above it", 2
    )


def _add_other(place: Place, name: str, where: Mapping[str, Device]) -> None:
    """Name the module of a weight that is in no layer, as the map has it, or by two names."""
    parts = name.split(".")[:-1]
    prefixes = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
    known = next((prefix for prefix in prefixes if prefix in where), ".".join(parts[:2]))
    if known not in place.others:
        place.others.append(known)


def _parts(
    model: Any, numbers: _Numbers, n_parts: int, memory: Mapping[Device, int]
) -> list[Place]:
    """What each of N processes holds by the model's tensor parallel plan."""
    styles = dict(model.tp_plan or {})
    if not styles:
        raise RelneuronError(
            f"{type(model).__name__} has no tensor parallel plan in transformers",
            "leave out --tensor-parallel-size, or use --device-map auto",
        )
    shapes = {name: tensor for name, tensor in model.named_parameters()}
    share = n_parts if any(s == "colwise" and k.endswith(_KEYS) for k, s in styles.items()) else 1
    places = []
    for part in range(n_parts):
        place = Place(part, list(range(len(numbers.layers))), memory=memory.get(part))
        for name, n_bytes in stored(model).items():
            size, own = _own_rows(name, shapes.get(name), styles, part, n_parts)
            place.weights += n_bytes * own // size
            if numbers.number(name) is None:
                _add_other(place, name, {})
        for number, width in enumerate(numbers.widths):
            down = last_map(numbers.layers[number], width)
            style = styles.get(_generic(f"{numbers.path}.{number}.{down}"))
            own = _chunk(width, part, n_parts) if style == "rowwise" else width
            numbers.compute(place, number, own, share)
        places.append(place)
    return places


def _generic(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _chunk(size: int, part: int, n_parts: int) -> int:
    """How many of `size` rows a part has: as torch cuts them, the last ones may have fewer."""
    each = -(-size // n_parts)
    return max(0, min(each, size - each * part))


def _own_rows(
    name: str, tensor: Tensor | None, styles: Mapping[str, str], part: int, n_parts: int
) -> tuple[int, int]:
    """The size of the dimension that a weight is cut along, and how much of it a part has."""
    generic = _generic(name)
    style = styles.get(generic) or styles.get(generic.rpartition(".")[0]) or ""
    if tensor is None or not tensor.dim():
        return 1, 1
    if style.startswith(("colwise", "packed_colwise")):
        dim = max(tensor.dim() - 2, 0)
    elif style.startswith(("rowwise", "packed_rowwise")) and not name.endswith("bias"):
        dim = tensor.dim() - 1
    elif style.startswith("embedding"):
        dim = int(style == "embedding_colwise")
    else:
        return 1, 1
    size = tensor.shape[dim]
    return size, _chunk(size, part, n_parts)
