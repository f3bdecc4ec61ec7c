"""The command that scores how neurons raise a model's answers, and what it prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from relneuron.artifact.gains import COMPARISON, COMPARISON_COLUMNS, TARGETS, Target, read_targets
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.reading import MAX_RECORD_MIB, Cells, read_csv
from relneuron.cli import options as take
from relneuron.cli.show import say
from relneuron.methods.gains.options import KINDS, AttributeOptions

_DEFAULT = AttributeOptions()

Knowledge = Annotated[
    Path,
    typer.Argument(
        metavar="PROMPTS",
        help="A prompts.jsonl; a .csv, .tsv or .jsonl with the columns prompt, answer, type; or "
        "LRE-format facts.",
    ),
]


def attribute(
    model: take.Model,
    prompts: Knowledge,
    output: take.Output,
    format: Annotated[str, typer.Option(help="Of the table of scores: csv, parquet.")] = "csv",
    splits: Annotated[str, typer.Option(help="Only these prompts: det,eva,eva2.")] = "",
    target: Annotated[
        str,
        typer.Option(help="Token scored: answer (its first, or the column target), prediction."),
    ] = _DEFAULT.target,
    kinds: Annotated[
        str, typer.Option(help=f"What is scored: all, or some of {', '.join(KINDS)}.")
    ] = "all",
    top: Annotated[
        int, typer.Option(help="Of each sentence's neurons and positions, so many are written.")
    ] = _DEFAULT.top,
    mode: Annotated[
        str, typer.Option(help="FFN gains: certified (within --tolerance) or exact.")
    ] = _DEFAULT.mode,
    tolerance: Annotated[float, typer.Option(help="Nats.")] = _DEFAULT.tolerance,
    own_norm: Annotated[
        bool, typer.Option("--own-norm", help="The final norm anew for each vector, not frozen.")
    ] = False,
    norm_bias: Annotated[
        bool, typer.Option("--norm-bias", help="With the biases of the final norm and the head.")
    ] = False,
    key: Annotated[
        str, typer.Option(help="Key of a neuron with --query-of ffn: gate, up, down.")
    ] = _DEFAULT.key,
    center_keys: Annotated[
        bool,
        typer.Option(
            help="Of models with LayerNorm (GPT-2): centre the keys of query scores, as the norm "
            "centres what they read; the published notebook does not."
        ),
    ] = _DEFAULT.center_keys,
    query_of: Annotated[
        str, typer.Option(help="Value neurons that query neurons activate: attention, ffn.")
    ] = _DEFAULT.query_of,
    query_units: Annotated[
        int, typer.Option(help="Of each sentence's value neurons, so many are explained.")
    ] = _DEFAULT.query_units,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse answers of several tokens.")
    ] = False,
    keep: Annotated[
        str, typer.Option(help="Sentences scored: all, or known (the model knows the answer).")
    ] = _DEFAULT.keep,
    compare: Annotated[
        bool, typer.Option(help="Zero the neurons of eight methods in the known sentences.")
    ] = True,
    intervene: Annotated[
        int, typer.Option(help="Neurons of each method that are zeroed in a sentence.")
    ] = _DEFAULT.intervene,
    random_seeds: take.RandomSeeds = _DEFAULT.random_seeds,
    batch_tokens: take.BatchTokens = _DEFAULT.batch_tokens,
    oom: take.Oom = _DEFAULT.oom,
    dtype: take.Dtype = None,
    device: take.Device = None,
    revision: take.Revision = None,
    backend: take.Backend = "auto",
    force: take.Force = False,
    quiet: take.Quiet = False,
    max_record_mib: take.MaxRecord = MAX_RECORD_MIB,
    debug: take.Debug = False,
) -> None:
    """How much each neuron, head and layer raises the log-probability of the answers.

    Goes on where it stopped.
    """
    from relneuron.methods.gains.attribute import attribute as attribute_stage
    from relneuron.model.load import load_model, load_tokenizer
    from relneuron.texts.knowledge import read_knowledge

    options = AttributeOptions(
        splits=take.split_list(splits) if splits else (),
        target=target,
        kinds=KINDS if kinds == "all" else take.names(kinds),
        top=top,
        mode=mode,
        tolerance=tolerance,
        own_norm=own_norm,
        norm_bias=norm_bias,
        key=key,
        center_keys=center_keys,
        query_of=query_of,
        query_units=query_units,
        strict=strict,
        keep=keep,
        compare=compare,
        intervene=intervene,
        random_seeds=random_seeds,
        batch_tokens=batch_tokens,
        oom=oom,
        format=format,
    )
    options.check_installed()
    take.check_folder(output)
    read_knowledge(
        prompts, answers=target == "answer"
    )  # what is wrong with it is said before the model is loaded
    loaded = load_model(model, revision=revision, dtype=dtype, device=device)
    tokenizer = load_tokenizer(model, revision=revision)
    attribute_stage(
        model,
        loaded,
        tokenizer,
        prompts,
        output,
        options,
        backend=backend,
        force=force,
        quiet=quiet,
    )
    print_attributed(output)
    say(f"-> {output}")


def print_attributed(folder: Path) -> None:
    """The sentences, each relation's best neurons, and what zeroing cost."""
    manifest = Manifest(folder).data
    entry = manifest["stages"]["attribute"]
    several = entry["tokens"]["answers_of_several_tokens"]
    say(
        f"{entry['sentences']:,} sentences, the model knows the answer of {entry['kept']:,}; "
        f"{several:,} answers of several tokens: their first one was asked for"
    )
    for relation, asked in target_counts(read_targets(folder / TARGETS)).items():
        shown = ", ".join(f"{token!r} ({token_id}) {n} times" for (token, token_id), n in asked[:5])
        more = f", {len(asked) - 5} more" if len(asked) > 5 else ""
        only = ", one and the same token" if len(asked) == 1 and asked[0][1] > 1 else ""
        say(f"{relation}: asked for {shown}{more}{only}")
    for relation, neurons in entry["best"].items():
        shown = ", ".join(f"{layer}_{index} {gain:+.3g}" for layer, index, gain in neurons)
        say(f"{relation}: best neurons {shown} nats")
    if COMPARISON in entry["files"]:
        print_comparison(folder / COMPARISON)


def target_counts(targets: Sequence[Target]) -> dict[str, list[tuple[tuple[str, int], int]]]:
    """Each relation's target tokens (text, id) and how often they are asked for, most first."""
    counts: dict[str, Counter[tuple[str, int]]] = {}
    for target in targets:
        counts.setdefault(target.relation, Counter())[target.target, target.target_id] += 1
    return {relation: found.most_common() for relation, found in counts.items()}


def print_comparison(path: Path) -> None:
    """Rank, probability and log-probability of the answers under each condition, and the drops.

    Over all sentences; of conditions that differ in their seed or type, the mean. The heads of a
    type are asked apart: of its own sentences, and of the other types'.
    """
    groups: dict[str, list[Cells]] = {}
    n_sentences = ""
    for row in read_csv(path, COMPARISON_COLUMNS):
        condition, relation = row["condition"], row["relation"]
        if condition == "clean" and not relation:
            n_sentences = row["n"]
        if condition.startswith("heads:"):
            is_own = condition == f"heads:{relation}"
            name = "heads, own type" if is_own else "heads, others"
        else:
            name = condition.rpartition(".")[0] or condition
        if bool(relation) == condition.startswith("heads:"):
            groups.setdefault(name, []).append(row)
    table = Table("zeroed", caption=f"{n_sentences} sentences")
    for title in ("MRR", "prob", "log p", "MRR lost", "prob lost", "nats lost"):
        table.add_column(title, justify="right")
    names = ("mrr", "prob", "logprob", "mrr_drop", "prob_drop", "logprob_drop")
    formats = ("{:.3f}", "{:.1%}", "{:.2f}", "{:.1%}", "{:.1%}", "{:.2f}")
    for name, rows in groups.items():
        means = [sum(row.real(key) for row in rows) / len(rows) for key in names]
        table.add_row(name, *(_cell(f, mean) for f, mean in zip(formats, means, strict=True)))
    Console(highlight=False).print(table)


def _cell(form: str, value: float) -> str:
    """A number of the table, zero without a sign; "" for NaN."""
    text = form.format(value)
    if value != value:
        return ""
    return text if text.strip("-0.%") else text.lstrip("-")
