"""Folders that the stages wrote, and what they were made of: once for the tests of integrity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relneuron.ablation.nll import nll
from relneuron.artifact.prompts import read_questions
from relneuron.methods.contrast.rank import identify_contrast
from relneuron.methods.gains.rank import identify_gains
from relneuron.model.load import load_model, load_tokenizer
from relneuron.report.page import write_report
from relneuron.study.pages import PAGES
from relneuron.study.run import run_study
from relneuron.texts.sources import parse_sources
from tests.artifact.handed import NLL, OPTIONS, attributed, contrasted, counted, probed
from tests.kit.counted import rank_counts
from tests.kit.gradient_studies import gradient_study


@pytest.fixture(scope="session")
def loaded(model_folder: Path) -> tuple[Any, Any]:
    return load_model(str(model_folder)), load_tokenizer(str(model_folder))


@pytest.fixture(scope="session")
def facts(fact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The facts, with two kinds of subject: concepts are studied, too."""
    folder = tmp_path_factory.mktemp("facts")
    for path in fact_folder.glob("*.json"):
        data = json.loads(path.read_text())
        town = path.stem == "works_as"
        data["properties"] = {"domain_name": "town" if town else "person"}
        if town:
            data["samples"] = [s | {"subject": f"{s['subject']}ville"} for s in data["samples"]]
        (folder / path.name).write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    for group, verb in (("a", "eats"), ("b", "lives in")):
        lines = [f"Person{i} {verb} apple Rome plum Oslo {i}" for i in range(60)]
        (folder / f"{group}.txt").write_text("\n".join(lines))
    return [f"{group}={folder / group}.txt" for group in "ab"]


@pytest.fixture(scope="session")
def made(
    model_folder: Path,
    loaded: tuple[Any, Any],
    facts: Path,
    corpus: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folders that the stages wrote: study, attribution, counts with all that follows, ..."""
    root = tmp_path_factory.mktemp("made")
    run_study(str(model_folder), facts, root / "study", OPTIONS, quiet=True)
    attributed(loaded, root / "study" / "prompts.jsonl", root / "attribution")
    identify_gains(root / "attribution", root / "attribution" / "neurons.json", quiet=True)
    write_report(root / "attribution", root / "attribution" / "report.html", PAGES)
    rng = np.random.default_rng(0)
    facts_asked = [(r, s, list(rng.normal(size=(2, 2, 48)))) for r in "rs" for s in "abc"]
    gradient_study(root / "gradients", facts_asked)
    counted(loaded, corpus, root / "counts", examples=2, histogram=8)
    counted(loaded, corpus, root / "products", sites=("product",))
    for shard in (1, 2):
        counted(loaded, corpus, root / f"half{shard}", shard=(shard, 2), examples=2, histogram=8)
    neurons = root / "counts" / "neurons.json"
    chosen = {"top_rate": 0.2, "filter_rate": 0.5, "bar_ratio": 0.5}
    rank_counts(root / "counts", neurons, **chosen)
    ids = [prompt.id for prompt in read_questions(root / "study" / "prompts.jsonl")]
    rows = [f"{key},{number % 2}\n" for number, key in enumerate(ids)]
    (root / "labels.csv").write_text("".join(["id,y\n", *rows]))
    probed(loaded, root, root / "probe")
    nll("m", *loaded, neurons, parse_sources(corpus), root / "counts", NLL, quiet=True)
    # A second choice: the manifest's entry is now this one's.
    rank_counts(root / "counts", root / "counts" / "random.json", method="random", top=9)
    write_report(root / "counts", root / "counts" / "report.html", PAGES)
    contrasted(loaded, root / "study" / "prompts.jsonl", root / "contrast")
    identify_contrast(root / "contrast", root / "contrast" / "neurons.json")
    return root
