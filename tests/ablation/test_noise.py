"""Static forms of patching: stored means and noise of so many deviations, against plain hooks."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from relneuron.ablation.exchange import stored_moments
from relneuron.ablation.noise import normal, prompt_key
from relneuron.artifact.contrast import NAME as CONTRAST
from relneuron.artifact.contrast import Contrast
from relneuron.artifact.counts import NAME, Counts
from relneuron.artifact.files import RelneuronError
from tests.ablation.test_generate import LAYERS, SHAPE, WIDTH
from tests.ablation.test_patching import by_layer, downs, ours, pair, penalised, sets, study

__all__ = ["pair", "sets", "study"]  # fixtures


@pytest.fixture
def counted(study: Path) -> dict[str, Any]:
    """Counts of products with moments, of two groups, and their mean and deviation by hand."""
    rng = np.random.default_rng(1)
    samples = [rng.normal(0.2, 0.5, (n, LAYERS, WIDTH)) for n in (30, 50)]
    shape = (2, LAYERS, WIDTH)
    arrays = {
        "count.product": np.stack([(x > 0).sum(0) for x in samples]),
        "sum.product": np.stack([x.sum(0) for x in samples]),
        "sum_sq.product": np.stack([(x**2).sum(0) for x in samples]),
        "max.product": np.stack([x.max(0) for x in samples]).astype(np.float32),
        "n_nonfinite.product": np.zeros(shape, np.int64),
    }
    Counts(["x", "y"], np.array([30, 50]), arrays).write(study / NAME)
    every = np.concatenate(samples)
    return {"mean": every.mean(0), "std": every.std(0, ddof=1)}


@pytest.mark.parametrize("mode", ["mean", "noise"])
def test_stored_values_are_put_by_plain_hooks(
    pair: Any, study: Path, sets: Any, counted: Any, mode: str
) -> None:
    a, _, tokenizer = pair
    made = ours(pair, study, off=("clean", "many"), mode=mode, donor=None, max_new_tokens=4)
    assert [g.output for g in made[:40]] != [g.output for g in made[40:]]
    for g in made[40::5]:
        with ExitStack() as stack:
            for layer, index in by_layer(sets["many"]).items():
                new = torch.tensor(counted["mean"][layer, index], dtype=torch.float32)
                spread = torch.tensor(counted["std"][layer, index], dtype=torch.float32)

                def put(
                    _m: Any, inputs: Any, layer: int = layer, index: Any = index,
                    new: Tensor = new, spread: Tensor = spread, id: str = g.id,
                ) -> Any:  # fmt: skip
                    h = inputs[0].clone()
                    if mode == "mean":
                        h[..., index] = new
                        return (h,)
                    # Without a cache: the positions are those of the whole text.
                    places = torch.arange(h.shape[1])
                    keys = prompt_key(0, id) + places
                    drawn = normal(keys, (layer << 32) + torch.tensor(index))
                    h[..., index] += 3 * spread * drawn
                    return (h,)

                hook = downs(a)[layer].register_forward_pre_hook(put)
                stack.callback(hook.remove)
            tokens = tokenizer(g.prompt)["input_ids"]
            wanted = tokenizer(g.prompt)["input_ids"]
            for _ in range(4):
                with torch.no_grad():
                    logits = a(torch.tensor([wanted])).logits[0, -1]
                wanted += penalised(1.1)(logits[None], [wanted])
                if wanted[-1] == tokenizer.eos_token_id:
                    break
        text = tokenizer.decode(wanted[len(tokens) :], skip_special_tokens=True)
        assert g.output == text.rstrip("\ufffd")
    small = ours(
        pair, study, "s.jsonl", off=("many",), mode=mode, donor=None, max_new_tokens=4,
        batch_tokens=40,
    )  # fmt: skip
    assert small == made[40:]


def test_noise_has_a_normal_distribution_and_its_seeds_differ(pair: Any, study: Path) -> None:
    tokens = prompt_key(0, "p") + torch.arange(400)
    drawn = normal(tokens, (3 << 32) + torch.arange(500)).double()
    n = drawn.numel()
    assert abs(float(drawn.mean())) < 4 / n**0.5
    assert abs(float(drawn.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float((drawn**4).mean()) - 3) < 4 * (96 / n) ** 0.5
    share = float((drawn.abs() < 1.959964).double().mean())
    assert abs(share - 0.95) < 4 * (0.95 * 0.05 / n) ** 0.5
    # Neighbours in either direction are as good as independent.
    for one, other in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1])):
        assert abs(float((one * other).mean())) < 4 / n**0.5
    assert torch.equal(normal(tokens[7:9], (3 << 32) + torch.tensor([5])), drawn[7:9, 5:6].float())
    assert prompt_key(0, "p") != prompt_key(1, "p") != prompt_key(1, "q")


def test_the_seed_and_the_size_of_noise_change_the_text(
    pair: Any, study: Path, counted: Any
) -> None:
    texts = [
        [
            g.output
            for g in ours(
                pair, study, f"{i}.jsonl", off=("many",), mode="noise", donor=None,
                max_new_tokens=3, **asked,
            )
        ]
        for i, asked in enumerate(({}, {"noise_seed": 1}, {"noise": 1e-6}, {"noise": 3.0}))
    ]  # fmt: skip
    assert texts[0] == texts[3] and len({*map(tuple, texts)}) == 3
    clean = ours(pair, study, "c.jsonl", off=("clean",), mode="zero", donor=None, max_new_tokens=3)
    assert texts[2] == [g.output for g in clean]


def test_the_moments_of_a_contrast_are_those_of_the_donor_and_of_the_model(tmp_path: Path) -> None:
    """The mean of b, which is put there, and the deviation of a, to which noise is added."""
    rng = np.random.default_rng(2)
    values = {
        "a": rng.normal(1, 2, (40, LAYERS, WIDTH)),
        "b": rng.normal(3, 1, (40, LAYERS, WIDTH)),
    }
    values["difference"] = values["a"] - values["b"]
    arrays: dict[str, Any] = {}
    for site, x in values.items():
        arrays |= {
            f"count.{site}": (x > 0).sum(0)[None],
            f"sum.{site}": x.sum(0)[None],
            f"sum_sq.{site}": (x**2).sum(0)[None],
            f"max.{site}": x.max(0)[None].astype(np.float32),
            f"n_nonfinite.{site}": np.zeros((1, LAYERS, WIDTH), np.int64),
        }
    Contrast(["all"], np.array([40]), arrays).write(tmp_path / CONTRAST)
    path, moments = stored_moments(tmp_path, SHAPE)
    assert path == tmp_path / CONTRAST
    assert np.allclose(moments.mean, values["b"].mean(0), rtol=1e-5)
    assert np.allclose(moments.std, values["a"].std(0, ddof=1), rtol=1e-5)
    with pytest.raises(RelneuronError, match="this one has 3 and 48"):
        stored_moments(tmp_path, SHAPE | {"layers": 3})
    Contrast(["all"], np.array([1]), arrays).write(tmp_path / CONTRAST)
    with pytest.raises(RelneuronError, match="fewer than two tokens"):
        stored_moments(tmp_path, SHAPE)


def test_counts_without_moments_of_products_are_refused(study: Path, counted: Any) -> None:
    whole = Counts.read(study / NAME)
    arrays = {"count.product": whole.arrays["count.product"]}
    Counts(whole.groups, whole.tokens, arrays).write(study / NAME)
    with pytest.raises(RelneuronError, match="holds no moments of the site product") as caught:
        stored_moments(study, SHAPE)
    assert "--sites product --moments" in caught.value.fix
