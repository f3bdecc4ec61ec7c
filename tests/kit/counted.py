"""A corpus of numbers, its windows written out by hand, and the counters of plain hooks.

The tests of `count` read them. A tokenizer that reads numbers lets a test choose every token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import relneuron.methods.counts.count
from relneuron.artifact.counts import Counts
from relneuron.artifact.neurons import NeuronFile
from relneuron.methods.counts.count import Counted, count
from relneuron.methods.counts.counter import Counter
from relneuron.methods.counts.rank import OPTIONS, identify_counts
from relneuron.texts.options import CountOptions
from relneuron.texts.sources import File, Source

BOS, VOCABULARY = 1, 96
Documents = Mapping[str, Sequence[Sequence[int]]]
Windows = list[tuple[int, list[int]]]


class Numbers:
    """A tokenizer of texts such as "5 17 3", written in Python: it is used in this process."""

    def __init__(self, bos_token_id: int | None = BOS, vocabulary: int = VOCABULARY) -> None:
        self.bos_token_id, self.vocabulary = bos_token_id, vocabulary

    def __call__(self, texts: Any, *, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        bos = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        lines = [texts] if isinstance(texts, str) else texts
        ids = [bos + [int(word) for word in line.split() if word.isdigit()] for line in lines]
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}

    def __len__(self) -> int:
        return self.vocabulary

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.vocabulary)}


def draw(
    groups: Sequence[str], n_tokens: int, *, longest: int = 30, seed: int = 0
) -> dict[str, list[list[int]]]:
    """Documents of random tokens, about `n_tokens` in each group."""
    rng = random.Random(seed)
    found: dict[str, list[list[int]]] = {}
    for name in groups:
        found[name] = []
        while sum(map(len, found[name])) < n_tokens:
            length = rng.randint(1, longest)
            found[name].append([rng.randrange(3, VOCABULARY) for _ in range(length)])
    return found


def write_corpus(folder: Path, documents: Documents) -> list[Source]:
    """One text file a group, one document a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in documents.items():
        text = "".join(" ".join(map(str, line)) + "\n" for line in lines)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return [Source(name, (File(str(folder / f"{name}.txt"), "text"),)) for name in documents]


def run(
    model: Any,
    documents: Documents,
    folder: Path,
    *,
    tokenizer: Any = None,
    force: bool = False,
    **options: Any,
) -> Counts:
    """What `count` gives of these documents, from files beside `folder`."""
    sources = write_corpus(folder.parent / f"{folder.name}.corpus", documents)
    counted = count(
        "m",
        model,
        tokenizer or Numbers(),
        sources,
        folder,
        CountOptions(**{"checkpoint_seconds": 1e9} | options),
        force=force,
        quiet=True,
    )
    assert isinstance(counted, Counted)
    written = Counts.read(folder / "counts.safetensors")
    assert_equal(written, counted.counts)
    return written


def assert_equal(one: Counts, other: Counts) -> None:
    assert one.groups == other.groups
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert np.array_equal(array, other.arrays[name]), name


# --- runs that are stopped ------------------------------------------------------------------------


def stopping(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Each run is asked to stop at its batch `after`."""

    @contextmanager
    def interruptible() -> Iterator[Callable[[], bool]]:
        looks = 0

        def stopped() -> bool:
            nonlocal looks
            looks += 1
            return looks == after

        yield stopped

    monkeypatch.setattr(relneuron.methods.counts.count, "interruptible", interruptible)


def note_batches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is counted from here on."""
    true, seen = Counter.count, []

    def note(self: Counter, batch: Any) -> None:
        seen.append(batch)
        true(self, batch)

    monkeypatch.setattr(Counter, "count", note)
    return seen


# --- windows, written out ----------------------------------------------------------------------


def packed(documents: Documents, window: int, *, bos: str = "document") -> Windows:
    """Every group's documents one after the other in full windows; the rest is dropped."""
    found: Windows = []
    step = window - (bos == "window")
    for group, lines in enumerate(documents.values()):
        stream: list[int] = []
        for line in lines:
            stream += [BOS, *line] if bos == "document" else line
        for first in range(0, len(stream) - step + 1, step):
            head = [BOS] if bos == "window" else []
            found.append((group, head + stream[first : first + step]))
    return found


def alone(documents: Documents, window: int) -> Windows:
    """Every document, a BOS first, alone, cut where it is longer than a window."""
    found: Windows = []
    for group, lines in enumerate(documents.values()):
        for line in ([BOS, *line] for line in lines):
            found += [(group, line[i : i + window]) for i in range(0, len(line), window)]
    return found


def split_at_bos(windows: Windows) -> Windows:
    """The documents of packed windows, each as if it stood alone."""
    found: Windows = []
    for group, ids in windows:
        starts = sorted({0, *(i for i, token in enumerate(ids) if token == BOS)})
        ends = [*starts[1:], len(ids)]
        found += [(group, ids[i:j]) for i, j in zip(starts, ends, strict=True)]
    return found


# --- plain hooks -------------------------------------------------------------------------------


@contextmanager
def hooked(model: Any) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The last forward's outputs of each layer's projections: gate, up, down (B, T, .)."""
    seen: list[dict[str, torch.Tensor]] = [{} for _ in model.model.layers]
    with ExitStack() as stack:
        for place, layer in enumerate(model.model.layers):
            for name, module in layer.mlp.named_children():

                def keep(_m: Any, _i: Any, out: torch.Tensor, at: Any = (place, name)) -> None:
                    seen[at[0]][at[1]] = out

                stack.callback(module.register_forward_hook(keep).remove)
        yield seen


def values_of(model: Any, windows: Windows) -> Iterator[tuple[int, list[int], list[Any]]]:
    """Group, tokens and, per layer, the values of all sites of every window, one at a time."""
    with torch.no_grad(), hooked(model) as seen:
        for group, ids in windows:
            model(torch.tensor([ids]))
            found = []
            for layer in ({name: out[0] for name, out in one.items()} for one in seen):
                if "gate_up_proj" in layer:
                    gate, up = layer["gate_up_proj"].chunk(2, dim=-1)
                else:
                    gate, up = layer["gate_proj"], layer["up_proj"]
                act = torch.nn.functional.silu(gate)
                sites = {"gate": gate, "up": up, "act": act, "product": act * up}
                found.append(sites | {"down": layer["down_proj"]})
            yield group, ids, found


def plain_counts(
    model: Any,
    windows: Windows,
    n_groups: int,
    site: str = "act",
    threshold: float = 0.0,
    not_counted: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (G,) and the number of them with value > threshold (G, L, F)."""
    tokens, active = np.zeros(n_groups, np.int64), None
    for group, ids, layers in values_of(model, windows):
        kept = torch.tensor([token != not_counted for token in ids])
        tokens[group] += int(kept.sum())
        found = torch.stack(
            [(layer[site][kept].double() > threshold).sum(0) for layer in layers]
        ).numpy()
        if active is None:
            active = np.zeros((n_groups, *found.shape), np.int64)
        active[group] += found
    assert active is not None
    return tokens, active


def check_between(
    counts: Counts,
    model: Any,
    windows: Windows,
    site: str = "act",
    *,
    not_counted: int | None = None,
) -> None:
    """Ours lie between the plain counts with the threshold moved by far more than rounding.

    More than 99 % of the neurons have no value in between: there ours are the plain counts.
    """
    n = len(counts.groups)
    _, _, layers = next(values_of(model, windows))
    epsilon = 1e-6 * float(torch.stack([layer[site].abs().mean() for layer in layers]).mean())
    bounds = []
    for threshold in (epsilon, 0.0, -epsilon):
        tokens, active = plain_counts(model, windows, n, site, threshold, not_counted)
        bounds.append(active)
    ours = counts.arrays[f"count.{site}"]
    assert counts.tokens.tolist() == tokens.tolist()
    assert (bounds[0] <= ours).all() and (ours <= bounds[2]).all()
    sure = bounds[0] == bounds[2]
    assert sure.mean() > 0.99
    assert np.array_equal(ours[sure], bounds[1][sure])


def rank_counts(
    folder: Path, output: Path, method: str = "lape", force: bool = False, **asked: Any
) -> NeuronFile:
    """`identify` of counts, with options of the method."""
    options = OPTIONS[method](**asked)
    return identify_counts(folder, output, options, method=method, force=force)
