"""A contrast that is stopped, killed, out of disk or of memory goes on with the same bits.

What needs a process that dies is done by kit/contrast_crash.py, in processes of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import relneuron.methods.contrast.contrast as stage
from relneuron.artifact.contrast import NAME, Contrast
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.methods.contrast.counter import PairCounter
from relneuron.methods.contrast.options import ContrastOptions
from relneuron.methods.counts.merge import merge
from relneuron.model.pair import Pair, pair_of
from tests.conftest import tiny_model
from tests.kit import contrast_crash
from tests.kit.count_crash import files_of
from tests.kit.forked import Forked
from tests.kit.pairs import Words, moved, write_prompts

ASKED: dict[str, Any] = {"max_new_tokens": 3, "batch_tokens": 34, "checkpoint_seconds": 1e9}
N_BATCHES = 8


@pytest.fixture(scope="module")
def pair() -> Pair:
    model = tiny_model("llama")
    return pair_of(model, moved(model), Words())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", 14)


def run(pair: Pair, prompts: Path, folder: Path, *, force: bool = False, **asked: Any) -> Any:
    options = ContrastOptions(**ASKED | asked)
    return stage.contrast(pair, prompts, folder, options, force=force, quiet=True)


def stopping(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Each run is asked to stop at its batch `after`."""

    @contextmanager
    def interruptible() -> Iterator[Callable[[], bool]]:
        looks = iter(range(1, 10**6))
        yield lambda: next(looks) == after

    monkeypatch.setattr(stage, "interruptible", interruptible)


@pytest.fixture
def stopped(pair: Pair, prompts: Path, tmp_path: Path) -> Path:
    """A folder with an unfinished contrast."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, 3)
        run(pair, prompts, tmp_path / "o")
    assert files_of(tmp_path / "o").keys() == {".lock", "contrast.checkpoint"}
    return tmp_path / "o"


@pytest.fixture(scope="module")
def whole(pair: Pair, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(pair, prompts, folder).contrast.tokens.sum() > 30
    return folder


# --- processes that die ----------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_out_of_disk_at_every_step_and_by_several_processes(tmp_path: Path) -> None:
    """Every step of every write: of two checkpoints, the counters and the manifest 6 each.

    The script checks that the next run ends with the bits of an undisturbed one, loses no more
    than one interval and leaves no other file; a full disk is one line of cause and one of fix.
    """
    process = Forked(contrast_crash.main, [str(tmp_path), "kill", "full", "ranks"])
    assert process.wait(600) == 0, process.said()
    found = json.loads(process.said()[0])
    assert (found["kill"], found["full"]) == (24, 20)
    assert found["ranks"] == ["2", "3", "1-2", "2-1"]


# --- what goes on ----------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{}, {"checkpoint_batches": 2}, {"tokens": "last"}], ids=str)
def test_stopped_again_and_again(
    pair: Pair, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any
) -> None:
    run(pair, prompts, tmp_path / "whole", **asked)
    stopping(monkeypatch, 2)
    stops = 0
    while True:
        try:
            run(pair, prompts, tmp_path / "o", **asked)
            break
        except KeyboardInterrupt:
            stops += 1
            assert stops <= N_BATCHES and not (tmp_path / "o" / NAME).exists()
    assert files_of(tmp_path / "o") == files_of(tmp_path / "whole") and stops >= 2


def test_nothing_is_read_twice(
    pair: Pair, prompts: Path, stopped: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the checkpoint; and no more once it is finished, whose files stay as they are."""
    seen, true = [], PairCounter.count

    def count(self: PairCounter, *batch: Any) -> None:
        seen.append(batch)
        true(self, *batch)

    monkeypatch.setattr(PairCounter, "count", count)
    made = run(pair, prompts, stopped)
    assert made.contrast.tokens.sum() > 0 and files_of(stopped) == files_of(whole)
    n_left = len(seen)
    run(pair, prompts, stopped.parent / "again")
    assert len(seen) - n_left == n_left + 3
    seen.clear()
    assert run(pair, prompts, stopped) is None and not seen
    assert files_of(stopped) == files_of(whole)


def test_without_memory_it_begins_again_at_the_checkpoint(
    pair: Pair, prompts: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In smaller batches: what some layers of the batch had counted is not counted twice."""
    failed, true = [], PairCounter.count

    def count(self: PairCounter, rows: Any, groups: Any) -> None:
        true(self, rows, groups)
        if not failed:
            failed.append(len(groups))
            raise MemoryError

    monkeypatch.setattr(PairCounter, "count", count)
    with pytest.warns(UserWarning, match="out of memory with "):
        found = run(pair, prompts, stopped).contrast
    plain = run(pair, prompts, stopped.parent / "plain").contrast
    assert failed[0] > 1 and found.tokens.tolist() == plain.tokens.tolist()
    for site in ("a", "b", "difference"):
        assert np.array_equal(found.arrays[f"count.{site}"], plain.arrays[f"count.{site}"])
    assert np.allclose(found.rms(), plain.rms(), rtol=1e-5)
    assert "tokens a forward" in Manifest(stopped).data["batch_plan"]["plan_changed"]


# --- what does not ---------------------------------------------------------------------------


def test_a_second_writer_is_refused_at_once(pair: Pair, prompts: Path, stopped: Path) -> None:
    before = files_of(stopped)
    code = (
        "import sys; from pathlib import Path; from relneuron.artifact.manifest import locked\n"
        f"with locked(Path({str(stopped)!r})):\n print(1, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        with pytest.raises(RelneuronError, match="another process is writing to"):
            run(pair, prompts, stopped)
        assert process.stdin is not None
        process.stdin.close()
    assert files_of(stopped) == before


@pytest.mark.parametrize("state", ["stopped", "finished"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model", "model.digest: "),
        ("model_b", "model_b.digest: "),
        ("tokenizer", "tokenizer: "),
        ("prompts", "prompts: "),
        ({"positions": "predicting"}, "positions: own -> predicting"),
        ({"completion_by": "b"}, "completion_by: a -> b"),
        ({"max_new_tokens": 2}, "max_new_tokens: 3 -> 2"),
        ({"tokens": "prompt"}, "tokens: completion -> prompt"),
        ({"template": "5 {prompt}"}, "template: None -> 5 {prompt}"),
        ({"batch_tokens": 64}, "batch_tokens: 34 -> 64"),
        ({"shard": (1, 2)}, "shard: 1/1 -> 1/2"),
    ],
    ids=str,
)
def test_other_inputs_are_refused_by_name_and_force_begins_anew(
    pair: Pair, prompts: Path, stopped: Path, tmp_path: Path, change: Any, named: str, state: str
) -> None:
    if state == "finished":
        run(pair, prompts, stopped)
    before = files_of(stopped)
    asked = change if isinstance(change, dict) else {}
    if change == "model":
        pair = pair_of(moved(pair.a, seed=8), pair.b, Words())
    elif change == "model_b":
        pair = pair_of(pair.a, moved(pair.a, seed=8), Words())
    elif change == "tokenizer":
        pair = pair_of(pair.a, pair.b, Words(vocabulary=95))
    elif change == "prompts":
        prompts = write_prompts(tmp_path / "q.jsonl", 13)
    with pytest.raises(RelneuronError) as error:
        run(pair, prompts, stopped, **asked)
    assert named in error.value.cause and str(stopped) in error.value.cause
    assert "--force" in error.value.fix
    assert files_of(stopped) == before
    if state == "stopped":
        run(pair, prompts, stopped, force=True, **asked)
        run(pair, prompts, tmp_path / "whole", **asked)
        assert files_of(stopped) == files_of(tmp_path / "whole")


def test_a_damaged_checkpoint_is_never_used(
    pair: Pair, prompts: Path, stopped: Path, whole: Path
) -> None:
    path = stopped / "contrast.checkpoint"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(RelneuronError, match="is not the file that was written") as error:
        run(pair, prompts, stopped)
    assert error.value.fix == "restore it, or --force to contrast again"
    run(pair, prompts, stopped, force=True)
    assert files_of(stopped) == files_of(whole)


def test_a_file_of_somebody_else_and_another_study_stay(
    pair: Pair, prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / NAME).write_text("mine")
    with pytest.raises(RelneuronError, match="contrast.safetensors exists"):
        run(pair, prompts, tmp_path / "mine")
    assert (tmp_path / "mine" / NAME).read_text() == "mine"
    manifest = Manifest(tmp_path / "counted")
    (tmp_path / "counted").mkdir()
    manifest.finish("count", {}, [], reads=[])
    with pytest.raises(RelneuronError, match="holds a study of groups of text"):
        run(pair, prompts, tmp_path / "counted")


def test_prompts_that_change_meanwhile_are_refused(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, true = write_prompts(tmp_path / "p.jsonl", 3), PairCounter.count

    def count(self: PairCounter, *batch: Any) -> None:
        true(self, *batch)
        write_prompts(tmp_path / "p.jsonl", 4)

    monkeypatch.setattr(PairCounter, "count", count)
    with pytest.raises(RelneuronError, match="changed while it was read"):
        run(pair, prompts, tmp_path / "o")
    assert not (tmp_path / "o" / NAME).exists()


# --- parts -----------------------------------------------------------------------------------


def test_shards_are_merged_to_the_whole(
    pair: Pair, prompts: Path, whole: Path, tmp_path: Path
) -> None:
    parts = [tmp_path / f"{i}" for i in (1, 2, 3)]
    for number, folder in enumerate(parts, 1):
        run(pair, prompts, folder, shard=(number, 3))
    total = merge(parts, tmp_path / "all")
    one = Contrast.read(whole / NAME)
    assert isinstance(total, Contrast) and total.groups == one.groups
    assert total.tokens.tolist() == one.tokens.tolist()
    for name, array in one.arrays.items():
        is_sum = name.startswith("sum")
        close = np.allclose if is_sum else np.array_equal
        assert close(total.arrays[name], array, **{"rtol": 1e-12} if is_sum else {}), name
    manifest = Manifest(tmp_path / "all").data
    assert manifest["model_b"] == Manifest(whole).data["model_b"]
    assert manifest["tokens"]["compared"] == dict(zip(one.groups, one.tokens.tolist(), strict=True))
    with pytest.raises(RelneuronError, match="shard 2/3 of the corpus of .* is missing"):
        merge([parts[0], parts[2]], tmp_path / "two")
    with pytest.raises(RelneuronError, match="compare the same prompts"):
        merge([parts[0], parts[0]], tmp_path / "twice")


def test_contrasts_of_other_models_are_not_merged(
    pair: Pair, prompts: Path, whole: Path, tmp_path: Path
) -> None:
    run(pair_of(pair.a, moved(pair.a, seed=8), Words()), prompts, tmp_path / "b")
    with pytest.raises(RelneuronError, match="cannot be added: model_b.digest") as error:
        merge([whole, tmp_path / "b"], tmp_path / "all")
    assert error.value.fix.startswith("merge contrasts of the same two models")
    more = write_prompts(tmp_path / "more.jsonl", 3, groups="w")
    run(pair, more, tmp_path / "more")
    total = merge([whole, tmp_path / "more"], tmp_path / "all")
    assert total.groups == ["x", "y", "z", "w"]
