"""The evaluator: many conditions in one batch, in waves, and when memory runs out.

What it answers must be what plain hooks, edited weights and one condition at a time answer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import relneuron.ablation.evaluate
from relneuron.ablation.evaluate import plan_rows
from relneuron.ablation.said import Row
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import random_neurons
from relneuron.model.ask import Asker
from relneuron.model.batches import cut
from relneuron.model.questions import encode
from tests.kit.files import read_rows
from tests.kit.hooked import N_NEURONS, SHAPE, Hooked, Study, same_rows

SEEDS = 9


@pytest.fixture(scope="module")
def study(
    model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Study]:
    yield Study(model_folder, fact_folder, tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def neurons(study: Study) -> dict[str, list[Any]]:
    """The 13 conditions of the main study and their neurons."""
    drawn = {f"random.{seed}": random_neurons(SHAPE, 40, seed) for seed in range(SEEDS)}
    return {"clean": [], **study.sets, **drawn}


Rows = dict[tuple[str, str], dict[str, str]]


@pytest.fixture(scope="module")
def together(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    output = tmp_path_factory.mktemp("together")
    return study.ablate(output, splits=("eva", "eva2"), random_seeds=SEEDS, batch_tokens=300)


def test_all_conditions_at_once_are_one_condition_at_a_time(
    study: Study, neurons: dict[str, list[Any]], together: Rows, tmp_path: Path
) -> None:
    alone: Rows = {}
    for name, chosen in neurons.items():
        folder, only = tmp_path / name, "only" if chosen else "clean"
        # A file of empty sets alone is refused; the clean model is asked beside any set.
        sets = {"only": chosen or [(0, "gate", 0)]}
        path = study.write_sets(folder / "neurons.json", sets)
        asked = {"splits": ("eva", "eva2"), "random_seeds": 0, "any_set": True}
        for (condition, key), row in study.ablate(folder, neurons=path, **asked).items():
            if condition == only:
                alone[name, key] = row
    same_rows(together, alone)
    by_condition = {
        name: [row["prediction"] for (c, _), row in together.items() if c == name]
        for name in neurons
    }
    assert len(set(map(tuple, by_condition.values()))) > 8


def test_all_conditions_at_once_are_plain_hooks(
    study: Study, neurons: dict[str, list[Any]], together: Rows
) -> None:
    hooked = Hooked(study)
    for name, chosen in neurons.items():
        with hooked.changing(chosen):
            for (condition, key), row in together.items():
                if condition != name:
                    continue
                prompt = study.prompts[key]
                text, logprob = hooked.answer(prompt)
                assert row["prediction"] == text
                assert int(row["correct"]) == (
                    text != "" and prompt.object.lower().startswith(text.lower())
                )
                assert abs(float(row["logprob"]) - logprob) <= 1e-5


def test_all_conditions_at_once_are_edited_weights(
    study: Study, neurons: dict[str, list[Any]], together: Rows
) -> None:
    prompts = [p for p in study.prompts.values() if p.split != "det"]
    for name, chosen in neurons.items():
        edited = copy.deepcopy(study.model)
        for layer, site, index, *_ in chosen:
            getattr(edited.model.layers[layer].mlp, f"{site}_proj").weight.data[index] = 0
        questions = encode(study.tokenizer, edited, prompts)
        answers = Asker(edited, study.tokenizer).ask(questions, range(len(prompts)))
        for prompt, text, logprob in zip(
            prompts, answers.predictions, answers.logprobs, strict=True
        ):
            row = together[name, prompt.id]
            assert row["prediction"] == text
            assert abs(float(row["logprob"]) - logprob) <= 1e-5


@pytest.mark.parametrize("n_conditions", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zero", "scale"])
def test_waves_of_few_conditions_answer_the_same(
    study: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_conditions: int,
    mode: str,
) -> None:
    asked = {"mode": mode, "factor": -1.0 if mode == "scale" else None, "analyses": ("matched",)}
    at_once = study.ablate(tmp_path / "one", **asked)
    per_neuron = 1 if mode == "zero" else 5
    wave_bytes = (n_conditions + 1) * per_neuron * N_NEURONS
    monkeypatch.setattr(relneuron.ablation.evaluate, "WAVE_BYTES", wave_bytes)
    made, build = [], relneuron.ablation.evaluate.wave_states

    def count(plan: Any, wave: range, *rest: Any) -> Any:
        made.append(len(wave))
        return build(plan, wave, *rest)

    monkeypatch.setattr(relneuron.ablation.evaluate, "wave_states", count)
    same_rows(study.ablate(tmp_path / "many", **asked), at_once)
    assert set(made) == {n_conditions}
    assert len(made) == -(-len({c for c, _ in at_once}) // n_conditions)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_the_batch_size_changes_no_answer(
    study: Study, tmp_path: Path, together: Rows, batch_tokens: int
) -> None:
    asked = {"splits": ("eva", "eva2"), "random_seeds": 1, "batch_tokens": batch_tokens}
    ours = study.ablate(tmp_path, **asked)
    same_rows(ours, {key: together[key] for key in ours})


# --- batches ---------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_row_once_within_the_budget(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=12))
    n_conditions = data.draw(st.integers(1, 9))
    budget, wave_size = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 10))
    pairs = st.tuples(st.integers(0, n_conditions - 1), st.integers(0, len(lengths) - 1))
    rows = [Row(*pair) for pair in data.draw(st.lists(pairs, unique=True))]
    batches = [(wave, [*some]) for wave, some in plan_rows(rows, lengths, budget, wave_size)]
    assert sorted(row for _, batch in batches for row in batch) == sorted(rows)
    starts = [wave.start for wave, _ in batches]
    assert starts == sorted(starts)
    for wave, batch in batches:
        assert batch
        assert batch == sorted(batch)
        assert len(wave) == wave_size
        assert wave.start % wave_size == 0
        assert {row.condition for row in batch} <= set(wave)
        longest = max(lengths[row.prompt] for row in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    again = plan_rows(list(reversed(rows)), lengths, budget, wave_size)
    assert batches == [(wave, [*some]) for wave, some in again]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 100))
def test_a_cut_keeps_the_order_and_never_stops_early(lengths: list[int], budget: int) -> None:
    rows = [Row(0, i) for i in range(len(lengths))]
    parts = cut(rows, lambda row: lengths[row.prompt], budget)
    assert [row for part in parts for row in part] == rows
    sizes = [len(part) * max(lengths[row.prompt] for row in part) for part in parts]
    for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        assert size <= budget or len(part) == 1
        if i + 1 < len(parts):
            longest = max(lengths[row.prompt] for row in [*part, parts[i + 1][0]])
            assert (len(part) + 1) * longest > budget
    assert cut([], len, budget) == []


# --- out of memory ---------------------------------------------------------------------------


class Memory:
    """In place of the methods of Asker that ask: they run out of memory when `fails` says so.

    Only the evaluator's own calls are counted, or with `trial` only those that try forcing.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Any, *, trial: bool = False) -> None:
        self.tokens: list[int] = []
        for name in ("ask", "ask_forced", "score"):
            method = self._failing(getattr(Asker, name), fails, trial)
            monkeypatch.setattr(Asker, name, method)

    def _failing(self, method: Any, fails: Any, trial: bool) -> Any:
        def ask(asker: Asker, questions: Any, rows: Any, *mark: Any) -> Any:
            # An answer is asked with one more token, that of the object; a sentence is not.
            longest = max(len(questions.ids[row]) for row in rows) + bool(questions.answers)
            tokens = len(rows) * longest
            if trial != bool(mark):
                self.tokens.append(tokens)
                if fails(len(self.tokens), tokens):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return method(asker, questions, rows, *mark)

        return ask


OUT = "ignore:out of memory:UserWarning"


def fallbacks(folder: Path) -> list[str]:
    notices = json.loads((folder / "manifest.json").read_text())["fallbacks"]
    return [notice for notice in notices if notice.startswith("out of memory")]


@pytest.mark.filterwarnings(OUT)
@pytest.mark.parametrize("generate", [None, 2])
def test_memory_may_run_out_at_any_call(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generate: int | None
) -> None:
    asked = {"batch_tokens": 256, "generate": generate, "analyses": ("perplexity",)}
    with monkeypatch.context() as patch:
        memory = Memory(patch, lambda *_: False)
        whole = study.ablate(tmp_path / "whole", **asked)
    assert fallbacks(tmp_path / "whole") == []
    assert len(memory.tokens) > 3
    for k in range(1, len(memory.tokens) + 1):
        folder = tmp_path / str(k)
        with monkeypatch.context() as patch:
            Memory(patch, lambda call, *_, k=k: call == k)
            same_rows(study.ablate(folder, **asked), whole)
        nll = [read_rows(f / "perplexity.csv") for f in (folder, tmp_path / "whole")]
        for ours, theirs in zip(*nll, strict=True):
            assert {**ours, "nll": ""} == {**theirs, "nll": ""}
            assert abs(float(ours["nll"]) - float(theirs["nll"])) <= 1e-4
        assert fallbacks(folder) == [
            f"out of memory: batches of 256 tokens cut to {memory.tokens[k - 1] // 2}"
        ]
        assert not (folder / "ablate.journal").exists()


@pytest.mark.filterwarnings(OUT)
@pytest.mark.parametrize("k", [1, 2])
def test_memory_may_run_out_before_the_first_batch(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    """Also where forcing is tried: it may be left, or the trial made smaller."""
    whole = study.ablate(tmp_path / "whole")
    Memory(monkeypatch, lambda call, _: call == k, trial=True)
    same_rows(study.ablate(tmp_path / "s"), whole)


def test_the_budget_only_falls(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine for 40 tokens: 1 large batch is halved until it fits, and no budget rises again."""
    asked = {"batch_tokens": 2000, "generate": 2}
    whole = study.ablate(tmp_path / "whole", **asked)
    memory = Memory(monkeypatch, lambda _, tokens: tokens > 40)
    with pytest.warns(UserWarning, match="out of memory") as told:
        same_rows(study.ablate(tmp_path / "s", **asked), whole)
    budgets = [int(str(one.message).split("batches of ")[1].split()[0]) for one in told]
    assert len(budgets) > 2
    assert fallbacks(tmp_path / "s") == [
        f"out of memory: batches of 2000 tokens cut to {budgets[-1]}"
    ]
    assert budgets == sorted(set(budgets), reverse=True)
    assert sum(tokens > 40 for tokens in memory.tokens) == len(budgets)


@pytest.mark.filterwarnings(OUT)
def test_the_budget_survives_an_interrupt(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"batch_tokens": 256, "generate": 2}
    whole = study.ablate(tmp_path / "whole", **asked)
    folder = tmp_path / "s"

    def interrupt(call: int, *_: Any) -> bool:
        if call == 4:
            raise KeyboardInterrupt
        return call == 2

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        memory = Memory(patch, interrupt)
        study.ablate(folder, **asked)
    budget = memory.tokens[1] // 2
    lines = (folder / "ablate.journal").read_text().splitlines()
    journal = [json.loads(line.partition(" ")[2]) for line in lines]
    assert {"key": "budget", "value": budget} in journal[1:]
    memory = Memory(monkeypatch, lambda *_: False)
    same_rows(study.ablate(folder, **asked), whole)
    assert max(memory.tokens) <= budget
    # The manifest says so as if there had been no interrupt.
    assert fallbacks(folder) == [f"out of memory: batches of 256 tokens cut to {budget}"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("not enough memory: you tried")])
@pytest.mark.filterwarnings(OUT)
def test_other_kinds_of_no_memory_are_known(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(call: int, *_: Any) -> bool:
        if call == 2:
            raise error
        return False

    Memory(monkeypatch, fails)
    study.ablate(tmp_path, generate=2, batch_tokens=256)
    assert len(fallbacks(tmp_path)) == 1


def test_other_errors_are_not_taken_for_it(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> bool:
        raise RuntimeError("shapes do not match")

    Memory(monkeypatch, fails)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        study.ablate(tmp_path, generate=2)


def test_no_memory_ends_the_stage_if_asked_to(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(monkeypatch, lambda call, *_: call == 2)
    with pytest.raises(RelneuronError, match=r"with \d+ prompts of together \d+ tokens") as caught:
        study.ablate(tmp_path, generate=2, batch_tokens=256, oom="error")
    assert f"together {memory.tokens[1]} tokens" in caught.value.cause
    assert not (tmp_path / "effects.csv").exists()
    with pytest.raises(RelneuronError, match="oom"):
        study.ablate(tmp_path / "never", oom="never")


@pytest.mark.filterwarnings(OUT)
def test_one_prompt_that_does_not_fit_ends_the_stage(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(monkeypatch, lambda *_: True)
    with pytest.raises(RelneuronError, match="with 1 prompts of together"):
        study.ablate(tmp_path, generate=2, batch_tokens=256)
    assert len(memory.tokens) < 10
