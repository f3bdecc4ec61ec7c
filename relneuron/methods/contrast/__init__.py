"""Neurons by how far two models' values are apart on the same tokens (arXiv 2406.14144).

`contrast` is the pass, a `job` of batches whose `lines` say what is read and compared, added up by
`counter`; `options` and `commands` are its command line. `rank` chooses by the contrast that a
folder holds, as `choices` says; `probe` learns what neurons tell at a prompt's last token by the
regression of `classify`; `authors_files` reads and writes the authors' scores. `study`,
`tables`, `page` and `figures` are the report's. No torch here.
"""

from relneuron.artifact.contrast import NAME
from relneuron.artifact.papers import SAFETY
from relneuron.artifact.stage import Method, Ranking, Stage
from relneuron.methods.contrast.choices import ChangeOptions

_HERE = "relneuron.methods.contrast"
_ASKS = ("transformers", "tqdm", "filelock")

METHOD = Method(
    stages=(
        Stage(
            "contrast",
            f"{_HERE}.commands:contrast",
            _ASKS,
            is_shared=True,
            papers=(SAFETY,),
            plan=f"{_HERE}.plan:contrast",
        ),
        Stage(
            "probe",
            f"{_HERE}.commands:probe",
            (*_ASKS, "sklearn"),
            is_shared=True,
            papers=(SAFETY,),
        ),
    ),
    rankings=(
        Ranking(
            "contrast",
            "change between two models",
            ChangeOptions,
            reads=NAME,
            of="a contrast of two models",
            run=f"{_HERE}.rank:rank",
            papers=(SAFETY,),
        ),
    ),
    page=f"{_HERE}.study:PAGE",
    formats={"safety": SAFETY},
)
