"""Responses that nobody keeps: where there is room, the same files as over the disk.

Killed and gone on with in any place, of one process or of several, with memory that runs out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from relneuron import ops
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.artifact.neurons import Shape
from relneuron.methods.responses import fill, places, room, sums
from relneuron.methods.responses.at_once import identify_at_once
from relneuron.methods.responses.options import AtOnceOptions, RankOptions, RecordOptions
from relneuron.methods.responses.places import Kept, Prompts, Store, blocks_of, n_response_bytes
from relneuron.methods.responses.rank import identify
from relneuron.methods.responses.record import record
from relneuron.model.ask import Asker
from relneuron.model.load import load_model, load_tokenizer
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import model_shape
from relneuron.model.widths import told_widths
from relneuron.texts.options import PromptsOptions
from relneuron.texts.prompts import write_prompts
from tests.conftest import tiny_model
from tests.kit import experts

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
    path: Path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_prompts(fact_folder, path, PromptsOptions(eva=8))
    return path


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS}


def made(
    loaded: tuple[Any, Any], prompts: Path, folder: Path, place: str | None, **changes: Any
) -> Store:
    """Both stages in a folder; without a place over the disk."""
    store = None if place is None else Store(place)
    record("m", *loaded, prompts, folder, OPTIONS, store=store, force=True, quiet=True)
    kept = None if store is None else store.kept
    identify(folder, folder / "neurons.json", RANKING, responses=kept, force=True, quiet=True)
    return store or Store()


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
    assert store.kept is not None
    for name, values in load_file(disk / "responses.safetensors").items():
        site, layer = name.split(".")
        assert np.array_equal(store.kept.block(int(layer), site).numpy(), values), name
    said = [
        json.loads((one / "manifest.json").read_text())["memory"] for one in (disk, tmp_path / "d")
    ]
    n_bytes = said[0]["responses_on_disk_bytes"]
    assert said[1]["responses_on_disk_bytes"] == 0 < n_bytes
    assert said[1]["responses_in_memory_bytes"] - said[0]["responses_in_memory_bytes"] == n_bytes
    assert "never written" in said[1]["responses"]


def test_blocks_on_a_device_are_filled_there(
    loaded: tuple[Any, Any],
    prompts: Path,
    disk: Path,
    tmp_path: Path,
    no_file: None,
    elsewhere: None,
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
    """A killed run, too, has the bits of a run that was not, as no forward is another one."""
    ask, read, log = Asker.ask, Asker.read, list[tuple[int, ...]]()
    stops: list[int] = []

    def small(self: Asker, questions: Any, rows: Any, *args: Any) -> Any:
        log.append(tuple(rows))
        if len(log) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(log) in stops:
            raise KeyboardInterrupt
        return ask(self, questions, rows, *args)

    def reading(self: Asker, questions: Any, rows: Any, *args: Any) -> None:
        log.append(tuple(rows))
        read(self, questions, rows, *args)

    monkeypatch.setattr(Asker, "ask", small)
    monkeypatch.setattr(Asker, "read", reading)
    with pytest.warns(match="going on with batches of"):
        whole = made(loaded, prompts, tmp_path / "whole", "memory")
    once = log[:2] + log[3:]  # the forwards that fitted
    log.clear()
    stops.append(9)
    with pytest.warns(match="going on with"), pytest.raises(KeyboardInterrupt):
        made(loaded, prompts, tmp_path / "cut", "memory")
    log[:] = [()] * 9
    cut = made(loaded, prompts, tmp_path / "cut", "memory")
    assert {*log[9:]} <= {*once}
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert whole.kept is not None and cut.kept is not None
    for layer, site, values in blocks_of(cut.kept, lambda: None):
        assert torch.equal(values, whole.kept.block(layer, site))
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


# --- where there is room -----------------------------------------------------------------------


def some_prompts(n: int = 10) -> Prompts:
    order = Shape.of({"layers": 2, "width": 100, "hidden": 50})
    return Prompts(order, range(n), [1] * n, {})


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    found: dict[str, int | None] = {"memory": None, "device": None}
    monkeypatch.setattr(room, "free_memory", lambda: found["memory"])
    monkeypatch.setattr(room, "free_on", lambda device: found["device"])
    return found


def test_auto_takes_the_first_place_with_room_for_twice_as_much(
    free: dict[str, int | None],
) -> None:
    prompts, gpu, cpu = some_prompts(), torch.device("cuda:0"), torch.device("cpu")
    n = 4 * 10 * 2 * (100 + 100 + 50)
    assert prompts.n_bytes == n
    there, here = {0: gpu, 1: gpu}, {0: cpu, 1: cpu}

    def chosen(device: int | None, memory: int | None, where: Any = there, ranks: int = 1) -> str:
        free.update(device=device, memory=memory)
        return room.choose("auto", prompts, where, ranks)

    assert chosen(2 * n, 2 * n) == "device"
    assert chosen(2 * n - 1, 2 * n) == "memory"
    assert chosen(2 * n - 1, 2 * n - 1) == "disk"
    assert chosen(None, None) == "disk"
    assert chosen(2 * n, 2 * n, here) == "memory"
    assert chosen(2 * n, 2 * n, {0: gpu, 1: cpu}) == "memory"
    assert chosen(2 * n, 2 * n, there, 2) == "memory"
    # Two devices, each with half of the layers.
    two = {0: gpu, 1: torch.device("cuda:1")}
    assert chosen(n, 0, two) == "device"


def test_a_place_without_room_is_refused(free: dict[str, int | None]) -> None:
    prompts, gpu = some_prompts(), torch.device("cuda:0")
    n, there = prompts.n_bytes, {0: gpu, 1: gpu}
    free.update(memory=n, device=n)
    assert room.choose("memory", prompts, there, 1) == "memory"
    assert room.choose("device", prompts, there, 1) == "device"
    assert room.choose("disk", prompts, there, 1) == "disk"
    free.update(memory=n - 1, device=n - 1)
    for place in ("memory", "device"):
        with pytest.raises(RelneuronError, match=f"{n:,} bytes, and {n - 1:,} are free") as error:
            room.choose(place, prompts, there, 1)
        assert "--responses auto" in error.value.fix
    free.update(memory=n, device=n)
    with pytest.raises(RelneuronError, match="the model computes on the CPU"):
        room.choose("device", prompts, {0: torch.device("cpu"), 1: gpu}, 1)
    with pytest.raises(RelneuronError, match="several processes"):
        room.choose("device", prompts, there, 2)


def test_what_is_free_is_what_the_system_and_every_group_leave(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert room.free_memory(tmp_path) is None
    write("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:     1000 kB\n")
    assert room.free_memory(tmp_path) == 1000 << 10
    write("proc/self/cgroup", "0::/a/b\n")
    write("sys/fs/cgroup/a/memory.max", "500000\n")
    write("sys/fs/cgroup/a/memory.current", "300000\n")
    write("sys/fs/cgroup/a/memory.stat", "anon 9\ninactive_file 100000\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    write("sys/fs/cgroup/a/b/memory.current", "300000\n")
    write("sys/fs/cgroup/a/b/memory.stat", "inactive_file 0\n")
    assert room.free_memory(tmp_path) == 500000 - 300000 + 100000
    write("proc/self/cgroup", "5:cpu:/x\n4:memory,pids:/c\n")
    write("sys/fs/cgroup/memory/c/memory.limit_in_bytes", "70000\n")
    write("sys/fs/cgroup/memory/c/memory.usage_in_bytes", "60000\n")
    write("sys/fs/cgroup/memory/c/memory.stat", "total_inactive_file 5000\n")
    assert room.free_memory(tmp_path) == 70000 - 60000 + 5000
    assert (room.free_memory() or 1) > 0


# --- sizes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_7b() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()


def shape_of(model: Any) -> Shape:
    layers = model.model.layers
    [width] = {*told_widths(model, list(layers))}
    return Shape.of({"layers": len(layers), "width": width, "hidden": model.config.hidden_size})


def test_the_responses_of_a_7b_are_known_to_the_byte(llama_7b: Any) -> None:
    order = shape_of(llama_7b)
    assert n_response_bytes(order, 8192) == 8192 * 4 * 32 * (2 * 11008 + 4096) == 27_380_416_512
    assert Prompts(order, range(300), [1] * 300, {}).n_bytes == 1_002_700_800


def test_a_block_of_a_7b_is_ranked_in_memory(
    llama_7b: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_file: None
) -> None:
    """The sums of real batches of 300 prompts at one MLP, stored and ranked; no file."""
    monkeypatch.chdir(tmp_path)
    order = shape_of(llama_7b)
    [mlp, *_] = find_mlps(tiny_model("llama"))
    assert isinstance(mlp, MLP)
    mlps = [replace(mlp, width=11008, hidden=4096)]
    n, generator = 300, torch.Generator().manual_seed(0)
    kept = Kept(Prompts(order, range(n), [3] * n, {"ids": []}), lambda layer: torch.device("cpu"))
    whole = torch.randn(n, 11008, generator=generator)
    rows = torch.randperm(n, generator=generator).tolist()
    for start in range(0, n, 128):
        own = rows[start : start + 128]
        batch = sums.Sums(mlps, ("gate", "up", "down"), len(own))
        assert batch.of[0] is not None and batch.of[0]["down"].shape == (len(own), 4096)
        batch.of[0]["gate"].copy_(whole[own])
        kept.store(batch.sections(on_host=True)(), own)
    assert kept.is_filled.all()
    layer, site, block = next(iter(blocks_of(kept, lambda: None)))
    assert (layer, site) == (0, "gate") and block.nbytes == 300 * 11008 * 4
    assert torch.equal(block, whole / 3)
    labels = torch.randint(0, 2, (5, n), generator=generator, dtype=torch.int8)
    ap = ops.average_precision(block, labels)
    some = torch.tensor([0, 17, 5000, 11007])
    want = ops.average_precision(whole[:, some], labels, backend="reference")
    assert torch.equal(ap[:, some], want)
    column = kept.column((0, "gate", 17))
    assert column is not None and np.array_equal(column, (whole / 3)[:, 17].numpy())
    assert kept.column((0, "q", 17)) is None
    assert not list(tmp_path.iterdir())


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


def waits(model: Any, prompts: Path, tokenizer: Any, folder: Path, monkeypatch: Any) -> list[str]:
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


def test_what_a_batch_waits_for_does_not_grow_with_the_layers(
    loaded: tuple[Any, Any], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    vocabulary = model.get_input_embeddings().num_embeddings
    found = []
    for n in (1, 2, 5):
        deep = tiny_model("llama", vocab_size=vocabulary, num_hidden_layers=n)
        found.append(waits(deep, prompts, tokenizer, tmp_path / str(n), monkeypatch))
    assert found[0] == found[1] == found[2]
    batches = json.loads((tmp_path / "5" / "manifest.json").read_text())["batch_plan"]["batches"]
    assert 0 < found[0].count("copy") <= batches
    assert "nonzero" not in found[0]


@pytest.mark.parametrize("family", ["qwen3", "deepseek"])
def test_the_sums_of_experts_stand_where_their_neurons_do(family: str) -> None:
    """Of expert e and prompt n in the row e * N + n; all that a layer writes is in one down."""
    mlps = find_mlps(experts.expert_model(family))
    order, n = Shape.of(model_shape(mlps)), 5
    kept = Kept(Prompts(order, range(n), [2] * n, {}), lambda layer: torch.device("cpu"))
    batch = sums.Sums(mlps, [*order.widths], n)
    wanted: dict[str, torch.Tensor] = {}
    for mlp, own in zip(mlps, batch.of, strict=True):
        assert own is not None
        for site in ("gate", "up"):
            values = torch.randn(own[site].shape)
            own[site].copy_(values)
            rows = values.reshape(mlp.n_experts, n, -1)
            name = f"{site}.{mlp.layer}"
            whole = wanted.setdefault(name, torch.zeros(n, order.width(mlp.layer, site)))
            for e in range(mlp.n_experts):
                start = mlp.offset + e * rows.shape[2]
                whole[:, start : start + rows.shape[2]] = rows[e] / 2
        own["down"] += 1
    kept.store(batch.sections(on_host=True)(), range(n))
    for name, values in wanted.items():
        at, _, number = name.partition(".")
        assert torch.equal(kept.block(int(number), at), values)
    n_parts = [sum(mlp.layer == layer for mlp in mlps) for layer in range(order.layers)]
    assert max(n_parts) == (2 if family == "deepseek" else 1)
    for layer, parts in enumerate(n_parts):
        assert (kept.block(layer, "down") == parts / 2).all()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Bits of a forward are those of its number of threads."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
