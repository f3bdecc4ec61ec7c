"""The commands for corpora, `count` and `merge`; what `identify` and `import` do with counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from relneuron.artifact.counts import NAME, tokens_of_modules
from relneuron.artifact.files import RelneuronError, check_folder
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.options import Argument, Model, Output, PartsOptions, refuse_stray
from relneuron.artifact.words import split
from relneuron.methods.counts.options import CountedOptions
from relneuron.texts.options import CountOptions, CountSourceOptions, Sources


def count(
    model: Model,
    sources: Sources,
    output: Output,
    options: CountOptions,
    reading: CountSourceOptions,
    load_options: PartsOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str]:
    """How often every neuron is active in each group of a corpus: counts.safetensors.

    Of a model that reads pictures also on records with pictures, and in its other modules. Goes
    on where it stopped. Under torchrun several processes share the work, each with the whole
    model, or with a part of it (--tensor-parallel-size).

    Examples:
      relneuron count Qwen/Qwen3-0.6B en=en.txt zh=zh.txt -o counts --moments
      relneuron count Qwen/Qwen3-0.6B en=en.txt zh=zh.txt -o seen --window 256 \\
          --examples 16 --histogram
      relneuron count Qwen/Qwen3-0.6B \\
          en=hf:wikimedia/wikipedia:20231101.en:train \\
          zh=hf:wikimedia/wikipedia:20231101.zh:train \\
          -o wiki --max-tokens 100000000
      relneuron count Qwen/Qwen3-0.6B texts.jsonl --group-column language \\
          -o part1 --shard 1/3
    """
    from relneuron.methods.counts.count import count as count_stage
    from relneuron.methods.counts.pictured import with_pictures
    from relneuron.model.load import load
    from relneuron.texts.sources import parse_sources

    check_folder(output)
    found = parse_sources(sources, **vars(reading))
    loaded, tokenizer = load(model, load_options, needs_text=any(not s.is_ids for s in found))
    found, processor = with_pictures(found, model, loaded, load_options.revision)
    counted = count_stage(
        model,
        loaded,
        tokenizer,
        found,
        output,
        options,
        processor=processor,
        backend=load_options.backend,
        force=force,
        quiet=quiet,
        say=print,
    )
    if counted is None:
        yield f"{output} holds this count already"
        return
    if "modules" in counted.model:
        for name, tokens in tokens_of_modules(counted.model, counted.counts).items():
            for group, n in tokens:
                yield f"{group}: {n:,} tokens in {name}"
    else:
        yield from token_lines(counted.counts.groups, counted.counts.tokens.tolist())
    seconds = max(counted.seconds, 1e-9)
    share = counted.share_of_bare
    bare = f", {share:.2f} of the bare forward's speed" if share is not None else ""
    yield (
        f"count: {counted.seconds:.1f} s, {counted.tokens / seconds:,.0f} tokens/s{bare}; "
        f"{counted.waiting / seconds:.1%} of it waiting for tokens, "
        f"{counted.saving / seconds:.1%} for checkpoints"
    )
    yield f"-> {output / NAME}"
    yield from counted.kept.lines(output)


def token_lines(groups: list[str], tokens: list[int]) -> Iterator[str]:
    """The number of tokens of each group."""
    for name, n in zip(groups, tokens, strict=True):
        yield f"{name}: {n:,} tokens"


def merge(
    folders: Annotated[list[Path], Argument("DIR...", "Folders that --shard made.")],
    output: Output,
    force: bool = False,
) -> Iterator[str]:
    """Add finished counts of one model, or contrasts of the same two; or parts of another stage.

    Of a stage that asks prompts or sentences each part has the batches that it did: the command
    that made them does the rest where they are put together.

    Examples:
      # of count --shard 1/3, 2/3, 3/3
      relneuron merge part1 part2 part3 -o counts
    """
    from relneuron.artifact.parts import journals_in, merge_parts
    from relneuron.methods.counts.merge import merge as merge_stage

    check_folder(output)
    if len(folders) > 1 and journals_in(folders[0]):
        for name, n in merge_parts(folders, output, force=force).items():
            stage = name.removesuffix(".journal")
            yield f"{stage}: {n:,} batches of {len(folders)} parts"
        yield f"-> {output}: run the command without --shard there, it does what is left"
        return
    total = merge_stage(folders, output, force=force)
    yield from token_lines(total.groups, total.tokens.tolist())
    yield f"-> {output}"


def import_files(
    files: list[str], model: str, output: Path, names: str, format: str, force: bool
) -> Iterator[str]:
    """`import` of LAPE's or MMNeuron's files: neurons (-> neurons.json), counts (-> a folder)."""
    from relneuron.methods.counts.folders import import_counts, import_neurons, name_counts
    from relneuron.model.config import config_shape

    if format == "mmneuron":
        yield from _import_mmneuron(files, model, output, split(names), force)
        return
    if names and not any("=" not in text or Path(text).exists() for text in files):
        refuse_stray("--names", "with a .neuron.pth")
    if paths := name_counts(files):
        check_folder(output)
        counts = import_counts(paths, config_shape(model), output, model=model, force=force)
        yield from token_lines(counts.groups, counts.tokens.tolist())
    elif len(files) == 1:
        if not split(names):
            raise RelneuronError("a .neuron.pth does not name its groups", "add --names en,zh,...")
        yield from group_lines(
            import_neurons(Path(files[0]), split(names), model, output, force=force)
        )
    else:
        fix = "give one .neuron.pth, or counts as GROUP=FILE"
        raise RelneuronError(f"unknown files: {' '.join(files)}", fix, 2)
    yield f"-> {output}"


def _import_mmneuron(
    files: list[str], model: str, output: Path, names: Sequence[str], force: bool
) -> Iterator[str]:
    from relneuron.methods.counts.folders import import_counts, import_masks, name_mmneuron
    from relneuron.methods.counts.mmneuron_files import DOMAINS
    from relneuron.model.config import modules_shape

    masks, logs = name_mmneuron(files)
    if masks:
        yield from group_lines(import_masks(masks, names or DOMAINS, model, output, force=force))
    else:
        if names:
            refuse_stray("--names", "with masks")
        check_folder(output)
        shape = modules_shape(model)
        counts = import_counts(logs, shape, output, model=model, mmneuron=True, force=force)
        yield from token_lines(counts.groups, counts.tokens.tolist())
    yield f"-> {output}"


def rank(
    folder: Path, output: Path, options: CountedOptions, *, method: str, force: bool, quiet: bool
) -> Iterator[str]:
    """`identify` with one of the rankings of counts."""
    from relneuron.methods.counts.rank import identify_counts

    yield from group_lines(identify_counts(folder, output, options, method=method, force=force))


def group_lines(chosen: NeuronFile) -> Iterator[str]:
    """How many neurons each group has, and what was left out."""
    for name, neurons in chosen.sets.items():
        none = ": none of those chosen is active enough in it" if chosen.method == "lape" else ""
        said = (
            f"{len(neurons):,} neurons{_by_module(chosen, name)}"
            if neurons
            else f"no neurons{none}"
        )
        yield f"{name}: {said}"
    multiplicity = chosen.selection.get("multiplicity")
    if multiplicity:
        several = sum(multiplicity[1:])
        yield f"{sum(multiplicity):,} distinct neurons, {several:,} of them in several groups"
    if "reason" in chosen.selection:
        yield str(chosen.selection["reason"])
    for module, facts in chosen.selection.get("modules", {}).items():
        if "reason" in facts:
            yield f"{module}: {facts['reason']}"


def _by_module(chosen: NeuronFile, name: str) -> str:
    """How many neurons of a group each module has, where several were ranked."""
    modules = chosen.selection.get("modules", {})
    held = (f"{facts['neurons'].get(name, 0):,} {module}" for module, facts in modules.items())
    return f" ({', '.join(held)})" if modules else ""
