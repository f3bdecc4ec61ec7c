"""What `attribute` is told to take, in operations, against those that torch counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

import relneuron
from relneuron.ablation import rows
from relneuron.artifact.gains import read_targets
from relneuron.methods.gains import scorer
from tests.cli.test_plan import MODELS
from tests.conftest import shared_folder, train_model
from tests.kit.corpus_commands import call

FAST = ["--tflops", 1, "--gbps", 1]


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi3", "mixtral"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, fact_folder: Path
) -> Path:
    config, changes = MODELS[request.param]
    name = f"planned-{request.param}"
    return shared_folder(
        tmp_path_factory, name, lambda path: train_model(path, fact_folder, config, **changes)
    )


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """The operations of the forwards that score sentences, and of those of the comparison."""
    found = {"scores": 0, "comparison": 0}

    def counting(name: str, run: Any) -> Any:
        def wrapped(residual: Any, *asked: Any) -> Any:
            residual.model.set_attn_implementation("eager")  # torch counts no other on a CPU
            if residual.layers[0].mixture:  # nor grouped products
                residual.model.set_experts_implementation("batched_mm")
            with FlopCounterMode(display=False) as counter:
                said = run(residual, *asked)
            found[name] += counter.get_total_flops()
            return said

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "trace", counting("scores", scorer.trace))
        patch.setattr(rows, "_last_logits", counting("comparison", rows._last_logits))
        yield found


def test_the_operations_of_the_comparison_are_those_that_torch_counts(
    model: Path, fact_folder: Path, tmp_path: Path
) -> None:
    """Of sentences that are all known, the number that is told at most."""
    assert call("prompts", fact_folder, "-o", tmp_path / "prompts.jsonl", "--eva", 8) == 0
    words = ["--batch-tokens", 300, "--splits", "eva"]
    first = [model, tmp_path / "prompts.jsonl", "-o", tmp_path / "all", *words]
    assert call("attribute", *first, "--no-compare", "--quiet") == 0
    known = {one.id for one in read_targets(tmp_path / "all" / "targets.csv") if one.kept}
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["id"] in known]
    assert len(kept) > 3
    (tmp_path / "known.jsonl").write_text("\n".join(kept) + "\n")
    asked = ["attribute", model, tmp_path / "known.jsonl", "-o", tmp_path / "a", *words]
    asked += ["--random-seeds", 2, "--intervene", 3]
    [stage] = relneuron.plan(*asked, *FAST)["stages"]
    with counted() as found:
        assert call(*asked, "--quiet") == 0
    if "mixtral" not in model.name:  # a trace has its experts write once more
        assert found["scores"] == stage["flops"] > 0
    assert found["comparison"] == stage["more_flops"] > 0
