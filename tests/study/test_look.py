"""Cards of neurons that were planted, and of random ones against hooks: what `look` writes."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bench.planted import LAYER, RELATIONS, answer_dim, planted_units
from relneuron.artifact.cards import check_card, read_cards
from relneuron.artifact.counts import Counts
from relneuron.artifact.examples import examples_of
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.model.load import load_model, load_tokenizer
from relneuron.study.look import open_cards, read_sets
from relneuron.study.settings import LookOptions
from tests.conftest import shared_folder
from tests.kit.corpus_commands import call
from tests.kit.looked import LOOK, forward, ids_of, make_looked


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory, "looked", make_looked)


@pytest.fixture(scope="module")
def loaded(root: Path) -> tuple[Any, Any]:
    return load_model(str(root / "model"), device="cpu"), load_tokenizer(str(root / "model"))


@pytest.fixture(scope="module")
def cards(root: Path) -> list[dict[str, Any]]:
    return read_cards(root / "study" / "cards.jsonl")


def test_a_planted_neuron_shows_its_word_in_every_example(cards: list[dict[str, Any]]) -> None:
    """The word is where it fires, and nothing else is."""
    seen = 0
    for card in cards:
        for relation, name in enumerate(RELATIONS):
            is_planted = card["layer"] == LAYER and card["index"] in planted_units(relation)
            if not is_planted or card["site"] == "down":
                continue
            seen += 1
            assert [one["set"] for one in card["sets"]] == [name]
            assert len(card["examples"]) == 4
            for one in card["examples"]:
                assert one["tokens"][one["peak"]].strip() == f"{name}-is"
                rest = [v for k, v in enumerate(one["values"]) if k != one["peak"]]
                assert max(map(abs, rest)) == 0 < one["values"][one["peak"]]
                assert one["group"] == name and one["next"].strip() == f"{name}-answer"
            assert card["promotes"][0]["token"].strip() == f"{name}-answer"
            # All that its units write is the same.
            assert {near["cosine"] for near in card["nearest"]} == {1.0}
            units = {(LAYER, unit) for unit in planted_units(relation)} - {(LAYER, card["index"])}
            found = [tuple(map(int, n["neuron"].split(".gate."))) for n in card["nearest"]]
            assert found == sorted(units)[:5]
    assert seen == 2 * 8 * len(RELATIONS)


def test_without_what_the_planted_neurons_write_the_answer_is_lost(
    cards: list[dict[str, Any]],
) -> None:
    """Eight of them write into one coordinate."""
    by_name = {card["neuron"]: card for card in cards}
    for relation, name in enumerate(RELATIONS):
        card = by_name[f"{LAYER}.down.{answer_dim(relation)}"]
        for one in card["examples"]:
            assert one["group"] == name and one["p"] > 0.99 and one["p_off"] < 0.1


def test_values_are_what_hooks_see(loaded: Any, cards: list[dict[str, Any]]) -> None:
    model, tokenizer = loaded
    for card in cards[::7]:
        for one in card["examples"]:
            seen, _ = forward(model, ids_of(tokenizer, one))
            values = seen[card["layer"], card["site"]][:, card["index"]].numpy()
            assert np.allclose(one["values"], values, rtol=1e-3, atol=1e-6)
            assert one["peak"] == int(values.argmax())
            assert one["value"] == pytest.approx(float(values.mean()), rel=1e-3, abs=1e-6)


def test_probabilities_are_those_with_the_neuron_at_zero(
    loaded: Any, cards: list[dict[str, Any]]
) -> None:
    model, tokenizer = loaded
    for card in cards[::7]:
        off = (card["layer"], card["site"], card["index"])
        for one in card["examples"]:
            text = ids_of(tokenizer, one)
            target = tokenizer.convert_tokens_to_ids(one["next"].strip())
            for key, without in (("p", None), ("p_off", off)):
                _, logits = forward(model, text, without)
                p = float(logits[-1].double().softmax(-1)[target])
                assert one[key] == pytest.approx(p, rel=2e-3), (card["neuron"], key)


def test_examples_are_the_largest_responses(root: Path, cards: list[dict[str, Any]]) -> None:
    responses = load_file(root / "study" / "responses.safetensors")
    text = (root / "study" / "prompts.jsonl").read_text(encoding="utf-8")
    prompts = [json.loads(line) for line in text.splitlines()]
    det = [prompt for prompt in prompts if prompt["split"] == "det"]
    for card in cards:
        column = responses[f"{card['site']}.{card['layer']}"][:, card["index"]]
        order = np.argsort(-column, kind="stable")[:4]
        assert [one["id"] for one in card["examples"]] == [det[k]["id"] for k in order]
        counts = np.array(list(card["histogram"]["groups"].values()))
        assert counts.sum() == len(det) and counts.shape == (len(RELATIONS), 24)


def test_tokens_and_neighbours_are_those_of_all_weights(
    loaded: Any, cards: list[dict[str, Any]]
) -> None:
    """Against every column of every layer in float64."""
    model, tokenizer = loaded
    layers = [block.mlp.down_proj.weight.detach().double() for block in model.model.layers]
    columns = torch.cat(layers, 1).T
    width = layers[0].shape[1]
    unit = columns / columns.norm(dim=1, keepdim=True)
    head = model.lm_head.weight.detach().double() * model.model.norm.weight.detach().double()
    for card in cards[::5]:
        place = card["layer"] * width + card["index"]
        if card["site"] == "down":
            vector = torch.zeros(columns.shape[1], dtype=torch.float64)
            vector[card["index"]] = 1
        else:
            vector = columns[place]
        logits = head @ vector
        for key, sign in (("promotes", 1), ("suppresses", -1)):
            best = (sign * logits).sort(descending=True).values[:10] * sign
            assert [t["logit"] for t in card[key]] == pytest.approx(
                best.tolist(), rel=1e-3, abs=1e-6
            )
            for token in card[key]:
                assert token["logit"] == pytest.approx(
                    float(logits[token["id"]]), rel=1e-3, abs=1e-6
                )
                assert tokenizer.decode([token["id"]]) == token["token"]
        cosines = unit @ (vector / vector.norm())
        if card["site"] != "down":
            cosines[place] = -2
        best = cosines.sort(descending=True).values[:5]
        assert [n["cosine"] for n in card["nearest"]] == pytest.approx(best.tolist(), abs=2e-4)
        for near in card["nearest"]:
            layer, _, index = near["neuron"].split(".")
            own = float(cosines[int(layer) * width + int(index)])
            assert near["cosine"] == pytest.approx(own, abs=2e-4)


def test_the_sets_are_a_csv(root: Path, cards: list[dict[str, Any]]) -> None:
    sets = NeuronFile.read(root / "study" / "neurons.json").sets
    with (root / "study" / "sets.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    keys = ("set", "rank", "layer", "site", "index")
    wanted = [
        (s, str(k), str(n[0]), n[1], str(n[2])) for s in sets for k, n in enumerate(sets[s], 1)
    ]
    assert [tuple(row[key] for key in keys) for row in rows] == wanted
    with (root / "study" / "significance.csv").open(encoding="utf-8") as file:
        tested = list(csv.DictReader(file))
    for row, test in zip(rows, tested, strict=True):
        assert float(row["q_value"]) == float(test["q_value"])
        assert float(row["score"]) == float(test["score"])
    by_set = {(row["set"], row["rank"]): row for row in rows}
    for card in cards:
        for one in card["sets"]:
            row = by_set[one["set"], str(one["rank"])]
            assert one["score"] == pytest.approx(float(row["score"]), rel=1e-3)
            assert one["q"] == pytest.approx(float(row["q_value"]), rel=1e-3)
            assert one["low"] == pytest.approx(float(row["ap_low"]), rel=1e-3)


def test_the_best_of_each_set_come_first(root: Path) -> None:
    """In turn, each neuron once, as many as were asked for."""
    sets = read_sets(root / "study", ())
    chosen = sets.file.sets
    order = [rows[rank][:3] for rank in range(17) for rows in chosen.values()]
    assert sets.best(1000) == list(dict.fromkeys(order))
    assert sets.best(7) == list(dict.fromkeys(order))[:7]


def test_one_card_is_that_of_all(root: Path, loaded: Any, cards: list[dict[str, Any]]) -> None:
    """What a server asks for, neuron by neuron; also of a neuron in no set."""
    maker, _ = open_cards(*loaded, root / "study", LookOptions(examples=4))
    for card in cards[::20]:
        assert maker.card((card["layer"], card["site"], card["index"])) == card
    other = maker.card((0, "up", 7))
    check_card(other)
    assert other["sets"] == [] and other["neuron"] == "0.up.7" and len(other["examples"]) == 4


# --- of a corpus, of an attribution ---------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups of random words, the words of relations among them, counted with examples."""
    draw, place = random.Random(3), tmp_path_factory.mktemp("corpus")
    words = [f"s{i}" for i in range(60)] + [f"{name}-is" for name in RELATIONS] * 2
    for name in ("one", "two"):
        lines = [" ".join(draw.choices(words, k=20)) for _ in range(30)]
        (place / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = [f"{name}={place / name}.txt" for name in ("one", "two")]
    folder = place / "corpus"
    asked = ("--examples", 4, "--histogram", 16, "--window", 24, "--workers", 1, "--quiet")
    assert call("count", root / "model", *texts, "-o", folder, *asked) == 0
    names = ",".join(f"{LAYER}.act.{planted_units(k)[0]}" for k in range(len(RELATIONS)))
    page = ("-o", place / "corpus.html", *LOOK)
    assert call("look", folder, *page, "--neurons", names) == 0
    return folder


def test_a_planted_neuron_of_a_corpus_shows_its_word_in_every_example(
    root: Path, corpus: Path, loaded: Any
) -> None:
    """In windows of a text, which the counting pass kept; their numbers are those of the file."""
    _, tokenizer = loaded
    cards = read_cards(corpus / "cards.jsonl")
    assert len(cards) == len(RELATIONS)
    for relation, card in enumerate(cards):
        neuron = (LAYER, "act", planted_units(relation)[0])
        (every,) = examples_of(corpus / "examples.safetensors", [neuron])
        best = sorted((one.value for one in every), reverse=True)[:4]
        assert [one["value"] for one in card["examples"]] == pytest.approx(best, rel=1e-3)
        for one in card["examples"]:
            peak = one["peak"]
            assert one["tokens"][peak].strip() == f"{RELATIONS[relation]}-is"
            assert (
                one["values"][peak] == max(one["values"]) == pytest.approx(one["value"], rel=1e-3)
            )
            # What follows it in the text, as the model expects it there.
            assert one["next"] is None or one["next"].strip() == one["tokens"][peak + 1].strip()
            assert 1 <= len(one["tokens"]) <= 24 + 1 + 8
        spread = card["histogram"]
        n_tokens = [sum(counts) for counts in spread["groups"].values()]
        counted = Counts.read(corpus / "counts.safetensors")
        assert n_tokens == counted.tokens.tolist() and [*spread["groups"]] == counted.groups
    assert "look" in Manifest(corpus).data["stages"]
    assert not Manifest(corpus).data["stages"]["look"]["notices"]


def test_neurons_of_a_set_show_what_was_counted(corpus: Path, root: Path, loaded: Any) -> None:
    """LAPE names the gate; its act is what the pass looked at."""
    maker, _ = open_cards(*loaded, corpus, LookOptions(examples=4))
    unit = planted_units(1)[0]
    gate, act = maker.cards([(LAYER, "gate", unit), (LAYER, "act", unit)])
    assert gate["values_at"] == act["values_at"] == "act"
    assert gate["examples"] == act["examples"] != []
    assert maker.card((LAYER, "down", 3))["examples"] == []  # was not counted


def test_gains_and_gradients_have_examples(root: Path, loaded: Any, tmp_path: Path) -> None:
    """The sentences with the largest gain; tokens are shaded by what the neuron writes with."""
    folder, prompts = tmp_path / "gains", root / "study" / "prompts.jsonl"
    words = ("attribute", root / "model", prompts, "-o", folder, "--quiet", "--splits", "eva")
    assert call(*words, "--no-compare") == 0
    gains = load_file(folder / "gains.safetensors")[f"ffn.{LAYER}"]
    maker, _ = open_cards(*loaded, folder, LookOptions(examples=3))
    unit = planted_units(2)[0]
    card = maker.card((LAYER, "gate", unit))
    best = np.sort(gains[:, unit])[::-1][:3]
    assert [one["value"] for one in card["examples"]] == pytest.approx(best.tolist(), rel=1e-3)
    assert card["values_at"] == "product" and "nats" in card["value_of"]
    for one in card["examples"]:
        assert one["group"] == RELATIONS[2] and one["next"].strip() == f"{RELATIONS[2]}-answer"
        assert one["tokens"][one["peak"]].strip() == f"{RELATIONS[2]}-is"
    # The same texts where the same sentences have gradients alone.
    other = tmp_path / "ig"
    words = ("attribute", root / "model", prompts, "-o", other, "--quiet", "--splits", "eva")
    assert call(*words, "--method", "ig", "--steps", 2) == 0
    maker, _ = open_cards(*loaded, other, LookOptions(examples=3))
    card = maker.card((LAYER, "gate", unit))
    assert {one["group"] for one in card["examples"]} == {RELATIONS[2]}
    assert card["value_of"] == "integrated gradient of the answer"
