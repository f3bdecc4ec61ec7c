"""What responses are recorded with, and neurons ranked by them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.options import Only, SeedOptions, TopOptions, option
from relneuron.texts.options import ShardOptions

POOLING = ("mean", "last")
ENDS = ("top", "bottom", "both")
PERMUTATIONS = BOOTSTRAP = 1000
NOISE = 100_000


@dataclass(frozen=True)
class RecordOptions(ShardOptions):
    """What a prompt's response is, and which answers are correct.

    Without `validate` nothing is asked: every prompt counts as correct.
    """

    PANEL = "What is recorded"

    pooling: str = option(
        "mean",
        "Response of a prompt: the mean over its tokens, or that of its last token.",
        choices=POOLING,
    )
    exclude_bos: bool = option(
        False,
        "Leave the first token out of the mean.",
        only=Only("with --pooling mean", lambda o: o.pooling == "mean"),
    )
    attention: bool = option(
        False, "Also record the outputs of the attention's projections: q, k, v and o."
    )
    accept_object_prefix: bool = option(
        False,
        "Also count a prediction that begins with the object as correct ('Japan.' for 'Japan').",
    )
    batch_tokens: int = option(4096, "Tokens of a batch, padding included.", least=1)
    validate: bool = True


@dataclass(frozen=True)
class RankOptions(TopOptions, SeedOptions):
    """How many neurons of which end are chosen, and how sure their scores are."""

    PANEL = TopOptions.PANEL

    ends: str = option(
        "top",
        "End of the ranking: top, bottom (the lowest scores), or both, half of --top from each.",
        choices=ENDS,
    )
    fdr: float | None = option(
        None,
        "Choose all neurons below this false discovery rate, such as 0.05, in place of --top.",
        above=0,
        below=1,
    )
    negatives: int = option(4, "Negative prompts per positive one.", least=1)
    permutations: int = option(
        PERMUTATIONS, "Shuffled labels for the p-value of each chosen neuron; 0: none.", least=0
    )
    bootstrap: int = option(
        BOOTSTRAP, "Resamples of the facts for the 95 % interval of each score; 0: none.", least=0
    )
    noise: int = option(
        NOISE, "Columns of noise that q-values compare with; 0: none, and no --fdr.", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fdr is None:
            return
        if self.ends != "top":
            cause = f"--fdr chooses among the highest scores, --ends {self.ends} others"
            raise RelneuronError(cause, "leave out one of them", 2)
        if self.top is not None:
            cause = "--top and --fdr are two ways to choose neurons"
            raise RelneuronError(cause, "give one of them", 2)
        if self.fdr * (1 + self.noise) < 1:
            cause = f"--fdr {self.fdr} needs more columns of noise than {self.noise}"
            more = max(NOISE, math.ceil(1 / self.fdr))
            raise RelneuronError(f"{cause}: no p-value is so low", f"use --noise {more} or more", 2)
