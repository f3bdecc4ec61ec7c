"""Responses that nobody keeps: where there is room, the same files as over the disk.

Killed and gone on with in any place, of one process or of several, with memory that runs out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.methods.responses import fill, places, sums
from relneuron.methods.responses.at_once import identify_at_once
from relneuron.methods.responses.options import AtOnceOptions, RankOptions, RecordOptions
from relneuron.methods.responses.places import Kept, Store
from relneuron.methods.responses.rank import identify
from relneuron.methods.responses.record import record
from relneuron.model.ask import Asker
from relneuron.model.load import load_model, load_tokenizer
from relneuron.texts.options import PromptsOptions
from relneuron.texts.prompts import write_prompts
from tests.conftest import tiny_model

OPTIONS = RecordOptions(batch_tokens=64)
RANKING = RankOptions(top=9, permutations=20, bootstrap=20, noise=500)
RESULTS = {
    *("validated.csv", "prompts.jsonl", "scores.safetensors", "labels.csv"),
    *("neurons.json", "significance.csv"),
}


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Any, Any]:
    return load_model(str(model_folder)), load_tokenizer(str(model_folder))


@pytest.fixture(scope="module")
def prompts(fact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made_in: Path = tmp_path_factory.mktemp("made") / "prompts.jsonl"
    write_prompts(fact_folder, made_in, PromptsOptions(eva=8))
    lines = made_in.read_bytes().splitlines(keepends=True)
    random.Random(0).shuffle(lines)  # batches take them by length, those of det first
    lines.sort(key=lambda line: b'"det"' not in line)
    path: Path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS}


def made(loaded: tuple[Any, Any], prompts: Path, folder: Path, place: str | None) -> Store:
    """Both stages in a folder; without a place over the disk."""
    store = None if place is None else Store(place)
    record("m", *loaded, prompts, folder, OPTIONS, store=store, force=True, quiet=True)
    kept = None if store is None else store.kept
    identify(folder, folder / "neurons.json", RANKING, responses=kept, force=True, quiet=True)
    return store or Store()


def same_responses(store: Store, folder: Path) -> None:
    """Those that are kept are those of a folder's file."""
    assert store.kept is not None
    for name, values in load_file(folder / "responses.safetensors").items():
        site, layer = name.split(".")
        assert np.array_equal(store.kept.block(int(layer), site).numpy()[store.kept.rows], values)


@pytest.fixture(scope="module")
def disk(loaded: tuple[Any, Any], prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("disk") / "d"
    made(loaded, prompts, folder, None)
    return folder


@pytest.fixture
def no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """No responses.safetensors may be made."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("responses are written")

    monkeypatch.setattr(places, "create_safetensors", refuse)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands in for a device: blocks are filled there, and batches stored beside others."""
    monkeypatch.setattr(Kept, "on_host", property(lambda kept: False))


@pytest.mark.parametrize("place", ["auto", "memory"])
def test_the_files_are_those_of_the_disk(
    loaded: tuple[Any, Any], prompts: Path, disk: Path, tmp_path: Path, no_file: None, place: str
) -> None:
    store = made(loaded, prompts, tmp_path / "d", place)
    assert results(tmp_path / "d") == results(disk)
    same_responses(store, disk)
    said = [
        json.loads((one / "manifest.json").read_text())["memory"] for one in (disk, tmp_path / "d")
    ]
    n_bytes = said[0]["responses_on_disk_bytes"]
    assert said[1]["responses_on_disk_bytes"] == 0 < n_bytes
    assert said[1]["responses_in_memory_bytes"] - said[0]["responses_in_memory_bytes"] == n_bytes
    assert "never written" in said[1]["responses"]


@pytest.mark.usefixtures("no_file", "elsewhere")
def test_blocks_on_a_device_are_filled_there(
    loaded: tuple[Any, Any], prompts: Path, disk: Path, tmp_path: Path
) -> None:
    made(loaded, prompts, tmp_path / "d", "memory")
    assert results(tmp_path / "d") == results(disk)


@pytest.mark.parametrize("place", ["memory", None])
def test_a_batch_is_stored_while_the_next_one_is_computed(
    loaded: tuple[Any, Any],
    prompts: Path,
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str | None,
) -> None:
    """As where a GPU computes: by a thread, and each batch is noted behind its rows."""
    began: list[str] = []
    put, asking = Kept.store if place else places.OnDisk.store, Asker.ask

    def slow(self: Any, *args: Any) -> None:
        put(self, *args)
        began.append("stored")

    def ask(self: Asker, *args: Any) -> Any:
        began.append("asked")
        return asking(self, *args)

    monkeypatch.setattr(Kept if place else places.OnDisk, "store", slow)
    monkeypatch.setattr(Asker, "ask", ask)
    monkeypatch.setattr(fill, "device_of", lambda module: torch.device("meta"))
    made(loaded, prompts, tmp_path / "d", place)
    assert results(tmp_path / "d") == results(disk)
    assert began.count("stored") > 3


def test_a_thread_that_fails_ends_the_stage(
    loaded: tuple[Any, Any], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(places.OnDisk, "store", full)
    monkeypatch.setattr(fill, "device_of", lambda module: torch.device("meta"))
    with pytest.raises(OSError, match="No space left"):
        made(loaded, prompts, tmp_path / "d", None)
    journal = (tmp_path / "d" / "record.journal").read_bytes()
    assert b'"digest": "' not in journal.partition(b"\n")[2]


@pytest.mark.parametrize(
    ("before", "after"),
    [("memory", "memory"), ("memory", "disk"), ("disk", "memory")],
)
def test_a_killed_run_goes_on_in_any_place_and_asks_nothing_again(
    loaded: tuple[Any, Any],
    prompts: Path,
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    after: str,
) -> None:
    ask, read, asked, n_read = Asker.ask, Asker.read, list[tuple[int, ...]](), list[int]()

    def failing(self: Asker, questions: Any, rows: Any, *args: Any) -> Any:
        asked.append(tuple(rows))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return ask(self, questions, rows, *args)

    def reading(self: Asker, *args: Any) -> None:
        n_read.append(1)
        read(self, *args)

    monkeypatch.setattr(Asker, "ask", failing)
    monkeypatch.setattr(Asker, "read", reading)
    folder = tmp_path / "d"
    with pytest.raises(KeyboardInterrupt):
        made(loaded, prompts, folder, before)
    asked.pop()
    asked += [()] * 9  # no more of them fails
    made(loaded, prompts, folder, after)
    asked = [rows for rows in asked if rows]
    assert len(asked) == len({*asked})
    assert 2 <= len(n_read) <= 4  # of the four batches that were done those with det prompts
    assert results(folder) == results(disk)
    is_written = (folder / "responses.safetensors").exists()
    assert is_written == (after == "disk")
    if is_written:
        name = "responses.safetensors"
        assert (folder / name).read_bytes() == (disk / name).read_bytes()


def test_what_memory_cut_is_read_again_in_the_same_parts(
    loaded: tuple[Any, Any], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run, too, has the bits of a run that was not, as no forward is another one.

    A forward for which memory ran out at its end leaves nothing in what the next one adds to.
    """
    ask, read, log = Asker.ask, Asker.read, list[tuple[int, ...]]()
    stops: list[int] = []

    def small(self: Asker, questions: Any, rows: Any, *args: Any) -> Any:
        log.append(tuple(rows))
        if len(log) in stops:
            raise KeyboardInterrupt
        said = ask(self, questions, rows, *args)
        if len(log) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return said

    def reading(self: Asker, questions: Any, rows: Any, *args: Any) -> None:
        log.append(tuple(rows))
        read(self, questions, rows, *args)

    monkeypatch.setattr(Asker, "ask", small)
    monkeypatch.setattr(Asker, "read", reading)
    with pytest.warns(match="going on with batches of"):
        whole = made(loaded, prompts, tmp_path / "whole", "memory")
    once = log[:2] + log[3:]  # the forwards that fitted
    log.clear()
    with pytest.warns(match="going on with batches of"):
        made(loaded, prompts, tmp_path / "disk", None)
    same_responses(whole, tmp_path / "disk")
    assert results(tmp_path / "whole") == results(tmp_path / "disk")
    log.clear()
    stops.append(9)
    with pytest.warns(match="going on with"), pytest.raises(KeyboardInterrupt):
        made(loaded, prompts, tmp_path / "cut", "memory")
    log[:] = [()] * 9
    cut = made(loaded, prompts, tmp_path / "cut", "memory")
    assert {*log[9:]} <= {*once}
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    same_responses(cut, tmp_path / "disk")
    journal = (tmp_path / "cut" / "record.journal").read_text()
    assert '"parts": [' in journal


# --- both stages at once -----------------------------------------------------------------------


def test_at_once_goes_on_where_it_was_killed_and_is_done_once(
    loaded: tuple[Any, Any],
    prompts: Path,
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed between the stages it reads again what it had in memory."""
    asked = AtOnceOptions(identify=True, **vars(RANKING))
    folder, module = tmp_path / "d", "relneuron.methods.responses.at_once"

    def run() -> None:
        identify_at_once("m", *loaded, prompts, folder, OPTIONS, asked, quiet=True)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"{module}.identify", killed)
        run()
    assert (folder / "record.journal").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Asker, "ask", killed)
        run()
    assert results(folder) == results(disk)
    assert {path.name for path in folder.iterdir()} - {".lock"} == {*RESULTS, "manifest.json"}
    before = (folder / "manifest.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.record", killed)
        patch.setattr(f"{module}.identify", killed)
        run()
    assert (folder / "manifest.json").read_bytes() == before
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "neurons.json").write_text("mine")
    with pytest.raises(RelneuronError, match="neurons.json exists"):
        identify_at_once("m", *loaded, prompts, tmp_path / "e", OPTIONS, asked, quiet=True)
    assert [path.name for path in (tmp_path / "e").iterdir() if path.name != ".lock"] == [
        "neurons.json"
    ]


def test_responses_of_other_prompts_are_refused(
    loaded: tuple[Any, Any], prompts: Path, tmp_path: Path
) -> None:
    store = made(loaded, prompts, tmp_path / "d", "memory")
    assert store.kept is not None
    store.kept.prompts.about["ids"][0] = "other"
    with pytest.raises(RelneuronError, match="of other prompts than"):
        identify(tmp_path / "d", tmp_path / "n.json", RANKING, responses=store.kept, quiet=True)


# --- nothing waits for the device --------------------------------------------------------------


WAITING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal")


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what a device would be waited for, or sent; the CPU stands in for it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def waits(
    model: Any, prompts: Path, tokenizer: Any, folder: Path, monkeypatch: Any, kind: str
) -> list[str]:
    """What one stage waits for while it asks, but for what the host does with its own numbers."""
    copies: list[str] = []
    to_host, pooled = sums.to_host, fill._pooled

    def counted(values: torch.Tensor) -> Any:
        copies.append("copy")
        return to_host(values)

    def on_host(*args: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return pooled(*args)

    with monkeypatch.context() as patch, Counting() as counting:
        if kind == "memory":  # of the host, beside a device
            patch.setattr(fill, "device_of", lambda module: torch.device("meta"))
        else:
            patch.setattr(Kept, "on_host", property(lambda kept: False))
        patch.setattr(sums, "to_host", counted)
        # Random models say parts of characters, and go on until these are whole.
        patch.setattr(Asker, "_is_cut", lambda asker, answer: False)
        patch.setattr(fill, "_pooled", on_host)
        ask_all = fill.ask_all

        def only(*args: Any, **asked: Any) -> None:
            counting.seen.clear()
            ask_all(*args, **asked)
            copies.extend(counting.seen)

        patch.setattr("relneuron.methods.responses.record.ask_all", only)
        record("m", model, tokenizer, prompts, folder, OPTIONS, store=Store("memory"), quiet=True)
    return sorted(copies)


@pytest.mark.parametrize("kind", ["memory", "device"])
def test_what_a_batch_waits_for_does_not_grow_with_the_layers(
    loaded: tuple[Any, Any],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    model, tokenizer = loaded
    vocabulary = model.get_input_embeddings().num_embeddings
    found = []
    for n in (1, 4):
        deep = tiny_model("llama", vocab_size=vocabulary, num_hidden_layers=n)
        found.append(waits(deep, prompts, tokenizer, tmp_path / str(n), monkeypatch, kind))
    assert found[0] == found[1]
    batches = json.loads((tmp_path / "4" / "manifest.json").read_text())["batch_plan"]["batches"]
    n_copies = found[0].count("copy")
    assert 0 < n_copies <= batches if kind == "memory" else n_copies == 0
    assert "nonzero" not in found[0]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Bits of a forward are those of its number of threads."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
