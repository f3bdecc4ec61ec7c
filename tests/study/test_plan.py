"""What the cards of a study are told to take, in operations, against those that torch counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

import relneuron
from relneuron.ablation import next_token
from relneuron.model import token_values
from tests.kit.corpus_commands import call

ASKED = ["--eva", 8, "--top", 6, "--random-seeds", 1, "--permutations", 2, "--bootstrap", 2]


def test_cards_take_at_most_what_is_told(
    model_folder: Path, fact_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single card has texts of its own: only their lengths differ."""
    words = [model_folder, "--facts", fact_folder, "-o", tmp_path / "s", *ASKED, "--noise", 0]
    words += ["--cards", 1, "--batch-tokens", 200]
    plan = relneuron.plan("run", *words, "--tflops", 1, "--gbps", 1)
    [look] = [one for one in plan["stages"] if one["stage"] == "look"]
    counted = {"flops": 0, "rows": 0}

    def counting(run: Any, n_rows: Any, model_of: Any) -> Any:
        def wrapped(*asked: Any) -> Any:
            model_of(asked).set_attn_implementation("eager")  # torch counts no other on a CPU
            with FlopCounterMode(display=False) as counter:
                said = run(*asked)
            counted["flops"] += counter.get_total_flops()
            counted["rows"] += n_rows(asked)
            return said

        return wrapped

    reader = token_values._Reader
    read = counting(reader.read, lambda asked: len(asked[1]), lambda asked: asked[0].asker.model)
    ask = counting(next_token._ask, lambda asked: len(asked[2]), lambda asked: asked[0])
    monkeypatch.setattr(reader, "read", read)
    monkeypatch.setattr(next_token, "_ask", ask)
    assert call("run", *words, "--quiet") == 0
    assert counted["rows"] == 24
    assert 0.7 * look["more_flops"] < counted["flops"] <= look["more_flops"]
