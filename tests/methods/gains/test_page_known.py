"""The page of an attribution of which only the known sentences are scored, and its commands.

The means are compared with plain loops over the rows of its files (kit/attribution_studies.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.gains import ATTRIBUTIONS
from relneuron.methods.gains.page import build, page
from relneuron.methods.gains.study import read_attribution_study
from relneuron.methods.gains.tables import attribution_tables, heads_table
from relneuron.report.page import render
from tests.kit.attribution_studies import RELATIONS, write_attribution
from tests.kit.pages import ids, rows_of, text_of, write_csv

# Only known sentences scored


def known_only(folder: Path, relations: Sequence[str] = RELATIONS) -> Path:
    """A folder of `--keep known`: the others' rows are not there."""
    write_attribution(folder, relations, inputs={"keep": "known"}, compare=False)
    path, targets = folder / "attributions.csv", rows_of(folder / "targets.csv")
    kept = {row["id"] for row in targets if row["kept"] == "1"}
    rows = [row for row in rows_of(path) if row["id"] in kept]
    write_csv(path, ATTRIBUTIONS, [[*row.values()] for row in rows])
    return folder


def test_means_are_over_the_sentences_that_were_scored(tmp_path: Path) -> None:
    folder = known_only(tmp_path)
    rows = rows_of(folder / "attributions.csv")
    study = read_attribution_study(folder)
    tables = attribution_tables(study)
    names = {row["id"] for row in rows}
    assert 0 < len(names) < len(study.targets)

    def mean(relation: str, **cells: str) -> float:
        """Of a score that each sentence has once."""
        own = {name for name in names if name.startswith(f"{relation}.")}
        found = [
            float(row["score"]) for row in rows if row["id"] in own and cells.items() <= row.items()
        ]
        assert len(found) == len(own)
        return sum(found) / len(own)

    for relation, layer, attention, ffn in tables["layers"].rows:
        for kind, value in (("attention_layer", attention), ("ffn_layer", ffn)):
            expected = mean(str(relation), kind=kind, layer=str(layer))
            assert value == pytest.approx(expected, abs=1e-9)
    for relation, _, name, value in tables["heads"].rows:
        layer, head = re.findall(r"\d+", str(name))
        expected = mean(str(relation), kind="head", layer=layer, head=head)
        assert value == pytest.approx(expected, abs=1e-9)
    for place, (_, _, value) in enumerate(tables["query_layers"].rows):
        scores = [
            float(row["score"])
            for row in rows
            if (row["kind"], row["index"]) == ("query_layer", str(place))
        ]
        assert value == pytest.approx(sum(scores) / len(names), abs=1e-9)
    for row in tables["ffn_neurons"].rows:
        own = sum(name.startswith(f"{row[0]}.") for name in names)
        assert float(row[4]) == pytest.approx(int(row[3]) / own)
    n_top = sum(int(r["rank"]) <= study.n_top for r in rows if r["kind"] == "ffn_neuron")
    assert sum(float(row[1]) for row in tables["top_layers"].rows) == pytest.approx(
        n_top / len(names)
    )
    # What was asked is still told of all.
    assert sum(int(row[1]) for row in tables["answers"].rows) == len(study.targets)
    html = render(page(study))
    assert f"{len(names)} sentences of {len(study.targets)} that were asked" in text_of(html)
    assert "Only the known ones are scored" in text_of(html, "answers")


def test_a_row_of_a_sentence_that_was_not_scored_is_of_another_attribution(tmp_path: Path) -> None:
    write_attribution(tmp_path, inputs={"keep": "known"}, compare=False)
    with pytest.raises(RelneuronError, match="damaged or of another attribution"):
        read_attribution_study(tmp_path)


def test_an_attribution_that_knows_nothing_has_a_page(tmp_path: Path) -> None:
    known_only(tmp_path)
    path = tmp_path / "targets.csv"
    path.write_text(re.sub(r",1$", ",0", path.read_text(), flags=re.M))
    write_csv(tmp_path / "attributions.csv", ATTRIBUTIONS, [])
    html = render(build(tmp_path, {}))
    assert ids(html)[:1] == ["answers"] and "0 sentences of" in text_of(html)


def test_heads_are_in_the_order_of_the_relations(tmp_path: Path) -> None:
    relations = ("month", "capital_of", "color")
    path = write_attribution(tmp_path, relations) / "comparison.csv"
    rows = sorted(rows_of(path), key=lambda row: row["condition"])
    write_csv(path, [*rows[0]], [[*row.values()] for row in rows])
    table = heads_table(read_attribution_study(tmp_path))
    assert [row[:2] for row in table.rows] == [[a, b] for a in relations for b in relations]
