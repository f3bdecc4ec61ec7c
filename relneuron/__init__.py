"""relneuron: find the neurons of a language model that carry a relation, and switch them off.

`instrument` and `ablate` act on a running model; `ops` are the kernels; `testing` holds another
backend to their contract; `cli` is the command line. Names are imported when they are first used,
so that `relneuron.ops` needs torch and nothing else, and Ctrl-C is heard before it is imported.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relneuron import ops
    from relneuron.ablate import ablate_prompts
    from relneuron.artifact.files import RelneuronError
    from relneuron.artifact.neurons import NeuronFile
    from relneuron.instrument import ablate, instrument
    from relneuron.model import find_gated_mlps

__version__ = "0.1.0"

__all__ = [
    "NeuronFile",
    "RelneuronError",
    "__version__",
    "ablate",
    "ablate_prompts",
    "find_gated_mlps",
    "instrument",
    "ops",
]

_HOMES = {
    "NeuronFile": "artifact.neurons",
    "RelneuronError": "artifact.files",
    "ablate": "instrument",
    "ablate_prompts": "ablate",
    "find_gated_mlps": "model",
    "instrument": "instrument",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("relneuron.ops")  # Python sets it here
    if name not in _HOMES:
        raise AttributeError(f"module 'relneuron' has no attribute {name!r}")
    value = getattr(import_module(f"relneuron.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Python stores each imported submodule as an attribute of its package, so the stage
    `relneuron.ablate` would take the place of the context manager of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
