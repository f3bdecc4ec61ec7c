"""Which model and tokenizer these are: digests of all that decides what they compute.

The stages note them as inputs and compare them, so that a changed weight or token is never taken
for the old one.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import Executor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from relneuron.artifact.files import Json, RelneuronError, hashing_threads
from relneuron.artifact.reading import read_json
from relneuron.model.layers import is_sharded, offloaded_weights, settle
from relneuron.model.shards import gathered

CHUNK_BYTES = 1 << 26  # of a tensor, on the host at a time for each thread

# What a config says of where it comes from, and of the library that read it.
_NOT_OF_THE_MODEL = ("_name_or_path", "_commit_hash", "transformers_version", "distributed_config")
# What decides tokens and text beside the rules of the tokenizer's backend.
_OF_THE_TOKENIZER = (
    *("special_tokens_map", "chat_template", "clean_up_tokenization_spaces"),
    *("add_bos_token", "add_eos_token", "split_special_tokens"),
)


# --- models ----------------------------------------------------------------------------------

ADAPTER = "adapter_config.json"  # of a folder that peft writes


def check_model_folder(name: str) -> bool:
    """Whether `name` is a folder, not a name of the hub; one that holds no model raises."""
    folder = Path(name)
    if not (name.startswith((".", "/", "~")) or folder.exists()):
        return False
    if (folder / "config.json").is_file():
        return True
    if (folder / ADAPTER).is_file():
        about = read_json(folder / ADAPTER, ADAPTER)
        base = about.get("base_model_name_or_path") if isinstance(about, dict) else None
        raise RelneuronError(
            f"{name} is an adapter ({ADAPTER}) of {base or 'another model'}, no model by itself",
            "merge it into that model (peft: model.merge_and_unload().save_pretrained(FOLDER)), "
            "save the tokenizer there and give FOLDER",
        )
    raise RelneuronError(
        f"{name} is no model folder: it has no config.json",
        "give a Hugging Face model folder (config.json, weights, tokenizer) or a hub name",
    )


_HELD: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


@contextmanager
def held(model: Any, digest: str) -> Iterator[None]:
    """Take a model's digest as known: within it nobody changes the model."""
    _HELD[model] = digest
    try:
        yield
    finally:
        _HELD.pop(model, None)


def model_digest(model: Any) -> str:
    """The SHA-256 of a model: config, adapters, and every byte of its weights and buffers.

    The weights are taken as they are in memory, in the order of their names and of their rows: on
    any device the same, in another dtype another one. Tied weights are read once. They are hashed
    side by side in chunks, about 1 GB a second with each of at most 8 threads: a 7B model in
    bfloat16 has 14 GB. Of a quantised weight it is packed numbers, scales and all that says how
    they are read; weights that accelerate offloaded are read from where they are, one at a time,
    and those that several processes hold in parts are put together: each of them must call this.
    Others that are not in memory (meta) raise RelneuronError.
    """
    if model in _HELD:
        return _HELD[model]
    settle(model)
    digest = hashlib.sha256(json.dumps(_settings(model), sort_keys=True, default=str).encode())
    read: dict[tuple[object, ...], tuple[list[Any], Tensor]] = {}
    elsewhere = offloaded_weights(model)
    contents = dict.fromkeys(elsewhere) | _contents(model)
    with hashing_threads() as pool:
        found = []
        for name, value in sorted(contents.items()):
            is_elsewhere = name in elsewhere and (value is None or value.device.type == "meta")
            is_passing = is_elsewhere or (isinstance(value, Tensor) and is_sharded(value))
            for part, tensor in _plain(name, elsewhere[name]() if is_elsewhere else value):
                about = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
                where = (tensor.data_ptr(), *about)
                if is_passing:
                    hashes = _hash_rows(part, tensor, pool)
                    wait(hashes)
                else:  # kept as long as its address stands for it
                    if where not in read:
                        read[where] = (_hash_rows(part, tensor, pool), tensor)
                    hashes = read[where][0]
                found.append((f"{part} {tuple(tensor.shape)} {tensor.dtype}", hashes))
        for text, hashes in found:
            digest.update(text.encode())
            for each in hashes:
                digest.update(each.result())
    return digest.hexdigest()


def _settings(model: Any) -> list[Any]:
    """What decides results beside the weights: config, end of text, active adapters."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_OF_THE_MODEL}
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    adapters = {
        path: [getattr(module, name, None) for name in ("active_adapters", "scaling", "merged")]
        for path, module in model.named_modules()
        if hasattr(module, "active_adapters") and hasattr(module, "scaling")
    }
    return [config, ends, adapters]


def _contents(model: Any) -> dict[str, Any]:
    """Parameters, buffers and what modules keep beside them."""
    found: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    found |= model.named_buffers(remove_duplicate=False)
    with _as_they_lie(model):
        found |= model.state_dict()
    return found


def _plain(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a value is made of, and what says how they are put together."""
    if hasattr(value, "__tensor_flatten__") and not is_sharded(value):
        names, about = value.__tensor_flatten__()
        yield f"{name}.about", torch.frombuffer(bytearray(repr(about).encode()), dtype=torch.uint8)
        for part in sorted(names):
            yield from _plain(f"{name}.{part}", getattr(value, part))
        return
    if isinstance(value, Tensor) and is_sharded(value):
        value = gathered(value)
    if not isinstance(value, Tensor):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        value = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    yield name, value


@contextmanager
def _as_they_lie(model: Any) -> Iterator[None]:
    """Within it `state_dict` gives bitsandbytes' 4-bit weights as they lie, and changes nothing.

    On some CPUs their first forward packs them in another way, with scales rounded to bfloat16.
    `state_dict` (0.50) undoes that in the model, but not the rounding and not the order of the
    scales, so that the model computes something else from then on.
    """
    states: list[Any] = [getattr(weight, "quant_state", None) for weight in model.parameters()]
    packed = [state for state in states if getattr(state, "packing_format_for_cpu", False)]
    try:
        for state in packed:
            state.packing_format_for_cpu = False
        yield
    finally:
        for state in packed:
            state.packing_format_for_cpu = True


def _hash_rows(name: str, value: Tensor, pool: Executor) -> list[Any]:
    """The digests of a tensor's chunks of rows, in their order, as they will be known."""
    if value.device.type == "meta":
        raise RelneuronError(
            f"the weights {name} are not in memory: they are on the meta device",
            "load the whole model, with --device-map auto where it is too large for one device",
        )
    rows = value.detach().reshape(1) if value.dim() == 0 else value.detach()
    if not rows.numel():
        return []
    n = max(1, CHUNK_BYTES * len(rows) // max(1, rows.numel() * rows.element_size()))
    return [pool.submit(_hash, rows[i : i + n]) for i in range(0, len(rows), n)]


def _hash(chunk: Tensor) -> bytes:
    data = chunk.to("cpu").resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(cast(Any, data.numpy())).digest()


def other_weights(what: str, found_in: Json, model: Json) -> list[str]:
    """A notice, if `what` comes from other weights than those of a model of the same shape."""
    known = found_in.get("digest")
    if known in (None, model["digest"]):
        return []
    before, now = found_in.get("dtype"), model["dtype"]
    dtypes = (f" as {before}", f" as {now}") if before not in (None, now) else ("", "")
    whose = f"{found_in.get('id', 'another model')}{dtypes[0]}"
    return [f"{what} of other weights: found in {whose}, used in {model['id']}{dtypes[1]}"]


# --- tokenizers ------------------------------------------------------------------------------


def tokenizer_digest(tokenizer: Any) -> str | None:
    """The SHA-256 of everything that decides which tokens a text has, and which text tokens have.

    Vocabulary, merges, added and special tokens, normaliser, pre-tokeniser, template, decoder and
    chat template; not how the last call padded or cut. None without a tokenizer.
    """
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any
    if backend is not None:
        rules = json.loads(backend.to_str())
        for name in ("padding", "truncation"):
            rules.pop(name, None)
    else:
        pieces = getattr(getattr(tokenizer, "sp_model", None), "serialized_model_proto", bytes)()
        rules = [
            type(tokenizer).__name__,
            sorted(getattr(tokenizer, "get_vocab", dict)().items()),
            hashlib.sha256(pieces).hexdigest(),
        ]
    about = {name: getattr(tokenizer, name, None) for name in _OF_THE_TOKENIZER}
    text = json.dumps([rules, about], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
