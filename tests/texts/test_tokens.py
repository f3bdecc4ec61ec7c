"""Texts as tokens with tokenizers of many kinds: special tokens, the answer's first token, bytes.

What each tokenizer should do was written down by hand, from how it splits a text.
"""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

import relneuron.texts.tokens
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.prompts import Prompt
from relneuron.texts.tokens import (
    Policy,
    check_bos,
    continuations,
    encode_texts,
    find_token,
    policy_text,
    read_policy,
    space_before,
    target_notices,
    token_text,
    whole_text,
    without_blanks,
)
from tests.kit.counted import Numbers
from tests.kit.speakers import byte_level, characters, sentence_piece, words

TOKENIZERS = {
    "bytes": byte_level(),
    "bpe": byte_level([" Paris", " 37", " Lo", "Log", " is"]),
    "digits": byte_level([" Paris"], digits=True),
    "sentencepiece": sentence_piece(["\u2581Paris", "\u2581is", "北京", "東京"]),
    "characters": characters(["The city is Paris 37( 中国的首都是北京東?:A"]),
    "no space": characters(["中国的首都是北京 "[:-1]]),
    "words": words(["The city is Paris 37 北京"]),
}


def pieces(tokenizer: Any, ids: Any) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(list(ids)))


# --- special tokens --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("around", "before", "after", "said"),
    [
        ("none", (), (), "no BOS"),
        ("bos", (1,), (), "<s> before a prompt"),
        ("both", (1,), (2,), "<s> before a prompt; </s>, which it appends, is taken off"),
        ("eos", (), (2,), "no BOS; </s>, which it appends, is taken off"),
    ],
)
def test_bos_stands_there_once_and_eos_never(
    around: str, before: tuple[int, ...], after: tuple[int, ...], said: str
) -> None:
    for tokenizer in (
        byte_level([" is"], around),
        sentence_piece([], around),
        words(["a"], around),
    ):
        assert read_policy(tokenizer) == Policy(before, after)
        assert policy_text(tokenizer) == said
        bare = tokenizer("a is", add_special_tokens=False)["input_ids"]
        assert tokenizer("a is")["input_ids"] == [*before, *bare, *after]
        assert encode_texts(tokenizer, ["a is", "a is"]) == [[*before, *bare]] * 2
        if before:
            (found,) = encode_texts(tokenizer, ["<s>a is"])
            assert found.count(1) == 1 and found[0] == 1 and len(found) > 1
    assert encode_texts(byte_level(), []) == []


def test_a_text_that_is_the_bos_itself_does_not_hide_it() -> None:
    """A tokenizer of numbers, whose BOS is 1: of "1 1" none is known to be the one that is put."""
    assert read_policy(Numbers()) == Policy((1,), ())


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    class Changed(Numbers):
        def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, Any]:
            return {"input_ids": [[3, 4] if add_special_tokens else [5] for _ in texts]}

    with pytest.raises(RelneuronError, match="other tokens of a text"):
        read_policy(Changed())


def test_a_tokenizer_that_knows_no_common_word_is_asked_for_its_own() -> None:
    """Of an unknown word, whose token is that of BOS, none is known to be the one that is put."""
    raw = Tokenizer(models.WordLevel({"<s>": 0, "alpha": 1}, unk_token="<s>"))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    assert read_policy(tokenizer) == Policy((0,), ())


def test_bos_can_only_be_left_out_where_it_is() -> None:
    check_bos(byte_level(), encode_texts(byte_level(), ["a", "b"]))
    for around in ("none", "eos"):
        tokenizer = byte_level([], around)
        with pytest.raises(RelneuronError, match="--exclude-bos: the tokenizer puts no BOS"):
            check_bos(tokenizer, encode_texts(tokenizer, ["a", "b"]))


# --- how a prompt goes on --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "answer", "language", "space"),
    [
        ("The city is", "Paris", "en", " "),
        ("Stolicą jest", "Łódź", "pl", " "),
        ("수도는", "서울", "ko", " "),
        ("العاصمة هي", "القاهرة", "ar", " "),
        ("The year is", "1912", "en", " "),
        ("The capital of China is", "北京", "en", " "),
        ("is ", "Paris", "en", ""),
        ("Answer:\n", "Paris", "en", ""),
        ("", "Paris", "en", ""),
        ("Paris (", "France", "en", ""),
        ("He said “", "yes", "en", ""),
        ("中国的首都是", "北京", "en", ""),
        ("中国的首都是", "Paris", "", ""),
        ("成立年份是", "1912", "zh", ""),
        ("首都在哪里？", "北京", "", ""),
        ("谁创立了Microsoft？", "盖茨", "", ""),
        ("答案是:", "北京", "", ""),
        ("成立年份:", "1912", "", ""),
        ("Headquarters of 三菱:", "Tokyo", "en", " "),
        ("Question? Answer:", "北京", "zh-Hant", ""),
        ("Question? Answer:", "北京", "zh_CN", ""),
        ("Question? Answer:", "Paris", "zh", " "),
        ("首都はどこですか。「", "東京", "ja", ""),
        ("เมืองหลวงคือ", "กรุงเทพ", "th", ""),
        ("ນະຄອນຫຼວງແມ່ນ", "ວຽງຈັນ", "", ""),
    ],
)
def test_where_a_space_stands(prompt: str, answer: str, language: str, space: str) -> None:
    assert space_before(prompt, answer, language) == space


@pytest.mark.parametrize(
    ("name", "prompt", "answer", "spaces", "own"),
    [
        ("bpe", "The city is", "Paris", [], ["ĠParis"]),
        ("bpe", "The city is", "37", [], ["Ġ37"]),
        ("bpe", "The city is", " Log ", [], ["ĠLo", "g"]),
        ("bpe", "The city is\n", "Log", [], ["Log"]),
        ("bytes", "The city is", "37", ["Ġ"], ["3", "7"]),
        ("bytes", "首都是", "北", [], ["å", "Į", "Ĺ"]),
        ("digits", "The city is", "37", ["Ġ"], ["3", "7"]),
        ("digits", "The city is", "Paris", [], ["ĠParis"]),
        ("sentencepiece", "The city is", "Paris", [], ["\u2581Paris"]),
        ("sentencepiece", "The city is", "37", ["\u2581"], ["<0x33>", "<0x37>"]),
        ("sentencepiece", "The city is", "北京", ["\u2581"], ["北京"]),
        ("sentencepiece", "首都是", "北京", [], ["北京"]),
        ("sentencepiece", "首都是", "南", [], ["<0xE5>", "<0x8D>", "<0x97>"]),
        ("characters", "The city is", "37", [" "], ["3", "7"]),
        ("characters", "中国的首都是", "北京", [], ["北", "京"]),
        ("no space", "中国的首都是? A:", "北京", [], ["北", "京"]),
        ("words", "The city is", "37", [], ["37"]),
        ("words", "The city(", "37", [], ["37"]),  # the two are one unknown word
    ],
)
def test_an_answer_begins_with_a_token_of_its_own(
    name: str, prompt: str, answer: str, spaces: list[str], own: list[str]
) -> None:
    tokenizer = TOKENIZERS[name]
    found, again = continuations(tokenizer, [prompt] * 2, [answer] * 2, ["en"] * 2)
    assert found == again
    assert pieces(tokenizer, found.spaces) == spaces
    assert pieces(tokenizer, found.tokens) == own


def test_a_prompt_keeps_its_tokens_where_the_answer_would_change_them() -> None:
    """東京 is one token: of 東 and 京都 the prompt's own stays, then come the answer's."""
    tokenizer = byte_level(["東京", "京都"])
    (found,) = continuations(tokenizer, ["東"], ["京都"], ["ja"])
    assert (
        tokenizer("東京都", add_special_tokens=False)["input_ids"][0]
        != (tokenizer("東", add_special_tokens=False)["input_ids"][0])
    )
    assert tokenizer.decode(found.tokens) == "京都"


class Watched:
    """A tokenizer that knows how many texts it was given at once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.most = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.most = max(self.most, len(texts))
        return self._tokenizer(texts, **options)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_many_texts_are_tokenised_some_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer's record of a text is many times its ids: it never has that of all texts."""
    true = TOKENIZERS[name]
    prompts = [f"{'The city is' * (i % 3)} Paris 37{'( ?:'[i % 4]}" for i in range(23)]
    answers = [("Paris", "37", " is ", "北京", "Log", "A ")[i % 6] for i in range(23)]
    spoken = ["zh" if i % 5 == 0 else "en" for i in range(23)]
    wanted = encode_texts(true, prompts), continuations(true, prompts, answers, spoken)
    for piece in (1, 4, 23):
        monkeypatch.setattr(relneuron.texts.tokens, "_PIECE", piece)
        watched: Any = Watched(true)
        assert encode_texts(watched, iter(prompts)) == wanted[0]
        assert continuations(watched, prompts, answers, spoken) == wanted[1]
        assert watched.most == piece


def test_an_answer_of_white_space_has_no_token() -> None:
    for tokenizer in TOKENIZERS.values():
        for answer in ("", " ", "\n"):
            (found,) = continuations(tokenizer, ["The city is"], [answer], ["en"])
            assert found.tokens == ()


@pytest.mark.parametrize(
    ("name", "answer", "is_changed"),
    [
        ("bpe", "Paris", True),
        ("sentencepiece", "Paris", True),
        ("sentencepiece", "37", False),  # the text of both has that space as a token
        ("characters", "Paris", False),
        ("bytes", "Paris", False),
        ("words", "Paris", False),
    ],
)
def test_a_space_at_the_end_of_a_prompt(name: str, answer: str, is_changed: bool) -> None:
    tokenizer = TOKENIZERS[name]
    prompts = ["The city is", "The city is ", "The city is\n"]
    texts, changed = without_blanks(tokenizer, prompts, [answer] * 3)
    assert changed == ([1] if is_changed else [])
    assert texts == [prompts[0], prompts[not is_changed], prompts[2]]


# --- targets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target", "spaces", "token"),
    [
        ("bpe", "Paris", [], "ĠParis"),
        ("bpe", " Paris", [], "ĠParis"),
        ("bpe", "ĠParis", [], "ĠParis"),
        ("bpe", "Log", [], "Log"),  # no token with a space in front
        ("bpe", "37", [], "Ġ37"),
        ("bpe", "3", [], "Ġ3"),
        ("digits", "3", ["Ġ"], "3"),
        ("sentencepiece", "Paris", [], "\u2581Paris"),
        ("sentencepiece", "\u2581Paris", [], "\u2581Paris"),
        ("sentencepiece", "北京", ["\u2581"], "北京"),
        ("sentencepiece", "<0xE5>", [], "<0xE5>"),
        ("words", "37", [], "37"),
    ],
)
def test_a_target_is_one_token(name: str, target: str, spaces: list[str], token: str) -> None:
    tokenizer = TOKENIZERS[name]
    found = find_token(tokenizer, "The city is", target, "en", may_be_id=True)
    assert found is not None
    assert pieces(tokenizer, found.spaces) == spaces and pieces(tokenizer, found.tokens) == [token]


def test_what_is_no_token_and_what_is_an_id() -> None:
    tokenizer = TOKENIZERS["digits"]
    for target in ("Lyon", " Lyon", "37"):
        assert find_token(tokenizer, "The city is", target, "en", may_be_id=False) is None
    found = find_token(tokenizer, "The city is", "37", "en", may_be_id=True)
    assert found is not None and (found.spaces, found.tokens) == ((), (37,))


def test_one_token_for_all_and_unknown_answers_are_said() -> None:
    tokenizer = TOKENIZERS["words"]
    asked = [("a", "r", "37"), ("b", "r", "37"), ("c", "q", "37"), ("d", "p", "Rome")]
    prompts = [Prompt(name, of, "eva", "en", "", "", said, "x") for name, of, said in asked]
    ids = [tokenizer.convert_tokens_to_ids(said) for _, _, said in asked]
    same = "r: all 4 prompts ask for one and the same token, '37'"
    unknown = "d: the tokenizer has no token for the answer, only <unk>"
    assert target_notices(tokenizer, prompts, ids) == [unknown]
    others = [Prompt(p.id, "r", "eva", "en", "", "", p.id, "x") for p in prompts]
    assert target_notices(tokenizer, others, ids[:1] * 4) == [same]


# --- tokens as text --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
def test_text_ends_with_a_whole_character(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for text in ("Zürich 南", "南南", "🎈"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        data = text.encode()
        for end in range(len(ids) + 1):
            said = whole_text(tokenizer.decode, ids[:end])
            assert text.startswith(said)
            n_bytes = len(tokenizer.decode(ids[:end]).encode())
            if name == "bytes":
                assert said == data[:end].decode(errors="ignore")
            assert len(said.encode()) <= n_bytes
        assert whole_text(tokenizer.decode, ids) == text


def test_a_token_that_is_no_character_shows_its_bytes() -> None:
    for name in ("bytes", "sentencepiece"):
        tokenizer = TOKENIZERS[name]
        ids = tokenizer("南", add_special_tokens=False)["input_ids"][-3:]
        assert [token_text(tokenizer, i) for i in ids] == ["<0xE5>", "<0x8D>", "<0x97>"]
    tokenizer = byte_level([" 南京"])
    (token,) = tokenizer(" 南京", add_special_tokens=False)["input_ids"]
    assert token_text(tokenizer, token) == " 南京"
