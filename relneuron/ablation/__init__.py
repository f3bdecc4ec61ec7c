"""Neurons switched off, or set, side by side: answers, NLL and continuations.

May import `model`, `texts` and `artifact`. Begin with `conditions.plan_conditions`, which says what
is off when, and `evaluate.Evaluator`, which runs all of it in common batches. STAGES are the
commands. No torch here.
"""

from relneuron.artifact.papers import HARNESS, LAPE, RELATIONS, SAFETY
from relneuron.artifact.stage import Stage

_HERE, _PLAN = "relneuron.ablation.commands", "relneuron.ablation.plan"
_WORKS = ("tqdm", "filelock")
_ASKS = ("transformers", *_WORKS)

STAGES = (
    Stage(
        "ablate",
        f"{_HERE}:ablate",
        _ASKS,
        is_shared=True,
        plan=f"{_PLAN}:ablate",
        papers=(RELATIONS,),
    ),
    Stage(
        "nll",
        f"{_HERE}:nll",
        _ASKS,
        is_shared=True,
        plan=f"{_PLAN}:nll",
        papers=(LAPE,),
    ),
    Stage(
        "generate",
        f"{_HERE}:generate",
        _ASKS,
        is_shared=True,
        plan=f"{_PLAN}:generate",
    ),
    Stage("eval", f"{_HERE}:run_tasks", (*_ASKS, "lm_eval"), is_shared=True, papers=(HARNESS,)),
    Stage("effect", f"{_HERE}:effect", _WORKS, is_shared=True, papers=(SAFETY,)),
)
