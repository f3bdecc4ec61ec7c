"""Neurons by the gradient of an answer's probability: knowledge neurons and their kin.

Of integrated gradients and relevance `rank` chooses, of what `scored` reads: `facts`, `clusters`,
`consistency` and `shares` are what each paper chooses by, as pure functions. `edit` (`editing`)
changes what the neurons write. No torch here.
"""

from relneuron.artifact.gradients import FILES, IG, RELEVANCE
from relneuron.artifact.stage import Method, Ranking, Stage
from relneuron.methods.gradients.choices import (
    ConsistencyOptions,
    KnowledgeOptions,
    QueryOptions,
    ShareOptions,
)

_HERE = "relneuron.methods.gradients"
_IG = {"reads": FILES[IG], "of": "integrated gradients", "run": f"{_HERE}.rank:rank"}
_RELEVANCE = {"reads": FILES[RELEVANCE], "of": "relevance", "run": f"{_HERE}.rank:rank"}

METHOD = Method(
    stages=(Stage("edit", f"{_HERE}.editing:edit", ("transformers", "tqdm", "filelock")),),
    rankings=(
        Ranking("knowledge_neurons", "knowledge neurons", KnowledgeOptions, **_IG),
        Ranking("qrnca", "query-relevant neurons (QRNCA)", QueryOptions, **_IG),
        Ranking("query_localization", "query localization", ConsistencyOptions, **_IG),
        Ranking("relevance", "share of the relevance", ShareOptions, **_RELEVANCE),
    ),
)
