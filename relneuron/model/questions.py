"""Prompts as tokens, what answers them right, and how a prompt goes on with its right objects.

Every stage that asks a model encodes its prompts here; `model/ask.py` asks them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from relneuron.artifact.files import RelneuronError, fold
from relneuron.artifact.prompts import Prompt
from relneuron.model.pictures import Processor
from relneuron.texts.pictures import open_picture, pictures_of
from relneuron.texts.tokens import (
    Continuation,
    blank_notice,
    continuations,
    encode_texts,
    without_blanks,
)

N_ANSWER_TOKENS = 2  # arXiv 2502.17355, section 3.2


def is_correct(prediction: str, answer: str, *, accept_object_prefix: bool = False) -> bool:
    """Whether a prediction is a non-empty prefix of the answer, as `artifact.files.fold` has both.

    It is one, too, if it ends between a letter and the mark that the answer writes after it.
    `accept_object_prefix` also accepts a prediction that the answer is a prefix of ("Japan." for
    "Japan"); the paper's rule (arXiv 2502.17355, section 3.2) does not.
    """
    given, wanted = fold(prediction), fold(answer)
    if not given:
        return False
    written = answer.strip().casefold().startswith(prediction.strip().casefold())
    is_prefix = wanted.startswith(given) or written
    return is_prefix or (accept_object_prefix and given.startswith(wanted))


def begins_with(text: str, answer: str) -> bool:
    """Whether free text begins with the answer, as `artifact.files.fold` has both."""
    return fold(text).startswith(fold(answer))


def given_object(text: str, objects: Sequence[str], rule: Callable[[str, str], bool]) -> str:
    """The first of the right objects that a text gives by a rule such as `is_correct`, or ""."""
    return next((name for name in objects if rule(text, name)), "")


@dataclass(frozen=True)
class Questions:
    """Prompts as tokens: `ids` of each prompt and the first token that carries its answer's bytes.

    starts   how a prompt goes on with each of its right objects, in their order: tokens of white
             space alone, where the tokenizer makes some, and the object's first own token; without
             them `answers` are the only ones
    options  how a multiple-choice prompt goes on with each of its options, no two of them alike
    notices  what a reader of the results must know of how prompts became tokens
    processor, texts  make the inputs of prompts with pictures, whose `ids` have a token for each
             place that a picture takes
    """

    prompts: list[Prompt]
    ids: list[list[int]]
    answers: list[int]
    starts: list[list[tuple[int, ...]]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    options: list[list[tuple[int, ...]]] = field(default_factory=list)
    processor: Processor | None = None
    texts: list[str] = field(default_factory=list)

    def has_pictures(self, row: int) -> bool:
        return self.processor is not None and bool(self.prompts[row].images)

    def inputs(self, row: int) -> dict[str, Tensor]:
        """What a forward takes for a prompt with pictures, as `Processor.inputs`."""
        assert self.processor is not None, "only what has a processor has pictures"
        return _inputs(self.processor, self.prompts[row], self.texts[row])

    def length(self, row: int) -> int:
        return len(self.ids[row])

    def starts_of(self, row: int) -> list[tuple[int, ...]]:
        return self.starts[row] if self.starts else [(self.answers[row],)]

    def asked_of(self, row: int) -> list[tuple[int, ...]]:
        """All starts whose probability is asked: those of the objects, then of the options."""
        return self.starts_of(row) + (self.options[row] if self.options else [])

    def put_in(self, row: int) -> int:
        """The token after a prompt that `ask_forced` puts in: a space, where an object has one."""
        starts = self.starts_of(row)
        return next((start for start in starts if len(start) > 1), starts[0])[0]


def encode(
    tokenizer: Any,
    model: Any,
    prompts: Sequence[Prompt],
    *,
    answers: bool = True,
    n_tokens: int = N_ANSWER_TOKENS,
    processor: Processor | None = None,
    options: bool = True,
) -> Questions:
    """Tokenise prompts, with the special tokens that the tokenizer puts before a text (BOS).

    An answer begins as `tokens.continuations` says. A prompt's space at its end is left out where
    the tokenizer joins it to the next word. Of a prompt about pictures the `processor` makes the
    tokens, from the pictures and the text. Raises RelneuronError for an empty prompt, one that
    with `n_tokens` of answer does not fit the context, and an object without a token; without
    `answers` objects are not looked at. A picture that cannot be read raises, as do pictures
    without a processor. Without `options` how a prompt goes on with its own is not looked at.
    """
    texts, notices = [prompt.prompt for prompt in prompts], []
    found: list[list[Continuation]] = []
    choices: list[list[tuple[int, ...]]] = []
    if answers:
        texts, changed = without_blanks(tokenizer, texts, [prompt.object for prompt in prompts])
        notices = [blank_notice([prompts[row].id for row in changed])] if changed else []
        found = object_continuations(tokenizer, prompts, texts)
        choices = _options(tokenizer, prompts, texts) if options else []
    ids = encode_texts(tokenizer, texts)
    pictured = {row for row, prompt in enumerate(prompts) if prompt.images}
    for row in sorted(pictured):
        if processor is None:
            raise RelneuronError(
                f"prompt {prompts[row].id} is about a picture, and text alone is read here",
                "give prompts without `image`, or use ablate, generate or count",
            )
        ids[row] = _inputs(processor, prompts[row], texts[row])["input_ids"][0].tolist()
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    vocabulary = model.get_input_embeddings().num_embeddings
    # What stands for a picture need not be a token of the model's.
    read = [line for row, line in enumerate(ids) if row not in pictured]
    lines = [*read, *(one.tokens for some in found for one in some)]
    largest = max((max(line, default=0) for line in lines), default=0)
    if largest >= vocabulary:
        raise RelneuronError(
            f"the tokenizer made the token {largest}, the model has {vocabulary} tokens",
            "give a model and a tokenizer that belong together",
        )
    for prompt, line in zip(prompts, ids, strict=True):
        if not line:
            raise RelneuronError(f"prompt {prompt.id} has no token", "remove the empty prompt")
        if context is not None and len(line) + n_tokens > context:
            raise RelneuronError(
                f"prompt {prompt.id} has {len(line)} tokens; with {n_tokens} for the answer "
                f"it is longer than the model's context of {context}",
                "shorten or remove it" + _fewer(context - len(line), n_tokens),
            )
    # Many prompts go on alike, and share one list.
    shared: dict[tuple[tuple[int, ...], ...], list[tuple[int, ...]]] = {}
    starts = []
    for prompt, some in zip(prompts, found, strict=False):
        pairs = zip(prompt.objects, some, strict=True)
        own = tuple(_start(prompt, name, one) for name, one in pairs)
        starts.append(shared.setdefault(own, list(own)))
    firsts = [some[0][-1] for some in starts]
    return Questions(list(prompts), ids, firsts, starts, notices, choices, processor, texts)


def _options(
    tokenizer: Any, prompts: Sequence[Prompt], texts: Sequence[str]
) -> list[list[tuple[int, ...]]]:
    """How each prompt goes on with each of its options; nothing where no prompt has any."""
    if not any(prompt.options for prompt in prompts):
        return []
    asked = [(text, p, name) for text, p in zip(texts, prompts, strict=True) for name in p.options]
    languages = [prompt.language for _, prompt, _ in asked]
    made = continuations(tokenizer, [a[0] for a in asked], [a[2] for a in asked], languages)
    starts = iter([_start(p, name, one) for (_, p, name), one in zip(asked, made, strict=True)])
    found = [[next(starts) for _ in prompt.options] for prompt in prompts]
    for prompt, some in zip(prompts, found, strict=True):
        if len({*some}) < len(some):
            first = next(k for k, start in enumerate(some) if start in some[:k])
            same = prompt.options[some.index(some[first])]
            raise RelneuronError(
                f"prompt {prompt.id}: its options {same!r} and {prompt.options[first]!r} begin "
                "with the same token",
                "give options that differ in their first token, such as letters",
            )
    return found


def _inputs(processor: Processor, prompt: Prompt, text: str) -> dict[str, Tensor]:
    where = f"prompt {prompt.id}"
    found = pictures_of(prompt.images, Path(), where)
    return processor.inputs([open_picture(one, where) for one in found], text, where)


def object_continuations(
    tokenizer: Any, prompts: Sequence[Prompt], texts: Sequence[str]
) -> list[list[Continuation]]:
    """How the text of each prompt goes on with each of its right objects."""
    asked = [(text, p, name) for text, p in zip(texts, prompts, strict=True) for name in p.objects]
    languages = [prompt.language for _, prompt, _ in asked]
    found = iter(continuations(tokenizer, [a[0] for a in asked], [a[2] for a in asked], languages))
    return [[next(found) for _ in prompt.objects] for prompt in prompts]


def _start(prompt: Prompt, name: str, found: Continuation) -> tuple[int, ...]:
    if not found.tokens:
        raise RelneuronError(
            f"prompt {prompt.id}: its object {name!r} makes no token",
            "give every fact an object, or remove the prompt",
        )
    return (*found.spaces, found.tokens[0])


def _fewer(room: int, n_tokens: int) -> str:
    """The other way to fit a context, where more than an answer's tokens are asked for."""
    if room < 1 or n_tokens <= N_ANSWER_TOKENS:
        return ""
    return f", or ask for at most {room} tokens (--max-new-tokens, --generate)"
