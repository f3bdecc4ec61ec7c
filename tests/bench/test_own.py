"""`relneuron bench --with`: a user's own op is held to the contract; then timed, or said wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from relneuron import ops
from relneuron.artifact.files import RelneuronError
from relneuron.bench import timing
from relneuron.bench.case import Case
from relneuron.bench.own import Own, find_own

EFFORT = timing.Effort(2, 1)
CASES = {
    "swiglu_stats": Case(T=24, F=65),
    "average_precision": Case("average_precision", T=40, F=6, G=2, layout="neuron-major"),
    "logprob_gain": Case("logprob_gain", T=60, F=7, G=3, layout="D=16"),
    "pair_stats": Case("pair_stats", T=24, F=65, G=2, layout="mixed"),
    "peaks": Case("peaks", T=24, F=65, G=2, layout="mixed"),
    "merge_peaks": Case("merge_peaks", T=8, F=65, G=2),
    "histogram": Case("histogram", T=24, F=65, G=2),
}


def mine(
    gate: Tensor, up: Tensor, *, activation: str, stats: Any = None, group_ids: Any = None
) -> Tensor:
    assert gate.dtype == torch.float32
    return ops.swiglu_stats(gate, up, activation=activation, stats=stats, group_ids=group_ids)


def zeros_are_active(
    gate: Tensor, up: Tensor, *, activation: str, stats: Any = None, group_ids: Any = None
) -> Tensor:
    """Right but for what is exactly at the threshold: the bench's own inputs never are."""
    h = mine(gate, up, activation=activation, stats=stats, group_ids=group_ids)
    if stats is not None:
        ids = torch.zeros(len(gate)) if group_ids is None else group_ids
        at = torch.nn.functional.silu(gate) == stats.threshold
        for group in range(stats.groups):
            stats.count["act"][group] += at[ids == group].sum(0)
    return h


def rows(op: str, function: Any) -> dict[tuple[str, str], timing.Row]:
    found = timing.run_case(CASES[op], compiled=False, effort=EFFORT, own=Own("mine:op", function))
    return {(row.variant, row.contestant): row for row in found}


def test_a_right_op_is_timed_where_it_can_take_part() -> None:
    found = rows("swiglu_stats", mine)
    for variant in ("swiglu", "count"):
        row = found[variant, "mine:op"]
        assert (row.correct, row.n_rounds) == (1, 2) and row.median_ms and row.ratio
    row = found["moments+masks", "mine:op"]
    assert (row.correct, row.median_ms) == (None, None)
    assert row.note == "it takes no keep, condition_ids"
    assert found["responses", "mine:op"].note == "it takes no responses, prompt_ids"


def test_what_breaks_the_contract_has_no_time_though_the_bench_would_not_see_it() -> None:
    found = rows("swiglu_stats", zeros_are_active)
    assert found["swiglu", "mine:op"].correct == 1
    row = found["count", "mine:op"]
    assert (row.correct, row.median_ms, row.ratio) == (0, None, None)
    assert "count[act]" in row.note and "\n" not in row.note


def test_a_result_that_is_not_written_where_it_should_is_wrong() -> None:
    def new(gate: Tensor, up: Tensor, *, activation: str, out: Tensor | None = None) -> Tensor:
        return ops.swiglu_stats(gate, up, activation=activation)

    row = rows("swiglu_stats", new)["swiglu", "mine:op"]
    assert row.correct == 0 and "out_is_written_and_returned" in row.note


@pytest.mark.parametrize("op", ["average_precision", "logprob_gain"])
def test_the_other_ops_have_own_ones_too(op: str) -> None:
    right, variant = getattr(ops, op), "ap" if op == "average_precision" else "exact"
    row = rows(op, lambda *given, **options: right(*given, **options))[variant, "mine:op"]
    assert row.correct == 1 and row.median_ms
    row = rows(op, lambda *given, **options: right(*given, **options) * 1.001)[variant, "mine:op"]
    assert (row.correct, row.median_ms) == (0, None) and "mine" not in row.note


def test_an_own_pair_stats_gets_rows_in_any_order() -> None:
    assert rows("pair_stats", ops.pair_stats)["pair", "mine:op"].correct == 1
    found = rows("pair_stats", lambda a, b, **options: ops.pair_stats(b, a, **options))
    assert found["pair", "mine:op"].correct == 0
    assert "pairs_are_counted_per_group" in found["difference", "mine:op"].note


def test_it_raises_what_it_likes() -> None:
    def broken(*given: Any, **options: Any) -> Tensor:
        raise RuntimeError("no kernel image")

    row = rows("logprob_gain", broken)["exact", "mine:op"]
    assert row.correct == 0 and "no kernel image" in row.note


def test_the_function_is_found_in_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_op_of_a_test.py").write_text("class a:\n    b = staticmethod(len)\nc = 3\n")
    found = find_own("own_op_of_a_test:a.b", "swiglu_stats")
    assert found == Own("own_op_of_a_test:a.b", len)
    assert find_own(None, None) is None
    Path("own_op_that_raises.py").write_text("1 / 0\n")
    for text, cause in {
        "mine": "unknown --with",
        "own_op_of_a_test:d": "has no function d",
        "own_op_of_a_test:c": "has no function c",
        "builtins:print.__self__": "has no function print.__self__",
        "no_such_module_here:f": "ModuleNotFoundError",
        "own_op_that_raises:f": "ZeroDivisionError",
    }.items():
        with pytest.raises(RelneuronError, match=cause) as caught:
            find_own(text, "swiglu_stats")
        assert caught.value.fix and "\n" not in caught.value.cause


def test_an_own_op_of_peaks_takes_part() -> None:
    def later(*inputs: Any, values: Tensor, positions: Tensor, **options: Any) -> None:
        ops.peaks(*inputs, values=values, positions=positions, **options)
        positions += 1

    for name in ("peaks", "merge_peaks", "histogram"):
        assert rows(name, getattr(ops, name))[name, "mine:op"].correct == 1
    found = rows("peaks", later)["peaks", "mine:op"]
    assert found.correct == 0 and "positions (segment, neuron)" in found.note
