"""Generated texts, their scores and layers, and a probe, as `relneuron.load` gives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from relneuron.ablation.outputs import (
    SCORES,
    Generated,
    beside,
    lens_tables,
    lines_bytes,
    score_rows,
)
from relneuron.artifact.files import csv_bytes
from relneuron.methods.contrast.classify import PREDICTIONS, Scored
from relneuron.study.folder import load

pytest.importorskip("pandas")

LINES = [
    Generated("clean", "", "p1", "Who?", "Ada", 2, "eos", "en", 0, 1.0),
    Generated("clean", "", "p1", "Who?", "=Bob", 2, "eos", "en", 1, 0.0),
    Generated("en", "", "p1", "Who?", "", 0, "length", "en", 0, 0.5),
]
READ = [[[(1.5, [3, 4]), (0.5, [4, 3])]], [[(2.5, [3, 4]), (0.25, [4, 3])]], []]


class Letters:
    """A tokenizer of letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


def test_texts_their_scores_and_their_layers(tmp_path: Path) -> None:
    output = tmp_path / "outputs.jsonl"
    output.write_bytes(lines_bytes(LINES))
    scores, lens, stages = beside(output)
    scores.write_bytes(csv_bytes(SCORES, score_rows(LINES, "exact")))
    for path, data in zip((lens, stages), lens_tables(LINES, READ, Letters()), strict=True):
        path.write_bytes(data)
    study = load(tmp_path)
    assert {"outputs", "output_scores", "lens", "layer_stages"} <= {*study.there}
    assert study.outputs["output"].tolist() == ["Ada", "=Bob", ""]
    assert study.outputs["score"].tolist() == [1.0, 0.0, 0.5]
    mean = study.output_scores.set_index("mask")["score"]
    assert (mean["clean"], mean["en"]) == (0.5, 0.5)
    assert study.lens["place"].tolist() == [0, 0, 0, 0] and study.lens["seed"].tolist()[::2] == [
        0,
        1,
    ]
    assert study.lens["top"].tolist() == [("d", "e"), ("e", "d")] * 2
    assert study.lens["entropy"].tolist() == [1.5, 0.5, 2.5, 0.25]
    assert study.layer_stages["entropy"].tolist() == [2.0, 0.375]
    assert np.isnan(study.layer_stages["stage"]).all()  # of fewer than three layers


def test_a_probe(tmp_path: Path) -> None:
    rows = [
        Scored("top", 4, 2, 8, 0.75, 0.5, 1.0, 0.5, None),
        Scored("random.*", 4, 2, 8, 0.5, None, None, 0.5, 0.1),
    ]
    cells = [["" if x is None else x for x in row] for row in rows]
    (tmp_path / "probe.csv").write_bytes(csv_bytes(Scored._fields, cells))
    said = [("a", 1, 0, 1, 0.75), ("b", 0, 1, 1, 0.5)]
    (tmp_path / "probe_predictions.csv").write_bytes(csv_bytes(PREDICTIONS, said))
    study = load(tmp_path)
    assert study.probe["neurons"].tolist() == ["top", "random.*"]
    assert study.probe["accuracy"].tolist() == [0.75, 0.5] and np.isnan(study.probe["low"][1])
    found = study.probe_predictions
    assert found.itertuples(index=False, name=None).__next__() == said[0]
    assert found["predicted"].dtype == np.int64
