"""Real artifacts of every kind, made by the commands themselves (cases.py) on a tiny model.

run.py calls `make_world` once, copies what a command reads, and mutates one of the files.
"""

from __future__ import annotations

import gzip
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from relneuron.artifact.journal import Journal
from relneuron.model.checkpoint import write_checkpoint
from tests.conftest import train_model, write_facts
from tests.fuzz.cases import CASES, GROUPS, MADE
from tests.kit.pairs import save_adapter


def write_given(root: Path) -> None:
    """What users bring: facts, a model, texts, token ids, tables, concepts, files of LAPE."""
    from transformers import AutoModelForCausalLM  # behind what tests/conftest.py says to it

    (root / "facts").mkdir(parents=True)
    train_model(root / "model", write_facts(root / "facts"))
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    save_adapter("ia3", root / "adapter", model=model)
    for path in (root / "facts").iterdir():  # two kinds of subject: concepts are studied, too
        data = json.loads(path.read_text())
        is_town = path.stem == "works_as"
        data["properties"] = {"domain_name": "town" if is_town else "person"}
        for sample in data["samples"] if is_town else ():
            sample["subject"] += "ville"
        path.write_text(json.dumps(data, indent=1))
    _write_corpus(root / "corpus")
    _write_tables(root)
    _write_concepts(root / "concepts")
    (root / "lape").mkdir()
    index = [[torch.tensor([1, 5]), torch.tensor([7])], [torch.tensor([2]), torch.tensor([3])]]
    torch.save(index, root / "lape" / "neurons.pth")
    generator = torch.Generator().manual_seed(0)
    for name in GROUPS:
        active = torch.randint(0, 1000, (2, 48), generator=generator)
        torch.save({"n": 1000, "over_zero": active}, root / "lape" / name)


def _write_corpus(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    texts = {
        "en": [f"Person{i} lives in Rome and eats an apple or a pear." for i in range(20)],
        "zh": [f"第{i}个人住在罗马，他是面包师。" for i in range(20)],
    }
    (folder / "en.txt").write_text("\n".join(texts["en"]) + "\n")
    records = [[json.dumps({"text": t, "language": g}) for t in texts[g]] for g in GROUPS]
    (folder / "zh.jsonl").write_text("\n".join(records[1]) + "\n")
    mixed = [line for pair in zip(*records, strict=True) for line in pair]
    (folder / "all.jsonl").write_text("\n".join(mixed) + "\n")
    packed = gzip.compress(("\n".join(records[0]) + "\n").encode(), mtime=0)
    (folder / "code.jsonl.gz").write_bytes(packed)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts["en"]}), folder / "fr.parquet")
    ids = (np.arange(300) * 7 % 250).astype(np.uint16)
    (folder / "ids.bin").write_bytes(ids.tobytes())
    np.save(folder / "ids.npy", ids.astype(np.int64))
    torch.save(torch.from_numpy(ids.astype(np.int64)), folder / "ids.pt")


def _write_tables(root: Path) -> None:
    answers = ["apple", "pear", "plum"] * 4  # of Person0, Person1, ...
    rows = [(f"Person{i} eats", answer, "fruit") for i, answer in enumerate(answers)]
    head = ("prompt", "answer", "type")
    for name, between in (("table.csv", ","), ("table.tsv", "\t")):
        lines = [between.join(row) + "\n" for row in (head, *rows)]
        (root / name).write_text("".join(lines))
    lines = [json.dumps(dict(zip(head, row, strict=True))) + "\n" for row in rows]
    (root / "table.jsonl").write_text("".join(lines))
    (root / "prompts.jsonl").write_text("".join(lines[:2]))
    (root / "prompts.txt").write_text("Person1 lives in\nPerson2 eats\nPerson3 eats\nOslo\n")
    (root / "labels.csv").write_text("id,y\n1,0\n2,1\n3,1\n4,0\n")
    masks = [(mask, key) for mask in ("clean", "donor", "en") for key in "pq"]
    said = [{"mask": m, "set": "", "id": k, "prompt": k, "output": m * 2} for m, k in masks]
    more = {"n_tokens": 2, "stopped": "eos"}
    (root / "said.jsonl").write_text("".join(json.dumps(one | more) + "\n" for one in said))
    costs = [f"{m},{k},{len(m)}\n" for m, k in masks]
    (root / "costs.csv").write_text("".join(["mask,id,cost\n", *costs]))


def _write_concepts(folder: Path) -> None:
    sentences = {
        "city": ["Person1 lives in Rome", "Person2 lives in Oslo", "Rome", "Person3 is in Oslo"],
        "fruit": ["Person1 eats apple", "Person3 eats plum", "Person3 eats pear"],
    }
    names = list(sentences)
    (folder / "sense").mkdir(parents=True)
    for name, other in (names, names[::-1]):
        both = {"positive": sentences[name], "negative": sentences[other]}
        data = {"concept": name, "group": "sense", "source": "test", "sentences": both}
        (folder / "sense" / f"{name}.json").write_text(json.dumps(data, indent=1))
    rows = ["concept,group", *(f"{name},sense" for name in names)]
    (folder / "concept_list.csv").write_text("\n".join(rows) + "\n")
    (folder / "concept_list.json").write_text(json.dumps({"sense": names}))


def make_world(root: Path, call: Callable[[list[str], Callable[[], None]], int]) -> Path:
    """All artifacts in `root`; `call` runs a command line in it, after what it is given."""
    write_given(root)
    for line in MADE:
        killed = line.startswith("!")
        code = call(shlex.split(line.removeprefix("!")), _die if killed else lambda: None)
        assert code == (137 if killed else 0), f"{code}: {line}"
    shutil.copy(root / "study" / "prompts.jsonl", root / "columns" / "prompts.jsonl")
    shutil.copy(root / "sentences" / "neurons.json", root / "columns" / "neurons.json")
    (root / "shared").mkdir()  # as two processes that were killed leave it
    for n, name in ((1, "ablate.journal"), (2, "ablate.journal.1")):
        shutil.copy(root / f"part{n}" / "ablate.journal", root / "shared" / name)
    for path in root.rglob(".lock"):
        path.unlink()
    for case in CASES.values():
        for name in (*case.guarded, *case.given):
            assert (root / name).is_file(), name
    return root


def _die(n_blocks: int = 2) -> None:
    """Have this process end, as if it was killed, once a stage has noted some blocks."""
    from relneuron.methods.counts import count
    from relneuron.model import checkpoint

    noted = 0

    def step() -> None:
        nonlocal noted
        noted += 1
        if noted == n_blocks:
            os._exit(137)

    add = Journal.add

    def add_and_die(self: Journal, key: str, value: object) -> None:
        add(self, key, value)
        self.commit()
        step()

    def write_and_die(*args: object) -> None:
        write_checkpoint(*args)  # type: ignore[arg-type]
        step()

    Journal.add = add_and_die  # type: ignore[method-assign]
    count.write_checkpoint = checkpoint.write_checkpoint = write_and_die
