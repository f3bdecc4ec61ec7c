"""The tokens that sentences are asked for, and the rule to keep a sentence.

The `attribute` stage calls it with the sentences of `texts/knowledge.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relneuron.artifact.files import Json, RelneuronError, atomic_write, refuse_overwrite, sha256
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.prompts import Prompt
from relneuron.model.ask import Asker
from relneuron.model.batches import Budget
from relneuron.model.questions import Questions, encode, object_continuations
from relneuron.model.stream.parts import ResidualModel
from relneuron.model.stream.trace import trace
from relneuron.texts.knowledge import TargetPrompt
from relneuron.texts.tokens import (
    Continuation,
    blank_notice,
    encode_texts,
    find_token,
    listed,
    without_blanks,
)

N_MOST_PROBABLE = 10  # a kept sentence's answer is among so many (arXiv 2312.12141, section 4)


@dataclass(frozen=True)
class Targets:
    """N sentences as tokens, with the token that each is asked for: its answer's first one.

    ids              of each sentence, special tokens included, and the space in front of the answer
                     where the tokenizer makes a token of it alone
    n_answer_tokens  1 where the target is given
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
    if any(len({*some}) > 1 for some in starts):
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
    return Targets(ids, targets, n_tokens, notices, rights, names)


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


# --- the rule to keep a sentence -------------------------------------------------------------


def type_tokens(targets: Sequence[int], types: Sequence[str]) -> dict[str, Tensor]:
    """Each type's target tokens, (K,) int64, each once and ascending."""
    found: dict[str, set[int]] = {}
    for target, kind in zip(targets, types, strict=True):
        found.setdefault(kind, set()).add(target)
    return {kind: torch.tensor(sorted(tokens), device="cpu") for kind, tokens in found.items()}


def keep(
    logits: Tensor,
    targets: Tensor,
    types: Sequence[str],
    type_tokens: Mapping[str, Tensor],
    rights: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Which sentences the model knows (arXiv 2312.12141, section 4): (E,) bool.

    `logits` (E, V) at the last position, `targets` (E,) int64. A sentence is kept if at most nine
    tokens have a larger logit than its target, and its target a larger one than every other token
    of `type_tokens[type]` but its `rights`, the first tokens of its other right answers. Where
    the type has no other token the first condition alone decides. A target whose logit is not
    finite is not kept.
    """
    own = logits.gather(1, targets[:, None])
    kept = ((logits > own).sum(1) < N_MOST_PROBABLE) & own[:, 0].isfinite()
    for kind in dict.fromkeys(types):
        rows = torch.tensor([i for i, name in enumerate(types) if name == kind], device="cpu")
        rows, tokens = rows.to(logits.device), type_tokens[kind].to(logits.device)
        is_own = tokens == targets[rows, None]
        for i, row in enumerate(rows.tolist() if rights else ()):
            is_own[i] |= torch.isin(tokens, tokens.new_tensor(rights[row]))
        above = (own[rows] > logits[rows[:, None], tokens]) | is_own
        kept[rows] &= above.all(1)
    return kept


def predictions(
    residual: ResidualModel,
    ids: Sequence[list[int]],
    batches: Sequence[Sequence[int]],
    budget: Budget,
) -> list[int]:
    """The model's most probable next token of each sentence, in the batches that are scored."""
    found = [0] * len(ids)

    def ask(rows: list[int]) -> list[int]:
        best: list[int] = trace(residual, [ids[row] for row in rows]).logits.argmax(1).tolist()
        return best

    for rows in batches:
        for row, token in zip(rows, budget.run(rows, lambda row: len(ids[row]), ask), strict=True):
            found[row] = token
    return found


# --- the prompts beside the scores -----------------------------------------------------------


def is_copy(copy: Path, source: Path, data: bytes) -> bool:
    return copy.is_file() and (copy.samefile(source) or copy.read_bytes() == data)


def check_recorded(folder: Path, source: Path, data: bytes, model: Json) -> None:
    """Refuse the folder of a recorded study of another model or of other prompts."""
    manifest = Manifest(folder)
    manifest.check_model(model)
    recorded = manifest.data["stages"].get("record", {}).get("inputs")
    if recorded is None:
        return
    copy = folder / "prompts.jsonl"
    if not is_copy(copy, source, data) or sha256(copy) != recorded.get("prompts"):
        raise RelneuronError(
            f"{folder} holds a study of other prompts", "use another output, or its prompts", 2
        )


def check_copy(copy: Path, source: Path, data: bytes, force: bool) -> None:
    """Refuse to replace other prompts than these."""
    if not is_copy(copy, source, data):
        refuse_overwrite(copy, force)


def write_copy(copy: Path, source: Path, data: bytes) -> None:
    if not is_copy(copy, source, data):
        atomic_write(copy, data)
