"""What `identify` takes to choose neurons by gradients; defaults are of the papers or their code.

`rank.py` and the command line read it.
"""

from __future__ import annotations

from dataclasses import dataclass

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.options import Only, Options, SeedOptions, TopOptions, option
from relneuron.methods.gradients.clusters import DECIMALS
from relneuron.methods.gradients.consistency import SCORES
from relneuron.methods.gradients.facts import KINDS

# A prompt's set: above this share of its largest attribution. QRNCA: section 4.2 of its paper.
ADAPTIVE, CLUSTERED = 0.3, 0.2
QUERY_TOP = 20  # neurons of a query, of the same section
SHARE_OF_ALL = 0.01  # of the neurons, where --top of relevance is not given
CAS_SHARE = 0.3  # of the largest consistency-aware score; as recalled
STATIC = 0.3  # the example of a figure; the value that was used is not known
OF = ("relation", "fact")
NEURONS = ("cas", "query", "union")


@dataclass(frozen=True)
class SetOptions(Options):
    """Whose sets are written."""

    sets: str = option(
        "relation",
        "By gradients: one set for each relation, the neurons of all of its facts, or for each "
        "fact.",
        choices=OF,
    )


@dataclass(frozen=True)
class ThresholdOptions(Options):
    """What makes a neuron one of a prompt's set."""

    threshold: float | None = option(
        None,
        "Attribution above which a neuron is of a prompt's set, as a share of the prompt's largest "
        f"one; default: {ADAPTIVE}, with qrnca {CLUSTERED}. With --kind absolute or percentile it "
        "is that.",
        least=0,
    )


@dataclass(frozen=True)
class KnowledgeOptions(ThresholdOptions, SetOptions, SeedOptions):
    """Knowledge neurons, arXiv 2104.08696: the coarse sets of prompts, and a fact's refined set."""

    kind: str = option(
        "adaptive",
        "Threshold of a knowledge neuron: adaptive (a share of the largest attribution), absolute, "
        "or percentile.",
        choices=KINDS,
    )
    share: float = option(
        0.5,
        "A fact has the neurons that are in more than this share of its prompts' sets.",
        least=0,
        below=1,
        only=Only("without --stepped", lambda o: not o.stepped, clashes=True),
    )
    stepped: bool = option(
        False,
        "Find that share by steps of 0.05 from 0.7, until facts have 2 to 5 neurons on average.",
    )
    negative_prompts: int = option(
        0,
        "Prompts of other relations, drawn for each fact, whose sets are taken off the fact's.",
        least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "adaptive" and self.threshold is None:
            raise RelneuronError(
                f"--kind {self.kind} has no threshold of its own",
                "add --threshold 99.9, say" if self.kind == "percentile" else "add --threshold",
                2,
            )
        if self.kind == "percentile" and not 0 <= (self.threshold or 0) <= 100:
            raise RelneuronError("a percentile is from 0 to 100", "use --threshold 99.9, say", 2)

    @property
    def tau(self) -> float:
        return ADAPTIVE if self.threshold is None else self.threshold


@dataclass(frozen=True)
class QueryOptions(TopOptions, ThresholdOptions, SetOptions):
    """Query-relevant neurons (QRNCA), arXiv 2406.10868; `top` is by default 20 a query."""

    common: float = option(
        0.3,
        "A neuron is common, and of no query's set, if more than this share of all queries have it "
        "in their cluster.",
        least=0,
        most=1,
    )
    keep_common: bool = option(
        False, "Leave common neurons in, as the published code of QRNCA in fact does."
    )
    decimals: int = option(
        DECIMALS, "Decimals to which the attributions of a cluster are rounded.", least=0, most=18
    )

    @property
    def tau(self) -> float:
        return CLUSTERED if self.threshold is None else self.threshold


@dataclass(frozen=True)
class ConsistencyOptions(ThresholdOptions, SetOptions):
    """Query localization, arXiv 2405.14117: consistent facts, consistency-aware neurons."""

    consistency: str = option(
        "cs2",
        "Consistency of a fact: cs1 (neurons of all of its prompts, of all neurons of any) or cs2 "
        "(of more than one).",
        choices=SCORES,
    )
    cut: float = option(
        STATIC,
        "A fact is consistent above this.",
        least=0,
        most=1,
        only=Only("without --otsu", lambda o: not o.otsu, clashes=True),
    )
    otsu: bool = option(False, "Cut between consistent and inconsistent facts by Otsu's method.")
    mean_weight: float = option(0.7, "Weight of the mean in the consistency-aware score.", least=0)
    deviation_weight: float = option(
        0.3, "Weight of the deviation in the consistency-aware score, which lowers it.", least=0
    )
    unbiased: bool = option(False, "The deviation of a sample, not of the population.")
    neurons: str = option(
        "cas",
        "A fact's neurons: cas (by the consistency-aware score), query (of its first prompt), or "
        "union (of any prompt).",
        choices=NEURONS,
    )
    cas_share: float = option(
        CAS_SHARE,
        "A neuron is a fact's if its consistency-aware score is above this share of the largest.",
        least=0,
        only=Only("with --neurons cas", lambda o: o.neurons == "cas"),
    )

    @property
    def tau(self) -> float:
        return ADAPTIVE if self.threshold is None else self.threshold


@dataclass(frozen=True)
class ShareOptions(TopOptions):
    """Neurons by the share of a relation in their relevance; our reconstruction, see shares.py."""

    specific: float = option(
        0.5,
        "A neuron can be of a relation that has at least this share of its relevance.",
        least=0,
        most=1,
    )
    sums: str = option(
        "positive",
        "Relevance of a sentence: its positive part, or its absolute value.",
        choices=("positive", "absolute"),
    )
