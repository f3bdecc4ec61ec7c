"""The files of whole studies, made by two versions of the package and compared bit by bit.

    python tests/same_results.py make FOLDER [--package ROOT]
    python tests/same_results.py compare FOLDER OTHER

`make` runs `python -m relneuron` of this checkout (or of the one at ROOT) on the demo's model: the
demo with all analyses; a corpus in shards that are killed, resumed and merged, with files of the
LAPE authors; an attribution with its comparison; stages one by one with options that are no
defaults. `compare` says which files differ, and ends with 1 if any does. Not compared are
manifest.json and, in a report, the commands and the manifest that it shows, and empty lines.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RELATIONS = ("company_hq", "person_mother", "star_constellation")
GROUPS = {
    "en": "The headquarters of number {0} are in town {1}, and its head is person {2}.",
    "de": "Der Firmensitz von Nummer {0} ist in Stadt {1}, und ihr Chef ist Person {2}.",
    "code": "def f{0}(x): return x[{1}] + {{'k': {2}}}  # {0}",
}
COUNT = "count given/model {texts} -o {out} --window 48 --moments --batch-tokens 96 --workers 1"
COUNT += " --checkpoint-batches 1 --sites act,up --quiet"
LAPE = "--filter-rate 0.2 --bar-ratio 0.2 --top-rate 0.3"
TEXTS = " ".join(f"{group}=given/{group}.txt" for group in GROUPS)

DEMO = ["demo -o demo --analyses all --quiet"]
CORPUS = [
    "merge corpus-1 corpus-2 -o corpus",
    f"identify corpus -o corpus/neurons.json --method lape {LAPE}",
    "identify corpus -o corpus/likely.json --method probability --site up --top-rate 0.02",
    f"nll given/model corpus/neurons.json {TEXTS} -o corpus --windows 20 --window 48"
    " --random-sets 2 --workers 1 --quiet",
    "generate given/model given/prompts.txt --neurons corpus/neurons.json --off clean,en,code"
    " -o corpus/off.jsonl --max-new-tokens 12 --quiet",
    "generate given/model given/prompts.txt --neurons corpus/neurons.json --off de --set en"
    " -o corpus/set.jsonl --max-new-tokens 12 --stop . --quiet",
    "report corpus -o corpus/report.html",
    "export corpus/neurons.json -o authors/lape.neuron.pth",
    "export corpus -o authors/counts",
    "import authors/lape.neuron.pth --model given/model -o imported/neurons.json"
    f" --names {','.join(GROUPS)}",
    "import authors/counts --model given/model -o imported/counts",
    f"identify imported/counts -o imported/counts/neurons.json --method lape {LAPE}",
    "report imported/counts -o imported/counts/report.html",
]
ATTRIBUTION = [
    "attribute given/model given/known.csv -o attribution --compare --top 50 --quiet",
    "identify attribution -o attribution/neurons.json --method logprob_gain --top 30",
    "report attribution -o attribution/report.html",
    "attribute given/model given/known.csv -o exact --no-compare --mode exact --own-norm"
    " --query-of ffn --target prediction --top 20 --format {table} --quiet",
    "report exact -o exact/report.html",
]
STAGES = [
    "prompts given/facts -o stages/prompts.jsonl --eva 20 --seed 3",
    "record given/model stages/prompts.jsonl -o stages --pooling last --attention --quiet",
    "identify stages -o stages/neurons.json --top 40 --ends both --permutations 50"
    " --bootstrap 50 --noise 2000 --quiet",
    "ablate given/model stages/neurons.json stages/prompts.jsonl -o stages/effects.csv"
    " --mode mean --mean-of relation --positions last --generate 3 --random-seeds 1"
    " --analyses sizes,sites,matched --sizes 10,40 --quiet",
    "report stages -o stages/report.html",
    "export stages -o stages/export",
    "prompts given/facts -o scaled/prompts.jsonl --eva 20 --suffix ''",
    "record given/model scaled/prompts.jsonl -o scaled --exclude-bos --accept-object-prefix"
    " --quiet",
    "identify scaled -o scaled/neurons.json --fdr 0.2 --negatives 2 --permutations 50"
    " --bootstrap 50 --noise 2000 --quiet",
    "ablate given/model scaled/neurons.json scaled/prompts.jsonl -o scaled/effects.{table}"
    " --mode scale --factor 0.5 --splits eva,eva2,det --random-seeds 2 --quiet",
    "report scaled -o scaled/report.html",
    "ablate given/model scaled/neurons.json scaled/prompts.jsonl -o p50/effects.csv --mode p50"
    " --random-seeds 1 --quiet",
]


class Maker:
    """Runs commands of one package in a folder; paths are relative, as they stand in files."""

    def __init__(self, folder: Path, package: Path) -> None:
        self.folder, self.environment = folder, {**os.environ, "PYTHONPATH": str(package)}
        self.environment |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        self.python("import relneuron; print(relneuron.__file__)")

    def python(self, code: str) -> str:
        words = [sys.executable, "-c", code]
        said = subprocess.check_output(words, cwd=self.folder, env=self.environment, text=True)
        print(said, end="", flush=True)
        return said.strip()

    def start(self, line: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "relneuron", *shlex.split(line)]
        return subprocess.Popen(
            words, cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL
        )

    def run(self, line: str) -> None:
        started = time.perf_counter()
        if self.start(line).wait():
            raise SystemExit(f"failed: relneuron {line}")
        print(f"{time.perf_counter() - started:6.1f} s  {line}", flush=True)

    def kill(self, line: str, checkpoint: Path) -> None:
        """Start a command and kill it behind its first checkpoint."""
        process = self.start(line)
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        if process.wait() != -9 or not checkpoint.exists():
            raise SystemExit(f"ended before it was killed: relneuron {line}")


def write_given(maker: Maker) -> None:
    """The demo's model, facts of three relations, texts of three groups, prompts."""
    code = "from relneuron.demo import CHECKPOINT, FACTS; print(CHECKPOINT, FACTS, sep='\\n')"
    model, facts = map(Path, maker.python(code).splitlines())
    given = maker.folder / "given"
    shutil.copytree(model, given / "model")
    (given / "facts").mkdir()
    for name in RELATIONS:
        shutil.copyfile(facts / f"{name}.json", given / "facts" / f"{name}.json")
    for group, text in GROUPS.items():
        lines = [text.format(i, i * 7 % 31, i * i % 57) for i in range(150)]
        (given / f"{group}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prompts = [text.split("{0}")[0] + "7" for text in GROUPS.values()]
    (given / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def write_known(folder: Path) -> None:
    """Some of the demo's prompts as a table of sentences with answers."""
    rows: list[tuple[str, str, str]] = []
    for line in (folder / "demo" / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)
        row = (prompt["prompt"], prompt["object"], prompt["relation"])
        if prompt["relation"] in RELATIONS and sum(x[2] == row[2] for x in rows) < 10:
            rows.append(row)
    with (folder / "given" / "known.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "answer", "type"), *rows])


def make(folder: Path, package: Path) -> None:
    folder.mkdir(parents=True)
    maker = Maker(folder.resolve(), package.resolve())
    write_given(maker)
    table = "parquet" if find_spec("pyarrow") else "csv"
    for line in DEMO:
        maker.run(line)
    write_known(folder)
    for shard in (1, 2):
        line = COUNT.format(texts=TEXTS, out=f"corpus-{shard}") + f" --shard {shard}/2"
        maker.kill(line, folder / f"corpus-{shard}" / "count.checkpoint")
        maker.run(line)
    for line in (*CORPUS, *ATTRIBUTION, *STAGES):
        maker.run(line.format(table=table))


def content(path: Path) -> bytes:
    """A file's bytes; of a page without what the manifest says, and as a browser shows it.

    Empty lines of the page, and whether an apostrophe is written as an entity, show nowhere.
    """
    data = path.read_bytes()
    if path.name in ("report.html", "look.html"):
        data = re.sub(rb"(<h3>Commands</h3>.*?<pre>).*?</pre>", rb"\1</pre>", data, flags=re.DOTALL)
        whole = rb"(<summary>The whole manifest[^<]*</summary>).*?</details>\s*</section>"
        data = re.sub(whole, rb"\1", data, flags=re.DOTALL)
        data = re.sub(rb"\n\n+", b"\n", data).replace(b"&#39;", b"'")
    return data


def files(folder: Path) -> dict[str, Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    skipped = (".lock", "manifest.json")
    return {p.relative_to(folder).as_posix(): p for p in found if p.name not in skipped}


def compare(one: Path, two: Path) -> list[str]:
    """A line for each file that differs."""
    a, b = files(one), files(two)
    said = [f"{name}: only in {one if name in a else two}" for name in sorted(a.keys() ^ b.keys())]
    for name in sorted(a.keys() & b.keys()):
        x, y = content(a[name]), content(b[name])
        if x != y:
            at = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), None)
            at = min(len(x), len(y)) if at is None else at
            near = [f"...{text[max(at - 40, 0) : at + 40]!r}..." for text in (x, y)]
            line = x.count(b"\n", 0, at) + 1
            said.append(f"{name}: {len(x)} and {len(y)} bytes, line {line}: {' | '.join(near)}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "compare"))
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--package", type=Path, default=ROOT, help="the checkout that is run")
    asked = parser.parse_args()
    if asked.what == "make":
        make(asked.folders[0], asked.package)
        return
    one, two = asked.folders
    differing = compare(one, two)
    print("\n".join([*differing, f"{len(files(one))} files, {len(differing)} differ"]))
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
