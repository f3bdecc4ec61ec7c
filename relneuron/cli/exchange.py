"""The commands `import` and `export`: files of other authors, whichever method they are of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from relneuron.artifact.contrast import NAME as CONTRAST
from relneuron.artifact.files import RelneuronError, check_folder
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.options import Argument, Named, Output, refuse_stray
from relneuron.artifact.words import split, whole_number
from relneuron.methods import formats

Without = Annotated[
    str,
    Named(
        "Of a .pt of safety neurons: layers that it has no rows for, from zero, such as 31; the "
        "authors leave out the last one of a Llama-2-7B.",
        metavar="<int>,...",
    ),
]


def import_files(
    files: Annotated[
        list[str],
        Argument(
            "FILE...",
            "One .neuron.pth of the LAPE authors, or their files of counts as GROUP=FILE; files "
            "called activation.GROUP.train.MODEL, or a folder of them, say it themselves. Or the "
            ".json of knowledge neurons, or the .jsonl of QRNCA. Of MMNeuron masks called "
            "MODEL-MODULE, or snapshots called DOMAIN_K.log. Of safety neurons a .pt of scores.",
        ),
    ],
    model: Annotated[str, Named("Model that the files belong to; only its config.json is read.")],
    output: Output,
    names: Annotated[
        str,
        Named(
            "Groups of a .neuron.pth in order: en,zh,...; of MMNeuron's masks: ad,med,rs,com,doc "
            "if it is left out.",
            metavar="<str>,...",
        ),
    ] = "",
    format: Annotated[
        str,
        Named(
            "Whose files: mmneuron has masks and counts, safety a .pt of scores.",
            offers=tuple(formats()),
        ),
    ] = "lape",
    top: Annotated[
        int | None,
        Named("Neurons of a .pt of safety neurons to take; default: 5 % of those it ranks."),
    ] = None,
    without_layers: Without = "",
    force: bool = False,
) -> Iterator[str]:
    """Neurons (-> neurons.json) or counts (-> a folder) of other authors' formats.

    Examples:
      relneuron import LLaMA-2-7B.neuron.pth --names en,zh,fr,es,vi,id,ja \\
          --model meta-llama/Llama-2-7b-hf -o lape/neurons.json
      # a folder with activation.en.train.llama-7b and its like
      relneuron import data --model meta-llama/Llama-2-7b-hf -o counts
      relneuron import scores.pt --format safety --without-layers 31 \\
          --model meta-llama/Llama-2-7b-hf -o safety/neurons.json
    """
    from relneuron.methods.counts.commands import import_files as import_counted
    from relneuron.methods.gradients.authors_files import SUFFIXES, import_facts

    _check_format(format)
    if format == "safety":
        yield from _import_safety(files, model, output, names, top, _layers(without_layers), force)
        return
    for flag, is_given in (("--top", top is not None), ("--without-layers", without_layers != "")):
        if is_given:
            refuse_stray(flag, "with --format safety")
    is_theirs = format == "mmneuron" or len(files) > 1 or "=" in files[0]
    if is_theirs or Path(files[0]).suffix not in SUFFIXES:
        yield from import_counted(files, model, output, names, format, force)
        return
    if names:
        refuse_stray("--names", "with a .neuron.pth")
    chosen = import_facts(Path(files[0]), model, output, force=force)
    n = sum(map(len, chosen.sets.values()))
    yield f"{len(chosen.sets):,} facts, {n:,} neurons"
    yield f"-> {output}"


def _import_safety(
    files: list[str],
    model: str,
    output: Path,
    names: str,
    top: int | None,
    without_layers: list[int],
    force: bool,
) -> Iterator[str]:
    from relneuron.methods.contrast.authors_files import import_scores

    if names:
        refuse_stray("--names", "with a .neuron.pth")
    if len(files) > 1:
        raise RelneuronError(f"{len(files)} files of safety neurons", "give one .pt", 2)
    if top is not None and top < 1:
        raise RelneuronError(f"--top must be at least 1, got {top}", "choose a positive number", 2)
    path = Path(files[0])
    chosen = import_scores(path, model, output, top=top, without_layers=without_layers, force=force)
    for name, neurons in chosen.sets.items():
        yield f"{name}: {len(neurons):,} of {chosen.selection['ranked']:,} neurons"
    yield f"-> {output}"


def _check_format(name: str) -> None:
    """Refuse a format that is nobody's; it is said where neither file nor folder says whose."""
    if name not in formats():
        raise RelneuronError(f"unknown --format {name!r}", f"use {', '.join(formats())}", 2)


def _layers(text: str) -> list[int]:
    numbers = [whole_number(part) for part in split(text)]
    if None in numbers:
        raise RelneuronError(
            f"unknown number in --without-layers {text!r}", "use numbers such as 0,31", 2
        )
    return [number for number in numbers if number is not None]


def export(
    source: Annotated[
        Path,
        Argument(
            "NEURONS|PROMPTS|DIR",
            "A neurons.json, a prompts.jsonl, or a counted, identified or contrasted directory.",
        ),
    ],
    output: Output,
    format: Annotated[
        str, Named("Whose files, of neurons and counts.", offers=tuple(formats()))
    ] = "lape",
    without_layers: Without = "",
    force: bool = False,
) -> Iterator[str]:
    """Files of others: LAPE's and MMNeuron's, selfcond's expertise.csv, facts, safety neurons.

    A neurons.json becomes a .neuron.pth, expertise.csv where -o ends in .csv, the neurons of facts
    in the form of knowledge neurons where it ends in .json and of QRNCA in .jsonl; a prompts.jsonl
    their facts with sentences; a counted directory files of counts; an identified one
    expertise.csv, or one a concept below a folder; a contrasted one a .pt of scores, as of safety
    neurons. With --format mmneuron a folder with a mask of each module, or a snapshot of each
    group.

    Examples:
      relneuron export counts/neurons.json -o mine.neuron.pth
      relneuron export study -o expertise.csv
      relneuron export counts/neurons.json --format mmneuron -o masks
    """
    from relneuron.ablation.expertise import export_expertise
    from relneuron.artifact.manifest import checked
    from relneuron.methods.contrast.authors_files import export_scores
    from relneuron.methods.counts.authors_files import write_neuron_pth
    from relneuron.methods.counts.folders import export_counts
    from relneuron.methods.counts.mmneuron_files import write_masks
    from relneuron.methods.gradients.authors_files import SUFFIXES, export_facts, export_queries

    _check_format(format)
    is_contrast = (source / CONTRAST).exists()
    if is_contrast or format == "safety":
        if is_contrast and format == "mmneuron":
            raise RelneuronError(f"{source} holds a contrast, no counts", "leave out --format", 2)
        export_scores(source, output, without_layers=_layers(without_layers), force=force)
        yield f"-> {output}"
        return
    if without_layers:
        refuse_stray("--without-layers", "with a contrasted directory")
    if source.is_file() and source.suffix == ".jsonl":
        export_queries(checked(source), output, force=force)
        yield f"-> {output}"
        return
    if source.is_file() and output.suffix in SUFFIXES:
        export_facts(NeuronFile.read(checked(source)), output, force=force)
        yield f"-> {output}"
        return
    is_recorded = (source / "responses.safetensors").exists()
    if format == "mmneuron":
        check_folder(output)
        if source.is_dir():
            written = export_counts(source, output, mmneuron=True, force=force)
        else:
            written = write_masks(NeuronFile.read(checked(source)), output, force=force)
        for path in written:
            yield f"-> {path}"
        return
    if is_recorded or (source.is_file() and output.suffix == ".csv"):
        if output.suffix != ".csv":
            check_folder(output)
        written = export_expertise(source, output, force=force)
    elif source.is_dir():
        check_folder(output)
        written = export_counts(source, output, force=force)
    else:
        write_neuron_pth(NeuronFile.read(checked(source)), output, force=force)
        written = [output]
    for path in written:
        yield f"-> {path}"
