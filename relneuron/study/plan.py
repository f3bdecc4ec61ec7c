"""What a whole study would take: `run --dry-run`, a row a stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.ablation.asked import Prompts, Sets, encode_asked
from relneuron.ablation.conditions import default_sizes, plan_conditions
from relneuron.ablation.evaluate import How
from relneuron.ablation.options import FROM_RESPONSES, AblateOptions
from relneuron.ablation.plan import plan_ablate
from relneuron.artifact.effects import own_languages
from relneuron.artifact.neurons import Shape, default_top
from relneuron.artifact.options import PlaceOptions
from relneuron.artifact.planned import Planned
from relneuron.artifact.prompts import Prompt, prompts_bytes
from relneuron.methods.gains.options import AttributeOptions
from relneuron.methods.gains.plan import plan_attribute
from relneuron.methods.gains.study import BEST
from relneuron.methods.responses.asked import Asked, asked_of
from relneuron.methods.responses.concepts import concept_subjects, make_concept_prompts
from relneuron.methods.responses.options import DISK, RankOptions, RecordOptions
from relneuron.methods.responses.plan import place_of, plan_identify, plan_record
from relneuron.model.batches import cut
from relneuron.model.dry import Dry, Work, dry_model
from relneuron.model.questions import encode
from relneuron.model.targets import encode_targets
from relneuron.report.page import load_tools
from relneuron.study.cards import AT_ONCE
from relneuron.study.facts import Facts
from relneuron.study.run import check_asked, relations_of
from relneuron.study.settings import RunOptions
from relneuron.texts.facts import Relation
from relneuron.texts.neutral import sentences_bytes
from relneuron.texts.prompts import chat_wrap, make_prompts, make_sentences
from relneuron.texts.tokens import check_bos

_EXAMPLES = 8  # texts of each card


def run(
    model: str,
    facts: Path,
    output: Path,
    options: RunOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[Planned]:
    """The plan of the command `run`, with its parameters.

    Neurons that are not known yet stand in for those that will be chosen: as many, of every
    relation others. What the model answers wrong makes less of it.
    """
    o, given = options, Facts.of(facts)
    relations = relations_of(given, output, o, force)
    dry = dry_model(model, o.part(PlaceOptions), attention=o.attention)
    wrap = chat_wrap(dry.tokenizer) if o.chat_template else str
    wanted = [p for r in relations for p in make_prompts(r, n_eva=o.eva, seed=o.seed, wrap=wrap)]
    questions = encode(dry.tokenizer, dry.model, wanted)
    if o.exclude_bos:
        check_bos(dry.tokenizer, questions.ids)
    check_asked(o, given.where, relations, wanted, dry.shape)
    sentences = [s for r in relations for s in make_sentences(r, n_eva=o.eva, seed=o.seed)]
    n_copy, path = len(prompts_bytes(wanted)), output / "prompts.jsonl"
    files: dict[str, int | None] = {"prompts.jsonl": n_copy}
    files |= {"sentences.jsonl": len(sentences_bytes(sentences))} if sentences else {}
    about = {"relations": len(relations), "prompts": len(wanted), "sentences": len(sentences)}
    yield Planned("prompts", about, files=files, device=dry.device)

    asked = asked_of(wanted, path, dry.model, dry.tokenizer, o.part(RecordOptions))
    where = place_of(o.responses, dry, asked) if o.drop_responses else DISK
    yield _first_answers(dry, asked)
    recorded = plan_record(dry, asked, 0, where)
    yield replace(recorded, files={k: v for k, v in recorded.files.items() if k not in files})
    yield plan_identify(dry, asked, o.part(RankOptions), where)
    top = min(o.top or default_top(dry.shape), dry.order.total)
    if o.cards:
        yield _look(dry, asked, min(o.cards, top * len(relations)), o)
    if "concepts" in o.analyses:
        yield from _concepts(dry, relations, o, top)
    if "gain" in o.analyses:
        yield _gain(dry, wanted, o)
    ablated = _ablate(dry, relations, Prompts.of(path, wanted, o.part(AblateOptions)), sentences, o)
    yield ablated
    yield _report(dry, ablated)


def _first_answers(dry: Dry, asked: Asked) -> Planned:
    """One prompt of each relation, before all of them."""
    work, first = Work(dry), {p.relation: row for row, p in reversed([*enumerate(asked.prompts)])}
    lengths = sorted(asked.questions.length(row) for row in first.values())
    work.batch(lengths)
    work.step(len(lengths), lengths[-1] + 1)
    return dry.planned("first answers", {"prompts": len(first)}, **work.told)


def _look(dry: Dry, asked: Asked, n_cards: int, o: RunOptions) -> Planned:
    """Cards, at most: each of its texts as long as the longest one, and another one's of no other.

    A text is read for the neuron's values, and asked what follows with the neuron and without; the
    last MLP is then computed of its last token alone.
    """
    work, longest = Work(dry), max(map(asked.questions.length, asked.det))
    for start in range(0, n_cards, AT_ONCE):
        n = _EXAMPLES * min(AT_ONCE, n_cards - start)
        different = min(n, len(asked.det))
        for n_rows, n_spared in ((different, 0), (different + n, longest - 1)):
            for rows in cut(range(n_rows), lambda _: longest, o.batch_tokens):
                less = len(rows) * n_spared * dry.last_mlp
                work.batch([longest] * len(rows), less=less)
    return Planned(
        "look",
        {"cards": n_cards},
        more=work.tokens,
        more_forwards=work.told["forwards"],
        files={"look.html": None, "cards.jsonl": None, "sets.csv": None},
        device=dry.device,
        notes=[f"look: a card has {_EXAMPLES} texts, each read three times at most"],
    )


def _concepts(
    dry: Dry, relations: Sequence[Relation], o: RunOptions, top: int
) -> Iterator[Planned]:
    """The study of the concepts that the relations are of."""
    made = make_concept_prompts(relations, n_eva=o.eva, seed=o.seed)
    if not made:
        return
    recording = replace(
        o.part(RecordOptions), attention=False, accept_object_prefix=False, validate=False
    )
    asked = asked_of(made, Path("concepts/prompts.jsonl"), dry.model, dry.tokenizer, recording)
    where = place_of(o.responses, dry, asked) if o.drop_responses else DISK
    recorded = plan_record(dry, asked, len(prompts_bytes(made)), where)
    yield replace(recorded, stage="concepts, record", notes=[])
    ranking = RankOptions(top=top, negatives=1, permutations=0, bootstrap=0, noise=0, seed=o.seed)
    chosen = plan_identify(dry, asked, ranking, where)
    yield replace(chosen, stage="concepts, identify", notes=[])


def _gain(dry: Dry, wanted: Sequence[Prompt], o: RunOptions) -> Planned:
    """Neurons by log-probability gain, of all prompts whose answers may be right."""
    det = [p for p in wanted if p.split == "det"]
    options = AttributeOptions(
        kinds=("ffn_neuron",), top=BEST, compare=False, batch_tokens=o.batch_tokens
    )
    targets = encode_targets(dry.tokenizer, dry.model, det)
    planned = plan_attribute(dry, det, targets, options, len(prompts_bytes(det)))
    return replace(
        planned,
        stage="gain, attribute",
        notes=[*planned.notes, "gain: as if all were answered right"],
    )


# --- ablate, of neurons that are not known -----------------------------------------------------


def _ablate(
    dry: Dry, relations: Sequence[Relation], prompts: Prompts, sentences: Any, o: RunOptions
) -> Planned:
    options = o.part(AblateOptions)
    sets = _stand_ins(relations, prompts, dry.shape, o)
    texts = encode_asked(
        dry.tokenizer, dry.model, prompts, sets, options, dry.order.total, given=sentences
    )
    planned = plan_ablate(dry, prompts.asked, sets, texts, options, _how(sets, o), "effects.csv")
    unsure = "--fdr says how many neurons a set has" if o.fdr is not None else ""
    notes = [*planned.notes, *([f"ablate: sets of the default --top; {unsure}"] if unsure else [])]
    return replace(planned, notes=notes)


def _report(dry: Dry, ablated: Planned) -> Planned:
    """The page: what draws it is loaded here, too; its tables and texts are not told."""
    load_tools()
    return dry.planned(
        "report",
        {"conditions": ablated.reads["conditions"]},
        files={"report.html": None, "analyses/*.csv": None},
    )


def _stand_ins(
    relations: Sequence[Relation], prompts: Prompts, shape: Mapping[str, Any], o: RunOptions
) -> Sets:
    """The conditions of sets as large as those that will be chosen, no two of them alike."""
    total, names = Shape.of(shape).total, [relation.name for relation in relations]
    top = min(o.top or default_top(shape), total)
    needs_all = bool({"sizes", "sites"} & {*o.analyses})
    concepts = list(concept_subjects(relations, n_eva=o.eva, seed=o.seed))
    concepts = concepts if len(concepts) > 1 and "concepts" in o.analyses else []
    gains = names if "gain" in o.analyses else []

    def others(number: int, n: int) -> np.ndarray[Any, Any]:
        # Drawn, so that the best of a site differ, too.
        rng = np.random.default_rng(number)
        return rng.permutation(total) if n == total else rng.choice(total, n, replace=False)

    ranked = [others(number, total if needs_all else top) for number in range(len(names))]
    rankings = dict(zip(names, ranked, strict=True))
    n = len(names)
    sizes = o.sizes or default_sizes(top, total)
    plan = plan_conditions(
        {name: ranking[:top] for name, ranking in rankings.items()},
        rankings,
        {name: others(n + k, top) for k, name in enumerate(concepts)},
        {name: others(n + len(concepts) + k, top) for k, name in enumerate(gains)},
        prompts.asked,
        shape,
        analyses=o.analyses,
        sizes=sizes,
        random_seeds=o.random_seeds,
        own=own_languages(prompts.everything),
    )
    has = {"concepts": bool(concepts), "gain": bool(gains)}
    return Sets(plan, own_languages(prompts.everything), top, sizes, total, has, [])


def _how(sets: Sets, o: RunOptions) -> How:
    """What becomes of neurons, as far as it says which conditions are the same."""
    if o.mode not in FROM_RESPONSES:
        return How(o.mode, o.factor or 0.0)
    of = {a.condition.name: a.condition.relation for a in sets.plan}
    if o.mode == "mean" and o.mean_of == "all":
        of = dict.fromkeys(of, "")
    values = {relation: np.zeros(0, np.float32) for relation in of.values()}
    return How("mean", means={name: values[relation] for name, relation in of.items()})
