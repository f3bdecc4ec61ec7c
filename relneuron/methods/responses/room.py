"""Where there is room for responses that nobody keeps: on the devices, in memory, else on the disk.

`record` asks before it begins. What is free is asked of the system; how much is needed is known to
the byte (`places.n_response_bytes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import n_started
from relneuron.artifact.neurons import Shape
from relneuron.artifact.prompts import RECORDED
from relneuron.methods.responses.options import DEVICE, DISK, MEMORY
from relneuron.methods.responses.places import Prompts, Store
from relneuron.model.layers import device_of
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.questions import Questions
from relneuron.model.ranks import Ranks

# Of what is free, the responses may take half: the other half is for the forward, its batches' sums
# and the ranking.
SHARE = 2


def free_memory(root: Path = Path("/")) -> int | None:
    """The bytes that this process may still take, by the system and its control groups.

    None where the system does not say it. What a group caches of files counts as free.
    """
    free = []
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) << 10)
    for folder, most, now in _groups(root):
        with suppress(OSError, ValueError):
            limit = int((folder / most).read_text())  # "max" is no number
            lines = (folder / "memory.stat").read_text().splitlines()
            stat = dict(line.split(" ", 1) for line in lines if " " in line)
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            free.append(limit - int((folder / now).read_text()) + cached)
    return max(0, min(free)) if free else None


def _groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """The folders of the control groups that this process is in, and of those around them."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            base = root / "sys/fs/cgroup"
            names = "memory.max", "memory.current"
            if kinds:
                base, names = base / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if not kinds or "memory" in kinds.split(","):
                inside = path.strip("/").split("/")
                for n in range(len(inside) + 1):
                    yield base.joinpath(*inside[:n]), *names


def free_on(device: torch.device) -> int | None:
    """The bytes that are free on a device; None where it does not say it."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + unused)


def devices_of(mlps: Sequence[Part]) -> dict[int, torch.device]:
    """Where each layer computes that has neurons."""
    return {mlp.layer: device_of(mlp.module) for mlp in reversed(mlps)}


def choose(asked: str, prompts: Prompts, devices: Mapping[int, torch.device], n_ranks: int) -> str:
    """The place of responses that nobody keeps: device, memory or disk.

    `auto` takes the first of them of which the responses need half of what is free at most. Of
    several processes the first one gets the rows of all, in memory. Raises RelneuronError for a
    place that was asked for and has no room.
    """
    needed: dict[torch.device, int] = {}
    for layer, _, width in prompts.order.blocks():
        device = devices[layer]
        needed[device] = needed.get(device, 0) + 4 * width * len(prompts.rows)
    is_away = all(device.type != "cpu" for device in needed)
    on_device = [(needed[device], free_on(device), str(device)) for device in needed]
    in_memory = [(prompts.n_bytes, free_memory(), "memory")]
    if asked == DEVICE and (n_ranks > 1 or not is_away):
        why = (
            "several processes bring their responses together in memory"
            if n_ranks > 1
            else "the model computes on the CPU, so responses are in memory"
        )
        raise RelneuronError(f"--responses device: {why}", "use --responses memory, or auto", 2)
    for kind, wanted in ((DEVICE, on_device), (MEMORY, in_memory)):
        if asked == kind:
            for n_bytes, free, where in wanted:
                if free is not None and n_bytes > free:
                    raise RelneuronError(
                        f"responses of {n_bytes:,} bytes, and {free:,} are free: {where}",
                        "use --responses auto, or disk",
                        2,
                    )
            return kind
        can = kind == MEMORY or (is_away and n_ranks == 1)
        fits = all(free is not None and SHARE * n_bytes <= free for n_bytes, free, _ in wanted)
        if asked == "auto" and can and fits:
            return kind
    return DISK


def agreed(asked: str, prompts: Prompts, devices: Mapping[int, torch.device], ranks: Ranks) -> str:
    """What the first process chooses; all must call it."""
    kinds = (DEVICE, MEMORY, DISK)
    own = kinds.index(choose(asked, prompts, devices, ranks.size)) if ranks.rank == 0 else 0
    return kinds[int(ranks.first(np.array([own]))[0])]


def check_room(store: Store, mlps: Sequence[Part], questions: Questions) -> None:
    """Refuse a place without room before anything is done."""
    det = [row for row, prompt in enumerate(questions.prompts) if prompt.split in RECORDED]
    prompts = Prompts(Shape.of(model_shape(mlps)), det, [1] * len(det), {})
    choose(store.asked, prompts, devices_of(mlps), n_started())
