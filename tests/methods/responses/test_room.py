"""Where there is room for responses that nobody keeps, how much they need, how sums get there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relneuron import ops
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import Shape
from relneuron.methods.responses import room
from relneuron.methods.responses.places import Kept, Prompts, blocks_of, n_response_bytes
from relneuron.methods.responses.sums import Sums
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import model_shape
from relneuron.model.widths import told_widths
from tests.conftest import tiny_model
from tests.kit import experts

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
    llama_7b: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        batch = Sums(mlps, ("gate", "up", "down"), len(own), room=kept.room(len(own)))
        assert batch.of[0] is not None and batch.of[0]["down"].shape == (len(own), 4096)
        batch.of[0]["gate"].copy_(whole[own])
        sections = batch.sections(on_host=True)()
        assert all(section.is_there for section in sections)
        kept.store(sections, own)
    assert (kept.rows >= 0).all()
    layer, site, block = next(iter(blocks_of(kept, lambda: None)))
    assert (layer, site) == (0, "gate") and block.nbytes == 300 * 11008 * 4
    assert torch.equal(block[kept.rows], whole / 3)
    labels = torch.randint(0, 2, (5, n), generator=generator, dtype=torch.int8)
    ap = ops.average_precision(block[kept.rows], labels)
    some = torch.tensor([0, 17, 5000, 11007])
    want = ops.average_precision(whole[:, some], labels, backend="reference")
    assert torch.equal(ap[:, some], want)
    column = kept.column((0, "gate", 17))
    assert column is not None and np.array_equal(column, (whole / 3)[:, 17].numpy())
    assert kept.column((0, "q", 17)) is None
    assert not list(tmp_path.iterdir())


# --- sums -----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_room", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "deepseek"])
def test_the_sums_of_experts_stand_where_their_neurons_do(family: str, has_room: bool) -> None:
    """Of expert e and prompt n in the row e * N + n; all that a layer writes is in one down."""
    mlps = find_mlps(experts.expert_model(family))
    order, n = Shape.of(model_shape(mlps)), 5
    kept = Kept(Prompts(order, range(n), [2] * n, {}), lambda layer: torch.device("cpu"))
    batch = Sums(mlps, [*order.widths], n, room=kept.room(n) if has_room else None)
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
    sections = batch.sections(on_host=True)()
    assert {x.name.split(".")[0] for x in sections if x.is_there} == (
        {"down"} if has_room else set()
    )
    kept.store(sections, range(n))
    for name, values in wanted.items():
        at, _, number = name.partition(".")
        assert torch.equal(kept.block(int(number), at), values)
    n_parts = [sum(mlp.layer == layer for mlp in mlps) for layer in range(order.layers)]
    assert max(n_parts) == (2 if family == "deepseek" else 1)
    for layer, parts in enumerate(n_parts):
        assert (kept.block(layer, "down") == parts / 2).all()
