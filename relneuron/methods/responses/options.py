"""What responses are recorded with, and neurons ranked by them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.options import Only, SeedOptions, TopOptions, like, option
from relneuron.texts.options import ShardOptions

DEVICE, MEMORY, DISK = "device", "memory", "disk"
PLACES = ("auto", DEVICE, MEMORY, DISK)
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


def responses_option(only: Only) -> Any:
    """`--responses` of what records and ranks in one go."""
    return option(
        "auto",
        "Where responses are until neurons are ranked: on the device, in memory, on the disk, or "
        "where there is room for them, in this order.",
        choices=PLACES,
        records=False,
        only=only,
    )


_BESIDE = Only("with --identify", lambda o: o.identify)


@dataclass(frozen=True)
class AtOnceOptions(RankOptions):
    """Whether `record` ranks, too, and how; responses are then not kept."""

    PANEL = "Ranking at once"

    identify: bool = option(
        False, "Also rank the neurons, as identify does, and keep no responses."
    )
    responses: str = responses_option(_BESIDE)
    top: int | None = like(RankOptions, "top", only=_BESIDE)
    seed: int = like(RankOptions, "seed", only=_BESIDE)
    ends: str = like(RankOptions, "ends", only=_BESIDE)
    fdr: float | None = like(RankOptions, "fdr", only=_BESIDE)
    negatives: int = like(RankOptions, "negatives", only=_BESIDE)
    permutations: int = like(RankOptions, "permutations", only=_BESIDE)
    bootstrap: int = like(RankOptions, "bootstrap", only=_BESIDE)
    noise: int = like(RankOptions, "noise", only=_BESIDE)
