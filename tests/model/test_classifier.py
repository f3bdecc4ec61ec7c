"""Classifiers of texts: what transformers says of each text alone, whatever shares its batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from relneuron.artifact.files import RelneuronError
from relneuron.model.classifier import load_classifier
from tests.kit.speakers import CLASSIFIERS, classifier_folder, save, words

TEXTS = ["a b c", "a", "c c a b a", "b", "a b", "b c a c b a c"]


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("pad", [None, 0])
def test_logits_are_those_of_each_text_alone(tmp_path: Path, kind: str, pad: int | None) -> None:
    folder = classifier_folder(tmp_path, kind, pad_token_id=pad)
    classifier = load_classifier(str(folder), device="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    for budget in (1, 12, 1000):
        for label in (0, 1):
            found = torch.tensor(classifier.logits(TEXTS, label, budget))
            torch.testing.assert_close(found, wanted[:, label], rtol=1e-5, atol=1e-6)
    assert classifier.logits(TEXTS, 1, 12) == classifier.logits(TEXTS, 1, 12)
    assert classifier.model.config.pad_token_id == pad


def test_no_pad_token_is_the_last_one_of_a_text(tmp_path: Path) -> None:
    """Texts that end in every token of the vocabulary: there is nothing to fill them up with."""
    classifier = load_classifier(str(classifier_folder(tmp_path)), device="cpu")
    vocabulary = classifier.model.config.vocab_size
    texts = [[3] * (1 + i % 3) + [i] for i in range(vocabulary)]
    for some in (texts, texts[1:]):  # nothing is free, and the token 0
        with torch.no_grad():
            alone = [float(classifier.model(torch.tensor([ids])).logits[0, 0]) for ids in some]
        assert classifier._ask(some, 0) == pytest.approx(alone, rel=1e-5, abs=1e-6)


def test_a_label_is_a_name_or_a_number(tmp_path: Path) -> None:
    named = classifier_folder(tmp_path / "a", id2label={0: "safe", 1: "unsafe"})
    classifier = load_classifier(str(named), device="cpu")
    assert [classifier.place_of(label) for label in ("safe", "unsafe", "1")] == [0, 1, 1]
    for label, cause in ((None, "has several labels"), ("bad", "has no label 'bad'")):
        with pytest.raises(RelneuronError, match=cause) as raised:
            classifier.place_of(label)
        assert raised.value.fix == "use --label: 0 (safe), 1 (unsafe)"
    single = classifier_folder(tmp_path / "b", n_labels=1)
    assert load_classifier(str(single), device="cpu").place_of(None) == 0


def test_what_is_no_classifier(tmp_path: Path) -> None:
    classifier = load_classifier(str(classifier_folder(tmp_path / "a")), device="cpu")
    with pytest.raises(RelneuronError, match="text 2 has 17 tokens, the classifier .* reads 1 to"):
        classifier.logits(["a", "a " * 16], 0, 100)
    with torch.no_grad():
        classifier.model.score.weight[:] = float("inf")
    with pytest.raises(RelneuronError, match="gives (inf|-inf|nan)"):
        classifier.logits(["a"], 0, 100)
    # A language model has no weights that classify.
    config = transformers.LlamaConfig(vocab_size=8, hidden_size=16, num_attention_heads=2)
    speaker = save(tmp_path / "b", transformers.LlamaForCausalLM(config), words(TEXTS))
    with pytest.raises(RelneuronError, match=r"lacks weights: score\.weight"):
        load_classifier(str(speaker), device="cpu")
    with pytest.raises(RelneuronError, match="no model folder"):
        load_classifier(str(tmp_path), device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(RelneuronError, match="could not be loaded as a classifier"):
        load_classifier(str(tmp_path), device="cpu")
