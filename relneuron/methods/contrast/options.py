"""What `contrast` is asked for: which tokens two models read, and which of them are compared."""

from __future__ import annotations

from dataclasses import dataclass

from relneuron.ablation.options import GenerateOptions
from relneuron.artifact.options import Only, OomOptions, Options, like, option
from relneuron.texts.options import CountOptions, check_shard

TOKENS = ("completion", "prompt", "last")
POSITIONS = ("own", "predicting")
_COMPLETED = Only("with --tokens completion", lambda o: o.tokens == "completion")


@dataclass(frozen=True)
class ContrastOptions(OomOptions, Options):
    """Which tokens are compared, who wrote them, and how prompts become batches."""

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
