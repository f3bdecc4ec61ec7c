"""What `effect` is asked for: what an output costs; its command and `costs.py` read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.options import LoadOptions, Only, Options, like, option
from relneuron.artifact.words import escaped, unescaped
from relneuron.texts.options import ShardOptions, check_shard

OUTPUT = "{output}"
_CLASSIFIER = Only("with a classifier as --cost", lambda o: Path(o.cost).is_dir())


@dataclass(frozen=True)
class EffectOptions(Options):
    """What an output costs, whoever says it."""

    PANEL = "What an output costs"

    cost: str = option(
        "",
        "What an output costs: FILE.csv:COLUMN (a row by mask and id, and seed if there are "
        "several), a folder with a classifier of texts, or a function of a prompt and an output "
        "as module:function.",
    )
    label: str | None = option(
        None, "Which of the classifier's logits is the cost: a name or a number.", only=_CLASSIFIER
    )
    template: str | None = option(
        None,
        "What the classifier reads, such as 'USER: {prompt} ASSISTANT: {output}'; default: the "
        "prompt and the output behind it.",
        read=unescaped,
        show=escaped,
        only=_CLASSIFIER,
    )
    batch_tokens: int = option(
        8192, "Tokens of a batch, padding included.", least=1, only=_CLASSIFIER
    )
    shard: tuple[int, int] = like(ShardOptions, "shard", only=_CLASSIFIER)
    dtype: str | None = like(LoadOptions, "dtype", only=_CLASSIFIER)
    device: str | None = like(LoadOptions, "device", only=_CLASSIFIER)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shard(self.shard)
        if not self.cost:
            raise RelneuronError(
                "--cost does not say what an output costs",
                "give FILE.csv:COLUMN, a classifier's folder, or module:function",
                2,
            )
        if self.template is not None and self.template.count(OUTPUT) != 1:
            raise RelneuronError(
                f"the template {self.template!r} does not have {OUTPUT} once",
                f"use 'USER: {{prompt}} ASSISTANT: {OUTPUT}', say",
                2,
            )
