"""Sweep the model types of transformers: a line a type, and a csv.

    python -m bench.zoo [TYPES...] [--image-text] [-n WORKERS] [-o FILE.csv]

Every type is checked in a fork of this process, with a limit of time and memory; a type that hangs,
eats memory or dies has its row, too. Without TYPES all types of the mapping: causal language
models, with --image-text the models that read images (given text alone), with --all both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

from bench.zoo.build import KINDS, types
from bench.zoo.check import NONE, Row, check
from relneuron.artifact.files import atomic_write, csv_bytes
from relneuron.artifact.reading import read_csv
from relneuron.bench.machine import where

LIMIT_S, LIMIT_BYTES = 300.0, 12 << 30


def _child(kind: str, model_type: str, answers: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    answers.send(tuple(check(kind, model_type)))


def sweep(asked: Sequence[tuple[str, str]], workers: int = 1) -> Iterator[tuple[Row, float]]:
    """The row of each (mapping, type), and the seconds it took, in the order in which they end."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(asked), []
    while waiting or running:
        while waiting and len(running) < workers:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(*waiting[0], theirs), daemon=True)
            process.start()
            theirs.close()
            running.append((*waiting.pop(0), process, ours, time.monotonic()))
        ready = wait([entry[3] for entry in running], timeout=0.5)
        for entry in list(running):
            kind, model_type, process, ours, began = entry
            seconds = time.monotonic() - began
            why = ""
            if ours in ready:
                try:
                    row = Row(*ours.recv())
                except EOFError:
                    process.join()
                    why = f"its process ended with {process.exitcode}"
            elif seconds > LIMIT_S:
                process.kill()
                why = f"it takes more than {LIMIT_S:.0f} s"
            else:
                continue
            if why:
                row = Row(model_type, kind, "", 0, 0, "ended", *[NONE] * 6, why)
            process.join()
            ours.close()
            running.remove(entry)
            yield row, seconds


def _key(line: Mapping[str, Any]) -> tuple[str, str]:
    return line["mapping"], line["model_type"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.zoo", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("types", nargs="*", metavar="TYPE", help="model types, as transformers names them")
    add("--image-text", action="store_true", help="models that read images, given text alone")
    add("--all", action="store_true", help="both mappings")
    add("-n", "--workers", type=int, default=1, help="processes at a time")
    add("-o", "--output", type=Path, metavar="FILE", help="a csv, whose rows of other types stay")
    options = parser.parse_args(arguments)
    kinds = list(KINDS) if options.all else ["image-text" if options.image_text else "causal"]
    asked = [(kind, one) for kind in kinds for one in types(kind)]
    unknown = set(options.types) - {one for _, one in asked}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such type in {' or '.join(kinds)}")
    asked = [(kind, one) for kind, one in asked if not options.types or one in options.types]
    torch.set_num_threads(1)  # models so small that threads only wait for each other
    about = where("cpu") | {"transformers": transformers.__version__}
    names = [*Row._fields, *about]
    lines: dict[tuple[str, str], list[object]] = {}
    if options.output and options.output.exists():
        old = read_csv(options.output, names)
        lines = {_key(line): [line[name] for name in names] for line in old}
    for model_type in ("llama", "qwen3_moe"):
        check("causal", model_type)  # imports what all need, before the first fork
    for row, seconds in sweep(asked, options.workers):
        checks = " / ".join(one or "-" for one in row[7:11])
        layers = f"{row.supported} of {row.layers} layers [{row.oracle}]"
        said = f"{row.model_type}: {row.verdict}, {layers} {checks}"
        print(f"{said} | {row.reason} ({seconds:.1f} s)", flush=True)
        if options.output:
            lines[_key(row._asdict())] = [*row, *about.values()]
            atomic_write(options.output, csv_bytes(names, [lines[key] for key in sorted(lines)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
