"""What a corpus is counted with: the options of the `count` stage, its packing and its inputs.

The stage and the command line build them; what is asked for wrongly is refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relneuron.artifact.command import STUDY, command, loading
from relneuron.artifact.counts import SITES
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.manifest import differences
from relneuron.texts.sources import Source, describe_sources, source_words
from relneuron.texts.windows import Packing, default_bos

MODES = ("packed", "documents")
BOS = ("document", "window", "none")
BOUNDARIES = ("none", "position")
WINDOW = 4096  # at most, where the model's context is longer


@dataclass(frozen=True)
class CountOptions:
    """What is counted, and how the corpus becomes batches.

    sites         of gate, up, act, product, down; a value v is active when v > threshold
    moments       also sums, sums of squares and maxima
    window        tokens of a window; default: the model's context, at most 4,096
    mode          `packed`: documents one after the other in full windows, the last one dropped;
                  `documents`: one a window, longer ones cut
    bos           `document`, `window` or `none`: where a BOS token is put; default: before each
                  document if the tokenizer does so
    exclude_bos   BOS tokens are run but not counted
    boundaries    `position`: positions begin anew at each document, which sees no other
    max_tokens    of each group
    shard         (i, n): only every n-th batch, from the i-th (from 1)
    """

    sites: Sequence[str] = ("act",)
    threshold: float = 0.0
    moments: bool = False
    window: int | None = None
    mode: str = "packed"
    bos: str | None = None
    exclude_bos: bool = False
    boundaries: str = "none"
    max_tokens: int | None = None
    batch_tokens: int = 8192
    shard: tuple[int, int] = (1, 1)
    oom: str = "split"

    def __post_init__(self) -> None:
        known = {
            "packing": (self.mode, MODES),
            "bos": (self.bos, (None, *BOS)),
            "boundaries": (self.boundaries, BOUNDARIES),
            "oom": (self.oom, ("split", "error")),
        }
        for name, (value, allowed) in known.items():
            if value not in allowed:
                fix = f"use {', '.join(x for x in allowed if x)}"
                raise RelneuronError(f"unknown --{name} {value!r}", fix, 2)
        if (
            not self.sites
            or len(set(self.sites)) < len(self.sites)
            or not set(self.sites) <= {*SITES}
        ):
            raise RelneuronError(
                f"unknown --sites {','.join(self.sites)!r}", f"use some of {', '.join(SITES)}", 2
            )
        if not math.isfinite(self.threshold):
            raise RelneuronError(f"--threshold {self.threshold} is no number", "use 0, say", 2)
        for name in ("window", "max_tokens", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RelneuronError(
                    f"--{name.replace('_', '-')} must be at least 1, got {value}",
                    "choose a positive number",
                    2,
                )
        if math.isnan(self.threshold):
            raise RelneuronError("--threshold is no number", "use 0 for the usual one", 2)
        number, of = self.shard
        if not 1 <= number <= of:
            raise RelneuronError(f"--shard {number}/{of} does not exist", "use 1/3, 2/3, 3/3", 2)


def choose_packing(
    model: Any, tokenizer: Any, sources: Sequence[Source], options: CountOptions
) -> Packing:
    """The windows of a corpus, with the model's context and the tokenizer's BOS as defaults."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    window = options.window or min(context or WINDOW, WINDOW)
    if context is not None and window > context:
        raise RelneuronError(
            f"--window {window} is longer than the model's context of {context}",
            "use a shorter one",
            2,
        )
    has_text = not all(source.is_ids for source in sources)
    if tokenizer is None and (has_text or options.exclude_bos):
        raise RelneuronError(
            "the model has no tokenizer", "save one into its folder, or give files of token ids"
        )
    bos, bos_id = default_bos(tokenizer) if has_text else ("none", None)
    if options.exclude_bos and tokenizer.bos_token_id is None:
        raise RelneuronError("--exclude-bos: the tokenizer has no BOS token", "leave it out", 2)
    if options.bos not in (None, bos):
        bos, bos_id = options.bos, getattr(tokenizer, "bos_token_id", None)
        if bos != "none" and bos_id is None:
            fix = "use --bos none"
            raise RelneuronError(f"--bos {bos}: the tokenizer has no BOS token", fix, 2)
    return Packing(window, options.mode, bos, bos_id, options.max_tokens)


def check_unchanged(sources: Sequence[Source], inputs: Json) -> None:
    """Raise if a text is not what it was when it was begun: nobody knows what was read."""
    changed = differences(inputs["sources"], json.loads(json.dumps(describe_sources(sources))))
    if changed:
        raise RelneuronError(
            f"a text changed while it was read: {'; '.join(changed)}",
            "leave the texts as they are meanwhile, and read them anew with --force",
        )


def count_command(
    name: str,
    sources: Sequence[Source],
    folder: Path,
    packing: Packing,
    described: Json,
    options: CountOptions,
) -> list[list[str]]:
    """The command that makes a count again."""
    return corpus_command(
        "count",
        [name],
        sources,
        folder,
        packing,
        described,
        sites=options.sites,
        threshold=options.threshold,
        moments=options.moments,
        exclude_bos=options.exclude_bos,
        boundaries=options.boundaries,
        max_tokens=options.max_tokens,
        batch_tokens=options.batch_tokens,
        shard=None if options.shard == (1, 1) else "{}/{}".format(*options.shard),
    )


def corpus_command(
    stage: str,
    given: Sequence[str],
    sources: Sequence[Source],
    folder: Path,
    packing: Packing,
    described: Json,
    **options: object,
) -> list[list[str]]:
    """The command of a stage that reads a corpus; none where the sources are known to Python only.

    `given` are the arguments before the sources.
    """
    named = source_words(sources, folder)
    if named is None:
        return []
    words, read_by = named
    return command(
        stage,
        *(*given, *words, "-o", STUDY),
        **{"packing": packing.mode, "window": packing.window, "bos": packing.bos},
        **read_by,
        **options,
        **loading(described),
    )
