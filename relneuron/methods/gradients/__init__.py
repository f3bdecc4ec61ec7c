"""Neurons by the gradient of an answer: integrated gradients, gradient x activation, and their kin.

`attribute --method ig|relevance` writes the scores of every neuron and sentence (`attribute.py`);
`options.py` and `commands.py` are its command line. Of them `rank` chooses, as `scored` reads them
and `choices` says: `facts`, `clusters`, `consistency` and `shares` are what each paper chooses by,
as pure functions. `edit` (`editing`) changes what the neurons write; `study`, `tables`, `page` and
`figures` are the report's. No torch here.
"""

from relneuron.artifact.gradients import FILES, IG, RELEVANCE
from relneuron.artifact.papers import CRANE, KNOWLEDGE, LOCALIZATION, QUERIES
from relneuron.artifact.stage import Attribution, Method, Ranking, Stage
from relneuron.methods.gradients.choices import (
    ConsistencyOptions,
    KnowledgeOptions,
    QueryOptions,
    ShareOptions,
)
from relneuron.methods.gradients.options import IgOptions, RelevanceOptions

_HERE = "relneuron.methods.gradients"
_RUN = f"{_HERE}.commands:attribute"
_PLAN = f"{_HERE}.plan:attribute"
_IG = {"reads": FILES[IG], "of": "integrated gradients", "run": f"{_HERE}.rank:rank"}
_RELEVANCE = {"reads": FILES[RELEVANCE], "of": "relevance", "run": f"{_HERE}.rank:rank"}

METHOD = Method(
    stages=(
        Stage(
            "edit",
            f"{_HERE}.editing:edit",
            ("transformers", "tqdm", "filelock"),
            papers=(KNOWLEDGE,),
        ),
    ),
    attributions=(
        Attribution(
            "ig",
            "integrated gradients of the answer's probability",
            IgOptions,
            _RUN,
            papers=(KNOWLEDGE,),
            plan=_PLAN,
        ),
        Attribution(
            "relevance",
            "gradient x activation over all tokens",
            RelevanceOptions,
            _RUN,
            plan=_PLAN,
        ),
    ),
    rankings=(
        Ranking(
            "knowledge_neurons",
            "knowledge neurons",
            KnowledgeOptions,
            **_IG,
            papers=(KNOWLEDGE,),
        ),
        Ranking("qrnca", "query-relevant neurons (QRNCA)", QueryOptions, **_IG, papers=(QUERIES,)),
        Ranking(
            "query_localization",
            "query localization",
            ConsistencyOptions,
            **_IG,
            papers=(LOCALIZATION,),
        ),
        Ranking("relevance", "share of the relevance", ShareOptions, **_RELEVANCE, papers=(CRANE,)),
    ),
    supports=f"{_HERE}.commands:supports",
    page=f"{_HERE}.study:PAGE",
)
