"""Cards of neurons that were planted, and of random ones against hooks: what `look` writes."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import relneuron
from bench.planted import (
    LAYER,
    RELATIONS,
    answer_dim,
    make_model,
    make_tokenizer,
    planted_units,
    write_facts,
)
from relneuron.artifact.cards import check_card, read_cards
from relneuron.artifact.counts import Counts
from relneuron.artifact.examples import examples_of
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.model.load import load_model, load_tokenizer
from relneuron.study.look import open_cards, read_sets
from relneuron.study.settings import LookOptions
from tests.kit.corpus_commands import call, caller

LOOK = ("--examples", 4, "--quiet")
PLACE = ("layer", "site", "index")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `study`, recorded and ranked, and its page `look.html`."""
    root: Path = tmp_path_factory.mktemp("look")
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    write_facts(root / "facts")
    study = root / "study"
    for words in (
        ("prompts", root / "facts", "-o", study / "prompts.jsonl", "--eva", 12, "--suffix", ""),
        ("record", root / "model", study / "prompts.jsonl", "-o", study, "--quiet"),
        ("identify", study, "-o", study / "neurons.json", "--top", 17, "--quiet"),
        ("look", study, "-o", root / "look.html", *LOOK),
    ):
        assert call(*words) == 0, words
    return root


@pytest.fixture(scope="module")
def loaded(root: Path) -> tuple[Any, Any]:
    return load_model(str(root / "model"), device="cpu"), load_tokenizer(str(root / "model"))


@pytest.fixture
def study(root: Path, tmp_path: Path) -> Path:
    """The study before it was looked at."""
    folder = tmp_path / "study"
    shutil.copytree(root / "study", folder)
    for name in ("cards.jsonl", "sets.csv"):
        (folder / name).unlink()
    manifest = Manifest(folder)
    del manifest.data["stages"]["look"]
    for name in ("cards.jsonl", "sets.csv"):
        del manifest.data["files"][name]
    manifest.save()
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line in this process; gives its exit code, output and errors."""
    return caller(capsys)


@pytest.fixture(scope="module")
def cards(root: Path) -> list[dict[str, Any]]:
    return read_cards(root / "study" / "cards.jsonl")


def forward(model: Any, text: list[int], off: tuple[int, str, int] | None = None) -> Any:
    """Outputs of gate, up, down and what down reads at each token by layer, and the logits.

    By hooks of torch; with a neuron at zero.
    """
    seen: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for layer, block in enumerate(model.model.layers):
        for site in ("gate", "up", "down"):

            def hook(_m: Any, given: Any, y: Any, layer: int = layer, site: str = site) -> Any:
                if off is not None and off[:2] == (layer, site):
                    y = y.clone()
                    y[..., off[2]] = 0
                seen[layer, site] = y[0]
                if site == "down":
                    seen[layer, "product"] = given[0][0]
                return y

            handles.append(getattr(block.mlp, f"{site}_proj").register_forward_hook(hook))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text])).logits[0]
    for handle in handles:
        handle.remove()
    return seen, logits


def ids_of(tokenizer: Any, example: dict[str, Any]) -> list[int]:
    assert example["first"] == 0
    return list(tokenizer.convert_tokens_to_ids([t.strip() for t in example["tokens"]]))


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


def test_names_of_neurons(root: Path, study: Path, run: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = ("look", study, "-o", page, *LOOK, "--model", root / "model")
    names = "2.gate.3,L2.act.3,2.product.3,2.down.5"
    code, out, _ = run(*words, "--neurons", names)
    assert code == 0 and "4 cards" in out
    gate, act, product, down = read_cards(study / "cards.jsonl")
    assert [c["neuron"] for c in (gate, act, product, down)] == [
        *("2.gate.3", "2.act.3", "2.product.3", "2.down.5")
    ]
    # One neuron, seen at three places: in the same set, and switched off in the same way.
    for one in (act, product):
        assert one["sets"] == gate["sets"] != []
        assert [e["p_off"] for e in one["examples"]] == [e["p_off"] for e in gate["examples"]]
    model, tokenizer = load_model(str(root / "model"), device="cpu"), make_tokenizer()
    one = act["examples"][0]
    seen, _ = forward(model, ids_of(tokenizer, one))
    silu = torch.nn.functional.silu(seen[2, "gate"][:, 3]).numpy()
    assert np.allclose(one["values"], silu, rtol=1e-3, atol=1e-6)
    values = product["examples"][0]["values"]
    assert np.allclose(values, seen[2, "product"][:, 3].numpy(), rtol=1e-3, atol=1e-6)
    assert page.read_bytes().count(b"<article") == 4


@pytest.mark.parametrize(
    "names,cause,fix",
    [
        (
            "2.gate",
            "'2.gate' is no name of a neuron",
            "write layer.site.index, such as 12.gate.345",
        ),
        ("2.gate.256", "neuron (layer 2, site 'gate', index 256) is not in a model", "count from"),
        ("7.up.0", "neuron (layer 7, site 'up', index 0) is not in a model", "count from zero"),
        ("2.ffn.0", "neuron (layer 2, site 'ffn', index 0) is not in a model", "sites are gate"),
        ("L2 expert 3 up 4", "layer 2 has 0 experts", "count from zero"),
        ("no.json", "no.json does not exist", "identify"),
    ],
)
def test_other_names_are_refused(
    study: Path, run: Any, tmp_path: Path, names: str, cause: str, fix: str
) -> None:
    words = ("look", study, "-o", tmp_path / "page.html", *LOOK, "--neurons", names)
    code, out, err = run(*words)
    lines = err.splitlines()
    assert code == 2 or "is not in a model" in err
    assert code and out == "" and cause in lines[0] and fix in lines[1] and len(lines) == 2
    assert not (tmp_path / "page.html").exists() and not (study / "cards.jsonl").exists()


def test_cards_that_are_there_are_shown_again(
    root: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    shutil.copytree(root / "study", folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    monkeypatch.setattr("relneuron.study.cards.Cards.cards", None)
    page = tmp_path / "page.html"
    assert run("look", folder, "-o", page, *LOOK)[0] == 0
    assert page.read_bytes() == (root / "look.html").read_bytes()
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    other = tmp_path / "other.html"
    assert run("look", folder, "-o", other, *LOOK, "--batch-tokens", 100)[0] == 0
    assert other.read_bytes() == page.read_bytes()
    code, _, err = run("look", folder, "-o", page, *LOOK)
    assert code == 2 and "page.html exists" in err
    code, _, err = run("look", folder, "-o", page, "--force", "--examples", 3, "--quiet")
    assert code == 1  # other cards: asked for again, and that is cut off above
    code, _, err = run("look", folder, "-o", tmp_path / "b.html", "--examples", 3)
    assert code == 1 and "look was made from other inputs: examples: 4 -> 3" in err


def test_named_neurons_are_looked_at_beside_the_cards_of_the_study(
    root: Path, tmp_path: Path, run: Any
) -> None:
    folder, page = tmp_path / "study", tmp_path / "page.html"
    shutil.copytree(root / "study", folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    words = ("look", folder, *LOOK, "--model", root / "model", "--neurons", "2.gate.3,2.up.0")
    code, out, err = run(*words, "-o", page)
    assert code == 0, err
    assert "2 cards" in out and page.read_bytes().count(b"<article") == 2
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    code, _, err = run(*words, "-o", folder / "other.html")
    assert code == 1 and "look was made from other inputs" in err
    assert run(*words, "-o", page, "--force")[0] == 0
    assert [card["neuron"] for card in read_cards(folder / "cards.jsonl")] == ["2.gate.3", "2.up.0"]


def test_the_page_is_no_file_of_the_study(study: Path, run: Any) -> None:
    for name in ("cards.jsonl", "neurons.json", "sets.csv"):
        code, _, err = run("look", study, "-o", study / name, *LOOK, "--force")
        assert code == 2 and f"{name} is a file of the study" in err


def test_another_model_is_refused(study: Path, root: Path, run: Any, tmp_path: Path) -> None:
    make_model(make_tokenizer(), seed=1).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    words = ("look", study, "-o", tmp_path / "p.html", *LOOK, "--model", tmp_path / "other")
    code, _, err = run(*words)
    assert code == 2 and "another model, or of other weights" in err
    assert not (study / "cards.jsonl").exists()


def test_a_folder_without_a_study_is_refused(tmp_path: Path, run: Any) -> None:
    code, _, err = run("look", tmp_path, "-o", tmp_path / "p.html")
    assert code == 2 and "manifest.json does not exist" in err


def test_numbers_of_a_prompt_that_is_not_there(study: Path, loaded: Any) -> None:
    path, manifest = study / "prompts.jsonl", Manifest(study)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"alpha.det.en.0000.0"' not in line))
    del manifest.data["files"]["prompts.jsonl"]
    manifest.save()
    with pytest.raises(RelneuronError, match="prompts.jsonl lacks alpha.det.en.0000"):
        open_cards(*loaded, study, LookOptions())


def test_the_report_shows_the_cards_while_they_hold(root: Path, tmp_path: Path, run: Any) -> None:
    """Those of neurons that were chosen again are not shown."""
    folder = tmp_path / "study"
    shutil.copytree(root / "study", folder)
    ablate = ("ablate", root / "model", folder / "neurons.json", folder / "prompts.jsonl")
    assert call(*ablate, "-o", folder / "effects.csv", "--random-seeds", 0, "--quiet") == 0
    assert call("report", folder, "-o", tmp_path / "a.html") == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count("<article") == 24 and "<script" not in page and 'id="neurons"' in page
    assert "relneuron look" in page
    again = ("identify", folder, "-o", folder / "neurons.json", "--top", 5, "--quiet", "--force")
    assert call(*again) == 0
    assert "look" not in Manifest(folder).data["stages"]
    assert (
        call(*ablate, "-o", folder / "effects.csv", "--random-seeds", 0, "--quiet", "--force") == 0
    )
    assert call("report", folder, "-o", tmp_path / "b.html") == 0
    assert "<article" not in (tmp_path / "b.html").read_text(encoding="utf-8")


def test_a_notebook_draws_a_card(root: Path, cards: list[dict[str, Any]]) -> None:
    """The same as the page has; without it the texts are seen."""
    study = relneuron.load(root / "study")
    name = cards[3]["neuron"]
    card = study.card(name)
    assert card.data == cards[3] == study.card(tuple(cards[3][k] for k in PLACE)).data
    html = card._repr_html_()
    assert html.count("<article") == 1 and "<style>" in html and "<script" not in html
    page = (root / "look.html").read_text(encoding="utf-8")
    body = html[html.index("<header>") : html.index("</article>")]
    assert body in re.sub("</?a[^>]*>", "", page)  # the page leads to other cards
    assert cards[3]["name"] in repr(card) and repr(card).count("\n") == 4
    assert "cards" in study.there and "card(neuron)" in repr(study)
    with pytest.raises(RelneuronError, match="has no card of 0.up.9, but of"):
        study.card("0.up.9")


def test_a_damaged_card_is_refused(root: Path, tmp_path: Path) -> None:
    lines = (root / "study" / "cards.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "cards.jsonl"

    def refused(what: str, **change: Any) -> None:
        card = json.loads(lines[1]) | change
        path.write_text("\n".join([lines[0], json.dumps(card)]), encoding="utf-8")
        with pytest.raises(RelneuronError, match=f"cards.jsonl, line 2: .*{what}"):
            read_cards(path)

    example = json.loads(lines[1])["examples"][0]
    refused("format is 'x'", format="x")
    refused("it.layer is not a whole number", layer=1.5)
    refused("it.sets is no list", sets={})
    refused("it.examples.0 is no object", examples=[3])
    refused("it.examples.0.p is not a number", examples=[example | {"p": "x"}])
    refused("a value for each token", examples=[example | {"values": [1.0]}])
    refused("a value for each token", examples=[example | {"peak": 99}])
    spread = {"of": "x", "edges": [0, 1], "groups": {"a": [1, 2]}}
    refused("a count for each bin", histogram=spread)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(RelneuronError, match="it is no object"):
        read_cards(path)


# --- of a corpus, of an attribution ---------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(root: Path) -> Path:
    """Two groups of random words, the words of relations among them, counted with examples."""
    draw = random.Random(3)
    words = [f"s{i}" for i in range(60)] + [f"{name}-is" for name in RELATIONS] * 2
    for name in ("one", "two"):
        lines = [" ".join(draw.choices(words, k=20)) for _ in range(30)]
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = [f"{name}={root / name}.txt" for name in ("one", "two")]
    folder = root / "corpus"
    asked = ("--examples", 4, "--histogram", 16, "--window", 24, "--workers", 1, "--quiet")
    assert call("count", root / "model", *texts, "-o", folder, *asked) == 0
    names = ",".join(f"{LAYER}.act.{planted_units(k)[0]}" for k in range(len(RELATIONS)))
    page = ("-o", root / "corpus.html", *LOOK)
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
