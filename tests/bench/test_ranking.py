"""The bench of average_precision and bench.ranking: contestants are right, faults are found.

The peers' ties, parts and threads are what can go wrong in them; sizes are tiny.
"""

from __future__ import annotations

import csv
import importlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from relneuron import ops
from relneuron.artifact.files import RelneuronError
from relneuron.bench import ranking as bench_ranking
from relneuron.bench import timing as bench
from relneuron.bench.case import Case, Contestant
from relneuron.bench.ranking import ONE_THREAD, draw_labels, draw_values

ranked = partial(Case, "average_precision")


def contestants(case: Case, n_looped: int | None = None) -> list[Contestant]:
    return bench_ranking.average_precision_contestants(case, "cpu", 1, False, n_looped)


def verdicts(case: Case) -> dict[tuple[str, str], str]:
    """What is said of everybody who is not right, and is here."""
    found = {(c.variant, c.name): bench._verdict(c) for c in contestants(case) if not c.missing}
    return {who: note for who, (is_right, note) in found.items() if not is_right}


@pytest.mark.parametrize("layout", ["prompt-major", "neuron-major", "tied", "heavy-tailed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("sizes", [(4, 3, 1), (48, 9, 12), (211, 5, 1), (330, 7, 3)])
def test_every_contestant_is_right(sizes: tuple[int, int, int], dtype: str, layout: str) -> None:
    assert verdicts(ranked(dtype, *sizes, layout)) == {}


@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_batched_sorts_are_right_in_parts(
    monkeypatch: pytest.MonkeyPatch, n_threads: int
) -> None:
    """Three columns at a time, by as many threads as there are."""
    monkeypatch.setattr(bench_ranking, "CHUNK", {"cpu": 900})
    monkeypatch.setattr(bench_ranking, "NUMPY_CHUNK", 900)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    for n_relations in (1, 12):
        values = draw_values(ranked(T=300, F=10, G=n_relations, layout="tied"), "cpu")
        labels = draw_labels(300, n_relations)
        want = ops.average_precision(values, labels, backend="reference")
        for peer in (bench_ranking.batched_torch, bench_ranking.batched_numpy):
            assert torch.allclose(peer(values, labels), want, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("peer", [bench_ranking.batched_torch, bench_ranking.batched_numpy])
def test_the_batched_sorts_know_zeros_signs_and_long_ties(peer: Any) -> None:
    """-0 is 0, a negative is below, and a group is longer than what is walked step by step."""
    columns = [
        [0.0, -0.0, 0.0, -0.0, 1e-45, -1e-45, 0.0, -0.0],
        [-1.0, -2.0, -3.0, 3.0, 2.0, 1.0, 0.0, -0.0],
        [5.0] * 8,
        [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0],
    ]
    values = torch.tensor(columns).T
    labels = torch.tensor([[1, 0, 1, 0, 0, 0, 1, 0], [0, 1, -1, -1, 1, -1, 0, 1]]).to(torch.int8)
    want = ops.average_precision(values, labels, backend="reference")
    assert want[0, 2] == 3 / 8
    for dtype in (torch.float32, torch.float64):
        assert torch.allclose(peer(values.to(dtype), labels), want, rtol=1.2e-7, atol=0)


def test_labels_are_one_positive_to_four_negatives() -> None:
    one = draw_labels(4000, 1)
    assert [int((one == label).sum()) for label in (1, 0, -1)] == [800, 3200, 0]
    twelve = draw_labels(8192, 12)
    n_positive, n_negative = (twelve == 1).sum(1), (twelve == 0).sum(1)
    assert torch.equal(n_negative, 4 * n_positive)
    assert torch.equal((twelve == 1).sum(0), torch.ones(8192, dtype=torch.int64))
    assert len({tuple(row.tolist()) for row in twelve == 0}) == 12


def test_a_wrong_contestant_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two units in the last place of one average precision, on one thread and on all."""
    right = bench_ranking.batched_torch

    def wrong(values: Tensor, labels: Tensor) -> Tensor:
        ap = right(values, labels)
        ap[1, 2] *= 1 + 4e-7
        return ap

    monkeypatch.setattr(bench_ranking, "batched_torch", wrong)
    note = "wrong: 1 of 60 differ: average precision"
    assert verdicts(ranked(T=60, F=5, layout="prompt-major")) == {
        (variant, "batched torch"): note for variant in ("ap", ONE_THREAD)
    }


def test_relneuron_is_held_to_the_reference_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.average_precision

    def wrong(values: Tensor, labels: Tensor, backend: str = "auto") -> Tensor:
        ap = right(values, labels, backend="reference")
        if backend == "auto":
            ap[0, 0] = torch.nextafter(ap[0, 0], torch.tensor(2.0))
        return ap

    monkeypatch.setattr(ops, "average_precision", wrong)
    case = ranked(T=60, F=5, layout="prompt-major")
    with pytest.raises(RelneuronError, match="relneuron itself is wrong here: wrong: 1 of 60"):
        bench.run_case(case, effort=bench.Effort(1, 1))


def test_one_thread_is_one_thread_and_is_given_back() -> None:
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), bench_ranking.one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
        case = ranked(T=40, F=3, layout="prompt-major")
        rows = bench.run_case(case, effort=bench.Effort(1, 1))
    finally:
        torch.set_num_threads(1)
    assert {(row.variant, row.threads) for row in rows} == {("ap", 2), (ONE_THREAD, 1)}
    loops = {row.contestant for row in rows if row.contestant.endswith("loop")}
    assert loops == {"sklearn loop", "torchmetrics loop"}
    assert str(case) == "average_precision float32 N=40 M=3 R=12 prompt-major"


def test_the_loops_can_be_held_to_some_of_the_columns() -> None:
    for contestant in contestants(ranked(T=40, F=6, layout="prompt-major"), n_looped=2):
        if not contestant.missing:
            contestant.check()
            made = contestant.run(0)
            assert isinstance(made, Tensor)
            assert made.shape == (12, 2 if contestant.name.endswith("loop") else 6)


def test_ranks_keep_ties_and_order() -> None:
    values = torch.tensor([[0.5, -1.0], [-7.0, 40.0], [0.5, 41.0], [-0.0, 1e30], [0.0, 41.0]])
    ranks = bench_ranking.ranks_in_unit_interval(values)
    want = torch.tensor([[2, 0, 2, 1, 1], [0, 1, 2, 3, 2]]) / 5
    assert torch.equal(ranks, want)


def test_torchmetrics_hides_a_sigmoid_that_ties_large_values() -> None:
    """40 and 41 become 1.0 both: so the contestant is given ranks, and says so."""
    pytest.importorskip("torchmetrics", exc_type=ImportError)
    values = torch.tensor([[40.0], [41.0], [39.0]])
    labels = torch.tensor([[0, 1, 0]], dtype=torch.int8)
    assert float(ops.average_precision(values, labels, backend="reference")) == 1
    raw = bench_ranking.torchmetrics_loop(values.T, labels)
    assert float(raw) == pytest.approx(1 / 3)
    ranks = bench_ranking.ranks_in_unit_interval(values)
    assert float(bench_ranking.torchmetrics_loop(ranks, labels)) == 1
    notes = {c.name: c.note for c in contestants(ranked(T=40, F=2, layout="prompt-major"))}
    assert "sigmoid" in notes["torchmetrics loop"]


# --- bench.ranking ---------------------------------------------------------------------------


@pytest.fixture
def ranking(monkeypatch: pytest.MonkeyPatch) -> Any:
    return importlib.import_module("bench.ranking")


def test_the_blocks_are_those_of_the_model(ranking: Any) -> None:
    whole = list(ranking.widths(835_584, 11008))
    assert (len(whole), sum(whole)) == (96, 835_584)
    assert whole[:4] == [11008, 11008, 4096, 11008]
    assert list(ranking.widths(12_000, 5000)) == [5000, 5000, 1008, 992]


@pytest.mark.parametrize("neuron_major", [False, True])
def test_every_block_is_other_noise_rolled_and_scaled(ranking: Any, neuron_major: bool) -> None:
    responses = ranking.Responses(30, 20, neuron_major)
    noise = responses.noise.clone()
    first, second = (responses.make(m).clone() for m in (20, 9))
    assert first.shape == (30, 20)
    assert second.shape == (30, 9)
    assert responses.values.stride() == ((1, 30) if neuron_major else (20, 1))
    assert torch.equal(responses.noise, noise)
    for block in (first, second):
        scales = set()
        for column in block.T:
            # A column is one of the noise, rolled, times a scale of its own.
            ratios = [column / noise[:, m].roll(shift) for m in range(20) for shift in range(30)]
            best = min(ratios, key=lambda ratio: float(ratio.std() / ratio.mean().abs()))
            assert float(best.std() / best.mean()) < 1e-5
            scales.add(float(best.median()))
        assert len(scales) == block.shape[1]
    assert not torch.equal(first[:, :9], second)


@pytest.mark.parametrize("words", [(), ("--neuron-major",), ("--backend", "reference")])
def test_a_model_is_ranked_and_written_down(
    ranking: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    path = tmp_path / "ranking.csv"
    sizes = ["--neurons", "300", "--prompts", "64", "--relations", "3", "--block", "128"]
    n_threads = torch.get_num_threads()
    try:
        for _ in range(2):
            assert ranking.main([*sizes, "--threads", "1", *words, "-o", str(path)]) == 0
    finally:
        torch.set_num_threads(n_threads)
    out = capsys.readouterr().out
    assert "neurons_per_s" in out
    with path.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["neurons"] == second["neurons"] == "300"
    assert (first["blocks"], first["checked_columns"], first["threads"]) == ("3", "12", "1")
    assert int(first["resident_bytes"]) > 1 << 20
    assert 0 <= int(first["peak_beyond_bytes"]) < 1 << 30
    assert int(first["neurons_per_s"]) > 0
    assert {"commit", "machine", "torch"} <= set(first)


def test_a_wrong_ranking_ends_the_run(ranking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.average_precision

    def wrong(values: Tensor, labels: Tensor, backend: str) -> Tensor:
        ap = right(values, labels, backend="reference")
        return ap if backend == "reference" else ap.roll(1, 1)

    monkeypatch.setattr(ops, "average_precision", wrong)
    with pytest.raises(AssertionError, match="block 0: columns .* are wrong"):
        ranking.rank(50, 40, 2, 64)


@pytest.mark.parametrize(
    "words", [["--neurons", "0"], ["--prompts", "3", "--relations", "4"], ["--threads", "-1"]]
)
def test_bad_sizes_are_refused(
    ranking: Any, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        ranking.main(words)
    assert "at least" in capsys.readouterr().err


def test_what_cannot_be_measured_is_replaced(ranking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc the peak of the process stands in for both."""
    monkeypatch.setattr("relneuron.artifact.memory.PROCESSES", Path("absent"))
    assert ranking.forget_peak() == ranking.peak_bytes() > 1 << 20
