"""Which sentences are asked, and for which tokens: an answer's first one, or one that is given.

The stages that attribute call it; the sentences are those of `texts/knowledge.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relneuron.artifact.files import RelneuronError, real_path
from relneuron.artifact.manifest import checked
from relneuron.artifact.prompts import Prompt, prompts_bytes
from relneuron.model.ask import Asker
from relneuron.model.layers import input_device
from relneuron.model.questions import Questions, encode, object_continuations
from relneuron.texts.knowledge import TargetPrompt, read_knowledge
from relneuron.texts.tokens import (
    Continuation,
    blank_notice,
    encode_texts,
    find_token,
    listed,
    without_blanks,
)


@dataclass(frozen=True)
class Targets:
    """N sentences as tokens, with the token that each is asked for: its answer's first one.

    ids              of each sentence, special tokens included, and the space in front of the answer
                     where the tokenizer makes a token of it alone
    n_answer_tokens  1 where the target is given
    tokens           all of each answer, the target its first
    notices          what a reader of the results must know of them
    rights           first tokens of all right answers of each sentence, those that other lines give
                     it among them
    answers          the right answer that is asked for, the most probable one of several
    """

    ids: list[list[int]]
    targets: list[int]
    n_answer_tokens: list[int]
    notices: list[str]
    rights: list[list[int]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    @property
    def n_several(self) -> int:
        """How many answers have more than one token."""
        return sum(n > 1 for n in self.n_answer_tokens)


def encode_targets(
    tokenizer: Any,
    model: Any,
    prompts: Sequence[Prompt],
    *,
    strict: bool = False,
    answers: bool = True,
    batch_tokens: int = 2048,
) -> Targets:
    """Tokenise sentences and their answers, or the targets that are given.

    The target is the first token that carries bytes of the answer (`tokens.continuations`); of
    several right answers the model is asked which one it finds most probable. An answer of several
    tokens is stood for by its first one, or with `strict` refused. Without `answers` every target
    is 0 until the model is asked.

    Raises RelneuronError that names the prompt for a sentence without a token or longer than the
    context, an answer without a token, a target that is none, and a token that the model does not
    have.
    """
    if not prompts:
        raise RelneuronError("there is no sentence to attribute", "give at least one prompt")
    texts = [prompt.prompt for prompt in prompts]
    _check_lengths(model, prompts, encode_texts(tokenizer, texts))
    texts, changed = without_blanks(tokenizer, texts, [p.object or "a" for p in prompts])
    notices = [blank_notice([prompts[row].id for row in changed])] if changed else []
    prompts = [replace(prompt, prompt=text) for prompt, text in zip(prompts, texts, strict=True)]
    heads = encode(tokenizer, model, prompts, answers=False, n_tokens=0).ids
    if not answers:
        n = len(heads)
        return Targets(heads, [0] * n, [1] * n, notices, [[] for _ in heads], [""] * n)
    every = object_continuations(tokenizer, prompts, texts)
    vocabulary, n_logits = model.get_input_embeddings().num_embeddings, _n_logits(model)
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, TargetPrompt):
            every[row] = [_find_target(tokenizer, prompt, every[row][0])]
        for name, answer in zip(prompt.objects, every[row], strict=False):
            _check_answer(prompt, name, answer, vocabulary, n_logits)
    starts = [[(*one.spaces, one.tokens[0]) for one in some] for some in every]
    which = [0] * len(prompts)
    # A model without numbers cannot say: the first answer stands for the others.
    if any(len({*some}) > 1 for some in starts) and input_device(model).type != "meta":
        questions = Questions(list(prompts), heads, [some[0][-1] for some in starts], starts)
        which = Asker(model, tokenizer).most_probable(questions, batch_tokens)
    found = [some[k] for some, k in zip(every, which, strict=True)]
    names = [prompt.objects[k] for prompt, k in zip(prompts, which, strict=True)]
    for prompt, name, answer in zip(prompts, names, found, strict=True):
        if strict and len(answer.tokens) > 1:
            raise RelneuronError(
                f"prompt {prompt.id}: its answer {name!r} has {len(answer.tokens)} tokens",
                "leave --strict out to ask for the first one, or remove the prompt",
            )
    ids = [[*head, *answer.spaces] for head, answer in zip(heads, found, strict=True)]
    _check_lengths(model, prompts, ids)
    after_space = [p.id for p, answer in zip(prompts, found, strict=True) if answer.spaces]
    if after_space:
        notices.append(
            f"{listed(after_space)}: the tokenizer makes a token of the space before the answer; "
            "the answer is asked for after it"
        )
    n_tokens = [len(answer.tokens) for answer in found]
    together: dict[tuple[str, str], list[int]] = {}
    for prompt, some in zip(prompts, starts, strict=True):
        together.setdefault((prompt.relation, prompt.prompt), []).extend(s[-1] for s in some)
    rights = [together[prompt.relation, prompt.prompt] for prompt in prompts]
    targets = [answer.tokens[0] for answer in found]
    tokens = [list(answer.tokens) for answer in found]
    return Targets(ids, targets, n_tokens, notices, rights, names, tokens)


def _find_target(tokenizer: Any, prompt: TargetPrompt, answer: Continuation) -> Continuation:
    """The token that a sentence gives; a text that stands for the answer may have several."""
    if isinstance(prompt.target, int):
        return Continuation((), (prompt.target,))
    is_answer = prompt.object == prompt.target.strip()
    found = find_token(
        tokenizer, prompt.prompt, prompt.target, prompt.language, may_be_id=not is_answer
    )
    if found is not None or is_answer:
        return found or answer
    raise RelneuronError(
        f"prompt {prompt.id}: its target {prompt.target!r} is no token of the tokenizer",
        "give one token as text or by its id, or leave it out to ask for the answer's first",
    )


def _check_answer(
    prompt: Prompt, name: str, answer: Continuation, vocabulary: int, n_logits: int | None
) -> None:
    if not answer.tokens:
        raise RelneuronError(
            f"prompt {prompt.id}: its object {name!r} makes no token",
            "give every fact an object, or remove the prompt",
        )
    first, largest = answer.tokens[0], max(answer.tokens)
    if isinstance(prompt, TargetPrompt) and first >= (n_logits or vocabulary):
        raise RelneuronError(
            f"prompt {prompt.id}: its target is the token {first}, the model predicts "
            f"{n_logits or vocabulary} tokens",
            "give an id of the model's vocabulary",
        )
    if largest >= vocabulary:
        raise RelneuronError(
            f"the tokenizer made the token {largest}, the model has {vocabulary} tokens",
            "give a model and a tokenizer that belong together",
        )
    if n_logits is not None and first >= n_logits:
        raise RelneuronError(
            f"prompt {prompt.id}: its answer {name!r} begins with the token "
            f"{first}, the model predicts {n_logits} tokens",
            "give a model and a tokenizer that belong together",
        )


def _check_lengths(model: Any, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for prompt, line in zip(prompts, ids, strict=True):
        if context is not None and len(line) > context:
            raise RelneuronError(
                f"prompt {prompt.id} has {len(line)} tokens, the model's context {context}",
                "shorten or remove it",
            )


def _n_logits(model: Any) -> int | None:
    """V, the tokens that the unembedding knows; not known without one."""
    head = model.get_output_embeddings()
    return None if head is None else int(head.weight.shape[0])


@dataclass(frozen=True)
class Asked:
    """The sentences that are attributed, their targets, and all prompts as the study's copy."""

    prompts: list[Prompt]
    targets: Targets
    copy: bytes


def read_asked(path: Path, folder: Path, model: Any, tokenizer: Any, options: Any) -> Asked:
    """What a stage that attributes asks, and its plan counts: read and tokenised.

    `options` are the stage's: `splits`, `target`, `batch_tokens`, and `strict` where it has it.
    Raises what `encode_targets` raises, and refuses splits without a prompt and an output `folder`
    that is a file, or that of the facts.
    """
    has_answers = options.target == "answer"
    everything, prompts = _read(path, folder, options.splits, answers=has_answers)
    targets = encode_targets(
        tokenizer,
        model,
        prompts,
        strict=getattr(options, "strict", False),
        answers=has_answers,
        batch_tokens=options.batch_tokens,
    )
    return Asked(prompts, targets, prompts_bytes(everything))


def _read(
    path: Path, folder: Path, splits: Sequence[str], *, answers: bool
) -> tuple[list[Prompt], list[Prompt]]:
    """All prompts of a file or of facts, and those of some splits (default: of all), to ask."""
    if folder.is_file():
        raise RelneuronError(f"{folder} is a file", "give a folder", 2)
    everything = read_knowledge(checked(path), answers=answers)
    if path.is_dir() and real_path(path) == real_path(folder):
        raise RelneuronError(f"{folder} is the folder of the facts", "choose another output", 2)
    prompts = [p for p in everything if not splits or p.split in splits]
    if not prompts:
        raise RelneuronError(
            f"{path} has no prompt of the splits {', '.join(splits)}",
            "name others with --splits",
            2,
        )
    return everything, prompts
