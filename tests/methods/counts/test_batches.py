"""Batches of a count, forwards that do not fit the memory, and what `count` refuses.

test_count.py holds what it counts against plain hooks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relneuron.artifact.files import RelneuronError
from relneuron.methods.counts.batches import make_batch, pool_windows
from relneuron.methods.counts.count import count
from relneuron.methods.counts.counter import Counter
from relneuron.model.mlps.find import find_mlps
from relneuron.model.passes import plan_pool
from relneuron.texts.options import CountOptions, choose_packing
from relneuron.texts.sources import File, Source
from relneuron.texts.windows import Window
from tests.conftest import tiny_model
from tests.kit.counted import (
    BOS,
    Numbers,
    alone,
    assert_equal,
    check_between,
    draw,
    packed,
    run,
    write_corpus,
)

FIVE = ("en", "zh", "fr", "es", "vi")


@pytest.fixture(scope="module")
def documents() -> dict[str, list[list[int]]]:
    return draw(FIVE, 400)


# --- batches -----------------------------------------------------------------------------------


lengths_and_groups = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4)), max_size=60)


@settings(deadline=None)
@given(lengths_and_groups, st.integers(1, 200))
def test_a_plan_holds_every_window_once_within_the_budget(
    windows: list[tuple[int, int]], budget: int
) -> None:
    lengths, groups = [w[0] for w in windows], [w[1] for w in windows]
    plan = plan_pool(lengths, groups, budget)
    assert sorted(i for batch in plan for i in batch) == list(range(len(windows)))
    longest = []
    for batch in plan:
        longest.append(max(lengths[i] for i in batch))
        assert len(batch) == 1 or len(batch) * longest[-1] <= budget
        assert [groups[i] for i in batch] == sorted(groups[i] for i in batch)
    assert longest == sorted(longest, reverse=True)
    for before, batch in zip(plan, plan[1:], strict=False):
        room = (len(before) + 1) * max(lengths[i] for i in before)
        assert room > budget, (before, batch)  # the next window did not fit
    assert pool_windows(40, budget) == 16 * max(1, budget // 40)


@settings(deadline=None)
@given(lengths_and_groups.filter(len), st.randoms(), st.booleans(), st.booleans())
def test_a_batch_is_its_windows(
    drawn: list[tuple[int, int]], rng: Any, by_document: bool, exclude: bool
) -> None:
    windows = []
    for length, group in drawn:
        ids = np.array([rng.randrange(9) for _ in range(length)], np.int32)
        windows.append(Window(group, ids, np.array([rng.random() < 0.2 for _ in ids])))
    batch = make_batch(windows, not_counted=1 if exclude else None, by_document=by_document)
    assert batch.n_tokens == sum(w.ids.size for w in windows)
    assert batch.ids.dtype == batch.group_ids.dtype == np.int32
    assert batch.is_padded == (len({w.ids.size for w in windows}) > 1)
    for row, window in enumerate(windows):
        position = -1
        for column in range(batch.ids.shape[1]):
            if column >= window.ids.size:
                assert (batch.ids[row, column], batch.group_ids[row, column]) == (0, -1)
                continue
            token = window.ids[column]
            counted = not (exclude and token == 1)
            assert batch.ids[row, column] == token
            assert batch.group_ids[row, column] == (window.group if counted else -1)
            position = 0 if window.first[column] or column == 0 else position + 1
            if by_document:
                assert batch.positions is not None and batch.positions[row, column] == position
    assert by_document or batch.positions is None


# --- groups that come later -----------------------------------------------------------------------


@pytest.mark.parametrize("n_runs", [1, 4])
def test_groups_of_a_column_may_come_after_others_were_counted(
    model: Any,
    documents: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_runs: int,
) -> None:
    """Also when a run is killed before a group was seen, and another one goes on."""
    files = []
    for name, found in documents.items():  # a file at least is read at once
        lines = [json.dumps({"g": name, "text": " ".join(map(str, line))}) for line in found]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("\n".join(lines), encoding="utf-8")
    read = tuple(File(str(path), "jsonl") for path in files)
    source = Source(None, read, group_column="g")
    options = CountOptions(
        window=16, batch_tokens=16, moments=True, sites=("act", "down"), checkpoint_batches=7
    )
    true, calls, seen = Counter.count, 0, []

    def dies(self: Counter, batch: Any) -> None:
        nonlocal calls
        calls += 1
        if n_runs > 1 and calls % 40 == 0:
            raise KeyboardInterrupt
        stats = self.states[0].stats
        assert stats is not None
        seen.append(stats.groups)
        true(self, batch)

    monkeypatch.setattr(Counter, "count", dies)

    def go_on() -> Any:
        return count("m", model, Numbers(), [source], tmp_path / "o", options, quiet=True)

    for _ in range(n_runs - 1):
        with pytest.raises(KeyboardInterrupt):
            go_on()
    found = go_on().counts
    monkeypatch.undo()
    assert found.groups == list(FIVE)
    assert seen[0] < len(FIVE) == seen[-1]
    asked = {"window": 16, "batch_tokens": 16, "moments": True, "sites": ("act", "down")}
    assert_equal(found, run(model, documents, tmp_path / "whole", **asked))


# --- out of memory -----------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int, Any], bool]) -> None:
    """Forwards that end in the middle of the model with no memory left."""
    true = Counter.run
    calls = 0

    def small(self: Counter, batch: Any) -> None:
        nonlocal calls
        calls += 1
        if not fails(calls, batch):
            return true(self, batch)

        def full(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        handle = self.mlps[1].module.up_proj.register_forward_hook(full)
        try:
            return true(self, batch)
        finally:
            handle.remove()

    monkeypatch.setattr(Counter, "run", small)


def plan_of(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())["batch_plan"]


@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("checkpoint_batches", [None, 1])
def test_out_of_memory_once_counts_everything_once(
    model: Any,
    documents: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    checkpoint_batches: int | None,
) -> None:
    failing(monkeypatch, lambda call, _: call == at)
    with pytest.warns(UserWarning, match=r"out of memory with a batch of 32 x 16 tokens: going on"):
        counts = run(
            model,
            documents,
            tmp_path / "o",
            window=16,
            batch_tokens=512,
            checkpoint_batches=checkpoint_batches,
        )
    monkeypatch.undo()
    check_between(counts, model, packed(documents, 16))
    assert plan_of(tmp_path / "o")["plan_changed"] == "256 tokens a forward"
    assert "plan_changed" not in plan_of(whole(model, documents, tmp_path))


def whole(model: Any, documents: Any, tmp_path: Path) -> Path:
    run(model, documents, tmp_path / "whole", window=16, batch_tokens=512)
    return tmp_path / "whole"


@pytest.mark.parametrize("mode", ["packed", "documents"])
def test_a_small_memory_is_met_by_smaller_and_smaller_forwards(
    model: Any, documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    failing(monkeypatch, lambda _, batch: batch.ids.size > 40)
    with pytest.warns(UserWarning, match="out of memory") as caught:
        counts = run(model, documents, tmp_path / "o", window=32, mode=mode, batch_tokens=1024)
    monkeypatch.undo()
    assert 4 <= len(caught) <= 5
    check_between(counts, model, {"packed": packed, "documents": alone}[mode](documents, 32))


def test_documents_shorter_than_the_window_are_still_divided(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = draw(["en"], 300, longest=5)
    failing(monkeypatch, lambda _, batch: batch.ids.size > 8)
    with pytest.warns(UserWarning, match="out of memory"):
        counts = run(model, documents, tmp_path / "o", window=64, mode="documents")
    monkeypatch.undo()
    check_between(counts, model, alone(documents, 64))


def test_a_window_that_does_not_fit_alone_is_an_error(
    model: Any, documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda _, batch: batch.ids.size > 10)
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(RelneuronError, match="out of memory with a batch of 1 x 16 tokens") as error,
    ):
        run(model, documents, tmp_path / "o", window=16, batch_tokens=64)
    assert error.value.fix == "use a shorter --window"
    assert [path.name for path in (tmp_path / "o").iterdir()] == [".lock"]


def test_out_of_memory_may_end_the_count_and_it_goes_on_smaller(
    model: Any, documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda call, _: call == 3)
    with pytest.raises(RelneuronError, match="out of memory") as error:
        run(model, documents, tmp_path / "o", window=16, batch_tokens=256, oom="error")
    assert error.value.fix.startswith("use --batch-tokens 128")


def test_another_error_of_a_forward_is_no_matter_of_memory(
    model: Any, documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a device-side assert")

    monkeypatch.setattr(Counter, "run", broken)
    with pytest.raises(RuntimeError, match="assert"):
        run(model, documents, tmp_path / "o", window=16)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        ({"mode": "padded"}, "unknown --packing 'padded'"),
        ({"bos": "first"}, "unknown --bos 'first'"),
        ({"boundaries": "mask"}, "unknown --boundaries 'mask'"),
        ({"oom": "ignore"}, "unknown --oom 'ignore'"),
        ({"sites": ()}, "--sites names nothing"),
        ({"sites": ("act", "act")}, "--sites names one twice"),
        ({"sites": ("attention",)}, "unknown --sites 'attention'"),
        ({"window": 0}, "--window must be at least 1"),
        ({"max_tokens": 0}, "--max-tokens must be at least 1"),
        ({"batch_tokens": -1}, "--batch-tokens must be at least 1"),
        ({"shard": (0, 2)}, "--shard 0/2 does not exist"),
        ({"shard": (3, 2)}, "--shard 3/2 does not exist"),
    ],
)
def test_options_that_make_no_sense_are_refused(asked: Any, cause: str) -> None:
    with pytest.raises(RelneuronError, match=cause) as error:
        CountOptions(**asked)
    assert error.value.exit_code == 2


def test_what_the_model_and_tokenizer_cannot_do_is_refused(
    model: Any, documents: Any, tmp_path: Path
) -> None:
    sources = write_corpus(tmp_path, documents)
    for tokenizer, asked, cause in (
        (Numbers(), {"window": 65}, "--window 65 is longer than the model's context of 64"),
        (None, {}, "the model has no tokenizer"),
        (Numbers(None), {"exclude_bos": True}, "--exclude-bos: the tokenizer has no BOS"),
        (Numbers(None), {"bos": "document"}, "--bos document: the tokenizer has no BOS"),
    ):
        with pytest.raises(RelneuronError, match=cause):
            options = CountOptions(**asked)
            exclude_bos = options.exclude_bos
            choose_packing(model, tokenizer, sources, options, exclude_bos=exclude_bos)
    assert choose_packing(model, Numbers(), sources, CountOptions()).window == 64
    assert choose_packing(model, Numbers(), sources, CountOptions(bos="none")).bos_id in (None, BOS)


def test_a_token_that_the_model_does_not_have(model: Any, tmp_path: Path) -> None:
    with pytest.raises(RelneuronError, match="holds the token 96, the model has 96 tokens"):
        run(model, {"en": [[5, 96, 7]]}, tmp_path / "o", window=2)
    assert [path.name for path in (tmp_path / "o").iterdir()] == [".lock"]


@pytest.mark.parametrize("lines", [[], [[5, 6]]])
def test_a_corpus_without_a_window_is_an_error(model: Any, tmp_path: Path, lines: Any) -> None:
    with pytest.raises(RelneuronError, match="the corpus has no window of tokens"):
        run(model, {"en": lines, "zh": []}, tmp_path / "o", window=16)
    assert [path.name for path in (tmp_path / "o").iterdir()] == [".lock"]


def test_a_group_without_a_token_is_told_and_stays_a_group(
    model: Any, documents: Any, tmp_path: Path
) -> None:
    two = {"none": [], "en": documents["en"]}
    with pytest.warns(UserWarning, match="group 'none' has no token"):
        counts = run(model, two, tmp_path / "o", window=16)
    assert counts.groups == ["none", "en"] and counts.tokens[0] == 0 < counts.tokens[1]


def test_the_patch_is_off_after_an_error(documents: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(RelneuronError, match="token 96"):
        run(model, {"en": [[5, 96, 7]]}, tmp_path / "o", window=2)
    assert all("forward" not in mlp.module.__dict__ for mlp in find_mlps(model))
    sources = write_corpus(tmp_path / "c", documents)
    assert count("m", model, Numbers(), sources, tmp_path / "p", CountOptions(window=16))
