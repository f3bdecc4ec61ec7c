"""`record` and `identify` with responses in memory against over the disk: whole processes.

    PYTHONPATH=. python -m bench.responses [--rounds N] [-o FILE.csv]

The ways a user has: `record`, then `identify`, two processes with a file between them ("disk");
`record --identify --responses disk`, one process with a file ("file"), and the same with
`--responses memory`, which writes none ("memory"). The results of all are compared before a time is
told. Every neuron of a model of random weights is ranked for every relation of the demo, with
nothing said of how sure a score is. Of a model of 7B a GPU computes a prompt of ten tokens, which
leaves 3.3 MB of responses, in less than a millisecond; so that a processor, too, computes little a
byte of responses, the model is narrow, wide inside, and reads prompts of few tokens.

All ways in each round, in an order drawn again. Of each: seconds; those without the time in which
others had the processor (of the main thread, /proc/PID/schedstat), as on an idle machine; those in
which the main thread slept, most of them for the disk; CPU seconds of all threads; bytes that were
read from the disk and written to it (/proc/self/io); the peak of memory. The file stays in the
system's cache, if there is room for it, as it does for a user.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from relneuron.artifact.files import atomic_write, csv_bytes
from relneuron.artifact.prompts import prompts_bytes
from relneuron.artifact.reading import read_csv
from relneuron.bench.machine import where
from relneuron.demo import CHECKPOINT, FACTS
from relneuron.model.load import load_tokenizer
from relneuron.texts.facts import read_relations
from relneuron.texts.prompts import make_prompts

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ("validated.csv", "labels.csv", "scores.safetensors", "neurons.json")
RANKING = ["--top", "100", "--permutations", "0", "--bootstrap", "0", "--noise", "0"]
WAYS = ("disk", "file", "memory")


def save_model(folder: Path, layers: int, width: int, hidden: int) -> Any:
    """A Llama of random weights, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(CHECKPOINT))
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 8,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_prompts(path: Path, n: int, asks: bool) -> None:
    """Subjects of the demo's facts as prompts, as often as there have to be, each with its name."""
    every = [p for r in read_relations(FACTS) for p in make_prompts(r, n_eva=10, seed=0)]
    det = [p for p in every if p.split == "det"]
    if not asks:  # prompts without an object are only read
        det = [replace(p, object="", objects=()) for p in det]
    more = [
        replace(p, id=f"{p.id}.{time}", prompt=p.subject)
        for time in range(-(-n // len(det)))
        for p in det
    ]
    path.write_bytes(prompts_bytes(more[:: max(1, len(more) // n)][:n]))


def moved_bytes() -> tuple[int, int]:
    """What this process and those it waited for have had read from a disk and written to one."""
    found = {"read_bytes": 0, "write_bytes": 0}
    with suppress(OSError):
        for line in Path("/proc/self/io").read_text().splitlines():
            name, _, value = line.partition(": ")
            if name in found:
                found[name] = int(value)
    return found["read_bytes"], found["write_bytes"]


def process(words: Sequence[str]) -> dict[str, float]:
    """What a command takes from its start to its end."""
    before, begun = moved_bytes(), time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "relneuron", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    seconds = time.perf_counter() - begun
    ran = queued = 0
    with suppress(OSError):
        ran, queued, _ = map(int, Path(f"/proc/{child.pid}/schedstat").read_text().split())
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"failed: relneuron {' '.join(words)}")
    n_read, n_written = (now - then for now, then in zip(moved_bytes(), before, strict=True))
    return {
        "s": seconds,
        "own_s": seconds - queued / 1e9,
        "asleep_s": seconds - (ran + queued) / 1e9,
        "cpu_s": used.ru_utime + used.ru_stime,
        "system_s": used.ru_stime,
        "read_mb": n_read / 1e6,
        "written_mb": n_written / 1e6,
        "peak_mb": used.ru_maxrss * 1024 / 1e6,
    }


def both_stages(way: str, model: Path, prompts: Path, folder: Path) -> dict[str, float]:
    """What both stages take in a new folder: the sum of the processes, the larger of the peaks."""
    recording = ["record", str(model), str(prompts), "-o", str(folder)]
    if way == "disk":
        commands = [recording, ["identify", str(folder), "-o", str(folder / "neurons.json")]]
    else:
        commands = [[*recording, "--identify", "--responses", {"file": "disk"}.get(way, way)]]
    commands[-1] += RANKING
    found = [process(words) for words in commands]
    return {
        name: (max if name == "peak_mb" else sum)(one[name] for one in found) for name in found[0]
    }


def measure(
    layers: int, width: int, hidden: int, n_prompts: int, rounds: int, asks: bool
) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="relneuron-bench-") as name:
        root = Path(name)
        model, prompts = root / "model", root / "prompts.jsonl"
        save_model(model, layers, width, hidden)
        write_prompts(prompts, n_prompts, asks)
        for number in range(rounds):
            found = {}
            for way in random.sample(WAYS, len(WAYS)):
                found[way] = both_stages(way, model, prompts, root / f"{way}.{number}")
                (root / f"{way}.{number}" / "responses.safetensors").unlink(missing_ok=True)
            for result in RESULTS:
                if len({(root / f"{way}.{number}" / result).read_bytes() for way in WAYS}) > 1:
                    raise AssertionError(f"{result} is not the same in all ways")
            rows.append(
                {"layers": layers, "width": width, "hidden": hidden, "prompts": n_prompts}
                | {
                    "asks": int(asks),
                    "response_mb": n_prompts * layers * (2 * width + hidden) / 25e4,
                }
                | {f"{way}_{key}": value for way in WAYS for key, value in found[way].items()}
                | {
                    f"{way}_to_memory_{key}": found[way][key] / found["memory"][key]
                    for way in WAYS[:2]
                    for key in ("s", "own_s", "cpu_s")
                }
            )
    return [{key: round(value, 2) for key, value in row.items()} for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--layers", type=int, default=8)
    add("--width", type=int, default=8192)
    add("--hidden", type=int, default=16)
    add("--prompts", type=int, default=2000)
    add("--rounds", type=int, default=3)
    add("--asks", action="store_true", help="ask every prompt, in place of reading it")
    add("-o", "--output", type=Path, metavar="FILE.csv", help="add the rows to this file")
    o = parser.parse_args(arguments)
    if min(o.layers, o.width, o.hidden, o.rounds) < 1 or o.prompts < 100:
        parser.error("numbers must be at least 1, --prompts at least 100")
    about = where("cpu")
    rows = measure(o.layers, o.width, o.hidden, o.prompts, o.rounds, o.asks)
    for row in rows:
        for name, value in row.items():
            print(f"{name:<22} {value:,}")
        print()
    if o.output is not None:
        named = [row | about for row in rows]
        old: list[Sequence[object]] = []
        if o.output.exists():
            names = list(named[0])
            old = [[line[name] for name in names] for line in read_csv(o.output, names)]
        new = [list(row.values()) for row in named]
        atomic_write(o.output, csv_bytes(list(named[0]), [*old, *new]))
        print(f"-> {o.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
