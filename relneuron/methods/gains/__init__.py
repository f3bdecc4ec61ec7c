"""Neurons by what they add to an answer's log-probability (arXiv 2312.12141).

`attribute` scores sentences (`scorer`, `values`, `scores`), `comparison` switches off what was
found, `rank` chooses; `page`, `study`, `tables` and `figures` are the report's. No torch here.
"""

from relneuron.artifact.papers import GAIN
from relneuron.artifact.stage import Attribution, Method, Ranking
from relneuron.methods.gains.options import AttributeOptions, GainRankOptions

_HERE = "relneuron.methods.gains"

METHOD = Method(
    attributions=(
        Attribution(
            "gain",
            "log-probability gain",
            AttributeOptions,
            f"{_HERE}.commands:attribute",
            papers=(GAIN,),
            plan=f"{_HERE}.plan:attribute",
        ),
    ),
    supports=f"{_HERE}.commands:supports",
    rankings=(
        Ranking(
            "logprob_gain",
            "log-probability gain",
            GainRankOptions,
            reads="targets.csv",
            of="an attribution",
            run=f"{_HERE}.commands:rank",
            papers=(GAIN,),
        ),
    ),
    page=f"{_HERE}.study:PAGE",
)
