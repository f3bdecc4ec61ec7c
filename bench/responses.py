"""`record` and `identify` with responses in memory against over the disk: whole stages, one model.

    PYTHONPATH=. python -m bench.responses [--rounds N] [-o FILE.csv]

A model of random weights reads prompts of a few tokens, the subjects of the demo's facts, and every
neuron is ranked for every relation, with nothing said of how sure a score is. The model is narrow
and the prompts are short, so that a processor computes little a byte of responses: of a model of 7B
a GPU computes a prompt of ten tokens, which leaves 3.3 MB of responses, in less than a millisecond.

Both ways in each round, in turns. A round over the disk ends when all is on it (fsync of the file,
which `record` does) and begins with nothing of it in the page cache, as far as the system drops it.
The results of both are compared before a time is told. CPU time is that of the process with its
threads; the bytes that it had written are those that reached the disk (/proc/self/io).
"""

from __future__ import annotations

import argparse
import os
import resource
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
from relneuron.methods.responses.options import RankOptions, RecordOptions
from relneuron.methods.responses.places import Store
from relneuron.methods.responses.rank import identify
from relneuron.methods.responses.record import record
from relneuron.model.load import load_tokenizer
from relneuron.texts.facts import read_relations
from relneuron.texts.prompts import make_prompts

RESULTS = ("validated.csv", "labels.csv", "scores.safetensors", "neurons.json")
RANKING = RankOptions(top=100, permutations=0, bootstrap=0, noise=0)


def random_model(layers: int, width: int, hidden: int, vocabulary: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def written_bytes() -> int:
    """What this process has had written to a disk; 0 where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("write_bytes:"):
                return int(line.split()[1])
    return 0


def forget(path: Path) -> None:
    """Have the pages of a file leave the memory, so that who reads it reads the disk."""
    if path.exists() and hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def both_stages(
    model: Any, tokenizer: Any, prompts: Path, folder: Path, place: str, options: RecordOptions
) -> dict[str, float]:
    """Seconds, CPU seconds and bytes written of both stages in a new folder."""
    store = Store(place) if place != "disk" else None
    begun, begun_cpu, before = time.perf_counter(), cpu_s(), written_bytes()
    record("random", model, tokenizer, prompts, folder, options, store=store, quiet=True)
    forget(folder / "responses.safetensors")
    recorded, recorded_cpu = time.perf_counter(), cpu_s()
    kept = None if store is None else store.kept
    identify(folder, folder / "neurons.json", RANKING, responses=kept, quiet=True)
    return {
        "s": time.perf_counter() - begun,
        "record_s": recorded - begun,
        "cpu_s": cpu_s() - begun_cpu,
        "record_cpu_s": recorded_cpu - begun_cpu,
        "written_bytes": written_bytes() - before,
    }


def measure(
    layers: int, width: int, hidden: int, n_prompts: int, rounds: int, place: str, asks: bool
) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(str(CHECKPOINT))
    model = random_model(layers, width, hidden, len(tokenizer) + 8)
    every = [p for r in read_relations(FACTS) for p in make_prompts(r, n_eva=10, seed=0)]
    det = [p for p in every if p.split == "det"]
    # As often as there have to be prompts, each under a name of its own.
    more = [
        replace(p, id=f"{p.id}.{n}", prompt=p.subject)
        for n in range(-(-n_prompts // len(det)))
        for p in det
    ]
    rows = []
    options = RecordOptions(validate=asks)
    with tempfile.TemporaryDirectory(prefix="relneuron-bench-") as name:
        root = Path(name)
        prompts = root / "prompts.jsonl"
        prompts.write_bytes(prompts_bytes(more[:: max(1, len(more) // n_prompts)][:n_prompts]))
        for number in range(rounds):
            found = {}
            ways = ("disk", place) if number % 2 else (place, "disk")
            for way in ways:
                folder = root / f"{way}.{number}"
                found[way] = both_stages(model, tokenizer, prompts, folder, way, options)
            for result in RESULTS:
                one, other = ((root / f"{way}.{number}" / result).read_bytes() for way in ways)
                if one != other:
                    raise AssertionError(f"{result} differs between {ways[0]} and {ways[1]}")
            (root / f"disk.{number}" / "responses.safetensors").unlink()
            disk, kept = found["disk"], found[place]
            rows.append(
                {"layers": layers, "width": width, "hidden": hidden, "prompts": n_prompts}
                | {"asks": int(asks), "place": place}
                | {"response_bytes": 4 * n_prompts * layers * (2 * width + hidden)}
                | {f"disk_{key}": round(value, 2) for key, value in disk.items()}
                | {f"kept_{key}": round(value, 2) for key, value in kept.items()}
                | {"ratio": round(disk["s"] / kept["s"], 2)}
                | {"cpu_ratio": round(disk["cpu_s"] / kept["cpu_s"], 2)}
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--layers", type=int, default=8)
    add("--width", type=int, default=8192)
    add("--hidden", type=int, default=16)
    add("--prompts", type=int, default=2000)
    add("--rounds", type=int, default=3)
    add("--place", choices=["memory", "device"], default="memory")
    add("--asks", action="store_true", help="ask every prompt, in place of reading it")
    add("-o", "--output", type=Path, metavar="FILE.csv", help="add the rows to this file")
    o = parser.parse_args(arguments)
    if min(o.layers, o.width, o.hidden, o.rounds) < 1 or o.prompts < 100:
        parser.error("numbers must be at least 1, --prompts at least 100")
    about = where("cpu")
    rows = measure(o.layers, o.width, o.hidden, o.prompts, o.rounds, o.place, o.asks)
    for row in rows:
        for name, value in row.items():
            print(f"{name:<22} {f'{value:,}' if isinstance(value, int | float) else value}")
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
