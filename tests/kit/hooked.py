"""A recorded study of the tiny trained model, and the same model with plain forward hooks only.

The tests of ablation/ read both: what `ablate` says must be
what the hooks say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron.ablation.ablate import ablate_prompts
from relneuron.artifact.prompts import Prompt, read_prompts
from relneuron.methods.responses.options import RankOptions, RecordOptions
from relneuron.methods.responses.rank import identify
from relneuron.methods.responses.record import record
from relneuron.model.ask import cache_of
from relneuron.model.load import load_model, load_tokenizer
from relneuron.texts.options import PromptsOptions
from relneuron.texts.prompts import write_prompts
from tests.kit.files import read_rows

SHAPE = {"layers": 2, "width": 48, "hidden": 32}
N_NEURONS = 256
TOP = 40
RELATIONS = ("likes_fruit", "lives_in", "works_as")

Change = Callable[[Tensor, tuple[int, str], Tensor], Tensor]
Inside = Callable[[int, int], bool]


class Study:
    """prompts.jsonl to neurons.json in `folder`, and the model that they belong to."""

    def __init__(
        self, model_folder: Path, facts: Path, folder: Path, *, attention: bool = False
    ) -> None:
        self.folder = folder
        self.model = load_model(str(model_folder))
        self.tokenizer = load_tokenizer(str(model_folder))
        write_prompts(facts, folder / "prompts.jsonl", PromptsOptions(eva=4))
        prompts = folder / "prompts.jsonl"
        record(
            "m",
            self.model,
            self.tokenizer,
            prompts,
            folder,
            RecordOptions(attention=attention),
            quiet=True,
        )
        identify(
            folder,
            folder / "neurons.json",
            RankOptions(top=TOP, permutations=0, bootstrap=0, noise=0),
            quiet=True,
        )
        self.prompts = {p.id: p for p in read_prompts(prompts)}
        self.sets = json.loads((folder / "neurons.json").read_text())["sets"]

    def ablate(
        self,
        output: Path,
        *,
        neurons: Path | None = None,
        prompts: Path | None = None,
        **asked: Any,
    ) -> dict[tuple[str, str], dict[str, str]]:
        """The rows of effects.csv by condition and prompt."""
        ablate_prompts(
            "m",
            self.model,
            self.tokenizer,
            neurons or self.folder / "neurons.json",
            prompts or self.folder / "prompts.jsonl",
            output / "effects.csv",
            **{"quiet": True, "splits": ("eva",), "random_seeds": 1, **asked},
        )
        found = read_rows(output / "effects.csv")
        rows = {(row["condition"], row["id"]): row for row in found}
        assert len(rows) == len(found)
        return rows

    def write_sets(self, path: Path, sets: Mapping[str, Sequence[Sequence[Any]]]) -> Path:
        """A neurons.json with other sets of (layer, site, index)."""
        data = json.loads((self.folder / "neurons.json").read_text())
        data["sets"] = {name: [[*n[:3], 1.0] for n in chosen] for name, chosen in sets.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))
        return path

    def write_prompts(self, path: Path, prompts: Iterable[Prompt]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(asdict(p)) + "\n" for p in prompts))
        return path


def same_rows(
    ours: Mapping[tuple[str, str], Mapping[str, str]],
    theirs: Mapping[tuple[str, str], Mapping[str, str]],
    atol: float = 1e-5,
) -> None:
    """The same rows with the same predictions, and log-probabilities up to rounding."""
    assert list(ours) == list(theirs)
    for key, row in ours.items():
        for column in ("relation", "split", "prediction", "correct"):
            assert row[column] == theirs[key][column], (key, column)
        assert abs(float(row["logprob"]) - float(theirs[key]["logprob"])) <= atol, key


def zero(out: Tensor, where: tuple[int, str], index: Tensor) -> Tensor:
    return torch.zeros_like(out)


def everywhere(position: int, n_prompt: int) -> bool:
    return True


INSIDE: dict[str, Inside] = {
    "all": everywhere,
    "prompt": lambda position, n_prompt: position < n_prompt,
    "last": lambda position, n_prompt: position >= n_prompt - 1,
}


class Hooked:
    """The model one prompt at a time; hooks overwrite outputs of gate_proj, up_proj, down_proj."""

    def __init__(self, study: Study) -> None:
        self.model, self.tokenizer = study.model, study.tokenizer
        self.modules = {
            (layer, site): getattr(block.mlp, f"{site}_proj")
            for layer, block in enumerate(self.model.model.layers)
            for site in ("gate", "up", "down")
        }
        self.modules |= {
            (layer, site): getattr(block.self_attn, f"{site}_proj")
            for layer, block in enumerate(self.model.model.layers)
            for site in ("q", "k", "v", "o")
        }
        self._columns = range(0)
        self._n_prompt = 0

    @contextmanager
    def changing(
        self, neurons: Iterable[Sequence[Any]], change: Change = zero, inside: Inside = everywhere
    ) -> Iterator[None]:
        by_module: dict[tuple[int, str], list[int]] = {}
        for layer, site, index, *_ in neurons:
            by_module.setdefault((layer, site), []).append(index)
        handles = []
        for where, indices in by_module.items():
            index = torch.tensor(indices)

            def hook(
                _m: Any,
                _i: Any,
                out: Tensor,
                where: tuple[int, str] = where,
                index: Tensor = index,
            ) -> Tensor:
                new = out.clone()
                for row, position in enumerate(self._columns):
                    if inside(position, self._n_prompt):
                        new[0, row, index] = change(out[0, row, index], where, index)
                return new

            handles.append(self.modules[where].register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _logits(self, tokens: Tensor, start: int, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        self._columns = range(start, start + tokens.shape[1])
        out = self.model(tokens, **options)
        return out.logits[0].float(), cache_of(out)

    @torch.no_grad()
    def answer(
        self, prompt: Prompt, *, n_tokens: int = 2, cached: bool = False
    ) -> tuple[str, float]:
        """Greedy tokens as text, and the log-probability of the object's first token."""
        ids = self.tokenizer(prompt.prompt)["input_ids"]
        whole = self.tokenizer(f"{prompt.prompt} {prompt.object}")["input_ids"]
        self._n_prompt = len(ids)
        logits, cache = self._logits(torch.tensor([ids]), 0, use_cache=cached)
        logprob = float(logits[-1].log_softmax(-1)[whole[len(ids)]])
        made = [int(logits[-1].argmax())]
        while len(made) < n_tokens and made[-1] != self.tokenizer.eos_token_id:
            if cached:
                start = len(ids) + len(made) - 1
                logits, cache = self._logits(
                    torch.tensor([made[-1:]]), start, use_cache=True, **cache
                )
            else:
                logits, _ = self._logits(torch.tensor([ids + made]), 0, use_cache=False)
            made.append(int(logits[-1].argmax()))
        # The last token may end inside a character.
        text = self.tokenizer.decode(made, skip_special_tokens=True).rstrip("\ufffd")
        return text.strip(), logprob

    @torch.no_grad()
    def nll(self, text: str) -> tuple[int, float]:
        """The number of tokens after the first, and -log p of them, summed, in nats."""
        ids = torch.tensor([self.tokenizer(text)["input_ids"]])
        self._n_prompt = ids.shape[1]
        logits, _ = self._logits(ids, 0, use_cache=False)
        logprobs = logits[:-1].double().log_softmax(-1)
        return ids.shape[1] - 1, -float(logprobs.gather(1, ids[0, 1:, None]).sum())


def plain_means(study: Study) -> dict[str, dict[tuple[int, str], np.ndarray[Any, Any]]]:
    """Mean response by module over the det prompts: of all (""), and of each relation."""
    from safetensors.numpy import load_file

    recorded = load_file(study.folder / "responses.safetensors")
    of = [p.relation for p in study.prompts.values() if p.split == "det"]
    found = {}
    for name in ("", *RELATIONS):
        rows = [i for i, relation in enumerate(of) if name in ("", relation)]
        found[name] = {
            (layer, site): recorded[f"{site}.{layer}"][rows].astype(np.float64).mean(0)
            for layer in range(SHAPE["layers"])
            for site in ("gate", "up", "down")
        }
    return found
