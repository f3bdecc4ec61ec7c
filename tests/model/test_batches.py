"""Budgets of tokens: what is halved, remembered and told when memory runs out; recording so.

ablation/ (test_evaluate, test_nll, test_generate, test_rows) and methods/ (counts/test_batches,
gains/test_attribute_input) hold the other stages to the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.methods.responses.options import RecordOptions
from relneuron.methods.responses.record import record
from relneuron.model.ask import Asker
from relneuron.model.batches import Budget
from relneuron.model.load import load_model, load_tokenizer
from relneuron.texts.options import PromptsOptions
from relneuron.texts.prompts import write_prompts
from tests.kit.files import read_rows


@pytest.mark.filterwarnings("ignore:out of memory")
def test_every_row_is_answered_once_in_its_order(tmp_path: Path) -> None:
    rows = [3, 1, 4, 1, 5, 9, 2, 6]
    asked: list[list[int]] = []

    def ask(part: list[int]) -> list[str]:
        if len(part) * max(part) > 20:
            raise torch.OutOfMemoryError("out of memory")
        asked.append(part)
        return [str(row) for row in part]

    with Journal(tmp_path / "j", {}) as journal:
        budget = Budget(1000, journal=journal)
        assert budget.run(rows, int, ask) == [str(row) for row in rows]
    assert [row for part in asked for row in part] == rows
    assert budget.tokens <= 20
    assert budget.notices == [f"out of memory: batches of 1000 tokens cut to {budget.tokens}"]
    again = Budget(1000, journal=Journal(tmp_path / "j", {}))
    assert again.tokens == budget.tokens and again.notices == budget.notices
    assert budget.run([], int, ask) == []


def test_other_errors_and_one_row_end_it() -> None:
    def broken(part: list[int]) -> list[int]:
        raise RuntimeError("shapes do not match")

    def full(part: list[int]) -> list[int]:
        raise MemoryError

    with pytest.raises(RuntimeError, match="shapes"):
        Budget(9).run([1, 2], int, broken)
    with pytest.raises(RelneuronError, match="out of memory with 1 prompts of together 7") as alone:
        Budget(9).run([7], int, full)
    assert "--oom" not in alone.value.fix
    with pytest.raises(RelneuronError, match="with 2 prompts of together 8 tokens") as error:
        Budget(9, "error").run([4, 3], int, full)
    assert error.value.fix == "use --batch-tokens 4, or --oom split"


@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_recording_in_smaller_batches_is_the_same(
    model_folder: Path, fact_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a kill: a run that goes on begins with the batches that fitted."""
    model, tokenizer = load_model(str(model_folder)), load_tokenizer(str(model_folder))
    prompts = tmp_path / "p" / "prompts.jsonl"
    write_prompts(fact_folder, prompts, PromptsOptions(eva=4))

    def run(name: str, oom: str = "split") -> None:
        options = RecordOptions(batch_tokens=200, oom=oom)
        record("m", model, tokenizer, prompts, tmp_path / name, options, quiet=True)

    run("whole")
    true, seen = Asker.ask, []
    killed = False

    def small(self: Asker, questions: Any, rows: Any, mark: Any) -> Any:
        nonlocal killed
        seen.append(len(rows) * max(len(questions.ids[row]) for row in rows))
        said = true(self, questions, rows, mark)  # what it pooled must not count twice
        if seen[-1] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(seen) == 12 and not killed:
            killed = True
            raise KeyboardInterrupt
        return said

    monkeypatch.setattr(Asker, "ask", small)
    with pytest.raises(KeyboardInterrupt):
        run("out")
    n_before = sum(n > 60 for n in seen)
    run("out")
    assert sum(n > 60 for n in seen) == n_before > 0
    whole, ours = (tmp_path / name for name in ("whole", "out"))
    assert read_rows(whole / "validated.csv") == read_rows(ours / "validated.csv")
    responses = [load_file(folder / "responses.safetensors") for folder in (whole, ours)]
    assert responses[0].keys() == responses[1].keys()
    for name, values in responses[0].items():
        np.testing.assert_allclose(responses[1][name], values, rtol=0, atol=1e-5)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (whole, ours)]
    assert manifests[0]["stages"]["record"]["inputs"] == manifests[1]["stages"]["record"]["inputs"]
    assert manifests[1]["fallbacks"][-1].startswith("out of memory: batches of 200 tokens cut to ")
    with pytest.raises(RelneuronError, match="prompts of together .* tokens") as error:
        run("e", "error")
    assert "--oom split" in error.value.fix
    with pytest.raises(RelneuronError, match="oom"):
        run("e", "never")
