"""Models that several processes hold in parts (tensor parallelism), as transformers loads them.

Of an MLP each process has the columns of gate and up, and the rows of `down`, of its own neurons;
what `down` gives is summed over the processes. `load.py` loads such a model, `mlps/find.py` asks
which neurons are here, `identity.py` and the corpus pass put the parts together.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, distributed, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.layers import Unfound, features, is_sharded


def check_parts(n_parts: int) -> None:
    """Refuse to load a model in parts unless torchrun started a process for each of them."""
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world == n_parts:
        return
    started = f"torchrun started {world}" if world > 1 else "this is one without torchrun"
    raise RelneuronError(
        f"--tensor-parallel-size {n_parts} takes {n_parts} processes, a part of the model in each: "
        f"{started}",
        f"begin the command with torchrun --nproc-per-node {n_parts} -m relneuron"
        + (", and share the text among several of them by --shard" if world > n_parts else ""),
        2,
    )


def loading_options(n_parts: int, stack: ExitStack) -> dict[str, Any]:
    """What `from_pretrained` takes to load this process's part; all processes join until then.

    `stack` ends what is begun. The plan which says what is cut, and how, is the model's own.
    """
    from transformers import __version__
    from transformers.distributed import DistributedConfig

    if "tp_size" not in {field.name for field in fields(DistributedConfig)}:
        raise RelneuronError(
            f"transformers {__version__} does not load a model in parts as it is needed here",
            "pip install 'transformers>=5.16', or use --device-map auto",
        )
    if not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Counters are added on the host, activations where the model is.
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        )
        stack.callback(distributed.destroy_process_group)
    return {"distributed_config": DistributedConfig(tp_size=n_parts)}


def n_parts(model: nn.Module) -> int:
    """In how many parts a model is held; 1 for one that is whole here."""
    weight = next(filter(is_sharded, model.parameters()), None)
    return 1 if weight is None else int(_mesh(weight).size())


def part_number(model: nn.Module) -> int:
    """Which part of a model this process holds, from 0 on."""
    weight = next(filter(is_sharded, model.parameters()), None)
    return 0 if weight is None else int(_mesh(weight).get_local_rank())


def _mesh(weight: Tensor) -> Any:
    return weight.device_mesh  # type: ignore[attr-defined]


def gathered(weight: Tensor) -> Tensor:
    """A sharded weight as a whole, as the checkpoint has it; all its processes must call this."""
    whole: Tensor = weight.detach().full_tensor()  # type: ignore[attr-defined]
    return whole


def own_inputs(linear: nn.Module, width: int) -> tuple[int, int]:
    """Where the `width` inputs that a linear map gets here stand among all: their first, how many.

    Raises Unfound where they are cut in another way than side by side, in the order of processes.
    """
    weight = getattr(linear, "weight", None)
    whole = features(linear)[0]
    if not isinstance(weight, Tensor) or not is_sharded(weight) or whole == width:
        return 0, width
    mesh, (placement, *others) = _mesh(weight), weight.placements  # type: ignore[attr-defined]
    each = -(-whole // mesh.size())
    first = each * mesh.get_local_rank()
    is_cut = not others and placement.is_shard(weight.dim() - 1)
    if not is_cut or width != min(each, whole - first):
        raise Unfound(f"its weight is sharded over processes by {placement}")
    return first, whole


def together(model: nn.Module, run: Callable[[], object]) -> Callable[[], object]:
    """`run`, a forward, which all processes of a model must begin for the same time."""
    if n_parts(model) == 1:
        return run
    number = 0

    def all_run() -> object:
        nonlocal number
        number += 1
        agree(model, f"forward {number}")
        return run()

    return all_run


def agree(model: nn.Module, found: object) -> None:
    """Raise in all processes of a model unless each of them has found the same.

    Otherwise one would wait for ever for a forward that the others do not run.
    """
    n = n_parts(model)
    if n == 1:
        return
    every: list[object] = [None] * n
    distributed.all_gather_object(every, found)
    if any(other != every[0] for other in every):
        raise RelneuronError(
            "the processes found different things in their parts of the model: "
            + "; ".join(dict.fromkeys(map(str, every))),
            "count it in one process, with --device-map auto if it is large",
        )
