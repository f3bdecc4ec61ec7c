"""What the reader of a page has where its Python begins: a model of theirs, and files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from relneuron.artifact.neurons import NeuronFile
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.pictures import Processor, picture_run
from relneuron.ops import PAIR_SITES, GroupStats


def readme() -> dict[str, Any]:
    """A model of 13 layers, texts of two languages, and tensors for the kernels alone."""
    from relneuron.demo import CHECKPOINT
    from tests.conftest import tiny_model

    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    sizes = {"num_hidden_layers": 13, "vocab_size": len(tokenizer)}
    model = tiny_model("llama", **sizes)
    chosen: Any = [(layer, "gate", 7, 1.0) for layer in range(13)]
    _write("study-7b", model_shape(find_mlps(model)), {"company_hq": chosen})
    relations, n, width, words = 3, 20, 48, 96
    return {
        "torch": torch,
        "model": model,
        "tokenizer": tokenizer,
        "batches": [(["The capital of", "It is"], 0), (["Die Hauptstadt von", "Es ist"], 1)],
        **{name: torch.randn(n, width) for name in ("gate", "up", "x", "a", "b", "values")},
        "group_ids": torch.arange(n, dtype=torch.int32) % 12,
        "keep": torch.full((2, 2), -1, dtype=torch.int32),
        "both": GroupStats(groups=12, width=width, sites=PAIR_SITES),
        "condition_ids": torch.arange(n, dtype=torch.int32) % 2,
        "windows": torch.arange(n, dtype=torch.int32) // 5,
        "highest": torch.full((4, width), -torch.inf),
        "where": torch.full((4, width), -1, dtype=torch.int32),
        "labels": torch.arange(relations * n).view(relations, n).remainder(2).to(torch.int8),
        "coefficients": torch.randn(n, n),
        "unembed": torch.randn(words, width),
        "scale": torch.ones(n),
        "targets": torch.arange(n),
    }


def pictures() -> dict[str, Any]:
    """A model that reads pictures, its processor, a prompt, and neurons of all of its modules."""
    from tests.kit.pictures import picture, tiny

    model, processor = tiny("llava")
    parts = find_mlps(model, modules=("all",), run=picture_run(model, Processor(processor)))
    _write("DIR", model_shape(parts), {"med": [(part.layer, "gate", 3, 1.0) for part in parts]})
    inputs = processor(text="<image>\nwhat", images=picture(0), return_tensors="pt")
    return {"model": model, "processor": processor, "inputs": inputs}


def examples() -> dict[str, Any]:
    """A count of two short texts, with examples and histograms."""
    from relneuron.artifact.options import PartsOptions
    from relneuron.demo import CHECKPOINT
    from relneuron.methods.counts.count import count
    from relneuron.model.load import load
    from relneuron.texts.options import CountOptions
    from relneuron.texts.sources import parse_sources

    for name, text in (("en", "The capital of France is"), ("zh", "It is in")):
        Path(f"{name}.txt").write_text(f"{text}\n" * 9, encoding="utf-8")
    asked = CountOptions(window=8, examples=2, histogram=16)
    loaded = load(str(CHECKPOINT), PartsOptions())
    sources = parse_sources(["en=en.txt", "zh=zh.txt"])
    count(str(CHECKPOINT), *loaded, sources, Path("DIR"), asked, quiet=True)
    return {}


def look() -> dict[str, Any]:
    """A recorded relation with the card of one neuron."""
    from relneuron.artifact.options import LoadOptions
    from relneuron.demo import CHECKPOINT, FACTS
    from relneuron.methods.responses.options import RecordOptions
    from relneuron.methods.responses.record import record
    from relneuron.model.load import load
    from relneuron.study.look import look as look_at
    from relneuron.study.settings import LookOptions
    from relneuron.texts.options import PromptsOptions
    from relneuron.texts.prompts import write_prompts

    folder, loaded = Path("study"), load(str(CHECKPOINT), LoadOptions(device="cpu"))
    prompts = folder / "prompts.jsonl"
    write_prompts(FACTS / "company_ceo.json", prompts, PromptsOptions())
    record(str(CHECKPOINT), *loaded, prompts, folder, RecordOptions(validate=False), quiet=True)
    options = LookOptions(neurons=("0.gate.7",), examples=2)
    look_at(str(CHECKPOINT), *loaded, folder, None, options, quiet=True)
    return {}


def _write(folder: str, shape: dict[str, Any], sets: dict[str, Any]) -> None:
    NeuronFile(shape, "by hand", sets, {}).write(Path(folder) / "neurons.json")


GIVEN = {
    "README.md": readme,
    "docs/pictures.md": pictures,
    "docs/examples.md": examples,
    "docs/look.md": look,
}
