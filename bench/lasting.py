"""What many sentences cost `attribute`, and many batches a journal: memory that should be flat.

    PYTHONPATH=. python -m bench.lasting [--sentences 1000,10000] [--options "--keep known"]
    PYTHONPATH=. python -m bench.lasting --batches 1000,10000

Each point is a process of its own: `relneuron attribute` of a Llama of random weights (`--layers`,
`--width`, `--hidden`) with the demo's tokenizer, on a table of made sentences of `--relations`
relations. Printed: the peak of its resident memory and how much more that is than at the first
number, its CPU seconds, and the exponent of these between two numbers, log-log, with the seconds
of a run of two sentences taken off. With `--batches` the process only notes as many blocks of
`--bytes` bytes in a journal and reads them back, in the order in which they were noted.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SENTENCE = "{name} went by the {thing} number {n} and lives in"


def make_study(folder: Path, sizes: argparse.Namespace) -> Path:
    """A model of random weights with the demo's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from relneuron.demo import CHECKPOINT
    from relneuron.model.load import load_tokenizer

    tokenizer = load_tokenizer(str(CHECKPOINT))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def write_sentences(path: Path, n: int, n_relations: int) -> None:
    names, answers = ("Ada", "Bo", "Cy", "Di", "Ed"), ("Rome", "Oslo", "Paris", "Bern", "Kyiv")
    lines = ["prompt,answer,type\n"]
    for i in range(n):
        # Numbers of one length: later sentences have no more tokens than earlier ones.
        text = SENTENCE.format(name=names[i % 5], thing=answers[i // 5 % 5], n=f"{i:06}")
        lines.append(f"{text},{answers[i * 7 % 5]},relation{i % n_relations}\n")
    path.write_text("".join(lines))


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """(MB, CPU seconds) of a process that does `work`: its peak of resident memory."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException as error:  # a fork must not go on as its parent
            print(error, file=sys.stderr)
            os._exit(1)
    _, status, used = os.wait4(pid, 0)
    if status:
        sys.exit("the process failed")
    return used.ru_maxrss / 1000, used.ru_utime + used.ru_stime


def attribute(model: Path, folder: Path, n: int, asked: argparse.Namespace) -> None:
    table = folder / f"{n}.csv"
    write_sentences(table, n, asked.relations)
    words = ["-m", "relneuron", "attribute", str(model), str(table), "-o", str(folder / f"{n}")]
    os.execv(sys.executable, [sys.executable, *words, "--quiet", *shlex.split(asked.options)])


def note(path: Path, n: int, n_bytes: int) -> None:
    """A journal of n blocks, noted and read."""
    from relneuron.artifact.journal import Journal
    from relneuron.artifact.memory import peak_bytes

    text = "x" * n_bytes
    with Journal(path, {"n": n}) as journal:
        for number in range(n):
            if journal.takes(str(number)):
                journal.add(str(number), [text, number])
    assert all(journal.done[str(number)][1] == number for number in range(n))
    print(f"{n}: {(peak_bytes() or 0) / 1e6:.1f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", default="500,1000,2000")
    parser.add_argument("--relations", type=int, default=10)
    parser.add_argument("--options", default="")
    parser.add_argument("--batches", default="")
    parser.add_argument("--bytes", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=688)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--keep", type=Path, help="a folder for the files, which stay")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.keep or Path(scratch)
        folder.mkdir(exist_ok=True)
        points: list[tuple[int, float, float]] = []
        if asked.batches:
            import relneuron.artifact.journal  # noqa: F401  # before the forks

            for n in map(int, asked.batches.split(",")):
                path = folder / f"{n}.journal"
                points.append((n, *measured(lambda n=n, path=path: note(path, n, asked.bytes))))
            still = 0.0
        else:
            pid = os.fork()  # this process stays small: its size is a child's at first
            if not pid:
                make_study(folder, asked)
                os._exit(0)
            os.waitpid(pid, 0)
            model = folder / "model"
            _, still = measured(lambda: attribute(model, folder, 2, asked))
            for n in map(int, asked.sentences.split(",")):
                points.append((n, *measured(lambda n=n: attribute(model, folder, n, asked))))
        before: tuple[int, float, float] | None = None
        print("n,peak_mb,more_mb,cpu_s,exponent")
        for n, peak, seconds in points:
            slope = ""
            if before is not None:
                rise = math.log((seconds - still) / (before[2] - still))
                slope = f"{rise / math.log(n / before[0]):.3f}"
            print(f"{n},{peak:.1f},{peak - points[0][1]:.1f},{seconds:.2f},{slope}", flush=True)
            before = n, peak, seconds


if __name__ == "__main__":
    main()
