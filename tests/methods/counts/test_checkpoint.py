"""A folder with an unfinished or finished count: in use, of other inputs, damaged, someone else's.

test_count_crash.py holds how a count comes to be unfinished.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.methods.counts.count import CHECKPOINT, count
from relneuron.methods.counts.counter import Counter
from relneuron.texts.options import CountOptions
from tests.conftest import tiny_model
from tests.kit.count_crash import GROUPS, files_of
from tests.kit.counted import Numbers, draw, note_batches, run, stopping, write_corpus


@pytest.fixture(scope="module")
def documents() -> dict[str, list[list[int]]]:
    return draw(GROUPS, 150)


ASKED: dict[str, Any] = {"window": 16, "batch_tokens": 32}


@pytest.fixture
def stopped(model: Any, documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an unfinished count."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, 4)
        run(model, documents, tmp_path / "o", **ASKED)
    return tmp_path / "o"


def test_a_second_writer_is_refused_at_once(model: Any, documents: Any, stopped: Path) -> None:
    before = files_of(stopped)
    code = (
        "import sys; from pathlib import Path; from relneuron.artifact.manifest import locked\n"
        f"with locked(Path({str(stopped)!r})):\n print(1, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"1\n"
        with pytest.raises(RelneuronError, match="another process is writing to"):
            run(model, documents, stopped, **ASKED)
        assert other.stdin is not None
        other.stdin.close()
    assert files_of(stopped) == before
    run(model, documents, stopped, **ASKED)


@pytest.mark.parametrize("state", ["stopped", "finished"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model", "model.digest: "),
        ("text", "sources.0.files.0.sha256: "),
        ("tokenizer", "tokenizer: "),
        ({"window": 8}, "packing.window: 16 -> 8"),
        ({"threshold": 0.5}, "threshold: 0.0 -> 0.5"),
        ({"batch_tokens": 64}, "batch_tokens: 32 -> 64"),
        ({"moments": True}, "moments: False -> True"),
        ({"sites": ("up",)}, "sites: "),
        ({"shard": (1, 2)}, "shard: 1/1 -> 1/2"),
    ],
    ids=str,
)
def test_other_inputs_are_refused_by_name_and_force_begins_anew(
    model: Any, documents: Any, stopped: Path, tmp_path: Path, change: Any, named: str, state: str
) -> None:
    if state == "finished":
        run(model, documents, stopped, **ASKED)
    before = files_of(stopped)
    asked = ASKED | (change if isinstance(change, dict) else {})
    changed_model = tiny_model("qwen2") if change == "model" else model
    tokenizer = Numbers(vocabulary=95) if change == "tokenizer" else Numbers()
    text = documents
    if change == "text":
        text = documents | {"en": [list(reversed(line)) for line in documents["en"]]}
    with pytest.raises(RelneuronError) as error:
        run(changed_model, text, stopped, tokenizer=tokenizer, **asked)
    assert named in error.value.cause and str(stopped) in error.value.cause
    assert "--force" in error.value.fix
    assert files_of(stopped) == before
    run(changed_model, text, stopped, tokenizer=tokenizer, force=True, **asked)
    run(changed_model, text, tmp_path / "whole", tokenizer=tokenizer, **asked)
    assert files_of(stopped) == files_of(tmp_path / "whole")


def test_how_it_is_saved_and_what_happens_without_memory_may_change(
    model: Any, documents: Any, stopped: Path, tmp_path: Path
) -> None:
    run(model, documents, stopped, checkpoint_batches=1, oom="error", **ASKED)
    run(model, documents, tmp_path / "whole", **ASKED)
    assert files_of(stopped) == files_of(tmp_path / "whole")


def test_a_forced_count_goes_on_where_it_was_stopped(
    model: Any, documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C says to give the same command again: with --force it must not begin again."""
    run(model, documents, tmp_path / "o", window=16)
    run(model, documents, tmp_path / "whole", **ASKED)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, 4)
        run(model, documents, tmp_path / "o", force=True, **ASKED)
    seen = note_batches(monkeypatch)
    run(model, documents, tmp_path / "o", force=True, **ASKED)
    n_left = len(seen)
    assert files_of(tmp_path / "o") == files_of(tmp_path / "whole")
    run(model, documents, tmp_path / "again", **ASKED)
    assert len(seen) - n_left == n_left + 4


def test_a_damaged_checkpoint_is_never_used(
    model: Any, documents: Any, stopped: Path, tmp_path: Path
) -> None:
    path = stopped / CHECKPOINT
    whole = path.read_bytes()
    places = [0, 1, 63, 64, 65, 72, 73, len(whole) // 3, len(whole) // 2, len(whole) - 1]
    damaged = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in places]
    damaged += [whole[:place] for place in places] + [whole + b"\0"]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(RelneuronError, match="its digest differs") as error:
            run(model, documents, stopped, **ASKED)
        assert str(path) in error.value.cause and "--force" in error.value.fix
        assert path.read_bytes() == data
    run(model, documents, stopped, force=True, **ASKED)
    run(model, documents, tmp_path / "whole", **ASKED)
    assert files_of(stopped) == files_of(tmp_path / "whole")


def test_a_checkpoint_of_another_version_is_told(model: Any, documents: Any, stopped: Path) -> None:
    path = stopped / CHECKPOINT
    whole = path.read_bytes().partition(b"\n")[2]
    # The last one's header is none of safetensors.
    others = [(b'\\"done\\"', b'\\"gone\\"'), (b'\\"inputs\\"', b'\\"inputz\\"')]
    for old, new in [*others, (b'"data_offsets":[0,', b'"data_offsets":[9,')]:
        assert whole.count(old) == 1
        data = whole.replace(old, new)
        path.write_bytes(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
        with pytest.raises(RelneuronError, match="written by another version") as error:
            run(model, documents, stopped, **ASKED)
        assert str(path) in error.value.cause and "--force" in error.value.fix


def test_a_finished_count_is_left_alone(
    model: Any, documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "o"
    run(model, documents, folder, **ASKED)
    before = files_of(folder)
    sources = write_corpus(tmp_path / "o.corpus", documents)
    options = CountOptions(**ASKED)

    def refused(*_: Any) -> None:
        raise AssertionError("nothing is to be counted")

    with monkeypatch.context() as patch:
        patch.setattr(Counter, "count", refused)
        for force in (False, True):
            found = count(
                "another name", model, Numbers(), sources, folder, options, force=force, quiet=True
            )
            assert found is None and files_of(folder) == before
    (folder / "counts.safetensors").write_bytes(before["counts.safetensors"][:-1] + b"\1")
    with pytest.raises(RelneuronError, match="is not the file that was written"):
        run(model, documents, folder, **ASKED)
    run(model, documents, folder, force=True, **ASKED)
    assert files_of(folder) == before
    (folder / "counts.safetensors").unlink()
    run(model, documents, folder, **ASKED)
    assert files_of(folder) == before


def test_a_file_of_somebody_else_is_not_overwritten(
    model: Any, documents: Any, tmp_path: Path
) -> None:
    path = tmp_path / "o" / "counts.safetensors"
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(RelneuronError, match=r"counts\.safetensors exists"):
        run(model, documents, path.parent, **ASKED)
    assert path.read_text() == "mine"
    run(model, documents, path.parent, force=True, **ASKED)


@pytest.mark.parametrize("stage", ["prompts", "record"])
def test_nothing_is_counted_in_a_study_of_relations(
    model: Any, documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    output = tmp_path / "o"
    output.mkdir()
    for name in ("prompts.jsonl", "neurons.json"):
        (output / name).write_text("{}")
    manifest = Manifest(output)
    manifest.finish(stage, {}, [output / "prompts.jsonl"], reads=[])
    manifest.finish("identify", {}, [output / "neurons.json"])
    before, seen = files_of(output), note_batches(monkeypatch)
    with pytest.raises(RelneuronError, match="o holds a study of relations") as caught:
        run(model, documents, output, **ASKED)
    assert "--force" in caught.value.fix and not seen
    assert files_of(output) == before | {".lock": b""}
    run(model, documents, output, force=True, **ASKED)
    assert [*Manifest(output).data["stages"]] == [stage, "count"]
    # Now the count is a finished one as any other.
    counted, n_batches = files_of(output), len(seen)
    with pytest.raises(RelneuronError, match="count was made from other inputs"):
        run(model, documents, output, window=8, batch_tokens=32)
    sources = write_corpus(tmp_path / "o.corpus", documents)
    again = count("m", model, Numbers(), sources, output, CountOptions(**ASKED), quiet=True)
    assert again is None and len(seen) == n_batches and files_of(output) == counted


def test_the_corpus_may_lie_elsewhere_when_a_count_goes_on(
    model: Any, documents: Any, stopped: Path, tmp_path: Path
) -> None:
    run(model, documents, tmp_path / "whole", **ASKED)
    moved = write_corpus(tmp_path / "elsewhere", documents)
    assert count("m", model, Numbers(), moved, stopped, CountOptions(**ASKED), quiet=True)
    assert files_of(stopped) == files_of(tmp_path / "whole")


def test_killed_between_the_counters_and_the_manifest(
    model: Any, documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a count that was too short for a checkpoint needs no --force then."""

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    run(model, documents, tmp_path / "whole", **ASKED)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Manifest, "finish", dies)
        run(model, documents, tmp_path / "o", **ASKED)
    assert (tmp_path / "o" / "counts.safetensors").exists()
    run(model, documents, tmp_path / "o", **ASKED)
    assert files_of(tmp_path / "o") == files_of(tmp_path / "whole")
