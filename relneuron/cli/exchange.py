"""The commands `import` and `export`: files of other authors, whichever method they are of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from relneuron.artifact.files import check_folder
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.options import Argument, Named, Output, refuse_stray


def import_files(
    files: Annotated[
        list[str],
        Argument(
            "FILE...",
            "One .neuron.pth of the LAPE authors, or their files of counts as GROUP=FILE; files "
            "called activation.GROUP.train.MODEL, or a folder of them, say it themselves. Or the "
            ".json of knowledge neurons, or the .jsonl of QRNCA. Of MMNeuron masks called "
            "MODEL-MODULE, or snapshots called DOMAIN_K.log.",
        ),
    ],
    model: Annotated[str, Named("Model that the files belong to; only its config.json is read.")],
    output: Output,
    names: Annotated[
        str,
        Named(
            "Groups of a .neuron.pth in order: en,zh,...; of MMNeuron's masks: ad,med,rs,com,doc "
            "if it is left out."
        ),
    ] = "",
    format: Annotated[str, Named("Whose files: lape or mmneuron (of masks and counts).")] = "lape",
    force: bool = False,
) -> Iterator[str]:
    """Neurons (-> neurons.json) or counts (-> a folder) of other authors' formats."""
    from relneuron.methods.counts.commands import check_format
    from relneuron.methods.counts.commands import import_files as import_counted
    from relneuron.methods.gradients.authors_files import SUFFIXES, import_facts

    check_format(format)
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


def export(
    source: Annotated[
        Path,
        Argument(
            "NEURONS|PROMPTS|DIR",
            "A neurons.json, a prompts.jsonl, or a counted or identified directory.",
        ),
    ],
    output: Output,
    format: Annotated[
        str, Named("Whose files: lape or mmneuron (of neurons and counts).")
    ] = "lape",
    force: bool = False,
) -> Iterator[str]:
    """Files of others: LAPE's and MMNeuron's, selfcond's expertise.csv, facts and theirs.

    A neurons.json becomes a .neuron.pth, expertise.csv where -o ends in .csv, the neurons of facts
    in the form of knowledge neurons where it ends in .json and of QRNCA in .jsonl; a prompts.jsonl
    their facts with sentences; a counted directory files of counts; an identified one
    expertise.csv, or one a concept below a folder. With --format mmneuron a folder with a mask of
    each module, or a snapshot of each group.
    """
    from relneuron.ablation.expertise import export_expertise
    from relneuron.artifact.manifest import checked
    from relneuron.methods.counts.authors_files import write_neuron_pth
    from relneuron.methods.counts.commands import check_format
    from relneuron.methods.counts.folders import export_counts
    from relneuron.methods.counts.mmneuron_files import write_masks
    from relneuron.methods.gradients.authors_files import SUFFIXES, export_facts, export_queries

    check_format(format)
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
