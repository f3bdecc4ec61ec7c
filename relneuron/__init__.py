"""relneuron: find the neurons of a language model that carry a relation, and switch them off.

`instrument` and `ablate` act on a running model; `ops` are the kernels; `cli` is the command line.
"""

from relneuron import ops
from relneuron.ablate import ablate_prompts  # before the context manager of the stage's name
from relneuron.artifact import NeuronFile, RelneuronError
from relneuron.model import find_gated_mlps
from relneuron.patch import ablate, instrument

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
