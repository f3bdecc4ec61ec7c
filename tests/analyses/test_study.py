"""The files of a study held to each other: a report is never of other neurons than it names.

The studies are those of kit/studies.py, or of a corpus; no model is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relneuron.analyses.drops import headline
from relneuron.analyses.outcomes import filled_sets, relations
from relneuron.analyses.page import page
from relneuron.analyses.study import read_study
from relneuron.artifact.effects import EFFECTS
from relneuron.artifact.files import RelneuronError, sha256
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.reading import read_csv
from relneuron.report.page import render
from relneuron.study.run import report_stage
from tests.kit.corpus_studies import write_corpus_study
from tests.kit.studies import RIGHT, SETS, write_study, write_whole_study


def describe(folder: Path, stages: dict[str, Any]) -> None:
    """Let the manifest of a study know these stages."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data.pop("digest", None)
    path.write_text(json.dumps(data | {"stages": stages}), encoding="utf-8")


def ablated(folder: Path, **beside: str) -> dict[str, Any]:
    """The entry of an `ablate` of the neurons that are there."""
    inputs = {"neurons": sha256(folder / "neurons.json"), "beside": beside}
    return {"inputs": inputs, "files": ["effects.csv", "accuracy.csv"]}


def test_effects_of_other_neurons_are_refused(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    identify = {"inputs": {"top": 3}, "files": ["neurons.json"]}
    stages = {"identify": identify, "ablate": ablated(study)}
    describe(study, stages)
    assert read_study(study).n_neurons == 40
    # Other neurons by hand, and `identify` again: the manifest forgets the ablation.
    neurons = json.loads((study / "neurons.json").read_text(encoding="utf-8"))
    neurons["sets"]["company_ceo"].pop()
    (study / "neurons.json").write_text(json.dumps(neurons), encoding="utf-8")
    manifest = Manifest(study)
    for forget in (False, True):
        if forget:
            manifest.finish("identify", {"top": 2}, [study / "neurons.json"])
            assert "ablate" not in Manifest(study).data["stages"]
        with pytest.raises(RelneuronError, match="made with other neurons") as caught:
            read_study(study)
        assert f"-o {study / 'effects.csv'} --force" in caught.value.fix
    describe(study, {"identify": identify, "ablate": ablated(study)})
    read_study(study)


def test_concepts_of_an_earlier_study_are_not_compared(tmp_path: Path) -> None:
    study = write_whole_study(tmp_path)
    concepts = study / "concepts" / "neurons.json"
    assert "concepts" in read_study(study).tables
    describe(study, {"ablate": ablated(study, **{"concepts/neurons.json": sha256(concepts)})})
    assert "concepts" in read_study(study).tables
    concepts.write_bytes(concepts.read_bytes() + b"\n")
    with pytest.raises(RelneuronError, match="made with other concepts"):
        read_study(study)
    # The main analyses alone, in the same folder.
    again = write_study(tmp_path)
    (again / "conditions.csv").unlink()
    describe(again, {"ablate": ablated(again)})
    assert concepts.exists()
    assert read_study(again).concept_sets == {}
    assert "concepts" not in read_study(again).tables


def to_parquet(study: Path) -> None:
    """effects.parquet as `ablate` writes it, in place of effects.csv."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = list(read_csv(study / "effects.csv", EFFECTS))
    types = {"correct": int, "logprob": float}
    columns = {name: [types.get(name, str)(row[name]) for row in rows] for name in EFFECTS}
    parquet.write_table(pyarrow.table(columns), study / "effects.parquet")
    (study / "effects.csv").unlink()


def test_effects_may_be_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = write_study(tmp_path, splits=("eva", "eva2"))
    expected = {key: table.csv() for key, table in read_study(study).tables.items()}
    to_parquet(study)
    found = {key: table.csv() for key, table in read_study(study).tables.items()}
    assert found == expected
    # Of two the one that the last `ablate` wrote counts.
    (study / "effects.csv").write_text("damaged", encoding="utf-8")
    with pytest.raises(RelneuronError, match="lacks the column"):
        read_study(study)
    describe(study, {"ablate": ablated(study) | {"files": ["effects.parquet"]}})
    assert read_study(study).tables.keys() == expected.keys()
    data = (study / "effects.parquet").read_bytes()
    (study / "effects.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(RelneuronError, match=r"effects\.parquet is no parquet file"):
        read_study(study)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RelneuronError, match="needs pyarrow") as caught:
        read_study(study)
    assert "pip install" in caught.value.fix
    (study / "effects.parquet").unlink()
    with pytest.raises(RelneuronError, match=r"effects\.parquet does not exist"):
        read_study(study)


def test_a_study_without_effects_says_how_to_make_them(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    (study / "effects.csv").unlink()
    with pytest.raises(RelneuronError, match=r"effects\.csv does not exist") as caught:
        read_study(study)
    assert "relneuron ablate" in caught.value.fix


def test_templates_of_a_fact_are_one_case(tmp_path: Path) -> None:
    """Two templates for two facts each: the p-values are those of two facts."""
    study = write_study(tmp_path)
    apart = read_study(study).tables["drop"].rows[0]
    path = study / "prompts.jsonl"
    prompts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for prompt in prompts:
        prompt["subject"] = f"S{int(prompt['id'].rpartition('.')[2]) // 2}"
    path.write_text("".join(json.dumps(p) + "\n" for p in prompts), encoding="utf-8")
    found = read_study(study)
    assert found.grids["eva"].facts.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    table = found.tables["drop"]
    places = [table.columns.index(name) for name in ("lost", "p_value")]
    # company_ceo: four right, then the first only: three answers, two facts.
    assert [apart[place] for place in places] == [3, 2 / 8]
    assert [table.rows[0][place] for place in places] == [3, 2 / 4]
    # Prompts that name no subject are facts of their own.
    for prompt in prompts:
        prompt["subject"] = ""
    path.write_text("".join(json.dumps(p) + "\n" for p in prompts), encoding="utf-8")
    assert read_study(study).grids["eva"].facts.tolist() == list(range(12))


def test_the_answer_is_of_sets_with_neurons(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, sets=SETS | {"company_hq": []}))
    shown = page(study, {})
    assert [*filled_sets(study.main)] == ["company_ceo", "star_constellation"]
    assert relations(study.main) == list(RIGHT["clean"])
    assert " · 3 neurons each, " in shown.facts
    # company_ceo alone has a set and right answers: 4, then 1.
    assert "When the 3 neurons chosen for a relation" in shown.answer
    assert "accuracy on that relation falls by 75.0\xa0% on average" in shown.answer
    # Of ceo, hq, star under ceo and star: (hq, ceo) 0, (ceo, star) 0, (hq, star) -1/2.
    numbers = headline(study.main)
    assert numbers.other.mean == pytest.approx(-1 / 6) and np.isfinite(numbers.random.mean)
    render(shown)


def test_a_report_is_made_anew_when_a_corpus_study_changes(tmp_path: Path) -> None:
    study = write_corpus_study(tmp_path / "s")
    output = study / "report.html"

    def report() -> int:
        report_stage(study, output, force=False, resume=True)
        return output.stat().st_mtime_ns

    first = report()
    assert report() == first
    # The same numbers in other digits: the page may stay the same, the report may not be kept.
    path = study / "nll.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("\n", "\r\n"), encoding="utf-8")
    with pytest.raises(RelneuronError, match=r"report was made from other inputs: nll\.csv"):
        report()
    report_stage(study, output, force=True, resume=True)
    assert report() > first
    assert "counts.safetensors" in Manifest(study).data["stages"]["report"]["inputs"]
