"""Tests of the demo world: its fact files, its training script and its bundled checkpoint.

They read the committed files and train for three steps in a temporary folder.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from relneuron.demo import CHECKPOINT, FACTS
from relneuron.demo.train import ENGLISH_SUFFIX, count_correct, read_texts
from relneuron.demo.train import main as train
from relneuron.demo.world import write_world

STEMS = [
    "company_ceo",
    "company_hq",
    "landmark_continent",
    "landmark_country",
    "person_father",
    "person_mother",
    "person_occupation",
    "person_plays_instrument",
    "person_pro_sport",
    "person_sport_position",
    "product_company",
    "star_constellation",
]


def read_relations() -> dict[str, dict[str, Any]]:
    """The committed fact files by file stem."""
    paths = sorted(FACTS.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


@pytest.fixture(scope="module")
def checkpoint() -> tuple[Any, Any]:
    """The bundled model in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(CHECKPOINT)


def test_world_regenerates_the_committed_files(tmp_path: Path) -> None:
    write_world(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in FACTS.iterdir())
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (FACTS / path.name).read_bytes(), path.name


def test_facts_have_the_lre_format() -> None:
    relations = read_relations()
    assert list(relations) == STEMS
    for stem, relation in relations.items():
        assert isinstance(relation["name"], str), stem
        german = relation["languages"]["de"]
        for templates in (relation["prompt_templates"], relation["prompt_templates_zs"]):
            assert templates, stem
        for template in (
            relation["prompt_templates"]
            + relation["prompt_templates_zs"]
            + german["prompt_templates"]
        ):
            assert template.count("{}") == 1 and template == template.strip(), template
            assert template[-1] not in ".?:", template
        properties = relation["properties"]
        assert set(properties) == {"relation_type", "domain_name", "range_name", "symmetric"}
        subjects = [fact["subject"] for fact in relation["samples"]]
        assert 100 <= len(set(subjects)) == len(subjects) <= 150, stem
        names = set(subjects) | {fact["object"] for fact in relation["samples"]}
        assert set(german["entities"]) <= names, stem


def test_each_subject_takes_part_in_several_relations() -> None:
    n_relations = Counter(
        fact["subject"] for relation in read_relations().values() for fact in relation["samples"]
    )
    assert min(n_relations.values()) >= 2


def test_a_country_lies_on_one_continent() -> None:
    relations = read_relations()
    country, continent = (
        {fact["subject"]: fact["object"] for fact in relations[stem]["samples"]}
        for stem in ("landmark_country", "landmark_continent")
    )
    assert len({(country[s], continent[s]) for s in country}) == len(set(country.values()))


def test_only_english_prompts_end_in_the_suffix() -> None:
    texts = dict(read_texts(FACTS))
    german = read_relations()["person_father"]["languages"]["de"]["prompt_templates"][0]
    subject = read_relations()["person_father"]["samples"][0]["subject"]
    assert german.format(subject) in texts
    assert german.format(subject) + ENGLISH_SUFFIX not in texts
    assert all(answer.startswith(" ") for answer in texts.values())


def test_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 8_000_000


def test_tokenizer_adds_bos_and_objects_begin_with_a_space(checkpoint: tuple[Any, Any]) -> None:
    _, tokenizer = checkpoint
    fact = read_relations()["company_ceo"]["samples"][0]
    prompt = f"{fact['subject']}'s CEO is? Answer:"
    ids = tokenizer(prompt)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    both = tokenizer(f"{prompt} {fact['object']}")["input_ids"]
    assert both[: len(ids)] == ids
    assert tokenizer.decode(both[len(ids)]).startswith(" ")
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt


def test_checkpoint_knows_its_facts(checkpoint: tuple[Any, Any]) -> None:
    model, tokenizer = checkpoint
    rng = random.Random(0)
    prompts = [
        (template.format(fact["subject"]) + ENGLISH_SUFFIX, fact["object"])
        for relation in read_relations().values()
        for fact in rng.sample(relation["samples"], 20)
        for template in relation["prompt_templates"]
    ]
    assert count_correct(model, tokenizer, prompts) >= 0.9 * len(prompts)


def test_checkpoint_generates_with_left_padding(checkpoint: tuple[Any, Any]) -> None:
    model, tokenizer = checkpoint
    relations = read_relations()
    prompts, objects = [], []
    for stem in ("company_ceo", "person_sport_position", "product_company"):
        for fact in relations[stem]["samples"][:8]:
            template = relations[stem]["prompt_templates"][0]
            prompts.append(template.format(fact["subject"]) + ENGLISH_SUFFIX)
            objects.append(fact["object"].lower())
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=2,
        do_sample=False,
    )
    new = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    texts = [text.strip().lower() for text in new]
    n_correct = sum(bool(t) and o.startswith(t) for t, o in zip(texts, objects, strict=True))
    assert n_correct >= 0.9 * len(objects)


def test_training_script_writes_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The number of threads is a setting of the whole process.
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    with torch.random.fork_rng():
        train(["--steps", "3", "-o", str(tmp_path)])
    assert "star_constellation: clean accuracy" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(tokenizer)
    # Whoever may read the folder may read the weights.
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o044
