"""The `ablate` stage: switch each relation's neurons off and ask every prompt again.

It writes one row per condition and prompt (effects), and accuracies beside it (accuracy.csv).
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from relneuron.artifact import (
    Json,
    NeuronFile,
    Prompt,
    RelneuronError,
    atomic_write,
    check_neurons,
    csv_bytes,
    read_prompts,
    refuse_overwrite,
    sha256,
)
from relneuron.manifest import Journal, Manifest, locked, progress_bar, versions
from relneuron.model import describe_model, find_gated_mlps, model_shape, same_model
from relneuron.patch import Patch, check_canary, mask_states
from relneuron.predict import Asker, encode, is_correct, plan_batches
from relneuron.scores.ranking import random_neurons

EFFECTS = ("condition", "relation", "split", "id", "prediction", "correct", "logprob")


def ablate_inputs(
    model: Json,
    neurons: Path,
    prompts: Path,
    *,
    splits: Sequence[str],
    random_seeds: int,
    batch_tokens: int,
    accept_object_prefix: bool,
) -> Json:
    """What the stage depends on, for the manifest."""
    return {
        "model": same_model(model),
        "neurons": sha256(neurons),
        "prompts": sha256(prompts),
        "splits": list(splits),
        "random_seeds": random_seeds,
        "batch_tokens": batch_tokens,
        "accept_object_prefix": accept_object_prefix,
    }


def split_name(prompt: Prompt) -> str:
    """The split as effects name it: `eva`, and `eva.de` for the same in another language."""
    return prompt.split if prompt.language == "en" else f"{prompt.split}.{prompt.language}"


def accuracy_rows(effects: Sequence[Sequence[Any]]) -> list[tuple[str, str, str, int, int, float]]:
    """(condition, relation, split, n_prompts, n_correct, accuracy), in order of appearance."""
    total: Counter[tuple[str, str, str]] = Counter()
    correct: Counter[tuple[str, str, str]] = Counter()
    for condition, relation, split, _, _, is_right, _ in effects:
        total[condition, relation, split] += 1
        correct[condition, relation, split] += is_right
    return [(*key, n, correct[key], correct[key] / n) for key, n in total.items()]


def make_conditions(
    neurons: NeuronFile, shape: dict[str, int], random_seeds: int
) -> dict[str, list[Any]]:
    """`clean`, every relation's set by its name, and `random.<seed>` sets as large as the largest.

    The random baseline draws from all outputs of gate, up and down projections (methods A9).
    """
    sets = {name: check_neurons(chosen, shape) for name, chosen in neurons.sets.items()}
    k = max(map(len, sets.values()), default=0)
    randoms = {f"random.{seed}": random_neurons(shape, k, seed) for seed in range(random_seeds)}
    clash = sorted(sets.keys() & ({"clean"} | randoms.keys()))
    if clash:
        raise RelneuronError(f"a neuron set is named {clash[0]}", "rename the relation's file")
    return {"clean": [], **sets, **randoms}


def ablate_prompts(
    name: str,
    model: Any,
    tokenizer: Any,
    neurons_path: Path,
    prompts_path: Path,
    output: Path,
    *,
    splits: Sequence[str] = ("eva", "eva2"),
    random_seeds: int = 10,
    batch_tokens: int = 4096,
    accept_object_prefix: bool = False,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> list[tuple[str, str, str, int, int, float]]:
    """Ask the prompts of `splits` under every condition; returns the rows of accuracy.csv.

    A condition sets the outputs of its neurons to zero at all positions of the prompt and of the
    answer, KV cache included (arXiv 2502.17355, section 3.3). `logprob` is the log-probability in
    nats of the object's first token after the prompt. `output` is .csv or .parquet.
    """
    refuse_overwrite(output, force)
    check_format(output)
    neurons = NeuronFile.read(neurons_path)
    prompts = [p for p in read_prompts(prompts_path) if p.split in splits]
    if not prompts:
        raise RelneuronError(
            f"{prompts_path} has no prompt of the splits {', '.join(splits)}",
            "name others with --splits",
            2,
        )
    mlps = find_gated_mlps(model)
    shape = model_shape(mlps)
    neurons.check_model(shape)
    conditions = make_conditions(neurons, shape, random_seeds)
    questions = encode(tokenizer, model, prompts)
    batches = plan_batches(questions, batch_tokens)
    asker = Asker(model, tokenizer)
    described = describe_model(name, model, mlps, backend)
    check_canary(model, mlps, asker.pad(questions.ids[:1])[0], backend)
    inputs = ablate_inputs(
        described,
        neurons_path,
        prompts_path,
        splits=splits,
        random_seeds=random_seeds,
        batch_tokens=batch_tokens,
        accept_object_prefix=accept_object_prefix,
    )
    correct = partial(is_correct, accept_object_prefix=accept_object_prefix)
    with locked(output.parent):
        journal = Journal(output.parent / "ablate.journal", inputs)
        total = len(conditions) * len(prompts)
        bar = progress_bar(total, "ablate", "prompt", quiet)
        with bar, journal:
            for condition, off in conditions.items():
                with Patch(mlps, mask_states([off], mlps), backend=backend):
                    for number, rows in enumerate(batches):
                        key = f"{condition} {number}"
                        if key not in journal.done:
                            answers = asker.ask(questions, rows)
                            journal.add(key, [answers.predictions, answers.logprobs])
                        bar.update(len(rows))

        effects: list[tuple[Any, ...]] = []
        for condition in conditions:
            found: dict[int, tuple[str, float]] = {}
            for number, rows in enumerate(batches):
                pairs = zip(*journal.done[f"{condition} {number}"], strict=True)
                found.update(zip(rows, pairs, strict=True))
            for row, p in enumerate(prompts):
                prediction, logprob = found[row]
                right = int(correct(prediction, p.object))
                effects.append(
                    (condition, p.relation, split_name(p), p.id, prediction, right, logprob)
                )
        atomic_write(output, _table_bytes(output, effects))
        accuracy_path = output.parent / "accuracy.csv"
        accuracy = accuracy_rows(effects)
        columns = ("condition", "relation", "split", "n_prompts", "n_correct", "accuracy")
        atomic_write(accuracy_path, csv_bytes(columns, accuracy))
        manifest = Manifest(output.parent)
        manifest.describe(
            versions=versions(),
            model=described,
            seeds=manifest.data.get("seeds", {}) | {"random": list(range(random_seeds))},
        )
        manifest.finish(
            "ablate",
            inputs,
            [output, accuracy_path],
            conditions=len(conditions),
            prompts=len(prompts),
            random_set_size=len(conditions.get("random.0", [])),
            positions="all, prompt and answer",
            value=0,
        )
        journal.remove()
    return accuracy


def check_format(output: Path) -> None:
    """Refuse a table format that cannot be written, before any prompt is asked."""
    if output.suffix not in (".csv", ".parquet"):
        raise RelneuronError(f"{output} is neither .csv nor .parquet", "choose one of the two", 2)
    if output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise RelneuronError(
            "writing .parquet needs pyarrow", "pip install 'relneuron[data]', or write .csv"
        )


def _table_bytes(path: Path, effects: list[tuple[Any, ...]]) -> bytes:
    if path.suffix == ".csv":
        return csv_bytes(EFFECTS, effects)
    import pyarrow
    import pyarrow.parquet

    columns = dict(zip(EFFECTS, map(list, zip(*effects, strict=True)), strict=True))
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()
