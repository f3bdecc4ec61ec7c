"""Command lines of odd arguments, drawn from the commands' own options.

run.py runs them; what they name lies in a copy of world.py's artifacts.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import typer.main

from relneuron.cli import main as cli

CLI = "command line"
# No path in them is absolute: with --force a command may replace what it is given to write.
ODD = [
    *("", " ", "-1", "0", "1", "1e999", "nan", "inf", "-inf", "1e-999", "9" * 400, "9" * 5000),
    *("x", "ü", "\u202e", "\ud7ff", "\x1b[31m", "a\nb", "%s", "{}", "{0}", "[bold]", "None", "-"),
    *("--", "-x", "--no-such", "=", "a=", "=a", ",", ",,", "1,2", "1/0", "0/1", "3/2", "1/x"),
    *("*", ".", "..", "x" * 300, "x" * 100_000, "1.5", "true", "٣", "²", "0x10", "1_0"),
]
PATHS = [
    *("missing", "missing/x.json", "study", "study/neurons.json", "study/prompts.jsonl", "facts"),
    *("study/manifest.json", "corpus", "corpus/en.txt", "corpus/ids.bin", "counts", "half1"),
    *("model", "table.csv", "prompts.txt", "lape/en", "lape/neurons.pth", "concepts", "out"),
    *("counts/neurons.json", "corpus/en.txt/x", "facts/lives_in.json", "attribution", "out/x.csv"),
    *("en=corpus/en.txt", "zh=corpus/zh.jsonl", "hf:", "en=hf:", "en=corpus", "en=missing"),
    *("out.parquet", "study/scores.safetensors", "study/missing/x", "model/config.json"),
]
# Known values of options, so that some command lines are right but for one.
KNOWN = {
    "method": ("ap", "lape", "logprob_gain", "random", "mean", "probability"),
    "mode": ("zero", "mean", "scale", "p50", "p90", "off_mean", "certified", "exact"),
    "splits": ("eva", "eva,eva2", "det"),
    "analyses": ("main", "all", "sizes", "gain", "perplexity"),
    "dtype": ("float32", "bfloat16", "float16"),
    "device": ("cpu", "cuda", "cuda:9", "meta"),
    "memory": ("0=80GiB,cpu=1GB", "cpu=1KB", "0=80GiB,0=1GB", "0=x"),
    "tensor_parallel_size": ("2", "3"),
    "device_map": ("auto", "balanced", "cpu", "study/manifest.json"),
    "backend": ("auto", "cpu", "reference", "triton"),
    "sites": ("act", "gate,up", "down"),
    "names": ("en,zh", "en", "en,en"),
    "kinds": ("all", "ffn_neuron", "head"),
    "off": ("clean", "en", "en,zh"),
    "set_to": ("en", "zz"),
}
# What the arguments of a command are, where it goes right.
GOOD = {
    "model": ("model",),
    "facts": ("facts",),
    "prompts": ("study/prompts.jsonl",),
    "neurons": ("counts/neurons.json", "study/neurons.json"),
    "folder": ("study", "counts", "attribution"),
    "folders": ("half1",),
    "sources": ("en=corpus/en.txt", "zh=corpus/zh.jsonl"),
    "files": ("lape/neurons.pth", "en=lape/en"),
    "source": ("counts", "study/neurons.json"),
    "output": ("out", "out/x.csv", "out/x.json"),
}
NOT_RUN = ("demo", "bench")  # minutes long where all is right


@dataclass(frozen=True)
class Line:
    """The words of a command line, and those that name parts of the world."""

    words: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.words, "model")


def draw_line(rng: Random) -> Line:
    """A command with arguments and options, most of them odd."""
    group: Any = typer.main.get_command(cli.app)
    commands = [name for name in sorted(group.commands) if name not in NOT_RUN]
    name = rng.choice(commands)
    words = [name]
    n_options = rng.choice((0, 1, 1, 2, 3, 8))
    params = list(group.commands[name].params)
    options = [p for p in params if p.param_type_name == "option" and p.name != "debug"]
    chosen = rng.sample(options, min(n_options, len(options)))
    needed = [p for p in options if p.required and p not in chosen and rng.random() < 0.95]
    is_wild = rng.random() < 0.4
    for param in (p for p in params if p.param_type_name == "argument"):
        for _ in range(rng.choice((1, 1, 1, 0, 2)) if is_wild else 1):
            words.append(_value(rng, param, is_wild))
    for param in needed:
        words += [param.opts[0], _value(rng, param, is_wild)]
    for param in chosen:
        words.append(rng.choice([*param.opts, *param.secondary_opts]))
        if not param.is_flag:
            words.append(_value(rng, param, True))
    words += ["--quiet"] * any(p.name == "quiet" for p in options)
    assert not any(word.rpartition("=")[2].startswith(("/", "~")) for word in words), words
    return Line(tuple(words))


def _value(rng: Random, param: Any, is_wild: bool) -> str:
    known = (*GOOD.get(param.name, ()), *KNOWN.get(param.name, ()))
    if known and (not is_wild or rng.random() < 0.3):
        return str(rng.choice(known))
    return str(rng.choice(PATHS if rng.random() < 0.4 else ODD))
