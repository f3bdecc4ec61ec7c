"""relneuron: find the neurons of a language model that carry a relation, and switch them off.

`run` makes a whole study of a model in memory, `plan` says what a command would take, `load` reads
any study as data frames, `stages` are the commands as functions; `instrument` and `ablate` act on a
running model; `ops` are the kernels; `testing` holds another backend to their contract; `cli` is
the command line. Names are imported when they are first used, so that `relneuron.ops` needs torch
and nothing else, and Ctrl-C is heard before it is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relneuron import ops
    from relneuron.ablation.ablate import ablate_prompts
    from relneuron.artifact.files import RelneuronError
    from relneuron.artifact.neurons import NeuronFile
    from relneuron.cli.python import plan
    from relneuron.model.instrument import ablate, instrument
    from relneuron.model.mlps.find import find_mlps
    from relneuron.study import stages
    from relneuron.study.folder import Study, load
    from relneuron.study.memory import run

__version__ = "0.1.0"

__all__ = [
    "NeuronFile",
    "RelneuronError",
    "Study",
    "__version__",
    "ablate",
    "ablate_prompts",
    "find_mlps",
    "instrument",
    "load",
    "ops",
    "plan",
    "run",
    "stages",
]

_HOMES = {
    "NeuronFile": "artifact.neurons",
    "NeuronLM": "ablation.harness.lm",
    "RelneuronError": "artifact.files",
    "Study": "study.folder",
    "ablate": "model.instrument",
    "ablate_prompts": "ablation.ablate",
    "find_gated_mlps": "model.mlps.find",
    "find_mlps": "model.mlps.find",
    "instrument": "model.instrument",
    "load": "study.folder",
    "plan": "cli.python",
    "run": "study.memory",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("relneuron.ops")  # Python sets it here
    if name == "stages":
        globals()[name] = import_module("relneuron.study.stages")
        return globals()[name]
    if name not in _HOMES:
        raise AttributeError(f"module 'relneuron' has no attribute {name!r}")
    value = getattr(import_module(f"relneuron.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
