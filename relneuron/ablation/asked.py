"""What `ablate` asks, and what is off: which conditions, prompts and sentences, before it starts.

`ablate.py` asks it; `plan.py` counts it, of a model without numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relneuron.ablation.conditions import (
    Ablation,
    default_sizes,
    empty_sets,
    plan_conditions,
    read_rankings,
    read_sets,
    scores_beside,
)
from relneuron.ablation.evaluate import How, same_ablation
from relneuron.ablation.how import SETS_BESIDE, left_out, sets_beside
from relneuron.ablation.options import AblateOptions
from relneuron.ablation.pictured import check_positions
from relneuron.ablation.said import PackedRows, Row
from relneuron.artifact.effects import own_languages
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import checked
from relneuron.artifact.neurons import NeuronFile, Shape
from relneuron.artifact.prompts import Prompt, read_prompts, rows_about
from relneuron.model.pictures import Processor
from relneuron.model.questions import N_ANSWER_TOKENS, Questions, encode
from relneuron.texts.neutral import Sentence, read_sentences
from relneuron.texts.tokens import target_notices


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file: all of them, and those of the splits that are asked."""

    path: Path
    everything: list[Prompt]
    asked: list[Prompt]

    @classmethod
    def read(cls, path: Path, options: AblateOptions, neurons: NeuronFile) -> Prompts:
        found = cls.of(path, read_prompts(checked(path)), options)
        check_positions(options.positions, neurons, found.asked)
        return found

    @classmethod
    def of(cls, path: Path, everything: list[Prompt], options: AblateOptions) -> Prompts:
        """Of prompts that were read from the file, or will be written to it."""
        asked = [p for p in everything if p.split in options.splits]
        if not asked:
            raise RelneuronError(
                f"{path} has no prompt of the splits {', '.join(options.splits)}",
                "name others with --splits",
                2,
            )
        return cls(path, everything, asked)


@dataclass(frozen=True)
class Sets:
    """The conditions of a study and what is to be said of them.

    own       each relation's own language
    size      neurons of the largest set, and so of a random one
    sizes     those of `--analyses sizes`
    known     how many ranks of each ranking are known; `has`, which analyses have their sets
    """

    plan: list[Ablation]
    own: dict[str, str]
    size: int
    sizes: Sequence[int]
    known: int
    has: Mapping[str, bool]
    notices: list[str]


def plan_sets(
    path: Path,
    neurons: NeuronFile,
    prompts: Prompts,
    options: AblateOptions,
    shape: Mapping[str, Any],
    of_weights: Sequence[str] = (),
) -> Sets:
    """The conditions of the sets in the file `path`; `of_weights` is said of the neurons first."""
    sets, doubles = read_sets(neurons, shape)
    known = rows_about(prompts.everything)
    strangers = [name for name in sets if name not in known]
    if strangers and not options.any_set:
        raise RelneuronError(
            f"{path} has a set for {strangers[0]}, which no prompt is about",
            "correct its name, or add --any-set to switch it off all the same",
        )
    notices = [*empty_sets(sets), *of_weights]
    notices += [f"{name}: {n} neurons stood there twice" for name, n in doubles.items()]
    rankings = dict(sets)
    if {"sizes", "sites"} & {*options.analyses}:
        rankings = read_rankings(checked(scores_beside(path)), sets, shape)
    concepts, gains = (
        sets_beside(path.parent / SETS_BESIDE[analysis], shape)
        if analysis in options.analyses
        else {}
        for analysis in ("concepts", "gain")
    )
    total, size = Shape.of(shape).total, max(map(len, sets.values()), default=0)
    sizes = options.sizes or default_sizes(size, total)
    own = own_languages(prompts.everything)
    plan = plan_conditions(
        sets,
        rankings,
        concepts,
        gains,
        prompts.asked,
        shape,
        analyses=options.analyses,
        sizes=sizes,
        random_seeds=options.random_seeds,
        with_modules=options.module_sets,
        own=own,
        unrelated=options.unrelated,
        products=options.mode == "patch",
    )
    has = {"concepts": bool(concepts), "gain": bool(gains)}
    least = min(map(len, rankings.values()), default=total)
    return Sets(plan, own, size, sizes, least, has, notices)


@dataclass(frozen=True)
class Texts:
    """Prompts and neutral sentences as tokens; no sentences where none are read."""

    questions: Questions
    sentences: Questions | None
    notices: list[str]


def encode_asked(
    tokenizer: Any,
    model: Any,
    prompts: Prompts,
    sets: Sets,
    options: AblateOptions,
    total: int,
    processor: Processor | None = None,
    given: Sequence[Sentence] | None = None,
) -> Texts:
    """The tokens of what is asked; of the model its config alone is. `total`: its neurons.

    Neutral sentences are read beside the prompts, unless they are `given`.
    """
    questions = encode(
        tokenizer,
        model,
        prompts.asked,
        n_tokens=options.generate or N_ANSWER_TOKENS,
        processor=processor,
        options=options.choose is None,
    )
    sentences = _neutral(options, prompts.path.parent / "sentences.jsonl", given)
    texts = encode(tokenizer, model, sentences, answers=False, n_tokens=0) if sentences else None
    notices = [*questions.notices]
    if options.choose is None:
        notices += target_notices(tokenizer, prompts.asked, questions.answers)
    has = {**sets.has, "perplexity": texts is not None}
    notices += left_out(options.analyses, sets.sizes, known=sets.known, total=total, has=has)
    return Texts(questions, texts, notices)


def _neutral(options: AblateOptions, path: Path, given: Sequence[Sentence] | None) -> list[Prompt]:
    """Neutral sentences as prompts that ask nothing."""
    if "perplexity" not in options.analyses or (given is None and not path.exists()):
        return []
    found = read_sentences(checked(path)) if given is None else given
    return [
        Prompt(s.id, s.relation, "neutral", "", s.template, "", s.object, s.sentence) for s in found
    ]


def rows_asked(plan: Sequence[Ablation], how: How) -> PackedRows:
    """Every row once, also where two conditions have the same neurons."""
    return _rows(plan, how, lambda ablation: ablation.prompts)


def rows_read(plan: Sequence[Ablation], texts: Questions | None, how: How) -> PackedRows:
    """Sentences of a relation under the clean model, its own set and the random sets."""
    return _rows(plan, how, lambda ablation: sentences_of(ablation, texts) if texts else ())


def _rows(
    plan: Sequence[Ablation], how: How, places: Callable[[Ablation], Sequence[int]]
) -> PackedRows:
    alike: dict[int, list[Ablation]] = {}
    for first, ablation in zip(same_ablation(plan, how), plan, strict=True):
        alike.setdefault(first, []).append(ablation)
    return PackedRows(
        Row(first, row)
        for first, some in alike.items()
        for row in dict.fromkeys(row for ablation in some for row in places(ablation))
    )


def sentences_of(ablation: Ablation, texts: Questions) -> list[int]:
    """The sentences that are read under a condition."""
    about = ablation.condition
    return [
        row
        for row, text in enumerate(texts.prompts)
        if len(texts.ids[row]) > 1
        and (about.kind in ("clean", "random") or about.name == text.relation)
    ]
