"""`attribute --method ig|relevance` on a command line: what is written, said and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from relneuron.artifact.gradients import FILES, IG, RELEVANCE, Gradients
from relneuron.artifact.manifest import Manifest

Call = Callable[..., tuple[int, str, str]]


def test_both_beside_each_other(
    relneuron: Call, model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("prompt,answer,type\nPerson1 eats,plum,eats\nPerson2 lives in,Oslo,lives\n")
    words = ["attribute", model_folder, table, "-o", out, "--quiet"]
    code, said, _ = relneuron(*words, "--method", "ig", "--steps", "4", "--schedule", "midpoint")
    assert code == 0
    lines = said.splitlines()
    assert lines[0] == "2 sentences: integrated gradients, one prefill, in float32"
    assert [line.partition(":")[0] for line in lines[2:4]] == ["eats", "lives"]
    assert lines[-1] == f"-> {out}"
    assert relneuron(*words, "--method", "relevance", "--rules", "conservative")[0] == 0
    found = {method: Gradients.read(out / FILES[method], method) for method in (IG, RELEVANCE)}
    assert found[IG].about["schedule"] == "midpoint" and found[IG].about["steps"] == 4
    assert found[RELEVANCE].about["rules"] == "conservative"
    assert found[IG].targets == found[RELEVANCE].targets
    commands = [entry["commands"][0] for entry in Manifest(out).data["stages"].values()]
    assert [words[words.index("--method") + 1] for words in commands] == ["ig", "relevance"]
    assert all("--backend" not in words for words in commands)


@pytest.mark.parametrize(
    ("words", "cause", "fix"),
    [
        (["--method", "lrp"], "unknown method 'lrp'", "use gain, ig, relevance"),
        (
            ["--method", "ig", "--rules", "plain"],
            "--method ig takes no --rules",
            "leave it out, or use --method relevance, which takes it",
        ),
        (
            ["--steps", "9"],
            "--method gain takes no --steps",
            "leave it out, or use --method ig, which takes it",
        ),
        (["--method", "ig", "--steps", "1"], "--steps must be at least 2, got 1", "at least 2"),
        (
            ["--method", "relevance", "--backend", "reference"],
            "--backend does something only with --method gain",
            "leave out --backend",
        ),
    ],
)
def test_what_does_nothing_is_refused(
    relneuron: Call, tmp_path: Path, words: list[str], cause: str, fix: str
) -> None:
    code, _, said = relneuron("attribute", "no-such/model", "p.csv", "-o", tmp_path / "o", *words)
    assert code == 2 and f"error: {cause}" in said and fix in said
    assert not (tmp_path / "o").exists()
