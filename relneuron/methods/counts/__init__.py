"""Neurons of groups of text by how often they are active: LAPE (arXiv 2402.16438) and baselines.

`count` is the corpus pass, `merge` adds, `folders` imports and exports, `rank` chooses;
`authors_files`: of others; `page`, `study`, `tables` and `figures` are the report's. No torch here.
"""

from relneuron.artifact.papers import LAPE, MMNEURON
from relneuron.artifact.stage import Method, Ranking, Stage
from relneuron.methods.counts.options import CountedOptions, LapeOptions, RandomOptions

_HERE = "relneuron.methods.counts"
_OF = {"reads": "counts.safetensors", "of": "counts", "run": f"{_HERE}.commands:rank"}

METHOD = Method(
    stages=(
        Stage(
            "count",
            f"{_HERE}.commands:count",
            ("transformers", "tqdm", "filelock"),
            is_shared=True,
            papers=(LAPE,),
            plan=f"{_HERE}.plan:count",
        ),
        Stage("merge", f"{_HERE}.commands:merge", ("filelock",)),
    ),
    rankings=(
        Ranking(
            "lape", "activation probability entropy (LAPE)", LapeOptions, **_OF, papers=(LAPE,)
        ),
        Ranking("probability", "activation probability", CountedOptions, **_OF, papers=(LAPE,)),
        Ranking("mean", "mean activation", CountedOptions, **_OF, papers=(LAPE,)),
        Ranking("random", "chance", RandomOptions, **_OF, papers=()),
    ),
    page=f"{_HERE}.study:PAGE",
    formats={"lape": LAPE, "mmneuron": MMNEURON},
)
