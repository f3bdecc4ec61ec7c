"""Texts as token ids: special tokens, how a prompt goes on with an answer, tokens as whole text.

`model.questions.encode` and `knowledge` call it for every stage that asks a model, `generate` for
its prompts, and `doctor` to say what a tokenizer does.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Any

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.prompts import Prompt

CUT = "\ufffd"  # what decoders write for bytes that are no whole character
CHARACTER_BYTES = 4  # of UTF-8 at most, and as many tokens of bytes
# Put in front of a text that the prompt before it would change: their tokens are taken off again.
_ANCHORS = ("\n", "a", ".")
_PROBES = ("a", "1", "7", ".", "\u4e00")
_OWN_PROBES = 16
_PIECE = 1024
_BLANKS = " \t\u00a0\u3000"  # what a hand-made prompt may end in; a new line is meant

# Writing systems without a space between words, by code point, with the punctuation of Chinese and
# Japanese; and languages that are written in them.
_UNSPACED = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x1AAF),  # Tai Le, New Tai Lue, Khmer symbols, Buginese, Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x312F),  # radicals, punctuation, kana, Bopomofo
    (0x31A0, 0x9FFF),  # more kana, Chinese characters
    (0xA000, 0xA4CF),  # Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar
    (0xAA60, 0xAADF),  # Myanmar, Tai Viet
    (0xF900, 0xFAFF),
    (0xFE30, 0xFE4F),
    (0xFF00, 0xFF9F),  # full-width forms, half-width kana
    (0x16FE0, 0x1B2FF),
    (0x1F200, 0x1F2FF),
    (0x20000, 0x3FFFF),
)
_UNSPACED_LANGUAGES = frozenset(
    (
        "zh",
        "cmn",
        "yue",
        "wuu",
        "nan",
        "hak",
        "gan",
        "lzh",
        "ja",
        "th",
        "lo",
        "my",
        "km",
        "bo",
        "dz",
    )
)


# --- special tokens --------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """The special tokens that a tokenizer puts around a text: before it, and after it."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def read_policy(tokenizer: Any) -> Policy:
    """What a tokenizer does by itself, found by asking it for a text with and without.

    Where it knows none of `_PROBES`, and gives them the token that it puts before a text, it is
    asked for words of its own.
    """
    for text in chain(_PROBES, _own_words(tokenizer)):
        bare = list(tokenizer([text], add_special_tokens=False)["input_ids"][0])
        full = list(tokenizer([text])["input_ids"][0])
        n = len(bare)
        places = [i for i in range(len(full) - n + 1) if n and full[i : i + n] == bare]
        if len(places) == 1:  # a text that is itself such a token may stand at several
            return Policy(tuple(full[: places[0]]), tuple(full[places[0] + n :]))
    raise RelneuronError(
        "the tokenizer makes other tokens of a text when it adds its special tokens",
        "give a tokenizer that puts them before or after a text",
    )


def _own_words(tokenizer: Any) -> Iterator[str]:
    """The first words of a tokenizer's vocabulary."""
    vocabulary = tokenizer.get_vocab()
    yield from sorted(vocabulary, key=vocabulary.__getitem__)[:_OWN_PROBES]


def policy_text(tokenizer: Any) -> str:
    """What happens to a prompt's special tokens, for `doctor` and the manifest."""
    policy = read_policy(tokenizer)
    before, after = (
        " ".join(map(str, tokenizer.convert_ids_to_tokens(list(ids))))
        for ids in (policy.before, policy.after)
    )
    said = f"{before} before a prompt" if before else "no BOS"
    return f"{said}; {after}, which it appends, is taken off" if after else said


def check_bos(tokenizer: Any, ids: Iterable[Sequence[int]]) -> None:
    """Refuse to leave out the first token of prompts where it is none that stands for the begin."""
    marks = {*read_policy(tokenizer).before[:1], getattr(tokenizer, "bos_token_id", None)}
    if not all(line[0] in marks for line in ids):
        raise RelneuronError(
            "--exclude-bos: the tokenizer puts no BOS before a prompt, its first token is a word's",
            "leave out --exclude-bos",
            2,
        )


def encode_texts(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    """The token ids of texts that a model is to go on with.

    The special tokens that the tokenizer puts before a text stand there once, also where the text
    begins with them itself. What it appends (EOS) is left out: nothing goes on after it.
    """
    before = list(read_policy(tokenizer).before)
    found = _bare(tokenizer, list(texts))
    return [ids if before and ids[:1] == before[:1] else before + ids for ids in found]


def _bare(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    found: list[list[int]] = []
    for some in _pieces(texts):
        found += map(list, tokenizer(some, add_special_tokens=False)["input_ids"])
    return found


def _pieces(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts that are tokenised at once; a tokenizer's own record of one is many times it."""
    return (list(texts[at : at + _PIECE]) for at in range(0, len(texts), _PIECE))


# --- how a prompt goes on --------------------------------------------------------------------


@dataclass(frozen=True)
class Continuation:
    """The tokens of an answer after its prompt.

    spaces   tokens of white space alone, where the tokenizer does not join the space to the word
    tokens   the answer's own; the first one carries bytes of it
    """

    spaces: tuple[int, ...]
    tokens: tuple[int, ...]


def space_before(prompt: str, answer: str, language: str = "") -> str:
    """The space between a prompt and its answer, or nothing.

    Nothing after white space or an opening bracket or quotation mark; nor in writing without
    spaces (Chinese, Japanese, Thai, ...): where the prompt ends in such a character; where its last
    letter is one and so is the answer's first, or the answer has none; and where the language is so
    written and the answer's first letter is.
    """
    if not prompt or prompt[-1].isspace() or unicodedata.category(prompt[-1]) in ("Ps", "Pi"):
        return ""
    last = next((char for char in reversed(prompt) if char.isalpha()), "")
    first = next((char for char in answer if char.isalpha()), "")
    if _is_unspaced(prompt[-1]) or (_is_unspaced(last) and (not first or _is_unspaced(first))):
        return ""
    spoken = language.lower().replace("_", "-").partition("-")[0]
    return "" if spoken in _UNSPACED_LANGUAGES and _is_unspaced(first) else " "


def _is_unspaced(char: str) -> bool:
    return any(low <= ord(char) <= high for low, high in _UNSPACED) if char else False


def continuations(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], languages: Sequence[str]
) -> list[Continuation]:
    """How each prompt goes on with its answer, the prompt's own tokens as they are.

    Of the text of both, tokenised as one, what follows the prompt's tokens; where the last of them
    come out otherwise, the tokens of the answer alone. A space is put between the two as
    `space_before` says, but not where the tokenizer has no token for it. `tokens` is empty for an
    answer of nothing but white space.
    """
    is_space = _space_test(tokenizer)
    unknown = getattr(tokenizer, "unk_token_id", None)
    found = []
    for heads, names, spoken in zip(*map(_pieces, (prompts, answers, languages)), strict=True):
        stripped = [answer.strip() for answer in names]
        ends = [
            space_before(head, answer, language) + answer
            for head, answer, language in zip(heads, stripped, spoken, strict=True)
        ]
        wholes = [head + end for head, end in zip(heads, ends, strict=True)]
        rows = zip(_bare(tokenizer, heads), _bare(tokenizer, wholes), ends, stripped, strict=True)
        for head, whole, end, answer in rows:
            rest = _rest(tokenizer, head, whole, end)
            if answer and rest[:1] in ([], [unknown]):  # no space, or the two are one unknown word
                alone = _rest(tokenizer, [], [], answer)
                rest = alone if alone[:1] != [unknown] else rest or alone
            n_spaces = len(list(takewhile(is_space, rest))) if answer else len(rest)
            found.append(Continuation(tuple(rest[:n_spaces]), tuple(rest[n_spaces:])))
    return found


def _rest(tokenizer: Any, head: list[int], whole: list[int], end: str) -> list[int]:
    """What of `whole` follows `head`; if it does not begin so, the tokens of `end` alone."""
    if whole and whole[: len(head)] == head:
        return whole[len(head) :]
    for anchor in _ANCHORS:
        first, both = _bare(tokenizer, [anchor, anchor + end])
        if both[: len(first)] == first and len(both) > len(first):
            return both[len(first) :]
    return _bare(tokenizer, [end])[0]


def _space_test(tokenizer: Any) -> Callable[[int], bool]:
    """Whether a token is white space and nothing else."""
    known: dict[int, bool] = {}

    def is_space(token: int) -> bool:
        if token not in known:
            known[token] = not token_text(tokenizer, token).strip()
        return known[token]

    return is_space


def without_blanks(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[list[str], list[int]]:
    """Prompts without a space at their end that the tokenizer joins to the next word, and which.

    No text has such a space as a token of its own in front of the answer, so a model that knows
    the answer does not know it there. Where the tokenizer writes prompt and answer with that
    token, the prompt stays as it is.
    """
    texts = list(prompts)
    ending = [row for row, text in enumerate(texts) if text != text.rstrip(_BLANKS)]
    heads = _bare(tokenizer, [texts[row] for row in ending])
    wholes = _bare(tokenizer, [texts[row] + answers[row].strip() for row in ending])
    changed = [
        row
        for row, head, whole in zip(ending, heads, wholes, strict=True)
        if whole[: len(head)] != head
    ]
    for row in changed:
        texts[row] = texts[row].rstrip(_BLANKS)
    return texts, changed


def blank_notice(names: Sequence[str]) -> str:
    """What is said of prompts that `without_blanks` changed."""
    why = "which the tokenizer joins to the next word"
    return f"{listed(names)}: asked without the space at the end of the prompt, {why}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def target_notices(tokenizer: Any, prompts: Sequence[Prompt], targets: Sequence[int]) -> list[str]:
    """What a reader must know of the tokens that stand for answers.

    Relations whose answers differ and all begin with one and the same token, and answers that the
    tokenizer does not know.
    """
    of: dict[str, list[tuple[Prompt, int]]] = {}
    for prompt, target in zip(prompts, targets, strict=True):
        of.setdefault(prompt.relation, []).append((prompt, target))
    notices = []
    for relation, found in of.items():
        tokens, answers = {target for _, target in found}, {p.object.strip() for p, _ in found}
        if len(tokens) == 1 and len(answers) > 1:
            text = token_text(tokenizer, found[0][1])
            notices.append(
                f"{relation}: all {len(found)} prompts ask for one and the same token, {text!r}"
            )
    unknown, name = (getattr(tokenizer, key, None) for key in ("unk_token_id", "unk_token"))
    pairs = zip(prompts, targets, strict=True)
    strange = [p.id for p, t in pairs if t == unknown is not None and p.object.strip() != name]
    if strange:
        notices.append(f"{listed(strange)}: the tokenizer has no token for the answer, only {name}")
    return notices


def find_token(
    tokenizer: Any, prompt: str, target: str, language: str, *, may_be_id: bool
) -> Continuation | None:
    """The one token that is written `target`, as the continuation of a prompt; None without one.

    A text that begins with a space, or stands so in the vocabulary ("\u2581Paris"), is that very
    token. Any other is taken with the space that an answer would have there, or as it is. Digits
    that are no token of their own are an id if they may be.
    """
    piece = tokenizer.convert_tokens_to_ids(target)
    is_piece = piece is not None and tokenizer.convert_ids_to_tokens(piece) == target
    if is_piece and tokenizer.decode([piece], skip_special_tokens=False) != target:
        return Continuation((), (piece,))
    if target == target.lstrip():
        (found,) = continuations(tokenizer, [prompt], [target], [language])
        if len(found.tokens) == 1:
            return found
    exact = _rest(tokenizer, [], [], target)
    if len(exact) == 1:
        return Continuation((), tuple(exact))
    is_id = may_be_id and target.strip().isdecimal()
    return Continuation((), (int(target),)) if is_id else None


# --- tokens as text --------------------------------------------------------------------------


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token; bytes that are no whole character as <0xE4>."""
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    if CUT not in text:
        return text
    piece = str(tokenizer.convert_ids_to_tokens([token])[0])
    if not all(char in _BYTES for char in piece):
        return piece
    data = bytes(_BYTES[char] for char in piece)
    whole = data.decode(errors="surrogateescape")
    return "".join(f"<0x{ord(c) & 0xFF:02X}>" if "\udc80" <= c <= "\udcff" else c for c in whole)


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it: together the text, spaces included.

    Where that is no whole character, or the text before it becomes another one, it is `token_text`.
    """

    def decode(some: Sequence[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=False))

    pieces, before = [], ""
    for end, token in enumerate(ids, 1):
        text = decode(ids[:end])
        is_added = text.startswith(before) and CUT not in text[len(before) :]
        pieces.append(text[len(before) :] if is_added else token_text(tokenizer, token))
        before = text
    return pieces


def _byte_letters() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for.

    Printable ones of Latin-1 for themselves, the others in order from U+0100 on.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()


def whole_text(decode: Callable[[Sequence[int]], str], tokens: Sequence[int]) -> str:
    """The text of tokens, without a character that they end in the middle of."""
    text = decode(tokens)
    if not text.endswith(CUT):
        return text
    # A decoder of byte tokens gives up the whole run of bytes that ends in half a character.
    fewer = (decode(tokens[:-n]) for n in range(1, min(CHARACTER_BYTES, len(tokens))))
    whole = (shorter for shorter in fewer if not shorter.endswith(CUT))
    return max(text.rstrip(CUT), next(whole, ""), key=len)
