"""A tiny model that reads pictures, sets of its neurons, and what plain hooks make of its answers.

The reference takes one prompt and one condition at a time, and zeroes neurons in forward hooks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from relneuron.ablation.generate import generate
from relneuron.ablation.options import GenerateOptions
from relneuron.artifact.modules import module_layers
from relneuron.artifact.neurons import NeuronFile, Shape
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.pictures import Processor, picture_run, sent
from tests.kit.pictures import QUESTIONS, picture, register, tiny

NEW = 4
DOMAINS = ("doc", "med")

# What a neuron's value is the output or the input of, by the names of each kind's own modules.
READS: dict[str, dict[str, Callable[[Any, int], nn.Module]]] = {
    "llava": {
        "language": lambda m, i: m.model.language_model.layers[i].mlp.down_proj,
        "vision": lambda m, i: tower_of(m).encoder.layers[i].mlp.fc2,
        "projector": lambda m, i: m.model.multi_modal_projector.linear_2,
    },
    "qwen2_vl": {
        "language": lambda m, i: m.model.language_model.layers[i].mlp.down_proj,
        "vision": lambda m, i: m.model.visual.blocks[i].mlp.fc2,
        "projector": lambda m, i: m.model.visual.merger.mlp[2],
    },
    "instructblip": {
        "language": lambda m, i: m.language_model.model.layers[i].mlp.down_proj,
        "vision": lambda m, i: m.vision_model.encoder.layers[i].mlp.fc2,
        "qformer_query": lambda m, i: m.qformer.encoder.layer[i].output_query.dense,
        "qformer_text": lambda m, i: m.qformer.encoder.layer[i].output.dense,
    },
}


def tower_of(model: Any) -> Any:
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


class World:
    """A tiny model of a kind, its sets of neurons in all modules, and questions about pictures."""

    def __init__(self, kind: str, folder: Path) -> None:
        register()
        self.kind, self.folder = kind, folder
        self.model, processor = tiny(kind)
        self.processor = Processor(processor)
        run = picture_run(self.model, self.processor)
        self.shape = model_shape(find_mlps(self.model, modules=("all",), run=run))
        order, rng = Shape.of(self.shape), np.random.default_rng(0)
        self.sets: dict[str, list[Any]] = {name: [] for name in DOMAINS}
        for layer, site, width in order.blocks():
            for name in DOMAINS:
                if site == "gate":
                    chosen = sorted(rng.choice(width, width // 2, replace=False).tolist())
                    self.sets[name] += [(layer, site, index, 0.5) for index in chosen]
        cut = {"site": "act", "filter_rate": 0.95}
        NeuronFile({"id": "m", **self.shape}, "lape", self.sets, cut).write(folder / "neurons.json")
        self.lines = []
        for number, question in enumerate(QUESTIONS[:4]):
            picture(number, 16 + 8 * (number % 2)).save(folder / f"{number}.png")
            group = DOMAINS[number % 2]
            line = {"id": f"p{number}", "image": f"{number}.png", "text": question, "group": group}
            self.lines.append(line | {"answers": ["red", "a b"]})
        (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def inputs(self, line: dict[str, Any]) -> dict[str, Tensor]:
        from PIL import Image

        opened = Image.open(self.folder / line["image"]).convert("RGB")
        text = line["text"]
        if self.processor.marker:
            text = f"{self.processor.marker}\n{text}"
        made = self.processor.processor(images=[opened], text=text, return_tensors="pt")
        return {name: x for name, x in made.items() if isinstance(x, Tensor)}

    @contextmanager
    def hooked(self, neurons: Sequence[Any]) -> Iterator[None]:
        """The values that a down map reads are 0 where a neuron is off."""
        with ExitStack() as stack:
            for module, layers in module_layers(self.shape).items():
                for layer in layers:
                    off = [index for at, _, index, *_ in neurons if at == layer]
                    reads = READS[self.kind][module](self.model, layer - layers.start)

                    def zero(_m: Any, inputs: Any, off: list[int] = off) -> Any:
                        new = inputs[0].clone()
                        new[..., off] = 0
                        return (new, *inputs[1:])

                    stack.callback(reads.register_forward_pre_hook(zero).remove)
            yield

    def said(self, line: dict[str, Any], neurons: Sequence[Any], new: int = NEW) -> list[int]:
        """transformers' own greedy tokens under the hooks."""
        inputs = sent(self.model, self.inputs(line))
        with self.hooked(neurons):
            made = self.model.generate(
                **inputs, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=2
            )[0].tolist()
        before = inputs["input_ids"].shape[1]
        # Some give the prompt back, too.
        made = made[before:] if len(made) > new else made
        return made[: made.index(2)] if 2 in made else made

    def logprob(self, line: dict[str, Any], neurons: Sequence[Any], tokens: Sequence[int]) -> float:
        """Of tokens after the prompt, one forward each."""
        total = 0.0
        for number, token in enumerate(tokens):
            inputs = self.inputs(line)
            for before in tokens[:number]:
                for name, value in (("input_ids", before), ("attention_mask", 1)):
                    inputs[name] = torch.cat([inputs[name], torch.tensor([[value]])], 1)
                if "mm_token_type_ids" in inputs:
                    kinds = inputs["mm_token_type_ids"]
                    inputs["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, 1)], 1)
            with self.hooked(neurons), torch.no_grad():
                logits = self.model(**sent(self.model, inputs)).logits[0, -1]
            total += float(logits.log_softmax(-1)[token])
        return total

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True))

    def within(self, name: str, modules: Sequence[str]) -> list[Any]:
        layers = [i for m in modules for i in module_layers(self.shape)[m]]
        return [row for row in self.sets[name] if row[0] in layers]

    def ours(self, output: str = "o.jsonl", **asked: Any) -> list[Any]:
        options = {"max_new_tokens": NEW, "stop": (), "repetition_penalty": 1.0} | asked
        return generate(
            "m",
            *(self.model, self.processor.tokenizer),
            *(self.folder / "neurons.json", self.folder / "q.jsonl", self.folder / output),
            GenerateOptions(**options),
            processor=self.processor,
            quiet=True,
            force=True,
        )
