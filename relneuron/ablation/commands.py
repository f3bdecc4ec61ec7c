"""The commands that switch sets of neurons off: ablate, nll, generate, eval.

And effect, of what was said.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from relneuron.ablation.effect_options import EffectOptions
from relneuron.ablation.harness.options import EvalOptions
from relneuron.ablation.options import AblateOptions, GenerateOptions, NllOptions
from relneuron.artifact.files import check_folder, require
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.options import (
    Argument,
    LoadOptions,
    Model,
    Named,
    Neurons,
    Output,
    PlaceOptions,
    Prompts,
)
from relneuron.artifact.prompts import read_prompts, read_questions
from relneuron.artifact.reading import read_csv
from relneuron.artifact.stage import Printed
from relneuron.texts.options import SourceOptions, Sources

if TYPE_CHECKING:
    from relneuron.ablation.nll import Cell
    from relneuron.model.pair import Pair


def ablate(
    model: Model,
    neurons: Neurons,
    prompts: Prompts,
    output: Output,
    options: AblateOptions,
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str | Printed]:
    """Switch each relation's neurons off and ask again: effects (.csv, .parquet), accuracy.csv.

    Examples:
      relneuron ablate Qwen/Qwen3-0.6B study/neurons.json study/prompts.jsonl \\
          -o study/effects.csv
      relneuron ablate Qwen/Qwen3-0.6B study/neurons.json study/prompts.jsonl \\
          -o halved/effects.csv --mode scale --factor 0.5 --analyses sizes \\
          --sizes 10,50,200
    """
    from relneuron.ablation.ablate import ablate_prompts, refuse_outputs
    from relneuron.ablation.pictured import processor_for
    from relneuron.ablation.tables import check_format
    from relneuron.model.instrument import Clock

    refuse_outputs(output, force)
    check_format(output)
    require(prompts, "prompts FACTS_DIR -o prompts.jsonl")
    found, asked = NeuronFile.read(neurons), read_prompts(prompts)
    loaded, tokenizer, pair = load_with(model, options.donor, load_options)
    with Clock(loaded) as clock:
        ablate_prompts(
            model,
            loaded,
            tokenizer,
            neurons,
            prompts,
            output,
            **vars(options),
            pair=pair,
            processor=processor_for(model, load_options, found, asked),
            backend=load_options.backend,
            force=force,
            quiet=quiet,
        )
    yield accuracy_table(output.parent)
    yield f"ablate: {clock}"
    yield f"-> {output}"


def load_with(model: str, donor: str | None, options: LoadOptions) -> tuple[Any, Any, Pair | None]:
    """A model, its tokenizer, and with the donor of --from the pair that they are."""
    from relneuron.model.load import load
    from relneuron.model.pair import load_pair

    if donor is None:
        return *load(model, options), None
    pair = load_pair(model, donor, options)
    return pair.a, pair.tokenizer, pair


def accuracy_table(folder: Path) -> Printed:
    """Accuracy per relation: before, with its own neurons off, others' off, random off.

    Of eva, or of the first split that was asked.
    """
    columns = ("condition", "relation", "split", "accuracy")
    conditions = read_csv(folder / "conditions.csv", ("condition", "kind", "n_neurons"))
    empty = {c["condition"] for c in conditions if c["n_neurons"] == "0" and c["kind"] != "clean"}
    rows = [r for r in read_csv(folder / "accuracy.csv", columns) if r["condition"] not in empty]
    splits = [row["split"] for row in rows]
    main = "eva" if "eva" in splits else splits[0]
    found = {
        (row["condition"], row["relation"]): row.real("accuracy")
        for row in rows
        if row["split"] == main
    }
    relations = [relation for condition, relation in found if condition == "clean"]
    shown = []
    for relation in relations:
        own = found.get((relation, relation))
        others = [found[c, relation] for c in relations if c != relation and (c, relation) in found]
        chance = [v for (c, r), v in found.items() if r == relation and c.startswith("random.")]
        cells = [
            found["clean", relation],
            own,
            sum(others) / len(others) if others else None,
            sum(chance) / len(chance) if chance else None,
        ]
        shown.append([relation, *("" if cell is None else f"{cell:.1%}" for cell in cells)])
    return Printed(("relation", "clean", "own off", "others off", "random off"), shown)


def nll(
    model: Model,
    neurons: Neurons,
    sources: Sources,
    output: Output,
    options: NllOptions,
    reading: SourceOptions,
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str | Printed]:
    """How well the model reads each group's text without each set of neurons: nll.csv.

    Examples:
      relneuron nll Qwen/Qwen3-0.6B counts/neurons.json en=en.txt zh=zh.txt \\
          -o counts
      relneuron nll Qwen/Qwen3-0.6B counts/neurons.json en=en.txt zh=zh.txt \\
          -o counts-random --random-sets 3 --windows 64
    """
    from relneuron.ablation.nll import nll as nll_stage
    from relneuron.model.load import load
    from relneuron.texts.sources import parse_sources

    check_folder(output)
    sets = NeuronFile.read(neurons).sets
    found = parse_sources(sources, **vars(reading))
    loaded, tokenizer = load(model, load_options, needs_text=any(not s.is_ids for s in found))
    cells = nll_stage(
        model,
        loaded,
        tokenizer,
        neurons,
        found,
        output,
        options,
        backend=load_options.backend,
        force=force,
        quiet=quiet,
    )
    yield nll_table(cells, [name for name, chosen in sets.items() if not chosen])
    yield f"-> {output / 'nll.csv'}"


def nll_table(cells: Sequence[Cell], empty: Collection[str] = ()) -> Printed:
    """The NLL of each group's text: clean, then how much it rises under each mask.

    Masks in `empty` have no neuron: there is nothing to say of them.
    """
    groups = list(dict.fromkeys(cell.group for cell in cells))
    clean = {cell.group: cell.nll for cell in cells if cell.mask == cells[0].mask}
    rows = []
    for mask in dict.fromkeys(cell.mask for cell in cells if cell.mask not in empty):
        found = {cell.group: cell.nll for cell in cells if cell.mask == mask}
        first = mask == cells[0].mask
        values = [found[g] if first else found[g] - clean[g] for g in groups]
        rows.append([mask, *(f"{x:.4f}" if first else f"{x:+.4f}" for x in values)])
    return Printed(("off", *groups), rows, "NLL, nats a token")


def generate(
    model: Model,
    prompts: Annotated[
        Path,
        Argument(
            "PROMPTS",
            "Prompts, one a line (.txt), or .jsonl with the field `prompt`, or `text` and `image`; "
            "`group` and `answers` where they are scored.",
        ),
    ],
    output: Output,
    neurons: Annotated[Path, Named("A neurons.json with the sets of --off and --set.")],
    options: GenerateOptions,
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str | Printed]:
    """Continuations of prompts with sets of neurons off, or set to other values.

    These are another group's mean (--set), or what --mode says: another model's values at every
    token (--mode patch --from MODEL), stored means, or noise.

    Examples:
      relneuron generate Qwen/Qwen3-0.6B prompts.txt \\
          --neurons counts/neurons.json --off clean,en,zh -o outputs.jsonl
      relneuron generate Qwen/Qwen3-0.6B-Base prompts.txt \\
          --neurons two/neurons.json --off clean,donor,contrast \\
          --mode patch --from Qwen/Qwen3-0.6B -o two/outputs.jsonl
      relneuron generate Qwen/Qwen3-0.6B prompts.txt \\
          --neurons counts/neurons.json --set zh -o in-chinese.jsonl \\
          --max-new-tokens 64
    """
    from relneuron.ablation.generate import generate as generate_stage
    from relneuron.ablation.outputs import score_table
    from relneuron.ablation.pictured import processor_for

    found, asked = NeuronFile.read(neurons), read_questions(prompts, options.template)
    loaded, tokenizer, pair = load_with(model, options.donor, load_options)
    made = generate_stage(
        model,
        loaded,
        tokenizer,
        neurons,
        prompts,
        output,
        options,
        pair=pair,
        processor=processor_for(model, load_options, found, asked),
        backend=load_options.backend,
        force=force,
        quiet=quiet,
    )
    if options.measure:
        yield score_table(made, options.measure)
    yield f"{len(made):,} outputs -> {output}"


def run_tasks(
    model: Model,
    output: Output,
    options: EvalOptions,
    load_options: PlaceOptions,
    neurons: Annotated[
        Path | None, Named("A neurons.json with the sets of --off and --set.")
    ] = None,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str | Printed]:
    """Tasks of lm-evaluation-harness, clean and with neurons off or set: eval.csv, eval.json.

    Clean results are those of the harness's own hf model. Each set is a run beside the clean one;
    --random-seeds adds random sets of its size.

    Examples:
      relneuron eval Qwen/Qwen3-0.6B --tasks hellaswag,arc_easy -o evals
      relneuron eval Qwen/Qwen3-0.6B --neurons counts/neurons.json --off zh \\
          --tasks hellaswag --limit 200 --random-seeds 3 -o evals
    """
    from relneuron.ablation.harness.scores import score_table
    from relneuron.ablation.harness.stage import check_neurons, evaluate
    from relneuron.model.load import load

    check_folder(output)
    check_neurons(neurons, options)
    if neurons is not None:
        NeuronFile.read(neurons)
    loaded, tokenizer = load(model, load_options)
    scores = evaluate(model, loaded, tokenizer, neurons, output, options, force=force, quiet=quiet)
    yield score_table(scores, options.tasks)
    yield f"-> {output / 'eval.csv'}"


def effect(
    outputs: Annotated[Path, Argument("OUTPUTS", "The .jsonl of generate --from.")],
    output: Output,
    options: EffectOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str | Printed]:
    """How much of the donor's change of a cost patched neurons cause: effect.csv.

    Examples:
      relneuron effect two/outputs.jsonl --cost costs.csv:cost -o two/effect.csv
      relneuron effect two/outputs.jsonl --cost mymodule:cost -o two/effect.csv
    """
    from relneuron.ablation.effect import effect as effect_stage
    from relneuron.ablation.effect import effect_table

    yield effect_table(effect_stage(outputs, output, options, force=force, quiet=quiet))
    yield f"-> {output}"
