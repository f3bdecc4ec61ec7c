"""The commands for corpora, which cli/main.py takes in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.reading import MAX_RECORD_MIB
from relneuron.cli import options as take
from relneuron.cli.show import print_counted, print_nll, say

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="GROUP=PATH...",
        help="Text of each group: .txt, .jsonl, .parquet, a folder of them, token ids (.pt, .npy, "
        ".bin), or hf:DATASET[:CONFIG[:SPLIT]]. Without GROUP= see --group-column.",
    ),
]
TextColumn = Annotated[
    str | None, typer.Option(help="Field of a record that holds the text; default: text.")
]
GroupColumn = Annotated[
    str | None, typer.Option(help="Field of a record that names its group; paths without GROUP=.")
]
Groups = Annotated[str, typer.Option(help="With --group-column: only these, as en,zh.")]
IdsDtype = Annotated[str | None, typer.Option(help="Of .bin files: uint16, uint32, int32, int64.")]
Window = Annotated[
    int | None,
    typer.Option(help="Tokens of a window; default: the model's context, at most 4096."),
]
Packing = Annotated[
    str,
    typer.Option(help="packed: documents one after the other; documents: one a window, padded."),
]
Bos = Annotated[
    str | None,
    typer.Option(help="BOS before each document, window or none; default: as the tokenizer does."),
]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens of each group; default: all.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes that tokenise ahead.")]
CorpusBatch = Annotated[int, typer.Option(min=1, help="Tokens of a batch, padding included.")]
Neurons = Annotated[Path, typer.Argument(metavar="NEURONS", help="A neurons.json.")]


def count(
    model: take.Model,
    sources: Sources,
    output: take.Output,
    sites: Annotated[
        str, typer.Option(help="Where a neuron is read: act, gate, up, product, down.")
    ] = "act",
    threshold: Annotated[float, typer.Option(help="Active means: above it.")] = 0.0,
    moments: Annotated[
        bool, typer.Option("--moments", help="Also sums, sums of squares and maxima.")
    ] = False,
    window: Window = None,
    packing: Packing = "packed",
    bos: Bos = None,
    exclude_bos: Annotated[
        bool, typer.Option("--exclude-bos", help="Run BOS tokens, but do not count them.")
    ] = False,
    boundaries: Annotated[
        str, typer.Option(help="position: a document sees no other one of its window; or none.")
    ] = "none",
    max_tokens: MaxTokens = None,
    text_column: TextColumn = None,
    group_column: GroupColumn = None,
    groups: Groups = "",
    ids_dtype: IdsDtype = None,
    batch_tokens: CorpusBatch = 8192,
    oom: take.Oom = "split",
    shard: Annotated[
        str, typer.Option(help="Only a part of the batches, as 1/3; add them with merge.")
    ] = "1/1",
    checkpoint_seconds: Annotated[
        float, typer.Option(min=0, help="Time between two checkpoints.")
    ] = 30.0,
    checkpoint_batches: Annotated[
        int | None, typer.Option(min=1, help="Batches between two, in place of the time.")
    ] = None,
    workers: Workers = None,
    dtype: take.Dtype = None,
    device: take.Device = None,
    revision: take.Revision = None,
    backend: take.Backend = "auto",
    force: take.Force = False,
    quiet: take.Quiet = False,
    max_record_mib: take.MaxRecord = MAX_RECORD_MIB,
    debug: take.Debug = False,
) -> None:
    """How often every neuron is active in each group of a corpus: counts.safetensors.

    Goes on where it stopped. Under torchrun several processes share the work.
    """
    from relneuron.methods.counts.count import count as count_stage
    from relneuron.methods.counts.ranks import local_device
    from relneuron.texts.options import CountOptions

    options = CountOptions(
        sites=take.names(sites),
        threshold=threshold,
        moments=moments,
        window=window,
        mode=packing,
        bos=bos,
        exclude_bos=exclude_bos,
        boundaries=boundaries,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        shard=_shard(shard),
        oom=oom,
    )
    take.check_folder(output)
    found = _sources(sources, text_column, group_column, groups, ids_dtype)
    loaded, tokenizer = _load(
        model, dtype, local_device(device), revision, needs_text=any(not s.is_ids for s in found)
    )
    counted = count_stage(
        model,
        loaded,
        tokenizer,
        found,
        output,
        options,
        checkpoint_seconds=checkpoint_seconds,
        checkpoint_batches=checkpoint_batches,
        n_workers=workers,
        backend=backend,
        force=force,
        quiet=quiet,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        print_counted(counted, output)


def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Finished counts.")],
    output: take.Output,
    force: take.Force = False,
    max_record_mib: take.MaxRecord = MAX_RECORD_MIB,
    debug: take.Debug = False,
) -> None:
    """Add finished counts of one model: counts.safetensors."""
    from relneuron.methods.counts.merge import merge as merge_stage

    take.check_folder(output)
    total = merge_stage(folders, output, force=force)
    for name, tokens in zip(total.groups, total.tokens.tolist(), strict=True):
        say(f"{name}: {tokens:,} tokens")
    say(f"-> {output}")


def nll(
    model: take.Model,
    neurons: Neurons,
    sources: Sources,
    output: take.Output,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each group.")] = 256,
    window: Window = None,
    packing: Packing = "packed",
    bos: Bos = None,
    random_sets: Annotated[
        int, typer.Option(min=0, help="Also random sets, as large as the largest one.")
    ] = 0,
    text_column: TextColumn = None,
    group_column: GroupColumn = None,
    groups: Groups = "",
    ids_dtype: IdsDtype = None,
    batch_tokens: CorpusBatch = 8192,
    oom: take.Oom = "split",
    workers: Workers = None,
    dtype: take.Dtype = None,
    device: take.Device = None,
    revision: take.Revision = None,
    backend: take.Backend = "auto",
    force: take.Force = False,
    quiet: take.Quiet = False,
    max_record_mib: take.MaxRecord = MAX_RECORD_MIB,
    debug: take.Debug = False,
) -> None:
    """How well the model reads each group's text without each set of neurons: nll.csv."""
    from relneuron.ablation.nll import nll as nll_stage
    from relneuron.artifact.neurons import NeuronFile

    take.check_folder(output)
    sets = NeuronFile.read(neurons).sets
    found = _sources(sources, text_column, group_column, groups, ids_dtype)
    loaded, tokenizer = _load(
        model, dtype, device, revision, needs_text=any(not s.is_ids for s in found)
    )
    cells = nll_stage(
        model,
        loaded,
        tokenizer,
        neurons,
        found,
        output,
        windows=windows,
        window=window,
        packing=packing,
        bos=bos,
        random_sets=random_sets,
        batch_tokens=batch_tokens,
        oom=oom,
        n_workers=workers,
        backend=backend,
        force=force,
        quiet=quiet,
    )
    print_nll(cells, [name for name, chosen in sets.items() if not chosen])
    say(f"-> {output / 'nll.csv'}")


def generate(
    model: take.Model,
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS", help="One a line (.txt), or .jsonl with `prompt`.")
    ],
    output: take.Output,
    neurons: Annotated[Path, typer.Option(help="A neurons.json: the sets of --off and --set.")],
    off: Annotated[
        str, typer.Option(help="Sets to switch off, one run of the prompts each; clean: none.")
    ] = "clean",
    set_to: Annotated[
        str | None, typer.Option("--set", help="A set whose neurons get their mean activation.")
    ] = None,
    counts: Annotated[
        Path | None,
        typer.Option(help="Folder with the counts (--moments) for --set; default: the neurons'."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an output.")] = 256,
    repetition_penalty: Annotated[
        float, typer.Option(help="Logits of tokens that stood before are divided by it; 1: none.")
    ] = 1.1,
    stop: Annotated[
        list[str] | None, typer.Option(help="An output ends before it; may be given several times.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Around each prompt, as 'Q: {prompt}\\nA:'.")
    ] = None,
    batch_tokens: CorpusBatch = 8192,
    oom: take.Oom = "split",
    dtype: take.Dtype = None,
    device: take.Device = None,
    revision: take.Revision = None,
    backend: take.Backend = "auto",
    force: take.Force = False,
    quiet: take.Quiet = False,
    max_record_mib: take.MaxRecord = MAX_RECORD_MIB,
    debug: take.Debug = False,
) -> None:
    """Greedy continuations of prompts with sets of neurons off, or set to another group's mean."""
    from relneuron.ablation.generate import STOP
    from relneuron.ablation.generate import generate as generate_stage

    loaded, tokenizer = _load(model, dtype, device, revision, needs_text=True)
    made = generate_stage(
        model,
        loaded,
        tokenizer,
        neurons,
        prompts,
        output,
        off=take.names(off) or ("clean",),
        set_to=set_to,
        counts_folder=counts,
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        stop=STOP if stop is None else [_unescaped(text) for text in stop],
        template=None if template is None else _unescaped(template),
        batch_tokens=batch_tokens,
        oom=oom,
        backend=backend,
        force=force,
        quiet=quiet,
    )
    say(f"{len(made):,} outputs -> {output}")


def _unescaped(text: str) -> str:
    """A text of the command line with its \\n as line ends."""
    return text.replace("\\n", "\n")


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit()):
        raise RelneuronError(f"unknown --shard {text!r}", "use 1/3, 2/3, 3/3", 2)
    return int(number), int(of)


def _sources(
    texts: list[str],
    text_column: str | None,
    group_column: str | None,
    groups: str,
    ids_dtype: str | None,
) -> list[Any]:
    from relneuron.texts.sources import parse_sources

    return parse_sources(
        texts,
        text_column=text_column,
        group_column=group_column,
        groups=take.names(groups) or None,
        ids_dtype=ids_dtype,
    )


def _load(
    model: str, dtype: str | None, device: str | None, revision: str | None, *, needs_text: bool
) -> tuple[Any, Any]:
    """The model and its tokenizer; without text to read it may lack one."""
    from relneuron.model.load import load_model, load_tokenizer

    loaded = load_model(model, revision=revision, dtype=dtype, device=device)
    try:
        return loaded, load_tokenizer(model, revision=revision)
    except RelneuronError:
        if needs_text:
            raise
        return loaded, None
