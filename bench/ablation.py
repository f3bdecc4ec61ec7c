"""Many conditions in one batch against the published way: one condition, one prompt at a time.

    PYTHONPATH=. python -m bench.ablation [--model DIR --facts DIR] [--prompts N] [-o FILE.csv]

Every contestant answers the same eva prompts with the model as it is and with each relation's set
off (`--sets`), by the same rule, in alternating rounds of one run:

- `relneuron`: the evaluator of `relneuron ablate`;
- `generate, batch 1`: forward hooks that zero the outputs, `model.generate` prompt by prompt, two
  new tokens, greedy: what the method's published code does;
- `generate, batched`: the same hooks, the prompts of one condition in batches as large as ours:
  the strongest way that we know to write it with the library alone.

All must give the same predictions, or the run ends. The sets are random neurons of the size that
`identify` would choose: what is off does not change the time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.rows import add_rows
from relneuron.ablation.conditions import Ablation
from relneuron.ablation.evaluate import Evaluator, How
from relneuron.ablation.said import Row
from relneuron.artifact.effects import Condition
from relneuron.artifact.journal import Journal
from relneuron.artifact.neurons import Shape, random_neurons
from relneuron.artifact.prompts import Prompt
from relneuron.bench.machine import where
from relneuron.demo import CHECKPOINT, FACTS, TOP
from relneuron.model.ask import Asker
from relneuron.model.load import load_model, load_tokenizer
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.questions import N_ANSWER_TOKENS, Questions, encode
from relneuron.texts.facts import read_relations
from relneuron.texts.prompts import make_prompts

Predictions = list[list[str]]  # by condition, by prompt


def make_plan(shape: Mapping[str, int], n_sets: int, size: int, n_prompts: int) -> list[Ablation]:
    """The clean model and `n_sets` random sets, each asked every prompt."""
    plan = [Ablation(Condition("clean", "clean"), Shape.of(shape).places([]), range(n_prompts))]
    for seed in range(n_sets):
        places = Shape.of(shape).places(random_neurons(shape, size, seed))
        condition = Condition(f"random.{seed}", "random", seed=seed, n_neurons=size)
        plan.append(Ablation(condition, places, range(n_prompts)))
    return plan


def ask_together(
    asker: Asker, plan: Sequence[Ablation], questions: Questions, batch_tokens: int
) -> Predictions:
    """All conditions in common batches, each batch one forward and a step for the open answers."""
    mlps = find_mlps(asker.model)
    rows = [Row(c, p) for c, ablation in enumerate(plan) for p in ablation.prompts]
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal", {})
        evaluator = Evaluator(asker, mlps, plan, journal, How(), batch_tokens)
        found = evaluator.run(
            "answers",
            rows,
            [len(ids) + 1 for ids in questions.ids],
            lambda prompts, mark: asker.ask_forced(questions, prompts, mark).predictions,
            lambda n: None,
        )
    return [[found[Row(c, p)] for p in a.prompts] for c, a in enumerate(plan)]


@contextmanager
def hooks(model: Any, ablation: Ablation) -> Iterator[None]:
    """Forward hooks that overwrite the outputs of the chosen neurons with zero."""
    mlps = find_mlps(model)
    off: dict[Any, list[int]] = {}
    for layer, site, index in Shape.of(model_shape(mlps)).neurons(ablation.places):
        off.setdefault(getattr(mlps[layer].module, f"{site}_proj"), []).append(index)
    handles = []
    for module, indices in off.items():
        chosen = torch.tensor(indices, device=next(model.parameters()).device)

        def zero(_module: Any, _inputs: Any, out: Any, chosen: Any = chosen) -> None:
            out[..., chosen] = 0

        handles.append(module.register_forward_hook(zero))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def ask_apart(
    asker: Asker, plan: Sequence[Ablation], questions: Questions, batch_tokens: int
) -> Predictions:
    """One condition after the other, `model.generate` on batches; 0 tokens: batches of one."""
    order = sorted(range(len(questions.ids)), key=lambda row: len(questions.ids[row]))
    batches: list[list[int]] = []
    for row in order:
        n = len(batches[-1]) + 1 if batches else 0
        if not batches or n * len(questions.ids[row]) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    found = []
    for ablation in plan:
        said = [""] * len(questions.ids)
        with hooks(asker.model, ablation):
            for rows in batches:
                tokens, mask = asker.pad([questions.ids[row] for row in rows])
                out = asker.model.generate(
                    tokens,
                    attention_mask=mask,
                    max_new_tokens=N_ANSWER_TOKENS,
                    do_sample=False,
                    pad_token_id=asker.tokenizer.pad_token_id or 0,
                )
                for row, ids in zip(rows, out[:, tokens.shape[1] :].tolist(), strict=True):
                    said[row] = asker.tokenizer.decode(ids, skip_special_tokens=True).strip()
        found.append(said)
    return found


def race(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant, in alternating rounds; another result than ours raises."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    wanted: Any = None
    for _ in range(rounds):
        for name, run in contestants.items():
            began = time.perf_counter()
            said = run()
            seconds[name].append(time.perf_counter() - began)
            wanted = wanted or said
            if said != wanted:
                raise AssertionError(f"{name} says otherwise than {next(iter(contestants))}")
    return seconds


def eva_prompts(facts: Path, n_prompts: int) -> list[Prompt]:
    """The first eva prompts of each relation, in turn, in the files' own language."""
    by_relation = [
        [
            p
            for p in make_prompts(r, n_eva=50, seed=0)
            if (p.split, p.language) == ("eva", r.language)
        ]
        for r in read_relations(facts)
    ]
    turns = max(map(len, by_relation))
    mixed = [own[i] for i in range(turns) for own in by_relation if i < len(own)]
    return mixed[:n_prompts]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=str(CHECKPOINT), help="a model folder; default: the demo's")
    add("--facts", type=Path, default=FACTS, help="its facts")
    add("--prompts", type=int, default=60, help="eva prompts of each condition")
    add("--sets", type=int, default=12, help="conditions beside the clean model")
    add("--size", type=int, default=TOP, help="neurons of a set")
    add("--batch-tokens", type=int, default=4096)
    add("--rounds", type=int, default=3)
    add("-o", "--output", type=Path, metavar="FILE.csv", help="add rows to this file")
    options = parser.parse_args(arguments)
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    questions = encode(tokenizer, model, eva_prompts(options.facts, options.prompts))
    asker = Asker(model, tokenizer)
    shape = model_shape(find_mlps(model))
    plan = make_plan(shape, options.sets, options.size, len(questions.ids))
    seconds = race(
        {
            "relneuron": lambda: ask_together(asker, plan, questions, options.batch_tokens),
            "generate, batched": lambda: ask_apart(asker, plan, questions, options.batch_tokens),
            "generate, batch 1": lambda: ask_apart(asker, plan, questions, 0),
        },
        options.rounds,
    )
    n_rows = len(plan) * len(questions.ids)
    device = asker.device.type
    rows = []
    for name, times in seconds.items():
        # A ratio is that of one round, so a machine that is busy for a while does not bend it.
        ratios = [t / own for t, own in zip(times, seconds["relneuron"], strict=True)]
        row = {
            "contestant": name,
            "conditions": len(plan),
            "prompts": len(questions.ids),
            "answers": n_rows,
            "median_s": round(median(times), 4),
            "ratio": round(median(ratios), 3),
        }
        rows.append({**row, **shape, **where(device)})
        print(
            f"{name:<18} {median(times):8.3f} s  {1e3 * median(times) / n_rows:8.3f} ms an answer"
            f"  {median(ratios):7.1f} x ours"
        )
    add_rows(options.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
