"""bench.study: two checkouts do the same, and what a command takes is told of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import study
from relneuron.artifact.reading import read_csv

TINY = {"relations": 2, "facts": 8, "groups": 2, "texts": 2}
COLUMNS = ("model", "command", "seconds", "cpu_ratio", "share", "share_of_other", "commit")


def test_each_command_of_a_model_is_compared_and_leaves_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    took = {"seconds": 8.0, "cpu": 6.0, "products": 2.0}
    others = {"seconds": 16.0, "cpu": 8.0, "products": 8.0}
    asked: list[list[str]] = []

    def run(root: Path, command: list[str]) -> tuple[dict[str, float], dict[str, str]]:
        asked.append(command)
        return (took if root == study.ROOT else others), {"a.csv": "0"}

    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "MODELS", {"tiny": TINY})
    rows = tmp_path / "rows.csv"
    study.main(["--models", "--rounds", "2", "-o", str(rows), str(tmp_path)])
    said = capsys.readouterr().out
    assert [command[0] for command in asked[::4]] == ["run", "count", "attribute"]
    for name in ("run", "count", "attribute"):
        assert f"| tiny | {name} | 8.0 | 0.50 | 0.75 | 25% | 50% |" in said
    assert [row.real("share") for row in read_csv(rows, COLUMNS)] == [0.25] * 3


def test_files_that_differ_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    took = {"seconds": 8.0, "cpu": 6.0, "products": 2.0}
    monkeypatch.setattr(study, "run", lambda root, _: (took, {"a.csv": root.name}))
    with pytest.raises(SystemExit, match=r"the files differ: a\.csv"):
        study.compare(tmp_path, ["demo"], 1)


@pytest.mark.slow
def test_commands_run_and_their_products_are_timed(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    made = {command[0]: command for _, command in study.commands(tmp_path, {"tiny": TINY})}
    for name in ("count", "attribute", "run"):
        took, files = study.run(study.ROOT, made[name])
        assert files
        assert 0 < took["products"] < took["cpu"] <= took["seconds"] * 1.1 * threads
