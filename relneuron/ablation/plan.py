"""What `ablate`, `nll` and `generate` would take: their --dry-run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from relneuron.ablation.ablate import PERPLEXITY, refuse_outputs
from relneuron.ablation.asked import (
    Prompts,
    Sets,
    Texts,
    encode_asked,
    plan_sets,
    rows_asked,
    rows_read,
    sentences_of,
)
from relneuron.ablation.conditions import Ablation, empty_sets, read_sets
from relneuron.ablation.evaluate import How, plan_rows, same_ablation, wave_size
from relneuron.ablation.generate import check_answers
from relneuron.ablation.generate import plan_masks as generate_masks
from relneuron.ablation.how import by_product, read_how
from relneuron.ablation.nll import COLUMNS, WINDOWS, plan_masks
from relneuron.ablation.options import AblateOptions, GenerateOptions, NllOptions
from relneuron.ablation.outputs import Generated, beside, lines_bytes
from relneuron.ablation.said import Row
from relneuron.ablation.tables import check_format
from relneuron.ablation.windows import LOGITS, read_texts
from relneuron.artifact.effects import conditions_bytes, split_name
from relneuron.artifact.files import (
    RelneuronError,
    check_folder,
    csv_bytes,
    refuse_overwrite,
    require,
)
from relneuron.artifact.journal import is_unfinished
from relneuron.artifact.manifest import checked
from relneuron.artifact.neurons import ATTENTION, NeuronFile
from relneuron.artifact.options import LoadOptions
from relneuron.artifact.planned import Planned
from relneuron.artifact.prompts import Prompt, read_questions
from relneuron.model.choose import encode_options
from relneuron.model.dry import Dry, Work, dry_model
from relneuron.model.questions import N_ANSWER_TOKENS, encode
from relneuron.texts.feed import Feed
from relneuron.texts.options import SourceOptions, choose_packing
from relneuron.texts.sources import parse_sources
from relneuron.texts.tokens import CHARACTER_BYTES

_NUMBER = -0.12345678901234567  # as long as most log-probabilities are


def _dry(model: str, options: LoadOptions, neurons: NeuronFile, pictured: bool) -> Dry:
    """The model of some neurons."""
    if pictured or "modules" in neurons.model:
        raise RelneuronError(
            "prompts with pictures are not planned: their processor makes their tokens",
            "plan prompts of text, and neurons of the language model",
        )
    dry = dry_model(model, options, attention=ATTENTION[0] in neurons.model)
    neurons.check_model(dry.shape)
    return dry


def _donor(name: str | None, options: LoadOptions) -> tuple[int, list[str]]:
    """Bytes of the other model of --from, and what is said of it."""
    if name is None:
        return 0, []
    note = "the donor reads what the model reads: as much again in operations and time"
    return dry_model(name, options).weights, [note]


# --- ablate ------------------------------------------------------------------------------------


def ablate(
    model: str,
    neurons: Path,
    prompts: Path,
    output: Path,
    options: AblateOptions,
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[Planned]:
    """The plan of the command `ablate`, with its parameters."""
    refuse_outputs(output, force)
    check_format(output)
    require(prompts, "prompts FACTS_DIR -o prompts.jsonl")
    found = NeuronFile.read(checked(neurons))
    asked = Prompts.read(prompts, options, found)
    dry = _dry(model, load_options, found, any(p.images for p in asked.asked))
    sets = plan_sets(neurons, found, asked, options, dry.shape)
    texts = encode_asked(dry.tokenizer, dry.model, asked, sets, options, dry.order.total)
    how = How("patch")
    if options.mode != "patch":
        responses = neurons.parent / "responses.safetensors"
        how = read_how(
            *(options, sets.plan, responses, asked.everything, dry.shape),
            by_product=by_product(found),
        )
    n_donor, notes = _donor(options.donor, load_options)
    planned = plan_ablate(dry, asked.asked, sets, texts, options, how, output.name)
    told = {"weights of the donor": n_donor} if n_donor else {}
    yield replace(planned, tensors={**planned.tensors, **told}, notes=[*planned.notes, *notes])


def plan_ablate(
    dry: Dry,
    prompts: Sequence[Prompt],
    sets: Sets,
    texts: Texts,
    options: AblateOptions,
    how: How,
    output: str,
) -> Planned:
    """The plan of conditions, and of the prompts and sentences that are read under them."""
    work, plan, questions = Work(dry), sets.plan, texts.questions
    waves = wave_size(how.mode, dry.order.total)
    rows: Sequence[Row] = rows_asked(plan, how)
    n_steps = (options.generate or 1) - 1
    n_logits = 2 if options.generate is None else 1
    lengths = [len(ids) + 1 for ids in questions.ids]
    if options.choose:
        found = encode_options(dry.tokenizer, dry.model, questions)
        lengths, n_logits = [len(ids) for ids in found.ids], max(map(len, found.wanted))
        rows = [Row(row.condition, k) for row in rows for k in found.rows_of(row.prompt)]
    then = "" if options.choose else "answers"
    _add(work, rows, lengths, options.batch_tokens, waves, n_logits, then=then, steps=n_steps)
    read = rows_read(plan, texts.sentences, how)
    if texts.sentences is not None:
        own = [len(ids) for ids in texts.sentences.ids]
        _add(work, read, own, options.batch_tokens, waves, 0, then="scores")
    answers = sum(len(a.prompts) for a in plan)
    first = {a.condition.name: len(a.prompts) for a in plan}
    files: dict[str, int | None] = {
        output: _effects_bytes(dry, prompts, sets, texts, options)
        if output.endswith(".csv")
        else None,
        "accuracy.csv": _accuracy_bytes(prompts, sets),
        "conditions.csv": len(conditions_bytes(a.condition for a in plan)),
    }
    if texts.sentences is not None:
        table = (
            (a.condition.name, p.relation, p.id, len(texts.sentences.ids[row]) - 1, -10 * _NUMBER)
            for a in plan
            for row in sentences_of(a, texts.sentences)
            for p in [texts.sentences.prompts[row]]
        )
        files["perplexity.csv"] = len(csv_bytes(PERPLEXITY, table))
    is_greedy = not options.choose
    more = len(rows) * ((options.generate is None) + CHARACTER_BYTES - 1) if is_greedy else 0
    return dry.planned(
        "ablate",
        {
            "conditions": len(first),
            "prompts": len(prompts),
            "answers": answers,
            "asked": len(rows),
            "sentences read": len(read),
        },
        **work.told,
        more=more,
        tensors={
            "activations": work.peak(n_held=dry.n_inner),
            "masks": _masks(dry, min(len(plan), waves), how.mode),
        },
        host={"neurons of the conditions": sum(8 * len(a.places) for a in plan)},
        files=files,
        notes=["ablate: an answer whose first token is not the right one takes one token more"]
        if options.generate is None and is_greedy
        else [],
    )


def _add(
    work: Work,
    rows: Sequence[Row],
    lengths: Sequence[int],
    batch_tokens: int,
    waves: int,
    logits: int,
    *,
    then: str,
    steps: int = 0,
) -> None:
    """Rows of conditions, in the batches that `Evaluator.run` makes of them.

    What the last layer's MLP would give at columns without logits is left out there.
    """
    for _, batch in plan_rows(rows, lengths, batch_tokens, waves):
        own = [lengths[row.prompt] for row in batch]
        n, width = len(own), max(own)
        less = n * (width - logits) * work.dry.last_mlp if 0 < logits < width else 0
        work.batch(own, logits=logits, less=less, then=then)
        for step in range(steps):
            work.step(n, width + step)


def _masks(dry: Dry, n_conditions: int, mode: str) -> int:
    """The largest masks: as bytes before they are packed, a row for the clean model more."""
    return (n_conditions + 1) * dry.order.total * (1 if mode == "zero" else 5)


def _said(tokenizer: Any, text: str, n: int) -> str:
    ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids[:n])).strip()


def _effects_bytes(
    dry: Dry, prompts: Sequence[Prompt], sets: Sets, texts: Texts, options: AblateOptions
) -> int:
    """About the size of effects.csv: every answer as long as the right one."""
    sizes, n = [], options.generate or N_ANSWER_TOKENS
    known: dict[str, str] = {}
    for p in prompts:
        if p.object not in known:
            known[p.object] = _said(dry.tokenizer, p.object, n)
        about = (p.relation, split_name(p, sets.own), p.id)
        row = (*about, known[p.object], p.object, 1, p.object, _NUMBER)
        more = (p.options[0],) if p.options else ()
        sizes.append(len(csv_bytes((), [(*row, *more)])) - len(csv_bytes((), [])))
    total = 80  # the heading
    for ablation in sets.plan:
        name = len(ablation.condition.name.encode()) + 1
        total += sum(sizes[row] + name for row in ablation.prompts)
    return total


def _accuracy_bytes(prompts: Sequence[Prompt], sets: Sets) -> int:
    columns = ("condition", "relation", "split", "n_prompts", "n_correct", "accuracy")
    rows: dict[tuple[str, str, str], int] = {}
    for ablation in sets.plan:
        for row in ablation.prompts:
            p = prompts[row]
            key = (ablation.condition.name, p.relation, split_name(p, sets.own))
            rows[key] = rows.get(key, 0) + 1
    return len(csv_bytes(columns, ((*key, n, n, n // 3 / n) for key, n in rows.items())))


# --- nll ---------------------------------------------------------------------------------------


def nll(
    model: str,
    neurons: Path,
    sources: Sequence[str],
    output: Path,
    options: NllOptions,
    reading: SourceOptions,
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[Planned]:
    """The plan of the command `nll`, with its parameters."""
    check_folder(output)
    named = NeuronFile.read(checked(neurons))
    found = parse_sources(sources, **vars(reading))
    table = output / "nll.csv"
    refuse_overwrite(table, force or is_unfinished(table, "nll"))
    dry = _dry(model, load_options, named, False)
    sets, _ = read_sets(named, dry.shape)
    empty_sets(sets)
    cut = choose_packing(dry.model, dry.tokenizer, found, options)
    cut = replace(cut, max_tokens=options.windows * cut.window, join=options.join)
    plan = plan_masks(sets, dry.shape, options.random_sets)
    with Feed(
        found, dry.tokenizer, cut, vocabulary=dry.vocabulary, n_workers=options.workers
    ) as feed:
        texts = read_texts(feed, options.windows)
    first = same_ablation(plan, How())
    rows = [Row(mask, i) for mask in dict.fromkeys(first) for i in range(len(texts.ids))]
    lengths, work = [len(ids) - 1 for ids in texts.ids], Work(dry)
    waves = wave_size("zero", dry.order.total)
    for _, batch in plan_rows(rows, lengths, options.batch_tokens, waves):
        work.batch([lengths[row.prompt] for row in batch], logits=0)
    head = dry.costs.logit * work.tokens  # of slices of all tokens
    groups, masks = dict.fromkeys(texts.groups), [a.condition.name for a in plan]
    windows = (
        (mask, group, 10, n, -10 * _NUMBER)
        for mask in masks
        for group, n in zip(texts.groups, lengths, strict=True)
    )
    cells = ((m, g, 100, 10000, *[-10 * _NUMBER] * 3) for m in masks for g in groups)
    told = work.told
    told["forwards"] = (*told["forwards"], (1, head, 0))
    yield dry.planned(
        "nll",
        {"masks": len(masks), "windows": len(texts.ids), "read": len(rows)},
        **told,
        tensors={
            "activations": work.peak(dry.model.base_model, cache=False, n_held=dry.n_inner),
            "logits": 3 * 4 * min(LOGITS, math.prod(work.largest[:2]) * dry.vocabulary),
            "masks": _masks(dry, min(len(plan), waves), "zero"),
        },
        files={
            "nll.csv": len(csv_bytes(COLUMNS, cells)),
            "nll_windows.csv": len(csv_bytes(WINDOWS, windows)),
        },
    )


# --- generate ----------------------------------------------------------------------------------


def generate(
    model: str,
    prompts: Path,
    output: Path,
    neurons: Path,
    options: GenerateOptions,
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[Planned]:
    """The plan of the command `generate`, with its parameters: bounds, if no text ends before."""
    journal = output.with_name(f"{output.name}.journal")
    for path in (output, *beside(output)):
        refuse_overwrite(path, force or journal.exists())
    found = NeuronFile.read(checked(neurons))
    asked = read_questions(checked(prompts), options.template)
    if options.measure:
        check_answers(asked)
    dry = _dry(model, load_options, found, any(p.images for p in asked))
    masks = generate_masks(found, options, dry.shape, asked)
    plan: list[Ablation] = [ablation for some in masks.values() for ablation in some]
    n_new, n_seeds = options.max_new_tokens, options.n_seeds
    questions = encode(dry.tokenizer, dry.model, asked, answers=False, n_tokens=n_new)
    first = same_ablation(plan, How(options.mode))
    pairs = [(first[i], p) for i, ablation in enumerate(plan) for p in ablation.prompts]
    rows = [Row(i, p * n_seeds + s) for i, p in dict.fromkeys(pairs) for s in range(n_seeds)]
    lengths = [len(ids) + n_new for ids in questions.ids for _ in range(n_seeds)]
    work, waves = Work(dry), wave_size(options.mode, dry.order.total)
    for _, batch in plan_rows(rows, lengths, options.batch_tokens, waves):
        own = [lengths[row.prompt] - n_new for row in batch]
        work.batch(own, then="answers")
        for step in range(n_new - 1):
            work.step(len(own), max(own) + step + 1)
    n_donor, notes = _donor(options.donor, load_options)
    words = dry.tokenizer.decode(questions.ids[0][:4]) or "word"
    text = words * (n_new // 4 + 1)
    lines = [
        Generated(a.condition.name, "", asked[p].id, asked[p].prompt, text, n_new, "length")
        for a in plan
        for p in a.prompts
        for _ in range(n_seeds)
    ]
    tensors = {
        "activations": work.peak(n_held=dry.n_inner),
        "masks": _masks(dry, min(len(plan), waves), options.mode),
        "keys and values": work.largest[0] * n_new * dry.cache_bytes(),
    }
    tensors |= {"weights of the donor": n_donor} if n_donor else {}
    yield dry.planned(
        "generate",
        {"masks": len(masks), "prompts": len(asked), "texts": len(rows)},
        **work.told,
        tensors=tensors,
        files={output.name: len(lines_bytes(lines))},
        notes=[
            f"generate: all numbers are bounds, as if no text ended before its {n_new} tokens",
            *notes,
        ],
    )
