"""A whole command of two checkouts in the same rounds: seconds, and how much of them is products.

    PYTHONPATH=. python -m bench.study [--rounds N] [-o FILE.csv] OTHER [COMMAND ...]

COMMAND (default: `demo -o OUT --analyses all --quiet`) runs in a fresh process with this checkout
and with the one at OTHER, in an order drawn again each round; OUT stands for an empty folder. Of
both: seconds, seconds of CPU, and the share of the seconds in the model's own matrix products, the
forwards of its linear maps, which no study can do without. All files that a command leaves must be
the same, but for its manifests and pages, which name the code, or the run ends.

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
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = ["demo", "-o", "OUT", "--analyses", "all", "--quiet"]
WRITES_CODE = (".html", ".json")  # files that tell of versions


def child(words: list[str], result: Path) -> None:
    """Run a command line in this process, and note what it took; `result` is a file of JSON."""
    began = time.perf_counter()
    import torch

    import relneuron

    if not Path(relneuron.__file__).is_relative_to(os.environ["PYTHONPATH"]):
        sys.exit(f"{relneuron.__file__} is not of {os.environ['PYTHONPATH']}")

    seconds = [0.0]
    plain = torch.nn.Linear.forward

    def timed(self: Any, x: Any) -> Any:
        start = time.perf_counter()
        try:
            return plain(self, x)
        finally:
            seconds[0] += time.perf_counter() - start

    torch.nn.Linear.forward = timed  # type: ignore[assignment, method-assign]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    command = asked.command or DEMO
    roots = {"this": ROOT, "other": asked.other.resolve()}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
    for number in range(asked.rounds):
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
    rows: list[dict[str, object]] = []
    for what in ("seconds", "cpu"):
        pairs = zip(taken["this"], taken["other"], strict=True)
        ratios = [this[what] / other[what] for this, other in pairs]
        ends = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{what}: {median(ratios):.3f} of the other's ({ends} over {len(ratios)} rounds)")
        rows.append({"command": " ".join(command), "of": what, "ratio": median(ratios)})
    for name, all_of in taken.items():
        share = median(one["products"] / one["seconds"] for one in all_of)
        print(f"{name}: {share:.0%} in the model's matrix products")
        rows.append({"command": " ".join(command), "of": f"products, {name}", "ratio": share})
    if asked.output:
        from bench.rows import add_rows

        add_rows(asked.output, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[4:], Path(sys.argv[2]))
    else:
        main()
