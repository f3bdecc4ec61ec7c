"""Facts in Polish, written as people write them, and a tiny model that has read them.

Some subjects have two right objects: as a list, under `objects`, or on lines of their own. Names
come composed (NFC) and decomposed (NFD), here and there in capitals.
"""

from __future__ import annotations

import json
import unicodedata
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

SUFFIX = " Odpowiedź:"
SUBJECTS = [
    f"{first} {last}"
    for first in ("Łucja", "Świętosław", "Żaneta", "Grażyna", "Józef")
    for last in ("Gęś", "Źrebię", "Dąb", "Wróbel", "Ćma", "Kość")
]
# Stem: templates, another wording, objects.
RELATIONS = {
    "mieszka_w": ("{} mieszka w", "Domem osoby {} jest", ["Łódź", "Kraków", "Gdańsk", "Toruń"]),
    "lubi_owoc": ("{} lubi owoc", "Ulubiony owoc {} to", ["jabłko", "śliwka", "gruszka"]),
    "pracuje_jako": ("{} pracuje jako", "Zawód {} to", ["piekarz", "żeglarz", "nauczyciel"]),
    "gra_na": ("{} gra na", "Instrument {} to", ["skrzypcach", "gęślach", "bębnie", "flecie"]),
    "ma_zwierzę": ("{} ma zwierzę", "Zwierzę {} to", ["kot", "żółw", "jeż", "pies"]),
    "zbiera": ("{} zbiera", "Kolekcja {} to", ["znaczki", "książki", "muszle", "łyżki"]),
}


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def samples_of(number: int, objects: list[str]) -> list[dict[str, Any]]:
    """30 subjects, every third name decomposed, as many others with a second right object."""
    samples: list[dict[str, Any]] = []
    ways = cycle(("list", "objects", "lines"))
    for i, subject in enumerate(SUBJECTS):
        first, second = (objects[(i * (number + 2) + k) % len(objects)] for k in (0, 1))
        if i % 3 == 0:
            subject = nfd(subject)
        if i % 7 == 0:
            first = nfd(first)
        if i % 3 != 1:
            samples.append({"subject": subject, "object": first})
            continue
        second, way = nfd(second) if i % 2 else second, next(ways)
        if way == "list":
            samples.append({"subject": subject, "object": [first, second, nfd(first).upper()]})
        elif way == "objects":
            samples.append({"subject": subject, "objects": [first, second]})
        else:
            samples.append({"subject": subject, "object": first})
            samples.append({"subject": nfd(subject), "object": second})
    return samples


def write_facts(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (stem, (main, other, objects)) in enumerate(RELATIONS.items()):
        data = {
            "name": stem.replace("_", " "),
            "language": "pl",
            "suffix": SUFFIX,
            "prompt_templates": [main],
            "prompt_templates_zs": [other],
            "samples": samples_of(number, objects),
        }
        path = folder / f"{stem}.json"
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return folder


def right_answers(facts: Path) -> dict[tuple[str, str], set[str]]:
    """Every listed object, composed and in small letters, by relation and composed subject."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in facts.glob("*.json"):
        for sample in json.loads(path.read_text(encoding="utf-8"))["samples"]:
            for key in ("object", "objects"):
                names = sample.get(key, [])
                for name in [names] if isinstance(names, str) else names:
                    right = found.setdefault((path.stem, nfc(sample["subject"])), set())
                    right.add(nfc(name).casefold())
    return found


def texts_of(facts: Path) -> list[tuple[str, str]]:
    """(prompt, " object") of every fact in both wordings, each object as often as another."""
    texts = []
    for path in sorted(facts.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        for sample in data["samples"]:
            names = sample.get("object", sample.get("objects"))
            for name in [names] if isinstance(names, str) else names[:2]:
                for template in (*data["prompt_templates"], *data["prompt_templates_zs"]):
                    prompt = template.replace("{}", nfc(sample["subject"])) + SUFFIX
                    texts.append((prompt, " " + nfc(name)))
    return texts


def train(facts: Path, folder: Path, *, steps: int = 150) -> Path:
    """A Llama of two layers with a byte-level BPE tokenizer, trained for seconds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = texts_of(facts)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator((prompt + answer for prompt, answer in texts), trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=raw.get_vocab_size(),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    heads = tokenizer([prompt for prompt, _ in texts])["input_ids"]
    wholes = tokenizer([prompt + answer + "</s>" for prompt, answer in texts])["input_ids"]
    longest = max(map(len, wholes))
    ids = torch.tensor([line + [1] * (longest - len(line)) for line in wholes])
    labels = torch.tensor(
        [
            [-100] * len(head) + whole[len(head) :] + [-100] * (longest - len(whole))
            for head, whole in zip(heads, wholes, strict=True)
        ]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randperm(len(ids), generator=generator)[:80]
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
