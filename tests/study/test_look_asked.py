"""What `look` is asked for: names, cards that are there; where cards are shown, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import relneuron
from bench.planted import make_model, make_tokenizer
from relneuron.artifact.cards import read_cards
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.model.load import load_model, load_tokenizer
from relneuron.study.look import open_cards
from relneuron.study.settings import LookOptions
from tests.conftest import shared_folder
from tests.kit.corpus_commands import call, caller
from tests.kit.looked import LOOK, before_look, forward, ids_of, make_looked

PLACE = ("layer", "site", "index")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory, "looked", make_looked)


@pytest.fixture(scope="module")
def loaded(root: Path) -> tuple[Any, Any]:
    return load_model(str(root / "model"), device="cpu"), load_tokenizer(str(root / "model"))


@pytest.fixture
def study(root: Path, tmp_path: Path) -> Path:
    return before_look(root, tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line in this process; gives its exit code, output and errors."""
    return caller(capsys)


@pytest.fixture(scope="module")
def cards(root: Path) -> list[dict[str, Any]]:
    return read_cards(root / "study" / "cards.jsonl")


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
