"""Neurons by how far two models' values are apart on the same tokens (arXiv 2406.14144).

`contrast` is the pass, a `job` of batches whose `lines` say what is read and compared, added up by
`counter`; `options` and `commands` are its command line. No torch here.
"""

from relneuron.artifact.stage import Method, Stage

_HERE = "relneuron.methods.contrast"

METHOD = Method(
    stages=(Stage("contrast", f"{_HERE}.commands:contrast", ("transformers", "tqdm", "filelock")),),
)
