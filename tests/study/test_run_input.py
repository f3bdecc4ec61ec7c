"""What `run` refuses, before it writes and before hours of recording.

The model is the tiny one of conftest.py; nothing of a study may be there after a refusal.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import relneuron.study.run
from relneuron.ablation.options import ANALYSES
from relneuron.artifact.files import RelneuronError
from relneuron.study.run import run_study
from relneuron.study.settings import RunOptions

OPTIONS = RunOptions(
    eva=4, top=40, random_seeds=2, batch_tokens=512, permutations=0, bootstrap=0, noise=0
)


def renamed(facts: Path, folder: Path, names: dict[str, str], **changes: Any) -> Path:
    """The fact files that `names` names, under other names and with other content."""
    folder.mkdir()
    for old, new in names.items():
        data = json.loads((facts / f"{old}.json").read_text(encoding="utf-8"))
        (folder / f"{new}.json").write_text(json.dumps(data | changes), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "asked", "match"),
    [
        ("clean", {}, "two conditions are named clean"),
        ("random.1", {}, "named random.1"),
        ("works_as~0", {"analyses": ANALYSES}, "named works_as~0"),
        ("works_as@10", {"analyses": ("sizes",), "sizes": (10, 30)}, "named works_as@10"),
        ("works_as@11-30", {"analyses": ("sizes",), "sizes": (10, 30)}, "named works_as@11-30"),
        ("works_as@40", {"analyses": ("sizes",)}, "named works_as@40"),
        ("works_as@up", {"analyses": ("sites",)}, "named works_as@up"),
    ],
)
def test_names_of_conditions_are_refused_at_once(
    model_folder: Path,
    fact_folder: Path,
    tmp_path: Path,
    name: str,
    asked: dict[str, Any],
    match: str,
) -> None:
    facts = renamed(fact_folder, tmp_path / "facts", {"works_as": "works_as", "lives_in": name})
    options = replace(OPTIONS, **asked)
    with pytest.raises(RelneuronError, match=match) as caught:
        run_study(str(model_folder), facts, tmp_path / "s", options, quiet=True)
    assert "rename" in caught.value.fix
    assert not (tmp_path / "s").exists()


def test_names_of_concepts_are_refused_at_once(
    model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    facts = tmp_path / "facts"
    names = {"works_as": "works_as", "lives_in": "concept:town"}
    renamed(fact_folder, facts, names, properties={"domain_name": "person"})
    path = facts / "works_as.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["properties"]["domain_name"] = "town"
    data["samples"] = [s | {"subject": f"{s['subject']}ville"} for s in data["samples"]]
    path.write_text(json.dumps(data), encoding="utf-8")
    options = replace(OPTIONS, analyses=("concepts",))
    with pytest.raises(RelneuronError, match="two conditions are named concept:town"):
        run_study(str(model_folder), facts, tmp_path / "s", options, quiet=True)
    assert not (tmp_path / "s").exists()


def test_names_that_no_condition_has_are_kept(
    model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    names = {"works_as": "works_as", "lives_in": "works_as@10", "likes_fruit": "random.walk"}
    facts = renamed(fact_folder, tmp_path / "facts", names)
    run_study(str(model_folder), facts, tmp_path / "s", OPTIONS, quiet=True)
    assert (tmp_path / "s" / "report.html").exists()


def test_splits_without_prompts_are_refused_at_once(
    model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    names = {name: name for name in ("works_as", "likes_fruit")}
    facts = renamed(fact_folder, tmp_path / "facts", names, prompt_templates_zs=[])
    options = replace(OPTIONS, splits=("eva2",))
    with pytest.raises(RelneuronError, match="no prompt of the splits eva2"):
        run_study(str(model_folder), facts, tmp_path / "s", options, quiet=True)
    assert not (tmp_path / "s").exists()


def test_one_relation_is_refused_at_once(fact_folder: Path, tmp_path: Path) -> None:
    facts = renamed(fact_folder, tmp_path / "facts", {"works_as": "works_as"})
    with pytest.raises(RelneuronError, match="has one relation") as caught:
        run_study("no model", facts, tmp_path / "s", OPTIONS, quiet=True)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "s").exists()


def test_other_options_are_refused_before_the_concepts_study(
    model_folder: Path, fact_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "s"
    run_study(str(model_folder), fact_folder, study, OPTIONS, quiet=True)
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the concepts' study was begun")

    monkeypatch.setattr(relneuron.study.run, "concept_study", never)
    options = replace(OPTIONS, analyses=("concepts",))
    with pytest.raises(RelneuronError, match="ablate was made from other inputs: analyses"):
        run_study(str(model_folder), fact_folder, study, options, quiet=True)
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before
