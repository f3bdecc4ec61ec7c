"""What facts become prompts with, and a corpus is read and counted with.

The stages and the command line take these options; what is asked for wrongly is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from relneuron.artifact.counts import SITES
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.manifest import differences
from relneuron.artifact.modules import ASKED
from relneuron.artifact.options import Argument, Only, OomOptions, Options, SeedOptions, option
from relneuron.artifact.papers import MMNEURON, QUERIES
from relneuron.artifact.stage import STUDY, command, loading
from relneuron.artifact.words import whole_number
from relneuron.texts.picture_feed import describe_pictures
from relneuron.texts.sources import Source, describe_sources, source_words
from relneuron.texts.windows import Packing, default_bos

MODES = ("packed", "documents")
BOS = ("document", "window", "none")
BOUNDARIES = ("none", "position")
WINDOW = 4096  # at most, where the model's context is longer


def read_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    number, _, of = text.partition("/")
    place, n = whole_number(number), whole_number(of)
    if place is None or n is None:
        raise RelneuronError(f"unknown --shard {text!r}", "use 1/3, 2/3, 3/3", 2)
    return place, n


def check_shard(shard: tuple[int, int]) -> None:
    """Refuse a part that is none."""
    number, of = shard
    if not 1 <= number <= of:
        raise RelneuronError(f"--shard {number}/{of} does not exist", "use 1/3, 2/3, 3/3", 2)


@dataclass(frozen=True)
class ShardOptions(OomOptions):
    """Which of the batches a stage does: (i, n) every n-th, from the i-th; by default all."""

    shard: tuple[int, int] = option(
        (1, 1),
        "Only a part of the batches, such as 1/3, and no results yet; add the parts with merge.",
        read=read_shard,
        show="{0[0]}/{0[1]}".format,
        records=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shard(self.shard)


@dataclass(frozen=True)
class PromptsOptions(SeedOptions):
    """How facts become prompts."""

    PANEL = "The prompts"

    eva: int = option(50, "Facts of each relation that are kept for evaluation.", least=0)
    suffix: str | None = option(
        None,
        "Text that follows every template of the files' own language; default: what each file "
        "says, or '? Answer:' after English ones.",
    )
    choices: int | None = option(
        None,
        "Ask each fact as a multiple-choice question, in so many orders of its options.",
        least=1,
        papers={"": QUERIES},
    )
    choose_from: int = option(
        4,
        "Number of options of such a question: the right answer, and others of the relation.",
        least=2,
        most=26,
        only=Only("with --choices", lambda o: o.choices is not None),
    )


@dataclass(frozen=True)
class SourceOptions(Options):
    """How the files of a corpus are read."""

    PANEL = "The files of the corpus"

    text_column: str | None = option(None, "Field of a record that holds the text; default: text.")
    group_column: str | None = option(
        None, "Field of a record that names its group, for paths without GROUP=."
    )
    groups: Sequence[str] | None = option(
        None, "Groups to read, such as en,zh, of those that --group-column names; default: all."
    )
    ids_dtype: str | None = option(
        None,
        "Type of the token ids in .bin files.",
        offers=("uint16", "uint32", "int32", "int64"),
    )


@dataclass(frozen=True)
class CountSourceOptions(SourceOptions):
    """Likewise, of a corpus that may hold pictures."""

    PANEL = SourceOptions.PANEL

    image_column: str | None = option(
        None,
        "Field of a record that holds its pictures, paths or embedded; default: image, where the "
        "model reads pictures.",
    )


Sources = Annotated[
    list[str],
    Argument(
        "GROUP=PATH...",
        "Text of each group: .txt, .jsonl, .parquet, a folder of them, token ids (.pt, .npy, "
        ".bin), or hf:DATASET[:CONFIG[:SPLIT]]. Without GROUP= see --group-column.",
    ),
]


@dataclass(frozen=True)
class PackingOptions(Options):
    """How documents become windows of tokens; `mode` is the flag --packing."""

    PANEL = "Windows of tokens"

    window: int | None = option(
        None, "Tokens of a window; default: the model's context, at most 4096.", least=1
    )
    mode: str = option(
        "packed",
        "packed: documents one after the other in full windows; documents: one document a window, "
        "padded.",
        flag="packing",
        choices=MODES,
    )
    bos: str | None = option(
        None,
        "Where a BOS token is put: before each document, before each window, or none; default: as "
        "the tokenizer does.",
        choices=BOS,
    )


@dataclass(frozen=True)
class CountOptions(PackingOptions, OomOptions):
    """What is counted, and how the corpus becomes batches.

    A value v is active when v > `threshold`. `shard` (i, n): only every n-th batch, from the i-th
    (from 1). With `boundaries` "position" positions begin again at each document, which sees no
    other one.
    """

    PANEL = "What is counted"

    sites: Sequence[str] = option(
        ("act",),
        "Where a neuron is read.",
        choices=SITES,
        some=True,
    )
    threshold: float = option(0.0, "A neuron is active when its value is above this.")
    moments: bool = option(False, "Also add up values and their squares, and keep the largest.")
    examples: int | None = option(
        None,
        "Also keep each neuron's so many strongest tokens of each group, of another window each, "
        "with the windows they stand in.",
        least=1,
        most=128,
    )
    histogram: int | None = option(
        None,
        "Also count each neuron's values in so many bins, 64 where no number follows; their edges "
        "come from a first sample.",
        least=8,
        most=4096,
        bare="64",
    )
    exclude_bos: bool = option(False, "Run BOS tokens, but do not count them.")
    boundaries: str = option(
        "none",
        "position: a document sees no other one of its window; none: it sees all before it.",
        choices=BOUNDARIES,
    )
    max_tokens: int | None = option(
        None, "Maximum number of tokens of each group; default: all.", least=1
    )
    batch_tokens: int = option(8192, "Tokens of a batch, padding included.", least=1)
    module: Sequence[str] | None = option(
        None,
        "Of a model that reads pictures, whose neurons; default: language.",
        choices=ASKED,
        is_set=True,
        papers={"": MMNEURON},
    )
    max_records: int | None = option(
        None, "Maximum number of records with pictures of each group; default: all.", least=1
    )
    shard: tuple[int, int] = option(
        (1, 1),
        "Only a part of the batches, such as 1/3; add the parts with merge.",
        read=read_shard,
        show="{0[0]}/{0[1]}".format,
    )
    checkpoint_seconds: float = option(
        30.0,
        "Seconds between two checkpoints.",
        least=0,
        records=False,
        only=Only(
            "without --checkpoint-batches", lambda o: o.checkpoint_batches is None, clashes=True
        ),
    )
    checkpoint_batches: int | None = option(
        None, "Batches between two checkpoints, in place of the seconds.", least=1, records=False
    )
    workers: int | None = option(
        None, "Number of processes that tokenise ahead.", least=1, records=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shard(self.shard)
        if self.histogram is not None and self.histogram % 2:
            raise RelneuronError(
                f"--histogram {self.histogram} is odd", "give an even number of bins", 2
            )


def choose_packing(
    model: Any,
    tokenizer: Any,
    sources: Sequence[Source],
    options: PackingOptions,
    *,
    exclude_bos: bool = False,
    max_tokens: int | None = None,
) -> Packing:
    """The windows of a corpus, with the model's context and the tokenizer's BOS as defaults.

    `exclude_bos` needs a BOS token; `max_tokens` are those of each group.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    window = options.window or min(context or WINDOW, WINDOW)
    if context is not None and window > context:
        raise RelneuronError(
            f"--window {window} is longer than the model's context of {context}",
            "use a shorter one",
            2,
        )
    has_text = not all(source.is_ids for source in sources)
    if tokenizer is None and (has_text or exclude_bos):
        raise RelneuronError(
            "the model has no tokenizer", "save one into its folder, or give files of token ids"
        )
    bos, bos_id = default_bos(tokenizer) if has_text else ("none", None)
    if exclude_bos and tokenizer.bos_token_id is None:
        raise RelneuronError("--exclude-bos: the tokenizer has no BOS token", "leave it out", 2)
    if options.bos not in (None, bos):
        bos, bos_id = options.bos, getattr(tokenizer, "bos_token_id", None)
        if bos != "none" and bos_id is None:
            fix = "use --bos none"
            raise RelneuronError(f"--bos {bos}: the tokenizer has no BOS token", fix, 2)
    return Packing(window, options.mode, bos, bos_id, max_tokens)


def check_unchanged(sources: Sequence[Source], inputs: Json) -> None:
    """Raise if a text is not what it was when it was begun: nobody knows what was read."""
    before, now = inputs["sources"], describe_sources(sources)
    if "pictures" in inputs:
        before = before | {"pictures": inputs["pictures"]}
        now["pictures"] = describe_pictures(sources, inputs["max_records"])
    changed = differences(before, json.loads(json.dumps(now)))
    if changed:
        raise RelneuronError(
            f"a text changed while it was read: {'; '.join(changed)}",
            "leave the texts as they are meanwhile, and read them again with --force",
        )


def corpus_command(
    stage: str,
    given: Sequence[str],
    sources: Sequence[Source],
    folder: Path,
    packing: Packing | None,
    described: Json,
    options: PackingOptions,
) -> list[list[str]]:
    """The command of a stage that reads a corpus; none where the sources are known to Python only.

    `given` are the arguments before the sources. Of the packing what was chosen is named; records
    with pictures have none.
    """
    named = source_words(sources, folder)
    if named is None:
        return []
    words, read_by = named
    chosen = options
    if packing is not None:
        chosen = replace(options, window=packing.window, mode=packing.mode, bos=packing.bos)
    return command(
        stage,
        *(*given, *words, "-o", STUDY, *chosen.words()),
        **read_by,
        **loading(described),
    )
