"""The `generate` command's work: text for every prompt, under every mask that is asked for.

Masks stand side by side in the rows of a batch; optionally one group's neurons are set to their
mean activation throughout (ablation/steer.py). What comes out is scored and written by outputs.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from relneuron.ablation.conditions import (
    Ablation,
    empty_sets,
    module_conditions,
    read_sets,
)
from relneuron.ablation.continuer import Continuer
from relneuron.ablation.evaluate import Evaluator, How, same_ablation
from relneuron.ablation.exchange import (
    FromMeans,
    check_products,
    from_donor,
    stored_moments,
)
from relneuron.ablation.masks import named_masks
from relneuron.ablation.measures import find_measure
from relneuron.ablation.noise import FromNoise, prompt_key
from relneuron.ablation.options import CLEAN, DONOR, GenerateOptions
from relneuron.ablation.outputs import (
    SCORES,
    Generated,
    beside,
    lens_tables,
    lines_bytes,
    score_rows,
)
from relneuron.ablation.pictured import alone, find_for, first_inputs, pictured_inputs
from relneuron.ablation.said import Row
from relneuron.ablation.steer import steering_patch
from relneuron.artifact.counts import NAME
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    csv_bytes,
    refuse_overwrite,
    sha256,
)
from relneuron.artifact.journal import Journal, progress_bar
from relneuron.artifact.manifest import Manifest, checked, same_model
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import Prompt, read_questions
from relneuron.model.canary import check_canary, check_exchange
from relneuron.model.exchange import Exchanged
from relneuron.model.identity import other_weights, tokenizer_digest
from relneuron.model.load import describe_model
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.pair import Pair
from relneuron.model.pictures import Processor
from relneuron.model.questions import encode
from relneuron.model.ranks import sharing
from relneuron.texts.tokens import listed, without_blanks


def generate_inputs(
    model: Json,
    tokenizer: Any,
    neurons: Path,
    prompts: Path,
    counts: Path | None,
    options: GenerateOptions,
) -> Json:
    """What the texts depend on, for the journal: scores are made of them at the end."""
    asked = options.recorded()
    for name in ("measure", "anls_threshold"):
        del asked[name]
    return {
        "model": same_model(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "neurons": sha256(neurons),
        "prompts": sha256(prompts),
        **asked,
        "counts": sha256(counts) if counts else None,
        # As `read_exchanged` says: not by what they are called.
        "donor": None,
        "moments": None,
    }


def plan_masks(
    neurons: NeuronFile, options: GenerateOptions, shape: Json, prompts: Sequence[Prompt]
) -> dict[str, list[Ablation]]:
    """The masks asked for, each once, and what is off under each, in which prompts.

    A set that is named is off in all prompts; of a set of modules each prompt's own group is.
    """
    sets, _ = read_sets(neurons, shape)
    if options.module_sets:
        asked: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            asked.setdefault(prompt.relation, []).append(row)
        return module_conditions(sets, shape, asked)
    found = named_masks(
        sets,
        options.off,
        shape,
        models=(CLEAN, DONOR) if options.mode == "patch" else (CLEAN,),
        random_seeds=options.random_seeds,
        products=options.mode != "zero",
        prompts=range(len(prompts)),
    )
    return {ablation.condition.name: [ablation] for ablation in found}


def generate(
    name: str,
    model: Any,
    tokenizer: Any,
    neurons_path: Path,
    prompts_path: Path,
    output: Path,
    options: GenerateOptions | None = None,
    *,
    pair: Pair | None = None,
    processor: Processor | None = None,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> list[Generated]:
    """Continue every prompt under every mask of `options.off` and write the JSONL `output`.

    The neurons of a mask are at zero at all tokens of the prompt and of the output; `clean` or ""
    is no mask. With `options.set_to` the neurons of that set are instead at their mean activation
    in the counts of `options.counts` (default: the neurons' folder), at all tokens, whatever is
    off.

    With another `options.mode` than zero the products of a mask's neurons become other values
    (ablation/exchange.py): with `patch` those of the other model of `pair`, whose name
    `options.donor` is, at the same tokens of the prompt and of the output; the mask `donor` is that
    model itself, and `model` is `pair.a`.

    With `options.module_sets` a mask is one of the sets of modules (`conditions.module_sets`), and
    of each prompt the neurons of its own group in these modules are off.

    Lines come in order of masks, then prompts, then seeds. A batch holds `options.batch_tokens`
    tokens of prompts and outputs at most. `<output>.journal` lets a killed run go on; it is removed
    at the end. With `options.measure` each line has a score, and `<stem>.scores.csv` their means;
    with `options.lens` `<stem>.lens.csv` and `<stem>.stages.csv` say what the layers would say.
    """
    options = options or GenerateOptions()
    set_to = options.set_to
    journal_path = output.with_name(f"{output.name}.journal")
    for path in (output, *beside(output)):
        refuse_overwrite(path, force or journal_path.exists())
    measure = find_measure(options.measure, options.anls_threshold) if options.measure else None
    neurons = NeuronFile.read(checked(neurons_path))
    prompts = read_questions(checked(prompts_path), options.template)
    if measure:
        check_answers(prompts)
    mlps = pair.mlps[0] if pair else find_for(model, neurons, processor)
    shape = model_shape(mlps)
    neurons.check_model(shape)
    masks = plan_masks(neurons, options, shape, prompts)
    plan = [ablation for some in masks.values() for ablation in some]
    asked = {a.condition.name: a.places for a in plan if a.condition.kind not in (CLEAN, DONOR)}
    # With --set something is done, whatever is off.
    for notice in empty_sets({"": (0,), **asked} if set_to or not asked else asked):
        warnings.warn(notice, stacklevel=2)
    if options.mode != "zero":
        check_products(plan, mlps, prompts, options.mode)
    counts = (options.counts or neurons_path.parent) / NAME if set_to else None
    steering: Any = nullcontext()
    if set_to and counts:
        steering = steering_patch(mlps, neurons, set_to, counts, backend=backend)
    n_new = options.max_new_tokens
    questions = encode(
        tokenizer, model, prompts, answers=False, n_tokens=n_new, processor=processor
    )
    _, blank = without_blanks(tokenizer, [p.prompt for p in prompts], ["a"] * len(prompts))
    if blank:
        named = listed([prompts[row].id for row in blank])
        why = "which the tokenizer joins to the next word: a model hardly knows it alone"
        warnings.warn(f"{named}: the prompt ends in a space, {why}", stacklevel=2)
    described = pair.described[0] if pair else describe_model(name, model, mlps, backend)
    notices = other_weights(f"{neurons_path}: neurons", neurons.model, described)
    if counts:
        counted_in = Manifest(counts.parent).data.get("model", {})
        notices += other_weights(f"{counts}: means", counted_in, described)
    folder = options.moments or neurons_path.parent
    exchanged, of_values = read_exchanged(options, model, mlps, folder, prompts, pair)
    how = How(options.mode, model=exchanged)
    for notice in notices:
        warnings.warn(notice, stacklevel=2)
    continuer = Continuer(exchanged or model, tokenizer, options)
    first_prompt = first_inputs(questions, continuer.pad)
    check_canary(model, mlps, first_prompt, backend)
    if exchanged:
        check_exchange(model, exchanged.mlps, first_prompt)
    inputs = generate_inputs(described, tokenizer, neurons_path, prompts_path, counts, options)
    inputs |= of_values
    inputs |= pictured_inputs(processor, prompts)
    first, n_seeds = same_ablation(plan, how), options.n_seeds
    pairs = [(first[i], p) for i, ablation in enumerate(plan) for p in ablation.prompts]
    rows = [Row(i, p * n_seeds + seed) for i, p in dict.fromkeys(pairs) for seed in range(n_seeds)]
    lengths = [len(ids) + n_new for ids in questions.ids for _ in range(n_seeds)]
    with sharing(model, output.parent) as ranks:
        with ranks.in_turn():
            journal = Journal(journal_path, inputs, ranks=ranks, shard=options.shard)
        evaluator = Evaluator(
            continuer, mlps, plan, journal, how, options.batch_tokens, backend, options.oom
        )
        ask = partial(continuer.go_on, questions)
        bar = progress_bar(len(rows), "generate", "text", quiet)
        with bar, journal, steering, continuer.lens or nullcontext():
            found = evaluator.run(
                "texts", rows, lengths, ask, bar.update, alone=alone(questions, n_seeds)
            )
        lines, read, places = [], [], iter(first)
        for mask, some in masks.items():
            asked_of = {p: place for a, place in zip(some, places, strict=False) for p in a.prompts}
            for p, seed in ((p, seed) for p in sorted(asked_of) for seed in range(n_seeds)):
                text, n_tokens, end, layers = found[Row(asked_of[p], p * n_seeds + seed)]
                about = (mask, set_to or "", prompts[p].id, prompts[p].prompt)
                lines.append(
                    Generated(
                        *(*about, text, n_tokens, end),
                        group=prompts[p].relation if measure or options.module_sets else None,
                        seed=seed if options.temperature is not None else None,
                        score=measure(text, prompts[p].objects) if measure else None,
                    )
                )
                read.append(layers)
        if ranks.rank:
            return lines
        written = {output: lines_bytes(lines)}
        scores, lens, stages = beside(output)
        if options.measure:
            written[scores] = csv_bytes(SCORES, score_rows(lines, options.measure))
        if options.lens:
            written[lens], written[stages] = lens_tables(lines, read, tokenizer)
        for path, data in written.items():
            atomic_write(path, data)
        for path in beside(output):
            if path not in written:
                path.unlink(missing_ok=True)
        journal.remove()
    return lines


def read_exchanged(
    options: GenerateOptions,
    model: Any,
    parts: Sequence[Part],
    folder: Path,
    prompts: Sequence[Prompt],
    pair: Pair | None,
) -> tuple[Exchanged | None, Json]:
    """The model with what `options.mode` says, and what the texts depend on of that.

    `folder` has the stored moments.
    """
    paired = from_donor(pair, options.donor, options.mode)
    if paired and pair:
        return paired, {"donor": same_model(pair.described[1])}
    if options.mode == "zero":
        return None, {}
    path, moments = stored_moments(folder, model_shape(parts))
    inputs, mlps = {"moments": sha256(path)}, [p for p in parts if isinstance(p, MLP) and p.runs]
    if options.mode == "mean":
        return FromMeans(model, mlps, moments.mean), inputs
    keys = [prompt_key(options.noise_seed, p.id) for p in prompts for _ in range(options.n_seeds)]
    return FromNoise(model, mlps, moments.std, options.noise, keys), inputs


def check_answers(prompts: Sequence[Prompt]) -> None:
    """Refuse prompts without an answer, which no measure can score."""
    without = [prompt.id for prompt in prompts if not any(prompt.objects)]
    if without:
        raise RelneuronError(
            f"--measure scores answers, and {listed(without)} has none",
            "give each line its answers: a text, or a list of all that are right",
        )
