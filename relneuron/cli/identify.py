"""The commands that choose neurons, and take and give them as files of others; for cli/main.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.reading import MAX_RECORD_MIB
from relneuron.cli import options as take
from relneuron.cli.settings import Options
from relneuron.cli.show import print_chosen, print_groups, say

_DEFAULT = Options
COUNT_METHODS = ("lape", "probability", "mean", "random")


def identify(
    folder: take.Study,
    output: take.Output,
    method: Annotated[
        str,
        typer.Option(
            help="Of recorded responses: ap (average precision). Of attributions: logprob_gain. "
            "Of counts: lape (activation probability entropy), probability, mean, random."
        ),
    ] = _DEFAULT.method,
    top: Annotated[
        int | None,
        typer.Option(
            help="Neurons per relation or group; default: 3000, at most a tenth of the model's; "
            "of counts --top-rate. lape: of all groups together."
        ),
    ] = None,
    ends: take.Ends = _DEFAULT.ends,
    fdr: take.Fdr = None,
    negatives: take.Negatives = _DEFAULT.negatives,
    permutations: take.Permutations = _DEFAULT.permutations,
    bootstrap: take.Bootstrap = _DEFAULT.bootstrap,
    noise: take.Noise = _DEFAULT.noise,
    site: Annotated[str, typer.Option(help="Of counts: act, gate, up, product, down.")] = "act",
    groups: Annotated[str, typer.Option(help="Of counts: only these, as en,zh.")] = "",
    top_rate: Annotated[
        float, typer.Option(help="Of counts: share of the model's neurons to choose.")
    ] = 0.01,
    filter_rate: Annotated[
        float,
        typer.Option(help="lape: a neuron needs a group above this quantile of probabilities."),
    ] = 0.95,
    bar_ratio: Annotated[
        float, typer.Option(help="lape: a neuron is in the groups above this quantile.")
    ] = 0.95,
    precision: Annotated[
        str, typer.Option(help="lape: probabilities in float32 (as the authors) or float64.")
    ] = "float32",
    kept_only: Annotated[
        bool,
        typer.Option("--kept-only", help="logprob_gain: of sentences the model knows, no others."),
    ] = False,
    seed: take.Seed = _DEFAULT.seed,
    force: take.Force = False,
    quiet: take.Quiet = False,
    max_record_mib: take.MaxRecord = MAX_RECORD_MIB,
    debug: take.Debug = False,
) -> None:
    """Rank the neurons of a recorded, attributed or counted directory; needs no model."""
    if method == "logprob_gain":
        from relneuron.methods.gains.rank import identify_gains

        ranked = identify_gains(
            folder, output, top=top, kept_only=kept_only, force=force, quiet=quiet
        )
        print_gains(ranked)
        say(f"-> {output}")
        return
    if method in COUNT_METHODS:
        from relneuron.methods.counts.rank import identify_counts

        chosen = identify_counts(
            folder,
            output,
            method=method,
            site=site,
            groups=take.names(groups) or None,
            top=top,
            top_rate=top_rate,
            filter_rate=filter_rate,
            bar_ratio=bar_ratio,
            precision=precision,
            seed=seed,
            force=force,
        )
        print_groups(chosen)
        say(f"-> {output}")
        return
    from relneuron.methods.responses.rank import identify as identify_stage

    if (folder / "counts.safetensors").exists() and not (folder / "prompts.jsonl").exists():
        raise RelneuronError(f"{folder} holds counts, no responses", "add --method lape", 2)
    if (folder / "targets.csv").exists() and not (folder / "validated.csv").exists():
        cause = f"{folder} holds an attribution, no responses"
        raise RelneuronError(cause, "add --method logprob_gain", 2)
    chosen = identify_stage(
        folder,
        output,
        method=method,
        top=top,
        ends=ends,
        fdr=fdr,
        negatives=negatives,
        permutations=permutations,
        bootstrap=bootstrap,
        noise=noise,
        seed=seed,
        force=force,
        quiet=quiet,
    )
    print_chosen(chosen)
    say(f"-> {output}")


def print_gains(chosen: NeuronFile) -> None:
    """How many neurons each relation has, and the mean gain at the cut."""
    for relation, found in chosen.selection.items():
        if "reason" in found:
            say(f"{relation}: no neurons, {found['reason']}")
            continue
        say(
            f"{relation}: {len(chosen.sets[relation])} neurons, mean gain >= "
            f"{found['score_at_cut']:.3g} nats over {found['sentences']:,} sentences"
        )


def import_files(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="One .neuron.pth of the LAPE authors, or their files of counts as GROUP=FILE; "
            "files called activation.GROUP.train.MODEL, or a folder of them, say it themselves.",
        ),
    ],
    model: Annotated[
        str, typer.Option(help="The model that they belong to; only its config.json is read.")
    ],
    output: take.Output,
    names: Annotated[str, typer.Option(help="Groups of a .neuron.pth in order: en,zh,...")] = "",
    force: take.Force = False,
    max_record_mib: take.MaxRecord = MAX_RECORD_MIB,
    debug: take.Debug = False,
) -> None:
    """Neurons (-> neurons.json) or counts (-> a folder) of the LAPE authors' format."""
    from relneuron.methods.counts.authors_counts import import_counts, import_neurons, name_counts
    from relneuron.methods.counts.authors_files import config_shape

    if paths := name_counts(files):
        take.check_folder(output)
        counts = import_counts(paths, config_shape(model), output, model=model, force=force)
        for name, tokens in zip(counts.groups, counts.tokens.tolist(), strict=True):
            say(f"{name}: {tokens:,} tokens")
    elif len(files) == 1:
        if not take.names(names):
            raise RelneuronError("a .neuron.pth does not name its groups", "add --names en,zh,...")
        chosen = import_neurons(Path(files[0]), take.names(names), model, output, force=force)
        print_groups(chosen)
    else:
        fix = "give one .neuron.pth, or counts as GROUP=FILE"
        raise RelneuronError(f"unknown files: {' '.join(files)}", fix, 2)
    say(f"-> {output}")


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="NEURONS|DIR", help="A neurons.json, or a counted or identified directory."
        ),
    ],
    output: take.Output,
    force: take.Force = False,
    max_record_mib: take.MaxRecord = MAX_RECORD_MIB,
    debug: take.Debug = False,
) -> None:
    """Files of others: LAPE's .neuron.pth and counts, selfcond's expertise.csv.

    A neurons.json becomes a .neuron.pth, or expertise.csv where -o ends in .csv; a counted
    directory files of counts; an identified one expertise.csv, or one a concept below a folder.
    """
    from relneuron.ablation.expertise import export_expertise
    from relneuron.artifact.manifest import checked
    from relneuron.methods.counts.authors_counts import export_counts
    from relneuron.methods.counts.authors_files import write_neuron_pth

    is_recorded = (source / "responses.safetensors").exists()
    if is_recorded or (source.is_file() and output.suffix == ".csv"):
        if output.suffix != ".csv":
            take.check_folder(output)
        written = export_expertise(source, output, force=force)
    elif source.is_dir():
        take.check_folder(output)
        written = export_counts(source, output, force=force)
    else:
        write_neuron_pth(NeuronFile.read(checked(source)), output, force=force)
        written = [output]
    for path in written:
        say(f"-> {path}")
