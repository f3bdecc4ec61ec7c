"""What the page on facts says: its numbers are those of its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relneuron.artifact.files import RelneuronError
from relneuron.methods.gradients.choices import KnowledgeOptions
from relneuron.methods.gradients.rank import identify_gradients
from relneuron.methods.gradients.study import PAGE
from relneuron.report.page import kind_of, make_page, render
from relneuron.study.pages import PAGES, titles
from tests.kit.gradient_studies import write_fact_study
from tests.kit.pages import Page


def words(folder: Path) -> str:
    return " ".join(Page(render(make_page(folder, PAGES, titles()))).text.split())


def test_the_page_says_what_the_files_hold(tmp_path: Path) -> None:
    folder = write_fact_study(tmp_path)
    text = words(folder)
    changed = "times 2 at the last token of the prompt its answer's probability changes by −55.1"
    assert "3 facts · 6 prompts · 2 relations · query localization" in text
    # log P falls by 0.8 on the own prompts: e^-0.8 - 1.
    assert (
        "times 2 at the last token of the prompt its answer's probability changes by −55.1" in text
    )
    assert changed in text and "6 answers of what they are about" in text
    assert "Right answers: 50.0 % before, 50.0 % after" in text.replace("\xa0", " ")
    how = json.loads((folder / "neurons.json").read_text())["selection"]["how"]
    above = f"{how['consistent']} of {how['consistent'] + how['inconsistent']} facts are consistent"
    assert above in text
    assert "Another option is the most probable one in 0.0" in text
    # |sum - change| is 0.05, 0.04 and 0.03 by layer.
    assert "within 0.04 on average, 0.05 at most" in text


def test_without_effects_it_says_so_and_effects_of_other_sets_do_not_count(tmp_path: Path) -> None:
    folder = write_fact_study(tmp_path)
    identify_gradients(
        *(folder, folder / "neurons.json", KnowledgeOptions()),
        method="knowledge_neurons",
        force=True,
        quiet=True,
    )
    text = words(folder)
    assert "nothing was switched off" in text and "What the neurons do" not in text
    assert "A neuron is in more than 50.0 % of a fact's prompts" in text.replace("\xa0", " ")


def test_neurons_that_another_method_chose_are_not_of_facts(tmp_path: Path) -> None:
    folder = write_fact_study(tmp_path)
    data = json.loads((folder / "neurons.json").read_text())
    (folder / "neurons.json").write_text(json.dumps(data | {"method": "ap", "selection": {}}))
    assert kind_of(folder, PAGES) is PAGE
    with pytest.raises(RelneuronError, match="is not of the neurons beside it, which ap chose"):
        make_page(folder, PAGES)
