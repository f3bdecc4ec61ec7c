"""What `attribute --method gain` does, and `identify` with it; cli/commands.py calls both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from relneuron.artifact.files import RelneuronError, check_folder
from relneuron.artifact.gains import COMPARISON, COMPARISON_COLUMNS, TARGETS, Target, read_targets
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.options import LoadOptions
from relneuron.artifact.reading import Cells, read_csv
from relneuron.artifact.stage import Printed
from relneuron.methods.gains.options import AttributeOptions, GainRankOptions


def attribute(
    model: str,
    prompts: Path,
    output: Path,
    options: AttributeOptions,
    load_options: LoadOptions,
    *,
    method: str,
    force: bool,
    quiet: bool,
) -> Iterator[str | Printed]:
    """`attribute --method gain`: says each relation's best neurons, and what zeroing cost."""
    from relneuron.methods.gains.attribute import attribute as attribute_stage
    from relneuron.model.load import load

    check(prompts, output, options)
    loaded, tokenizer = load(model, load_options)
    attribute_stage(
        model,
        loaded,
        tokenizer,
        prompts,
        output,
        options,
        backend=load_options.backend,
        force=force,
        quiet=quiet,
    )
    yield from attributed(output)


def check(prompts: Path, output: Path, options: AttributeOptions) -> None:
    """Raise for what can be refused before a model is loaded, or planned."""
    from relneuron.texts.knowledge import read_knowledge

    options.check_installed()
    check_folder(output)
    read_knowledge(prompts, answers=options.target == "answer")


def attributed(folder: Path) -> Iterator[str | Printed]:
    """The sentences, each relation's best neurons, and what zeroing cost."""
    manifest = Manifest(folder).data
    entry = manifest["stages"]["attribute"]
    several = entry["tokens"]["answers_of_several_tokens"]
    yield (
        f"{entry['sentences']:,} sentences, the model knows the answer of {entry['kept']:,}; "
        f"{several:,} answers of several tokens: their first one was asked for"
    )
    for relation, asked in target_counts(read_targets(folder / TARGETS)).items():
        shown = ", ".join(f"{token!r} ({token_id}) {n} times" for (token, token_id), n in asked[:5])
        more = f", {len(asked) - 5} more" if len(asked) > 5 else ""
        only = ", one and the same token" if len(asked) == 1 and asked[0][1] > 1 else ""
        yield f"{relation}: asked for {shown}{more}{only}"
    for relation, neurons in entry["best"].items():
        shown = ", ".join(f"{layer}_{index} {gain:+.3g}" for layer, index, gain in neurons)
        yield f"{relation}: best neurons {shown} nats"
    if COMPARISON in entry["files"]:
        yield comparison_table(folder / COMPARISON)


def target_counts(targets: Sequence[Target]) -> dict[str, list[tuple[tuple[str, int], int]]]:
    """Each relation's target tokens (text, id) and how often they are asked for, most first."""
    counts: dict[str, Counter[tuple[str, int]]] = {}
    for target in targets:
        counts.setdefault(target.relation, Counter())[target.target, target.target_id] += 1
    return {relation: found.most_common() for relation, found in counts.items()}


def comparison_table(path: Path) -> Printed:
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
    names = ("mrr", "prob", "logprob", "mrr_drop", "prob_drop", "logprob_drop")
    formats = ("{:.3f}", "{:.1%}", "{:.2f}", "{:.1%}", "{:.1%}", "{:.2f}")
    rows = []
    for name, found in groups.items():
        means = [sum(row.real(key) for row in found) / len(found) for key in names]
        rows.append([name, *(_cell(f, mean) for f, mean in zip(formats, means, strict=True))])
    titles = ("zeroed", "MRR", "prob", "log p", "MRR lost", "prob lost", "nats lost")
    return Printed(titles, rows, f"{n_sentences} sentences")


def _cell(form: str, value: float) -> str:
    """A number of the table, zero without a sign; "" for NaN."""
    text = form.format(value)
    if value != value:
        return ""
    return text if text.strip("-0.%") else text.lstrip("-")


def rank(
    folder: Path, output: Path, options: GainRankOptions, *, method: str, force: bool, quiet: bool
) -> Iterator[str]:
    """`identify --method logprob_gain`: says each relation's neurons and the gain at the cut."""
    from relneuron.methods.gains.rank import identify_gains

    chosen = identify_gains(
        folder, output, top=options.top, kept_only=options.kept_only, force=force, quiet=quiet
    )
    for relation, found in chosen.selection.items():
        if "reason" in found:
            yield f"{relation}: no neurons, {found['reason']}"
            continue
        yield (
            f"{relation}: {len(chosen.sets[relation])} neurons, mean gain >= "
            f"{found['score_at_cut']:.3g} nats over {found['sentences']:,} sentences"
        )


def supports(model: Any) -> tuple[str, str]:
    """The row of `relneuron doctor`: whether what raises this model's answers can be told."""
    from relneuron.model.stream.read import read_residual_model

    try:
        found = read_residual_model(model)
    except RelneuronError as error:
        return "attribution", f"not supported: {error.cause}"
    if found.no_heads:
        return "attribution", f"supported but for heads: {found.no_heads}"
    return "attribution", f"supported: {found.n_heads} heads a layer"
