"""The causal effect of patched neurons: a published vector, plain loops, costs of every kind."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relneuron.ablation.costs import find_price, written
from relneuron.ablation.effect import Effect, causal_effects, effect
from relneuron.ablation.effect_options import EffectOptions
from relneuron.ablation.outputs import Generated, lines_bytes, read_outputs
from relneuron.artifact.files import RelneuronError, csv_bytes
from relneuron.model.classifier import load_classifier
from tests.kit.corpus_commands import check_refused
from tests.kit.speakers import classifier_folder


def column(*costs: float) -> np.ndarray[Any, Any]:
    return np.array(costs, np.float64)[:, None]


# Of arXiv 2406.14144: four prompts, what the model, the patched one and the donor cost.
E3 = {"clean": column(3, 1, 2, 0), "s": column(-3, -2, -4, -1), "donor": column(-4, -3, -4, -5)}


def test_the_effect_of_e3() -> None:
    (found,) = causal_effects(E3)
    assert found.effect == pytest.approx(0.72727273, abs=5e-9)
    assert found[:6] == ("s", 4, 1, 1.5, -4.0, -2.5)
    assert found.sd_masks is None
    # No draw of these prompts has a smaller effect than the last alone, or a larger than the third.
    assert 1 / 5 <= found.low < found.effect < found.high <= 1
    assert found.donor_low < -5.5 < found.donor_high < 0
    assert causal_effects(E3) == [found]


def test_an_effect_is_1_of_the_donor_and_0_of_the_model() -> None:
    nothing, everything = causal_effects(E3 | {"s": E3["clean"], "t": E3["donor"]})
    assert nothing[6:9] == (0, 0, 0) and everything[6:9] == (1, 1, 1)


def costs_of(n: int, n_seeds: int, spread: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """A clean cost, a donor's 2 below it and patched ones by 1, -0.2 and 0.4, of prompts."""
    rng = np.random.default_rng(seed)
    clean = rng.normal(size=(n, 1)) * 5 + rng.normal(size=(n, n_seeds))
    changes = {"donor": -2.0, "s": -1.0, "random.0": 0.2, "random.1": -0.4}
    noise = {name: rng.normal(size=(n, n_seeds)) * spread for name in changes}
    return {"clean": clean} | {k: clean + change + noise[k] for k, change in changes.items()}


def test_the_interval_draws_prompts_with_all_that_is_theirs() -> None:
    costs = costs_of(50, 3)
    found = {one.mask: one for one in causal_effects(costs)}
    assert [*found] == ["s", "random.0", "random.1", "random.*"]
    rng = np.random.default_rng(0)
    ratios, below = [], []
    for _ in range(2000):
        drawn = rng.integers(0, 50, 50)
        mean = {name: float(values[drawn].mean()) for name, values in costs.items()}
        below.append(mean["donor"] - mean["clean"])
        ratios.append((mean["s"] - mean["clean"]) / below[-1])
    assert (found["s"].low, found["s"].high) == pytest.approx(
        np.quantile(ratios, (0.025, 0.975), method="nearest")
    )
    assert found["s"][-2:] == pytest.approx(np.quantile(below, (0.025, 0.975)))
    # Prompts cost by 5 more or less, which does not matter beside what the same prompt costs clean.
    assert found["s"].high - found["s"].low < 0.3


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(60):
        one = causal_effects({k: costs_of(40, 1, seed=seed)[k] for k in ("clean", "donor", "s")})[0]
        hits += one.low <= 0.5 <= one.high
    # Of 95 % a bootstrap of 40 prompts has some less; three standard errors of 60 trials are 9 %.
    assert 0.85 <= hits / 60 <= 1


def test_random_masks_are_summed_up() -> None:
    costs = costs_of(30, 2)
    found = {one.mask: one for one in causal_effects(costs)}
    own = [found[name].effect for name in ("random.0", "random.1")]
    together = found["random.*"]
    assert together.effect == pytest.approx(np.mean(own))
    assert together.sd_masks == pytest.approx(np.std(own, ddof=1))
    assert together.cost == pytest.approx((found["random.0"].cost + found["random.1"].cost) / 2)
    # Beside several sets each has its own.
    renamed = {"random.0": "random.0.s", "random.1": "random.0.random.x"}
    costs = {renamed.get(name, name): values for name, values in costs.items()}
    assert [one.mask for one in causal_effects(costs)][3:] == ["random.*.s", "random.*.random.x"]
    assert all(one.sd_masks is None for one in causal_effects(costs))


def test_what_may_be_divided_by_nothing_has_no_interval() -> None:
    costs = costs_of(10, 1)
    costs["donor"] = costs["clean"] + column(*[1, -1] * 5) * 3 + 0.1
    found = causal_effects(costs)[0]
    assert found.effect == pytest.approx(-10, rel=0.8) and found.low is found.high is None
    assert found.donor_low < 0 < found.donor_high
    same = causal_effects(costs | {"donor": costs["clean"]})[0]
    assert same.effect is same.low is None and same.donor_low == same.donor_high == 0


# --- costs -------------------------------------------------------------------------------------


def lines(masks: Sequence[str] = ("clean", "donor", "s"), seeds: int = 0) -> list[Generated]:
    """Outputs to two prompts."""
    rng = random.Random(0)
    return [
        Generated(
            mask, "", key, f"{key} asks", rng.choice("abc") * rng.randint(1, 4), 1, "length"
        )._replace(seed=seed if seeds else None)
        for mask in masks
        for key in ("p", "q")
        for seed in range(max(seeds, 1))
    ]


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    path = tmp_path / "o.jsonl"
    path.write_bytes(lines_bytes(lines(seeds=2)))
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_function_a_column_and_the_command(
    relneuron: Any, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_cost.py").write_text(
        "def of(prompt, output):\n    return 10 * (prompt == 'q asks') + len(output)\n"
    )
    monkeypatch.chdir(tmp_path)
    code, said, err = relneuron("effect", outputs, "-o", "e.csv", "--cost", "own_cost:of")
    assert code == 0, err
    own = read_outputs(outputs)
    assert own == lines(seeds=2)
    costs = [10.0 * (line.id == "q") + len(line.output) for line in own]
    assert [(row["mask"], row["id"], int(row["seed"])) for row in rows_of(Path("e.costs.csv"))] == [
        (line.mask, line.id, line.seed) for line in own
    ]
    assert [float(row["cost"]) for row in rows_of(Path("e.costs.csv"))] == costs
    means = {m: np.mean([c for c, o in zip(costs, own, strict=True) if o.mask == m]) for m in "s"}
    (row,) = rows_of(Path("e.csv"))
    assert tuple(row) == Effect._fields
    assert float(row["cost"]) == means["s"] and row["mask"] == "s" and row["n_seeds"] == "2"
    assert "causal effect" in said and "-> e.csv" in said
    # What was written says the same again, in any order.
    table = [list(row.values()) for row in rows_of(Path("e.costs.csv"))]
    Path("c.csv").write_bytes(csv_bytes(("mask", "id", "seed", "price"), table[::-1]))
    assert relneuron("effect", outputs, "-o", "f.csv", "--cost", "c.csv:price")[0] == 0
    for name in ("e.csv", "e.costs.csv"):
        assert Path(name).read_bytes() == Path(name.replace("e", "f", 1)).read_bytes()
    assert relneuron("effect", outputs, "-o", "f.csv", "--cost", "c.csv:price", "--force")[0] == 0


def test_a_classifier_reads_prompt_and_output(tmp_path: Path) -> None:
    folder = classifier_folder(tmp_path / "judge")
    own = [one._replace(prompt="a b", output=" ".join(one.output)) for one in lines()]
    classifier = load_classifier(str(folder), device="cpu")
    asked = EffectOptions(cost=str(folder), label="1", template="{prompt} c {output}")
    texts = [f"a b c {line.output}" for line in own]
    assert find_price(asked, quiet=True).of(own, None) == classifier.logits(texts, 1, 8192)
    plain = EffectOptions(cost=str(folder), label="0", batch_tokens=5, device="cpu")
    joined = [line.prompt + line.output for line in own]
    assert find_price(plain, quiet=True).of(own, None) == classifier.logits(joined, 0, 5)
    with pytest.raises(RelneuronError, match="has several labels"):
        find_price(EffectOptions(cost=str(folder)), quiet=True)


def test_what_a_text_has_in_braces_stays() -> None:
    line = Generated("s", "", "p", "say {output}", "{prompt}!", 1, "eos")
    assert written("Q: {prompt} A: {output}", line) == "Q: say {output} A: {prompt}!"
    assert written("{output}", line) == "{prompt}!"


@pytest.mark.filterwarnings("ignore:the donor's cost differs")
@pytest.mark.parametrize(
    ("table", "cause"),
    [
        ("mask,id,price\ns,p,1\n", "lacks the column seed"),
        ("mask,id,seed,price\ns,p,0,1\n", "has no price of the output clean p 0 and 10 more"),
        ("mask,id,seed,price\ns,p,0,1\ns,p,0,2\n", "line 3: a second row of s, p, 0"),
        ("mask,id,seed,price\ns,p,0,\n", "price is '', not a finite number"),
        ("mask,id,seed\n", "lacks the column price"),
    ],
)
def test_a_table_that_lacks_costs(
    relneuron: Any, outputs: Path, tmp_path: Path, table: str, cause: str
) -> None:
    (tmp_path / "c.csv").write_text(table)
    words = ["effect", outputs, "-o", tmp_path / "e.csv", "--cost", f"{tmp_path / 'c.csv'}:price"]
    check_refused(relneuron, tmp_path, cause, *words)


def test_what_cannot_be_compared(relneuron: Any, tmp_path: Path) -> None:
    path, words = tmp_path / "o.jsonl", ["effect", tmp_path / "o.jsonl", "-o", tmp_path / "e.csv"]
    path.write_bytes(lines_bytes(lines()))
    for cost, cause in (
        ([], "--cost does not say what an output costs"),
        (["--cost", "cost"], "unknown --cost 'cost'"),
        (["--cost", "nowhere:f"], "--cost nowhere:f: nowhere cannot be imported"),
        (["--cost", "math:log"], "--cost math:log failed on the output"),
        (["--cost", "a.csv:c", "--label", "1"], "--label does something only with a classifier"),
    ):
        check_refused(relneuron, tmp_path, cause, *words, *cost)
    for some, cause in (
        (lines(("clean", "s")), "lacks the mask donor: it has clean, s"),
        (lines(("donor", "s")), "lacks the mask clean"),
        (lines(("clean", "donor")), "lacks a mask of patched neurons"),
        (lines()[:-1], "of s and clean only one has an output for q"),
        (lines() + lines()[:1], "line 7: a second output of clean for p"),
        ([], "holds no output"),
    ):
        path.write_bytes(lines_bytes(some))
        check_refused(relneuron, tmp_path, cause, *words, "--cost", "math:dist")
    record = json.loads(lines_bytes(lines()).splitlines()[0])
    for broken in ({"mask": 3}, {"seed": "x"}):
        path.write_text(json.dumps(record | broken) + "\n")
        check_refused(relneuron, tmp_path, "line 1: no output", *words, "--cost", "math:dist")
    path.write_text('{"mask": "s"}\n')
    check_refused(relneuron, tmp_path, "line 1: no output", *words, "--cost", "math:dist")
    words[3] = tmp_path / "e.txt"
    check_refused(relneuron, tmp_path, "is no .csv", *words, "--cost", "math:dist")


def test_a_donor_that_changes_nothing_is_said(tmp_path: Path, outputs: Path) -> None:
    rows = [(line.mask, line.id, line.seed, 1.0) for line in read_outputs(outputs)]
    (tmp_path / "c.csv").write_bytes(csv_bytes(("mask", "id", "seed", "cost"), rows))
    with pytest.warns(UserWarning, match="the donor's cost differs by 0 to 0 .* holds 0"):
        effect(outputs, tmp_path / "e.csv", EffectOptions(cost=f"{tmp_path / 'c.csv'}:cost"))
    (row,) = rows_of(tmp_path / "e.csv")
    assert row["effect"] == row["low"] == row["high"] == "" and row["cost_donor"] == "1.0"


def test_neurons_that_change_nothing_cause_nothing() -> None:
    """And not -0, where the donor costs less."""
    (one,) = causal_effects(
        {
            k: np.array(v)
            for k, v in {
                "clean": [[1.0], [2.0]],
                "random.0": [[1.0], [2.0]],
                "donor": [[0.0], [0.0]],
            }.items()
        }
    )[:1]
    assert [str(x) for x in (one.effect, one.low, one.high)] == ["0.0"] * 3
