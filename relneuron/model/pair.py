"""Two models that read the same tokens: A, which is patched, and B, whose values come.

`contrast` compares their neurons; B may be an adapter of peft over A, whose rows then share one
forward with A's. A neuron's value is what its layer's down map reads (the product of a gated MLP,
the activation of another one), behind what an adapter multiplies it by.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relneuron.artifact.files import Json, RelneuronError, real_path
from relneuron.artifact.options import LoadOptions
from relneuron.artifact.reading import read_json
from relneuron.model.adapters import Adapter, is_adapter, load_adapter
from relneuron.model.identity import ADAPTER, tokenizer_digest
from relneuron.model.layers import compute_dtype, input_device
from relneuron.model.load import describe_model, load, load_tokenizer
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import model_shape
from relneuron.model.patch import StatisticsDone

See = Callable[[int, Tensor], Tensor | None]


@dataclass(frozen=True)
class Pair:
    """Two models that fit together (`check_pair`).

    a, b       the models; the same one where B is an adapter of A
    tokenizer  of both
    mlps       A's MLPs that text runs and B's, one beside the other
    adapter    off outside of `adapter.rows`
    described  what a manifest says of each
    """

    a: Any
    b: Any
    tokenizer: Any
    mlps: tuple[list[MLP], list[MLP]]
    adapter: Adapter | None
    described: tuple[Json, Json]

    @contextmanager
    def only(self, which: str) -> Iterator[Any]:
        """The model "a" or "b", which alone runs within the context."""
        is_b = which == "b"
        with self.adapter.rows(is_b) if self.adapter else nullcontext():
            yield self.b if is_b else self.a


def load_pair(name_a: str, name_b: str, options: LoadOptions) -> Pair:
    """Two model folders or hub names; the second may be the folder of an adapter over the first.

    Both are loaded as the options say. Raises RelneuronError for a pair that does not fit, with
    what differs.
    """
    a, tokenizer = load(name_a, options)
    names, backend = (name_a, name_b), options.backend
    if not is_adapter(name_b):
        b, other = load(name_b, options)
        return pair_of(a, b, tokenizer, other, names=names, backend=backend)
    _warn_of_base(name_b, name_a)
    if (Path(name_b) / "tokenizer_config.json").is_file():
        check_tokenizers(tokenizer, load_tokenizer(name_b), names)
    mlps = running(a)
    described = describe_model(name_a, a, mlps, backend)
    adapter = load_adapter(a, name_b)
    adapted = describe_model(name_b, a, mlps, backend)
    return Pair(a, a, tokenizer, (mlps, mlps), adapter, (described, adapted))


def pair_of(
    a: Any,
    b: Any,
    tokenizer: Any,
    tokenizer_b: Any = None,
    *,
    names: tuple[str, str] = ("A", "B"),
    backend: str = "auto",
) -> Pair:
    """Two models in memory, checked; without a tokenizer of its own B reads A's tokens."""
    if tokenizer_b is not None:
        check_tokenizers(tokenizer, tokenizer_b, names)
    mlps = (running(a), running(b))
    check_pair((a, mlps[0]), (b, mlps[1]), names)
    described = [
        describe_model(name, model, own, backend)
        for name, model, own in zip(names, (a, b), mlps, strict=True)
    ]
    return Pair(a, b, tokenizer, mlps, None, (described[0], described[1]))


def running(model: Any) -> list[MLP]:
    """The MLPs of a model that text runs; experts are refused."""
    found: list[MLP] = []
    for part in find_mlps(model):
        if not isinstance(part, MLP):
            raise RelneuronError(
                f"layer {part.layer} has experts: two models may send a token to different ones",
                "give two models without experts",
            )
        found += [part] if part.runs else []
    return found


# --- what does not fit -----------------------------------------------------------------------


def check_pair(
    a: tuple[Any, Sequence[MLP]], b: tuple[Any, Sequence[MLP]], names: tuple[str, str]
) -> None:
    """Raise RelneuronError with the difference unless neuron i of a layer is one of both models.

    Each is a model and its MLPs. Layers, widths, hidden size, kind of MLP, activation, dtype and
    the number of tokens are compared.
    """
    one, other = (_form(model, mlps) for model, mlps in (a, b))
    for what, value in one.items():
        if other[what] != value:
            _refuse(f"{what} {_short(value)} and {_short(other[what])}", names)


def _form(model: Any, mlps: Sequence[MLP]) -> Json:
    shape = model_shape(mlps)
    # Several MLPs of a layer stand side by side in it, and each part is compared with its own.
    widths = [(mlp.layer, mlp.inside.start, mlp.inside.stop) for mlp in mlps]
    kinds = dict.fromkeys("gated" if mlp.is_gated else "not gated" for mlp in mlps)
    acts = dict.fromkeys(mlp.activation or type(mlp.act).__name__ for mlp in mlps)
    return {
        "number of layers": shape["layers"],
        "hidden size": shape["hidden"],
        "width of the MLPs": shape["width"],
        "MLPs (layer, first neuron, end)": widths,
        "kind of MLP": ", ".join(kinds),
        "activation": ", ".join(acts),
        "number of tokens": model.get_input_embeddings().num_embeddings,
        "dtype": str(compute_dtype(model)).removeprefix("torch."),
    }


def check_tokenizers(a: Any, b: Any, names: tuple[str, str]) -> None:
    """Raise RelneuronError with the difference unless both make the same tokens of every text."""
    if tokenizer_digest(a) == tokenizer_digest(b):
        return
    one, other = (dict(tokenizer.get_vocab()) for tokenizer in (a, b))
    for token in sorted({*one, *other}, key=lambda t: (one.get(t, len(one)), t)):
        if one.get(token) != other.get(token):
            found = (f"token {x[token]}" if token in x else "no token" for x in (one, other))
            _refuse(f"vocabularies, in which {token!r} is {' and '.join(found)}", names)
    templates = [getattr(tokenizer, "chat_template", None) for tokenizer in (a, b)]
    if templates[0] != templates[1]:
        told = " and ".join("one" if template else "none" for template in templates)
        _refuse(f"chat templates ({told})", names)
    _refuse("rules by which text becomes tokens (special tokens, normaliser, merges)", names)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse(what: str, names: tuple[str, str]) -> None:
    raise RelneuronError(
        f"{names[0]} and {names[1]} do not fit together: they have different {what}",
        "give two models of one kind that read the same tokens: a model, and what it was "
        "fine-tuned to",
    )


def _warn_of_base(adapter: str, base: str) -> None:
    about = read_json(Path(adapter) / ADAPTER, ADAPTER)
    said = about.get("base_model_name_or_path") if isinstance(about, dict) else None
    if isinstance(said, str) and said and Path(said).name != real_path(base).name:
        warnings.warn(
            f"{adapter} says that it is an adapter of {said}, not of {base}", stacklevel=3
        )


# --- what a layer's down map reads -----------------------------------------------------------


class Taps:
    """Shows `see(number, h)` what the down map of each MLP reads, which may be changed.

    A context manager: each map gets a `forward` on the instance, and loses it at the end; of one
    with an adapter of peft the map beneath. `number`
    is the MLP's place among `mlps`, h (..., F) is not copied; None from `see` leaves it as it is.
    """

    def __init__(self, mlps: Sequence[MLP], see: See) -> None:
        self.mlps, self.see = mlps, see
        self._before: list[tuple[Any, Any]] = []

    def __enter__(self) -> Taps:
        for number, mlp in enumerate(self.mlps):
            module: Any = mlp.product.module
            while hasattr(module, "base_layer"):  # an adapter of peft may scale what it reads
                module = module.base_layer
            before = module.__dict__.get("forward")
            self._before.append((module, before))
            plain = before or partial(type(module).forward, module)
            module.__dict__["forward"] = partial(self._forward, number, mlp, plain)
        return self

    def __exit__(self, *error: object) -> None:
        for module, before in reversed(self._before):
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        self._before.clear()

    def _forward(
        self, number: int, mlp: MLP, plain: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        h = mlp.product.of(x)
        new = self.see(number, h)
        if new is not None:
            x = new if new.shape == x.shape else x.clone()
            if x is not new:
                mlp.product.of(x).copy_(new)
        return plain(x)


Rows = tuple[Tensor, Tensor, Tensor]  # input_ids, attention_mask, position_ids (B, T)


class Held:
    """What A's MLPs left of a batch until B's have run, in memory that all batches use again.

    Kept as they were made, between what a forward makes and frees, they would leave holes: after
    ten batches the peak was twice that of one (glibc's allocator).
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def keep(self, number: int, h: Tensor) -> None:
        """Copy h of an MLP."""
        buffer = self._buffers.get(number)
        if buffer is None or buffer.numel() < h.numel() or buffer.dtype != h.dtype:
            buffer = None
            self._buffers.pop(number, None)
            self._buffers[number] = torch.empty(h.numel(), dtype=h.dtype, device=h.device)
        self.get(number, h).copy_(h)

    def get(self, number: int, like: Tensor) -> Tensor:
        """What was kept of an MLP, in the shape of the other model's."""
        return self._buffers[number][: like.numel()].view(like.shape)


def read_both(
    pair: Pair,
    rows: Rows,
    see: Callable[[int, Tensor, Tensor], None],
    held: Held | None = None,
) -> None:
    """Both models read the same tokens; `see(number, a, b)` gets h (B, T, F) of each at each MLP.

    Of an adapter it is one forward of A's rows and B's; else A's h are held until B's MLP has run.
    A forward ends with the last MLP's h: nothing behind it is computed.
    """
    n, held = len(pair.mlps[0]), held or Held()

    def end(number: int) -> None:
        if number == n - 1:
            raise StatisticsDone

    def of_both(number: int, h: Tensor) -> None:
        a, b = h.chunk(2)
        see(number, a, b)
        end(number)

    def of_a(number: int, h: Tensor) -> None:
        held.keep(number, h)
        end(number)

    def of_b(number: int, h: Tensor) -> None:
        see(number, held.get(number, h).to(h.device), h)
        end(number)

    if pair.adapter is not None:
        twice = [torch.cat([one, one]) for one in rows]
        is_b = torch.arange(len(twice[0]), device="cpu") >= len(rows[0])
        with pair.adapter.rows(is_b):
            read_one(pair.a, pair.mlps[0], (twice[0], twice[1], twice[2]), of_both)
        return
    read_one(pair.a, pair.mlps[0], rows, of_a)
    read_one(pair.b, pair.mlps[1], rows, of_b)


def read_one(model: Any, mlps: Sequence[MLP], rows: Rows, see: See) -> None:
    """One forward of a model without its lm_head; `see(number, h)` as `Taps` has it.

    `see` may end it with StatisticsDone behind the last MLP that it wants.
    """
    ids, mask, positions = (one.to(input_device(model)) for one in rows)
    body = getattr(model, "base_model", model)
    seen: list[int] = []

    def in_turn(number: int, h: Tensor) -> None:
        if h.shape[:-1] not in (ids.shape, (ids.numel(),)):
            raise RelneuronError(
                f"the MLP of layer {mlps[number].layer} reads {tuple(h.shape[:-1])} tokens of a "
                f"batch of {tuple(ids.shape)}",
                "give a model whose MLPs read rows of tokens, in the order of the batch",
            )
        if number != len(seen):
            raise RelneuronError(
                f"the model runs the MLP of layer {mlps[number].layer} out of turn",
                "give a model whose layers run once each, in their order",
            )
        seen.append(number)
        see(number, h)

    with Taps(mlps, in_turn), torch.no_grad(), suppress(StatisticsDone):
        body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    if len(seen) < len(mlps):
        raise RelneuronError(
            f"the model did not call the down map of layer {mlps[len(seen)].layer}",
            "give the model uncompiled, with its own forward methods",
        )
