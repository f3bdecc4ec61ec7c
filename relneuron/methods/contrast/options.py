"""What `contrast` is asked for, which tokens two models read and compare; and what `probe` is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from relneuron.ablation.options import CLEAN, GenerateOptions
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.options import Only, OomOptions, Options, like, option
from relneuron.texts.options import CountOptions, ShardOptions, check_shard

TOKENS = ("completion", "prompt", "last")
POSITIONS = ("own", "predicting")
_COMPLETED = Only("with --tokens completion", lambda o: o.tokens == "completion")


@dataclass(frozen=True)
class ContrastOptions(OomOptions, Options):
    """Which tokens are compared, who wrote them, and how prompts become batches."""

    PANEL = "What is compared"

    tokens: str = option(
        "completion",
        "Tokens that are compared: those of a completion that one of the models writes greedily "
        "and both then read, those of the prompt, or its last one.",
        choices=TOKENS,
    )
    completion_by: str = option(
        "a",
        "Which model writes the completions: a, the one that is patched, as in arXiv 2406.14144, "
        "or b.",
        choices=("a", "b"),
        only=_COMPLETED,
    )
    positions: str = option(
        "own",
        "Where a token of a completion is compared: own, where it is read (the authors' code), or "
        "predicting, one before, where it is predicted (the paper's formula).",
        choices=POSITIONS,
        only=_COMPLETED,
    )
    max_new_tokens: int = option(
        256, "Maximum number of tokens of a completion.", least=1, only=_COMPLETED
    )
    template: str | None = like(GenerateOptions, "template")
    chat_template: bool = option(
        False, "Put every prompt, as --template made it, into the model's chat template."
    )
    batch_tokens: int = option(
        8192, "Tokens of a batch of each model, padding and completions included.", least=1
    )
    shard: tuple[int, int] = like(CountOptions, "shard")
    checkpoint_seconds: float = like(CountOptions, "checkpoint_seconds")
    checkpoint_batches: int | None = like(CountOptions, "checkpoint_batches")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shard(self.shard)


_FITTED = Only("without --apply", lambda o: o.apply is None)
_LABELLED = Only("with --labels", lambda o: o.labels is not None)


@dataclass(frozen=True)
class ProbeOptions(ShardOptions):
    """What a probe learns, of which neurons, or which one is applied."""

    PANEL = "The probe"

    neurons: Path | None = option(
        None, "A neurons.json, whose first neurons the probe reads.", only=_FITTED
    )
    labels: str | None = option(
        None, "What it learns to tell, FILE.csv:COLUMN: a number to each prompt's id."
    )
    above: float = option(
        0.0, "A prompt is labelled 1 if its number is above this.", only=_LABELLED
    )
    mask: str = option(
        CLEAN, "Of a file with the column mask, as effect writes one, its rows.", only=_LABELLED
    )
    of_set: str | None = option(
        None, "Set of the neurons; default: the only one that there is.", flag="set", only=_FITTED
    )
    top: int = option(1500, "How many of its neurons, best first.", least=1, only=_FITTED)
    folds: int = option(5, "Parts that are left out in turn to measure it.", least=2, only=_FITTED)
    seed: int = option(0, "Seed of the parts.", least=0, most=2**32 - 1, only=_FITTED)
    random_seeds: int = option(
        5,
        "Number of random sets to compare with, of as many other neurons of each layer.",
        least=0,
        only=_FITTED,
    )
    apply: Path | None = option(
        None, "A probe.safetensors to apply to the prompts; with --labels it is scored, too."
    )
    template: str | None = like(GenerateOptions, "template")
    chat_template: bool = like(ContrastOptions, "chat_template")
    batch_tokens: int = option(8192, "Tokens of a batch, padding included.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.apply is None and (self.neurons is None or self.labels is None):
            raise RelneuronError(
                "a probe learns labels from neurons, and one of the two is not given",
                "add --neurons NEURONS --labels FILE.csv:COLUMN, or --apply PROBE",
                2,
            )
        if self.labels is not None and not self.labels.rpartition(":")[0].endswith(".csv"):
            raise RelneuronError(
                f"--labels {self.labels!r} names no column of a csv", "use FILE.csv:COLUMN", 2
            )
