"""Tokenizers of many kinds, built by hand, and tiny models that learn some sentences by heart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
SPECIAL = (UNK, BOS, EOS)
AROUND = {"none": "$A", "bos": f"{BOS} $A", "both": f"{BOS} $A {EOS}", "eos": f"$A {EOS}"}


def speaker(raw: Tokenizer, around: str = "bos") -> Any:
    """A tokenizer with special tokens around a text: none, bos, both or eos."""
    marks = [(mark, raw.token_to_id(mark)) for mark in (BOS, EOS)]
    raw.post_processor = processors.TemplateProcessing(single=AROUND[around], special_tokens=marks)
    marks_of: dict[str, str] = {"eos_token": EOS, "unk_token": UNK}
    if around in ("bos", "both"):
        marks_of["bos_token"] = BOS
    return PreTrainedTokenizerFast(tokenizer_object=raw, **marks_of)


def byte_level(words: Iterable[str] = (), around: str = "bos", *, digits: bool = False) -> Any:
    """Byte-level BPE; each of `words` (with its space in front) is one token.

    Without words every byte is a token; with `digits` they stand alone.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *letters))}
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merges: list[tuple[str, str]] = []
    for word in words:
        (piece, _), *_ = split.pre_tokenize_str(word)
        for end in range(1, len(piece)):
            pair = piece[:end], piece[end]
            if pair not in merges:
                merges.append(pair)
            vocabulary.setdefault(piece[: end + 1], len(vocabulary))
    raw = Tokenizer(models.BPE(vocabulary, merges))
    parts = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    raw.pre_tokenizer = pre_tokenizers.Sequence([*parts, split])
    raw.decoder = decoders.ByteLevel()
    return speaker(raw, around)


def sentence_piece(words: Iterable[str] = (), around: str = "bos") -> Any:
    """Unigram as SentencePiece has it: a mark for the space, bytes for what it has no piece of."""
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    pieces += [("\u2581", -5.0), *((char, -6.0) for char in "abcdefghijklmnopqrstuvwxyzPRT")]
    pieces += [(word, -1.0) for word in words]
    raw = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return speaker(raw, around)


def characters(texts: Iterable[str], around: str = "bos") -> Any:
    """One token a character; a character of none of the texts, such as a space, is unknown."""
    known = sorted({char for text in texts for char in text})
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *known))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    return speaker(raw, around)


def words(texts: Iterable[str], around: str = "bos") -> Any:
    """One token a word, and none for the space."""
    known = sorted({word for text in texts for word in text.split()})
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *known))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return speaker(raw, around)


def tiny_llama(tokenizer: Any, seed: int = 0) -> Any:
    """A random Llama of two layers with the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def taught(tokenizer: Any, texts: Sequence[str], steps: int = 120) -> Any:
    """A model that says these texts, each with BOS (if there is one) before and EOS after it."""
    model = tiny_llama(tokenizer)
    before = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    bare = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    lines = [[*before, *ids, tokenizer.eos_token_id] for ids in bare]
    longest = max(map(len, lines))
    labels = torch.tensor([line + [-100] * (longest - len(line)) for line in lines])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=labels.clamp(min=0), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "Llama": {"intermediate_size": 24, "max_position_embeddings": 16},
    "Bert": {"intermediate_size": 24, "max_position_embeddings": 16},
}


def classifier_folder(folder: Path, kind: str = "Llama", n_labels: int = 2, **more: Any) -> Path:
    """A random classifier with a token a word."""
    tokenizer = words(["a b c d"])
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), num_labels=n_labels, **_SIZES, **CLASSIFIERS[kind], **more
    )
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return save(folder, model, tokenizer)
