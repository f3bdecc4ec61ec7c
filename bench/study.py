"""Whole commands of two checkouts in the same rounds: seconds, and how much of them is products.

    PYTHONPATH=. python -m bench.study [--rounds N] [-o FILE.csv] OTHER [COMMAND ...]
    PYTHONPATH=. python -m bench.study [--rounds N] [-o FILE.csv] --models OTHER

COMMAND (default: `demo -o OUT --analyses all --quiet`) runs in a fresh process with this checkout
and with the one at OTHER, in an order drawn again each round; OUT stands for an empty folder. Of
both: seconds, seconds of CPU, and the share of the seconds in the model's own matrix products,
those of its linear maps and its attention, which no study can do without. All files that a command
leaves must be the same, but for its manifests and pages, which name the code, or the run ends.
`--models`: `run`, `count` and `attribute` of the demo's model and of two of random weights, in a
table. The imports of torch and transformers are seconds of every command.

    PYTHONPATH=. python -m bench.study OTHER attribute MODEL given/sentences.jsonl -o OUT/a.csv
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DEMO = ["demo", "-o", "OUT", "--analyses", "all", "--quiet"]
WRITES_CODE = (".html", ".json")  # files that tell of versions
# Of `--models`: fields of a World (bench/growth_world.py); the demo has a model and facts.
MODELS: dict[str, dict[str, int]] = {
    "demo": {},
    "4 layers of width 688": {"layers": 4, "width": 688, "hidden": 256, "facts": 32},
    "308 million weights": {
        **{"layers": 24, "width": 2816, "hidden": 1024},
        **{"relations": 2, "facts": 8, "groups": 2, "texts": 8},
    },
}
PRODUCTS = ("linear", "scaled_dot_product_attention")


def child(words: list[str], result: Path) -> None:
    """Run a command line in this process, and note what it took; `result` is a file of JSON."""
    began = time.perf_counter()
    import torch

    import relneuron

    if not Path(relneuron.__file__).is_relative_to(os.environ["PYTHONPATH"]):
        sys.exit(f"{relneuron.__file__} is not of {os.environ['PYTHONPATH']}")

    seconds = [0.0]

    def timed(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                seconds[0] += time.perf_counter() - start

        return call

    for name in PRODUCTS:
        setattr(torch.nn.functional, name, timed(getattr(torch.nn.functional, name)))
    from relneuron.cli.main import main

    sys.argv = ["relneuron", *words]
    code: Any = 0
    try:
        main()
    except SystemExit as error:
        code = error.code
    if code:
        sys.exit(code)
    taken = {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time(),
        "products": seconds[0],
    }
    result.write_text(json.dumps(taken))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that does not tell of the code that made it."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in WRITES_CODE
    }


def run(root: Path, command: list[str]) -> tuple[dict[str, float], dict[str, str]]:
    """What one command took with the checkout at `root`, and the digests of what it wrote."""
    with tempfile.TemporaryDirectory() as name:
        out, result = Path(name, "out"), Path(name, "result.json")
        words = [word.replace("OUT", str(out)) for word in command]
        start = [sys.executable, str(Path(__file__).resolve()), "--child", str(result), "--"]
        environ = os.environ | {"PYTHONPATH": str(root)}
        subprocess.run([*start, *words], env=environ, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, float] = json.loads(result.read_text())
        return found, digests(out)


class Measured(NamedTuple):
    """Of all rounds the median: ratios to the other checkout, shares of products in the seconds."""

    seconds: float
    seconds_ratio: float
    cpu_ratio: float
    share: float
    share_of_other: float

    def __str__(self) -> str:
        return (
            f"{self.seconds:6.1f} s, {self.seconds_ratio:.3f} of the other's ({self.cpu_ratio:.3f} "
            f"of its CPU); in the model's matrix products {self.share:.0%}, "
            f"the other's {self.share_of_other:.0%}"
        )


def compare(other: Path, command: list[str], rounds: int) -> Measured:
    """One command of both checkouts, so many rounds; what each took is printed."""
    roots = {"this": ROOT, "other": other.resolve()}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
    for number in range(rounds):
        files = {}
        for name in random.sample([*roots], len(roots)):
            found, files[name] = run(roots[name], command)
            taken[name].append(found)
            print(
                f"round {number + 1}, {name}: {found['seconds']:.1f} s, {found['cpu']:.1f} s of "
                f"CPU, {found['products'] / found['seconds']:.0%} in the model's matrix products",
                flush=True,
            )
        if files["this"] != files["other"]:
            names = files["this"].keys() | files["other"].keys()
            differ = [n for n in names if files["this"].get(n) != files["other"].get(n)]
            sys.exit(f"the files differ: {', '.join(sorted(differ))}")

    def ratio(what: str) -> float:
        pairs = zip(taken["this"], taken["other"], strict=True)
        return median(this[what] / other[what] for this, other in pairs)

    shares = [median(one["products"] / one["seconds"] for one in taken[name]) for name in roots]
    middle = median(one["seconds"] for one in taken["this"])
    return Measured(middle, ratio("seconds"), ratio("cpu"), *shares)


def commands(
    folder: Path, models: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[str, list[str]]]:
    """`run`, `count` and `attribute` of each model, made here with its facts and texts."""
    from bench.growth_world import World, make_model, write_facts, write_model, write_texts
    from relneuron.demo import CHECKPOINT, FACTS
    from relneuron.texts.options import PromptsOptions
    from relneuron.texts.prompts import write_prompts

    for number, (name, sizes) in enumerate(models.items()):
        place = folder / str(number)
        model, facts, prompts = CHECKPOINT, FACTS, place / "prompts.jsonl"
        asked = PromptsOptions(eva=sizes["facts"] // 2) if sizes else PromptsOptions()
        texts = [str(prompts), "--text-column", "prompt", "--group-column", "relation"]
        few: list[str] = []
        if sizes:
            world = World(**sizes)
            model, facts, path = place / "model", place / "facts", place / "texts.jsonl"
            write_model(world, model)
            write_facts(world, make_model(world), facts)
            write_texts(world, path)
            texts, few = [str(path), "--group-column", "group"], ["--cards", "10"]
        write_prompts(facts, prompts, asked)
        end = ["-o", "OUT", "--quiet"]
        few += ["--eva", str(asked.eva)]
        yield name, ["run", str(model), "--facts", str(facts), *few, *end]
        yield name, ["count", str(model), *texts, *end]
        yield name, ["attribute", str(model), str(prompts), *end]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", action="store_true", help="a table of three models")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args(words)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="relneuron-bench-") as folder:
        cases = commands(Path(folder), MODELS) if asked.models else [("", asked.command or DEMO)]
        for model, command in cases:
            what = command[0] if asked.models else " ".join(command)
            found = compare(asked.other, command, asked.rounds)
            rows.append({"model": model, "command": what, **found._asdict()})
            print(f"{model} {what}: {found}".strip(), flush=True)
    if asked.models:
        print("\n| model | command | s | of the other's | of its CPU | products | the other's |")
        print("|---|---|---|---|---|---|---|")
        for model, what, seconds, of_s, of_cpu, share, others in (row.values() for row in rows):
            print(
                f"| {model} | {what} | {seconds:.1f} | {of_s:.2f} | {of_cpu:.2f} "
                f"| {share:.0%} | {others:.0%} |"
            )
    if asked.output:
        from bench.rows import add_rows
        from relneuron.bench.machine import where

        about = where("cpu")
        add_rows(asked.output, [row | about for row in rows])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[4:], Path(sys.argv[2]))
    else:
        main()
