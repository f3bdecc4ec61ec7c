"""A model and its tokenizer as a stage would load them, without its weights.

The planners of the stages (`Stage.plan`) call `dry_model` where the stage calls `load.load`, and
count with it what the stage will do; everything else they ask the stage's own functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import nn

from relneuron import ops
from relneuron.artifact.files import Json
from relneuron.artifact.memory import resident_bytes
from relneuron.artifact.neurons import Shape
from relneuron.artifact.options import PlaceOptions
from relneuron.artifact.planned import Planned
from relneuron.model.batches import takes_keep
from relneuron.model.layers import decoder_layers
from relneuron.model.load import check_loading, load_tokenizer, settle_arithmetic
from relneuron.model.plan import cache_bytes, meta_model, stored
from relneuron.model.traced import Costs, traced
from relneuron.model.widths import last_map, told_shape

DIGEST = "0" * 64  # stands for one that only the weights could say


@dataclass(frozen=True)
class Dry:
    """A model without numbers, and what the stages ask of it; `device`: where it would compute."""

    model: Any
    tokenizer: Any
    shape: Json
    device: str

    @cached_property
    def order(self) -> Shape:
        return Shape.of(self.shape)

    @cached_property
    def costs(self) -> Costs:
        return Costs.of(self.model)

    @cached_property
    def weights(self) -> int:
        """Bytes of the weights and buffers, tied ones once."""
        return sum(stored(self.model).values())

    @cached_property
    def merged(self) -> int:
        """Bytes of the weights that loading puts together of several of the checkpoint's.

        The others are read where they lie in the file, which stays mapped, these with it.
        """
        try:
            from transformers.conversion_mapping import get_checkpoint_conversion_mapping

            kinds = get_checkpoint_conversion_mapping(self.model.config.model_type) or ()
        except ImportError:
            return 0
        made = [
            name
            for kind in kinds
            if any("*" in source for source in getattr(kind, "source_patterns", ()))
            for name in kind.target_patterns
        ]
        return sum(n for name, n in stored(self.model).items() if any(m in name for m in made))

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    @cached_property
    def neurons(self) -> dict[str, int]:
        return {site: len(self.order.site_places(site)) for site in self.order.widths}

    @cached_property
    def downs(self) -> list[nn.Module]:
        """What the MLP of each layer ends with, where it is one map."""
        if self.order.experts[0]:
            return []
        _, layers = decoder_layers(self.model)
        paths = ((one, last_map(one, self.order.width(n, "gate"))) for n, one in enumerate(layers))
        return [layer.get_submodule(path) for layer, path in paths if path]

    @property
    def n_inner(self) -> int:
        """How many tensors a patched MLP keeps beside h: what its maps gave."""
        return 1 + ("up" in self.order.widths)

    def logits(self, width: int, n: int) -> int:
        """How many columns of logits a forward gives where the last n are asked for."""
        return n if n and takes_keep(self.model) else width

    def active(self, layer: int) -> int:
        """How many neurons of a layer a token goes through: of experts those of some of them."""
        width, (n_experts, each) = self.order.width(layer, "gate"), self.order.experts
        if not (n_experts and n_experts[layer]):
            return width
        config = self.model.config.get_text_config()
        names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k")
        k = next((v for name in names if (v := getattr(config, name, None))), 1)
        return width + each * (int(k) - n_experts[layer])

    @cached_property
    def last_mlp(self) -> int:
        """Operations of a token in the MLP of the last layer; of experts none are left out."""
        last = self.order.layers - 1
        if self.order.experts[0]:
            return 0
        is_gated = "up" in self.order.widths and self.order.width(last, "up")
        return 2 * self.active(last) * self.order.width(last, "down") * (3 if is_gated else 2)

    def cache_bytes(self) -> int:
        """Keys and values of a token, in all layers; 0 where a forward does not tell them."""
        with suppress(Exception):
            return sum(cache_bytes(self.model))
        return 0

    @property
    def last_down(self) -> int:
        """Operations of a token in what the last layer's MLP ends with; of experts none is told."""
        last = self.order.layers - 1
        if self.order.experts[0]:
            return 0
        return 2 * self.order.width(last, "gate") * self.order.width(last, "down")

    def planned(self, stage: str, reads: Mapping[str, int], **told: Any) -> Planned:
        """What a stage takes, with what is known of the model.

        The process holds what this one does: Python, the libraries, the texts and their tokens.
        """
        told["host"] = {"process": resident_bytes(), **told.get("host", {})}
        if self.device == "cpu" and self.merged:
            told["host"]["experts, of the file"] = self.merged
        told["tensors"] = {"weights": self.weights, **told.get("tensors", {})}
        about: Json = {"neurons": self.neurons, "layers": self.order.layers, "device": self.device}
        about["dtype"] = str(self.model.dtype).removeprefix("torch.")
        return Planned(stage, reads, **about, **told)


def dry_model(
    name: str, options: PlaceOptions, *, attention: bool = False, needs_text: bool = True
) -> Dry:
    """A model of its config alone, with its tokenizer; refused as `load.load` refuses it."""
    device = check_loading(
        name,
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        device_map=options.device_map,
        tensor_parallel_size=getattr(options, "tensor_parallel_size", None),
    )[0]
    dtype = options.dtype or ("float32" if device == "cpu" else "auto")
    model = meta_model(name, options.revision, dtype)
    tokenizer = None
    try:
        tokenizer = load_tokenizer(name, revision=options.revision)
    except Exception:
        if needs_text:
            raise
    shape = told_shape(model, attention=attention)
    # What a stage has loaded before it begins, for this process is looked at in its place: the
    # kernels, and what the first product of matrices makes.
    settle_arithmetic()
    ops.available_backends(model.dtype)
    square = torch.ones(512, 512, device="cpu")
    (square @ square).softmax(-1)
    return Dry(model, tokenizer, shape, device.partition(":")[0])


# --- forwards ----------------------------------------------------------------------------------

_REPLAYED = 6  # batches whose memory is looked at


def _size(one: tuple[int, int, int]) -> tuple[int, int]:
    """Of as many tokens those of more rows have more logits."""
    return one[0] * one[1], one[0]


@dataclass
class Work:
    """The forwards of a stage, batches alike counted together."""

    dry: Dry
    found: Counter[tuple[int, int]] = field(default_factory=Counter)
    batches: int = 0
    tokens: int = 0
    padded: int = 0
    steps: int = 0
    # Rows, tokens and logits of each batch in its turn, by what becomes of its logits.
    made: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)

    def forward(
        self,
        rows: int,
        width: int,
        *,
        keys: int | None = None,
        logits: int = 1,
        less: int = 0,
        times: int = 1,
    ) -> None:
        """A forward of rows of `width` tokens; `less` operations are left out of it."""
        n = self.dry.logits(width, logits) if logits else 0
        flops = self.dry.costs.flops(rows, width, keys=keys, logits=n) - less
        self.found[flops, self.dry.weights] += times

    @property
    def largest(self) -> tuple[int, int, int]:
        """Rows, tokens and logits of the largest batch."""
        return max(chain(*self.made.values()), key=_size, default=(0, 0, 0))

    def batch(self, lengths: Sequence[int], *, then: str = "", **how: Any) -> None:
        """A batch that is planned, of rows of these lengths, padded to the longest.

        `then` says what becomes of its logits (`traced.traced`).
        """
        n_logits = int(how.get("logits", 1))
        self.made.setdefault(then, []).append((len(lengths), max(lengths), n_logits))
        self.batches += 1
        self.tokens += sum(lengths)
        self.padded += len(lengths) * max(lengths)
        self.forward(len(lengths), max(lengths), **how)

    def step(self, rows: int, keys: int) -> None:
        """One more token of each row, which sees `keys`."""
        self.steps += rows
        self.forward(rows, 1, keys=keys)

    def peak(self, body: Any = None, *, cache: bool = True, n_held: int = 0) -> int:
        """Bytes that the tensors of the largest forward take at most, by tracing it.

        `body` is what is run in place of the model: it without its head. A patched MLP holds
        `n_held` more tensors while its last map runs than the model's own does.
        """
        model = self.dry.model if body is None else body
        how: dict[str, Any] = {"cache": cache, "held": dict.fromkeys(self.dry.downs, n_held)}
        found = []
        for then, made in self.made.items():
            rows, width, n = most = max(made, key=_size)
            # Some of the batches, from the first to the last, and the largest one.
            some = [made[number * (len(made) - 1) // _REPLAYED] for number in range(_REPLAYED + 1)]
            shares = [one[0] * one[1] / (rows * width) for one in (*some, most)]
            found.append(traced(model, rows, width, n_logits=n, then=then, shares=shares, **how))
        kept = [one.kept_bytes if self.dry.device == "cpu" else one.peak_bytes for one in found]
        return max(kept, default=0)

    @property
    def told(self) -> dict[str, Any]:
        """What a `Planned` takes of it."""
        numbers = {name: getattr(self, name) for name in ("batches", "tokens", "padded", "steps")}
        forwards = tuple((n, *one) for one, n in sorted(self.found.items()))
        return {**numbers, "forwards": forwards}
