"""An adapter of peft over a model, on in some rows of a forward and off in the others.

model/pair.py reads the folder; what runs the model says whose each row is. The weights of the
model are then read once for both: only what the adapter itself adds is computed for its rows alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.installed import need
from relneuron.artifact.reading import read_json
from relneuron.model.identity import ADAPTER
from relneuron.model.layers import first_line, input_device

KINDS = ("LORA", "IA3")  # of peft, whose layers call the layer that they change once
MERGE = (
    "merge it into the model (peft: model.merge_and_unload().save_pretrained(FOLDER)), save the "
    "tokenizer there and give FOLDER"
)


def is_adapter(name: str) -> bool:
    """Whether `name` is a folder that peft wrote, without a model of its own."""
    folder = Path(name)
    return (folder / ADAPTER).is_file() and not (folder / "config.json").exists()


class Adapter:
    """An adapter in the layers of a model, off unless `rows` says whose rows are its own.

    Each layer that it changes gets a `forward` on the instance: the layer beneath runs once, over
    all rows, and peft's own forward of the adapter sees its rows only.
    """

    def __init__(self, model: nn.Module, layers: dict[str, Any]) -> None:
        self.device = input_device(model)
        self.chosen: slice | Tensor | None = None  # rows of the adapter
        self.n_rows = 0
        for path, layer in layers.items():
            layer.__dict__["forward"] = _Rows(self, path, layer)

    @contextmanager
    def rows(self, own: Tensor | bool) -> Iterator[None]:
        """Within it the adapter is on in the rows (B,) bool `own` of each forward, or in all."""
        before = self.chosen, self.n_rows
        if isinstance(own, bool):
            self.chosen, self.n_rows = (slice(None) if own else None), 0
        else:
            places = own.nonzero()[:, 0]
            self.chosen, self.n_rows = places.to(self.device), len(own)
            if len(places) == 0:
                self.chosen = None
            elif int(places[-1]) - int(places[0]) == len(places) - 1:
                # Neighbours are a view of the others, and no copy.
                self.chosen = slice(int(places[0]), int(places[-1]) + 1)
        try:
            yield
        finally:
            self.chosen, self.n_rows = before


class _Rows:
    """The forward of a layer that an adapter changes."""

    def __init__(self, adapter: Adapter, path: str, layer: Any) -> None:
        self.adapter, self.path, self.base = adapter, path, layer.base_layer
        self.own = partial(type(layer).forward, layer)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        chosen, n_rows = self.adapter.chosen, self.adapter.n_rows
        if chosen is None or n_rows == 0:  # none or all
            y: Tensor = (self.base if chosen is None else self.own)(x, *args, **kwargs)
            return y
        if len(x) != n_rows:
            raise RelneuronError(
                f"{self.path} reads {len(x)} rows of a batch of {n_rows}: the model folds them",
                MERGE,
            )
        part = x[chosen]
        seen: list[Tensor] = []
        beneath = self.base.__dict__.get("forward")
        plain = beneath or partial(type(self.base).forward, self.base)

        def base(changed: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            whole = x
            if changed is not part:  # an adapter of what the layer reads
                whole = x.clone()
                whole[chosen] = changed
            seen.append(plain(whole, *args, **kwargs))
            return seen[-1][chosen]

        self.base.__dict__["forward"] = base
        try:
            new = self.own(part, *args, **kwargs)
        finally:
            if beneath is None:
                del self.base.__dict__["forward"]
            else:
                self.base.__dict__["forward"] = beneath
        if len(seen) != 1:
            raise RelneuronError(
                f"the adapter's {self.path} runs its layer {len(seen)} times in a forward", MERGE
            )
        seen[0][chosen] = new
        return seen[0]


def load_adapter(model: Any, folder: str) -> Adapter:
    """Put the adapter of a folder into a model, off; its weights stay those that they were.

    Raises RelneuronError for an adapter that is more than what LoRA and (IA)3 add to layers:
    virtual tokens, whole modules, biases, weights of the model that are changed in place.
    """
    need("an adapter", "peft", otherwise=f", or {MERGE}")
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    about = read_json(Path(folder) / ADAPTER, ADAPTER)
    kind = about.get("peft_type") if isinstance(about, dict) else None
    if kind not in KINDS:
        raise RelneuronError(f"{folder} is an adapter of the kind {kind}, not LoRA or (IA)3", MERGE)
    before = _weights(model)
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.24 by a name that it gives up.
            warnings.simplefilter("ignore", FutureWarning)
            PeftModel.from_pretrained(model, folder)
    except Exception as error:  # a damaged file, or one of another model, raises what it leads to
        raise RelneuronError(
            f"{folder} could not be put into the model: {first_line(error)}",
            f"give the model that it was trained on{_base(about)}, and a whole adapter",
        ) from error
    layers, more = {}, []
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            more.append(path)
        elif isinstance(module, BaseTunerLayer):
            layers[path] = module
            more += [path] if isinstance(module.base_layer, BaseTunerLayer) else []
    model.eval()
    now = _weights(model)
    changed = [key for key, known in before.items() if now.get(key) != known]
    if more or changed or not layers:
        why = f"also replaces {more[0]}" if more else "also changes the model's own weights"
        raise RelneuronError(f"{folder} {why if layers else 'changes no layer'}", MERGE)
    return Adapter(model, layers)


def _weights(model: nn.Module) -> dict[int, tuple[int, int]]:
    """Where each weight lies, and how often it was written to."""
    return {id(p): (p.data_ptr(), p._version) for p in model.parameters()}


def _base(about: Any) -> str:
    name = about.get("base_model_name_or_path")
    return f" ({name})" if name else ""
