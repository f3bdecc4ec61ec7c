"""Neurons by how far they are apart in two models on the same tokens (arXiv 2406.14144).

`rank` chooses by the contrast that a folder holds, as `choices` says; `authors_files` reads and
writes the authors' scores. `study`, `tables`, `page` and `figures` are the report's. No torch here.
"""

from relneuron.artifact.contrast import NAME
from relneuron.artifact.stage import Method, Ranking
from relneuron.methods.contrast.choices import ContrastOptions

_HERE = "relneuron.methods.contrast"

METHOD = Method(
    rankings=(
        Ranking(
            "contrast",
            "change between two models",
            ContrastOptions,
            reads=NAME,
            of="a contrast of two models",
            run=f"{_HERE}.rank:rank",
        ),
    ),
    page=f"{_HERE}.study:PAGE",
)
