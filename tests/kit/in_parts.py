"""Two processes that hold a model in parts: `relneuron count` by them, and what they look at.

tests/methods/counts/test_in_parts.py runs it, each part a fork of one process (count_crash.py).
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import typer

import relneuron
import relneuron.model.load
from relneuron.artifact.counts import Counts
from relneuron.artifact.examples import Examples
from relneuron.artifact.histogram import Histogram
from relneuron.artifact.options import PartsOptions
from relneuron.cli import main as cli
from relneuron.methods.counts.counter import Counter
from relneuron.model.load import load_model
from relneuron.model.mlps import proof
from relneuron.model.mlps.find import find_mlps
from relneuron.model.plan import plan
from tests.conftest import FAMILIES, tiny_model
from tests.kit import count_crash
from tests.kit.count_crash import (
    BESIDE,
    GROUPS,
    KEPT,
    KILLED,
    LEFT,
    Faults,
    Study,
    files_of,
    run_ranks,
)
from tests.kit.counted import Numbers, check_between, draw, packed
from tests.kit.experts import expert_model

TWO = ("--tensor-parallel-size", "2")
PACKED = {
    "layers.*.mlp.gate_up_proj": "packed_colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
# What is counted in parts: a family, what is changed in its config, and in its plan.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "llama": ("llama", {}, {}),
    "uneven and tied": ("llama", {"intermediate_size": 45, "tie_word_embeddings": True}, {}),
    "packed and gathered": ("phi3", {}, {}),
    "packed": ("phi3", {}, PACKED),
    "ungated": ("phi", {}, {}),
}


def saved(folder: Path, name: str) -> str:
    """The folder of a model of MODELS; loading it goes by its plan from then on."""
    FAMILIES["phi"] = ("PhiConfig", {})
    family, changes, plan = MODELS[name]
    kind = getattr(transformers, FAMILIES[family][0])
    kind.base_model_tp_plan = kind.base_model_tp_plan | plan
    tiny_model(family, **changes).save_pretrained(folder)
    return str(folder)


class Parts(Study):
    """A study whose processes load the model, whole or in parts, as the options say."""

    def __init__(self, folder: Path, name: str, n_tokens: int, *words: str) -> None:
        super().__init__(folder, n_tokens, *words)
        self.model = saved(folder / "model", name)

        def load(_: str, options: PartsOptions, **__: Any) -> tuple[Any, Numbers]:
            return load_model(self.model, tensor_parallel_size=options.tensor_parallel_size), (
                Numbers()
            )

        relneuron.model.load.load = load


def same_counters(folder: Path, name: str) -> None:
    """The counters of a process with the whole model; what is no integer but for its rounding."""
    study = Parts(folder, name, 300, "--moments", "--sites", "gate,act,down", *KEPT)
    assert run_ranks(study, folder / "one", 1) == [0], study.said()
    assert run_ranks(study, folder / "two", 2, *TWO) == [0, 0], study.said()
    assert study.said().count("->") == 3  # one process speaks
    assert files_of(folder / "two").keys() == LEFT | BESIDE
    same_examples(folder / "one", folder / "two")
    one, two = (Counts.read(folder / which / "counts.safetensors") for which in ("one", "two"))
    assert one.groups == two.groups and one.tokens.tolist() == two.tokens.tolist()
    assert one.arrays.keys() == two.arrays.keys() and len(one.arrays) == 15
    for key, array in one.arrays.items():
        if array.dtype.kind == "i":
            assert np.array_equal(two.arrays[key], array), key
        else:
            assert np.allclose(two.arrays[key], array, rtol=1e-5, atol=1e-5), key
    if name != "ungated":
        model = load_model(study.model)
        for site in ("act", "gate", "down"):
            check_between(two, model, packed(draw(GROUPS, 300), 16), site)
    about, ours = (
        json.loads((folder / which / "manifest.json").read_text()) for which in ("one", "two")
    )
    assert ours["model"] == about["model"] | {"tensor_parallel_size": 2}  # the digest, too
    (words,) = ours["stages"]["count"]["commands"]
    assert words[words.index(TWO[0]) + 1] == "2" and "--device" not in words


def same_examples(one: Path, two: Path) -> None:
    """The same values but for their rounding; so are nearly all their windows and bins."""
    found = [Examples.read(folder / "examples.safetensors") for folder in (one, two)]
    spread = [Histogram.read(folder / "histogram.safetensors") for folder in (one, two)]
    assert found[0].n_windows.tolist() == found[1].n_windows.tolist()
    for site in found[0].sites:
        values = [examples.value[site] for examples in found]
        assert np.isfinite(values[0]).all()
        assert np.allclose(*values, rtol=1e-4, atol=1e-5)
        same = [examples.numbers(site) for examples in found]
        assert (same[0] == same[1]).mean() > 0.99
        counts = [histogram.count[site] for histogram in spread]
        assert (counts[0].sum(-1) == counts[1].sum(-1)).all()
        assert (counts[0] == counts[1]).mean() > 0.99


def kills(folder: Path) -> int:
    """The first process ends at steps of its files, the other one with it; both go on.

    Returns how often; that each step will do is shown with one process (test_count_crash.py).
    """
    study = Parts(folder, "llama", 130, "--moments")
    assert run_ranks(study, folder / "whole", 2, *TWO) == [0, 0], study.said()
    whole = files_of(folder / "whole")
    for n, at in enumerate(itertools.count(1, 3)):
        output = folder / f"{at}"

        def act(rank: int, at: int = at) -> None:
            if rank == 0:
                Faults(at, lambda: os._exit(KILLED), kills=True)

        codes = run_ranks(study, output, 2, *TWO, act=act)
        if codes == [0, 0]:
            return n
        assert codes[0] == KILLED, study.said()
        count_crash.check_checkpoint(output)
        assert run_ranks(study, output, 2, *TWO) == [0, 0], study.said()
        assert files_of(output) == whole, sorted(files_of(output))
    raise AssertionError("no run came to its end")


def ends_of_one(folder: Path) -> None:
    """One that dies, refuses or finds something else: all end, and nothing is lost."""
    study = Parts(folder, "llama", 600)
    assert run_ranks(study, folder / "whole", 2, *TWO) == [0, 0], study.said()
    whole = files_of(folder / "whole")

    def die(rank: int) -> None:
        true, seen = Counter.count, 0

        def count(self: Counter, batch: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == 8:
                os._exit(9)
            true(self, batch)

        if rank:
            Counter.count = count  # type: ignore[method-assign]

    codes = run_ranks(study, folder / "died", 2, *TWO, act=die)
    assert codes[1] == 9 and codes[0] == 1, study.said()
    assert "error: another process of torchrun has ended" in study.said(), study.said()
    assert run_ranks(study, folder / "died", 2, *TWO, stop=8) == [130, 130], study.said()
    # Half of a model in parts is nothing that a whole one goes on with: it rounds otherwise.
    assert run_ranks(study, folder / "died", 1) == [1], study.said()
    assert "tensor_parallel_size: 2 -> None" in study.said()
    assert run_ranks(study, folder / "died", 2, *TWO) == [0, 0], study.said()
    assert files_of(folder / "died") == whole

    def differ(rank: int) -> None:
        true = proof.prove

        def prove(seen: Any, run: Any, layers: Any) -> Any:
            run()
            return true(seen, run, layers)

        if rank:
            proof.prove = prove  # type: ignore[assignment]

    codes = run_ranks(study, folder / "differ", 2, *TWO, act=differ)
    assert codes == [1, 1], study.said()
    assert study.said().count("the processes found different things") == 1
    assert not (folder / "differ" / "manifest.json").exists()

    (folder / "mine").mkdir()
    (folder / "mine" / "counts.safetensors").write_text("mine")
    assert run_ranks(study, folder / "mine", 2, *TWO) == [2, 2], study.said()
    assert (folder / "mine" / "counts.safetensors").read_text() == "mine"


def contexts(folder: Path) -> None:
    """`instrument` and `ablate` of a model in parts: own neurons counted, all of them off."""
    for name in ("uneven and tied", "packed"):
        path = saved(folder / name, name)
        both(lambda rank, path=path: look(rank, path))


def check_bytes(rank: int, path: str, model: Any) -> None:
    """What a plan without weights says of a process is what it holds."""
    held = {}
    for tensor in (*model.parameters(), *model.buffers()):
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        held[own.data_ptr()] = own.numel() * own.element_size()
    found = plan(path, memory={}, n_parts=2, dtype="float32").places[rank]
    assert found.weights == sum(held.values())
    ids, cache = torch.zeros(1, 1, dtype=torch.int64), 0
    with torch.no_grad():
        for layer in model(ids, use_cache=True).past_key_values.layers:
            cache += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    assert found.cache == cache


def experts(folder: Path) -> None:
    """Experts in parts are refused with a reason; their bytes are told all the same."""
    expert_model("qwen3").save_pretrained(folder)

    def act(rank: int) -> None:
        model = load_model(str(folder), tensor_parallel_size=2)
        check_bytes(rank, str(folder), model)
        try:
            find_mlps(model)
        except relneuron.RelneuronError as error:
            assert "its experts' weights are sharded over devices" in error.cause
        else:
            raise AssertionError("experts in parts were found")

    both(act)


def look(rank: int, path: str) -> None:
    one, two = load_model(path), load_model(path, tensor_parallel_size=2)
    ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(5))
    check_bytes(rank, path, two)
    mlps = find_mlps(two)
    assert [mlp.n_neurons for mlp in mlps] == [mlp.width for mlp in find_mlps(one)]
    assert all(mlp.is_whole and mlp.width < mlp.n_neurons for mlp in mlps)
    before = [m.__dict__.get("forward") for m in two.modules()]
    neurons = [(layer, site, n) for layer in (0, 2) for site in ("gate", "up") for n in (0, 21, 44)]
    neurons += [(1, "down", 3)]

    def near(one: torch.Tensor, other: torch.Tensor) -> bool:
        return torch.allclose(one, other, rtol=1e-4, atol=1e-6)

    ways: tuple[dict[str, Any], ...] = ({}, {"mode": "scale", "value": 0.5})
    ways += ({"mode": "mean", "value": 2.0},)
    with torch.no_grad():
        clean = one(ids).logits
        assert near(two(ids).logits, clean)
        for how in ways:
            logits = []
            for model in (one, two):
                with relneuron.ablate(model, neurons, **how):
                    logits.append(model(ids).logits)
            assert near(*logits) and not near(logits[0], clean)
        stats = []
        for model in (one, two):
            with relneuron.instrument(model, 1, sites=("act", "product"), moments=True) as probe:
                probe.batch(torch.ones_like(ids))
                model(ids)
            stats.append(probe.stats)
    for mlp, whole, part in zip(mlps, *stats, strict=True):
        assert part.tokens.tolist() == whole.tokens.tolist() == [18]
        for site in ("act", "product"):
            assert torch.equal(part.count[site], whole.count[site][:, mlp.inside])
            assert near(part.sum[site], whole.sum[site][:, mlp.inside])
    assert before == [m.__dict__.get("forward") for m in two.modules()]
    try:
        find_mlps(two, attention=True)
    except relneuron.RelneuronError as error:
        assert "in parts" in error.cause
    else:
        raise AssertionError("the attention of a model in parts was found")


def both(act: Callable[[int], object]) -> None:
    """`act(rank)` in two processes of one torchrun."""
    port, pids = count_crash.free_port(), []
    for rank in range(2):
        pid = os.fork()
        if not pid:
            try:
                count_crash.join(rank, 2, port)
                act(rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(1)
        pids.append(pid)
    assert [count_crash.code_of(pid) for pid in pids] == [0, 0]


def main(what: str, folder: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    cli.app = typer.main.get_command(cli.app)  # once for all runs
    act: Callable[..., object] = globals()[what]
    print(json.dumps(act(Path(folder), *arguments)))
