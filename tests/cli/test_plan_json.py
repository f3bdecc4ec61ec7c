"""A plan as an object: `relneuron plan ... --json`, --dry-run --json and `relneuron.plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import relneuron as package
from relneuron.artifact.planned import Planned
from relneuron.cli.errors import fail
from relneuron.cli.plan import DryOptions, report
from relneuron.cli.show import show
from tests.kit.corpus_commands import call, check_refused, written

FAST = ["--tflops", 2, "--gbps", 100]
NUMBERS = {
    *("batches", "tokens", "padded_tokens", "steps", "more_tokens", "flops", "more_flops"),
    *("memory_bytes", "device_bytes", "disk_bytes", "seconds", "more_seconds"),
}


@pytest.fixture(scope="module")
def prompts(fact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    assert call("prompts", fact_folder, "-o", path, "--eva", 8) == 0
    return path


def without_memory(found: Any) -> Any:
    """The object without what this process holds, which grows from plan to plan."""
    if isinstance(found, dict):
        left = {k: v for k, v in found.items() if k not in ("memory_bytes", "process")}
        return {k: without_memory(v) for k, v in left.items()}
    return [without_memory(one) for one in found] if isinstance(found, list) else found


def test_json_is_all_that_is_printed_and_what_the_manifest_then_has(
    relneuron: Any, model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    words = ["record", model_folder, prompts, "-o", tmp_path / "r", "--batch-tokens", 200]
    code, out, err = relneuron("plan", *words, *FAST, "--json")
    found = json.loads(out)
    assert code == 0 and not err and not written(tmp_path)
    behind = json.loads(relneuron(*words, *FAST, "--dry-run", "--json")[1])
    same = package.plan(*words, *FAST)
    assert without_memory(found) == without_memory(behind) == without_memory(same)
    assert (found["flops_per_s"], found["bytes_per_s"]) == (2e12, 1e11)
    [stage] = found["stages"]
    assert stage["stage"] == "record" and {*found["total"]} == NUMBERS <= {*stage}
    assert {name: stage[name] for name in NUMBERS} == found["total"]
    assert call(*words, "--quiet") == 0
    made = json.loads((tmp_path / "r" / "manifest.json").read_text())
    for name in ("batches", "tokens", "padded_tokens"):
        assert stage[name] == made["batch_plan"][name]
    assert found["layers"] == made["model"]["layers"]
    size = (tmp_path / "r" / "responses.safetensors").stat().st_size
    assert stage["files_bytes"]["responses.safetensors"] == size
    parts = (*stage["tensors_bytes"].values(), *stage["host_bytes"].values())
    assert stage["memory_bytes"] == sum(parts)


def test_a_study_has_its_stages_and_their_total(
    model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    words = [model_folder, "--facts", fact_folder, "-o", tmp_path / "s", "--eva", 8, *FAST]
    found = package.plan("run", *words)
    stages, total = found["stages"], found["total"]
    assert [one["stage"] for one in stages[:3]] == ["prompts", "first answers", "record"]
    for name in NUMBERS - {"memory_bytes", "device_bytes"}:
        assert total[name] == pytest.approx(sum(one[name] for one in stages))
    assert total["memory_bytes"] == max(one["memory_bytes"] for one in stages)
    [look] = [one for one in stages if one["stage"] == "look"]
    assert look["files_bytes"]["look.html"] is None
    assert any(note.startswith("look: ") for note in found["notes"])
    assert json.loads(json.dumps(found)) == found


def test_the_table_has_the_same_numbers() -> None:
    plans = [
        Planned("a", {"x": 1}, batches=2, tokens=5, steps=1, forwards=((1, 10**12, 1),), layers=1),
        Planned("b", {"x": 1}, batches=3, tokens=7, forwards=((1, 3 * 10**12, 1),)),
    ]
    [text] = report(plans, DryOptions(tflops=1, gbps=1, json=True))
    found = json.loads(str(text))
    assert found["total"]["batches"] == 5 and found["total"]["seconds"] == 4
    table: Any = next(iter(report(plans, DryOptions(tflops=1, gbps=1))))
    assert table.rows == [
        ["a", "2", "6", "1 T", "1 s"],
        ["b", "3", "7", "3 T", "3 s"],
        ["in all", "5", "13", "4 T", "4 s"],
    ]


def test_what_a_command_refuses_is_raised(
    relneuron: Any, model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "gone.jsonl"
    words = ["record", model_folder, gone, "-o", tmp_path / "r"]
    check_refused(
        relneuron, tmp_path, "--json does something only with --dry-run", *words, "--json"
    )
    for asked, cause in (
        (words, "does not exist"),
        ([*words, "--bacth-tokens", 3], "--bacth-tokens"),
        (words[:2], "PROMPTS"),
        ([*words, "--shard", "3"], "shard"),
        (["report", tmp_path], "nothing to plan of 'report'"),
        (["record", "--help"], "--help"),
    ):
        with pytest.raises(package.RelneuronError) as raised:
            package.plan(*asked)
        assert cause in raised.value.cause and raised.value.fix
    assert not written(tmp_path)


def test_no_word_between_colons_becomes_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    """A path or a relation may be called so."""
    show("out/:cat:/a [b] c")
    with pytest.raises(SystemExit):
        fail("no folder :cat:", "give :dog:", 1)
    out, err = capsys.readouterr()
    assert out == "out/:cat:/a [b] c\n"
    assert err.splitlines() == ["error: no folder :cat:", "fix:   give :dog:"]


def test_typer_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relneuron.artifact.installed.find_spec", lambda name: None)
    with pytest.raises(package.RelneuronError, match="relneuron.plan needs typer, rich and"):
        package.plan("record")
