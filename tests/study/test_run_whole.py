"""A study with all analyses: it survives crashes, and its tables are those of its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from relneuron.ablation.options import ANALYSES
from relneuron.artifact.effects import KINDS
from relneuron.study.run import run_study
from relneuron.study.settings import RunOptions
from tests.kit.files import contents, read_rows

WHOLE = RunOptions(eva=8, top=40, random_seeds=2, batch_tokens=512, analyses=ANALYSES)


@pytest.mark.slow
def test_the_whole_study_survives_crashes_and_its_tables_are_those_of_its_answers(
    model_folder: Path, fact_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import relneuron.model.ask
    from relneuron.artifact.journal import Journal

    # Kinds of subjects: two relations about people, one about towns.
    facts = tmp_path / "facts"
    facts.mkdir()
    for path in fact_folder.glob("*.json"):
        data = json.loads(path.read_text())
        domain = "town" if path.stem == "works_as" else "person"
        data["properties"] = {"domain_name": domain}
        if domain == "town":
            data["samples"] = [s | {"subject": f"{s['subject']}ville"} for s in data["samples"]]
        (facts / path.name).write_text(json.dumps(data))
    study, again = tmp_path / "s", tmp_path / "again"
    run_study(str(model_folder), facts, study, WHOLE, quiet=True)

    forward, calls = relneuron.model.ask.Asker._forward, []

    def failing(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) % 11 == 0:
            raise OSError("the disk is gone")
        return forward(self, *args)

    monkeypatch.setattr(Journal, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(relneuron.model.ask.Asker, "_forward", failing)
    n_failures = 0
    while n_failures < 60:
        try:
            run_study(str(model_folder), facts, again, WHOLE, quiet=True)
            break
        except OSError:
            n_failures += 1
    assert 3 < n_failures < 60
    assert contents(again) == contents(study)

    kinds = {row["condition"]: row for row in read_rows(study / "conditions.csv")}
    assert {row["kind"] for row in kinds.values()} == set(KINDS)
    right: dict[str, dict[str, int]] = {}
    relation = {}
    for row in read_rows(study / "effects.csv"):
        if row["split"] == "eva":
            right.setdefault(row["condition"], {})[row["id"]] = int(row["correct"])
            relation[row["id"]] = row["relation"]
    sets = json.loads((study / "neurons.json").read_text())["sets"]
    chosen = {name: {tuple(neuron[:3]) for neuron in found} for name, found in sets.items()}
    for row in read_rows(study / "analyses" / "drop.csv"):
        own = [key for key in right["clean"] if relation[key] == row["relation"]]
        before, after = (sum(right[c][key] for key in own) for c in ("clean", row["off"]))
        n = len(own)
        assert [int(row[c]) for c in ("n_prompts", "n_before", "n_after")] == [n, before, after]
        assert float(row["drop"]) == (before / n - after / n) / (before / n)
    for row in read_rows(study / "analyses" / "overlap.csv"):
        assert int(row["shared"]) == len(chosen[row["relation"]] & chosen[row["other"]])
    ranges = read_rows(study / "analyses" / "cumulativity.csv")
    assert len(ranges) >= 3 * 6
    for row in ranges:
        name, a, b = row["relation"], int(row["from"]), int(row["to"])
        top_a, top_b, alone = (right[f"{name}@{c}"] for c in (a, b, f"{a + 1}-{b}"))
        lost = [key for key in alone if top_a[key] and not top_b[key]]
        assert int(row["total"]) == len(lost)
        assert int(row["affected"]) == sum(not alone[key] for key in lost)
    page = (study / "report.html").read_text()
    for section in ("sizes", "cumulativity", "sites", "concepts", "gain", "perplexity"):
        assert f'id="{section}"' in page
