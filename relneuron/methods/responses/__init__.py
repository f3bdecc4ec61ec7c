"""Neurons by their responses to recorded prompts: average precision (record.py, rank.py).

Responses are in one of places.py in between.

Imports artifact, model, texts, report, ablation, analyses and ops; no other method. No torch here.
Begin with record.py.
"""

from relneuron.artifact.papers import EXPERTS, RELATIONS
from relneuron.artifact.stage import Method, Ranking, Stage
from relneuron.methods.responses.options import RankOptions

METHOD = Method(
    stages=(
        Stage(
            "record",
            "relneuron.methods.responses.commands:record",
            ("transformers", "tqdm", "filelock"),
            is_shared=True,
            papers=(RELATIONS,),
            plan="relneuron.methods.responses.plan:record",
        ),
    ),
    rankings=(
        Ranking(
            "ap",
            "average precision",
            RankOptions,
            reads="validated.csv",
            of="responses",
            run="relneuron.methods.responses.commands:rank",
            papers=(RELATIONS, EXPERTS),
        ),
    ),
)
