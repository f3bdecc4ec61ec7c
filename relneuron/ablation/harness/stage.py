"""The `eval` stage: tasks of lm-evaluation-harness, clean and with neurons off or set.

It writes a row per condition, task and metric (eval.csv), all that the harness says (eval.json),
and the samples, if they are asked for.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from relneuron.ablation.harness.changes import Changes, Run
from relneuron.ablation.harness.options import ChangeOptions, EvalOptions
from relneuron.ablation.harness.scores import CSV, Score, scores_of
from relneuron.ablation.options import CLEAN
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    csv_bytes,
    json_bytes,
    refuse_overwrite,
    sha256,
)
from relneuron.artifact.journal import Journal, is_unfinished, progress_bar
from relneuron.artifact.manifest import Manifest, same_model, versions
from relneuron.artifact.parts import SAMPLES
from relneuron.artifact.stage import STUDY, command, loading, placed
from relneuron.model.batches import is_out_of_memory
from relneuron.model.canary import check_canary
from relneuron.model.identity import other_weights, tokenizer_digest
from relneuron.model.layers import input_device
from relneuron.model.load import describe_model
from relneuron.model.ranks import sharing

if TYPE_CHECKING:
    from relneuron.ablation.harness.lm import NeuronLM
    from relneuron.ablation.harness.tasks import Read

SCHEMA = "relneuron.eval/1"
JSON = "eval.json"


def evaluate(
    name: str,
    model: Any,
    tokenizer: Any,
    neurons_path: Path | None,
    folder: Path,
    options: EvalOptions,
    *,
    force: bool = False,
    quiet: bool = False,
) -> list[Score]:
    """Run each task of `options.tasks` clean and under every condition; writes to `folder`.

    A task or group is run by itself, as `lm_eval --tasks TASK` runs it, on the harness's own `hf`
    model: clean results are the harness's, those with neurons off what forward hooks give. With
    `neurons_path` None there is the clean model only. `eval.journal` lets a killed run go on behind
    the last task of the last condition that it finished, with the same bits; several processes each
    run a task under a condition, the next one that is free.

    Raises RelneuronError for a task that is not known or cannot be read, and for what of the
    neurons is not there, before anything is written.
    """
    from relneuron.ablation.harness.lm import NeuronLM
    from relneuron.ablation.harness.tasks import (
        each_once,
        find_tasks,
        quietly,
        read_task,
        run_task,
    )

    for path in (folder / CSV, folder / JSON):
        refuse_overwrite(path, force or is_unfinished(folder / CSV, "eval"))
    check_neurons(neurons_path, options)
    if options.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise RelneuronError(f"{name} has no chat template", "leave out --apply-chat-template", 2)
    changes = Changes(model, neurons_path, options, options.random_seeds)
    described = describe_model(name, model, changes.mlps, "auto")
    Manifest(folder).check_model(described)
    notices: list[str] = []
    if changes.neurons:
        notices += other_weights(f"{neurons_path}: neurons", changes.neurons.model, described)
    with quietly() as said:
        # The harness may give a tokenizer a token for padding.
        lm = NeuronLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=options.batch_size)
        manager, tasks = find_tasks(options)
        read = {task: read_task(lm, manager, task, options) for task in tasks}
    if len(changes.runs) > 1:
        ids = lm.tokenizer("a", return_tensors="pt")["input_ids"].to(input_device(model))
        check_canary(model, changes.mlps, ids, "auto")
    inputs = eval_inputs(described, tokenizer, changes, read, options)
    with sharing(model, folder, folder / SAMPLES) as ranks:
        with ranks.in_turn():
            journal = Journal(folder / "eval.journal", inputs, ranks=ranks, shard=options.shard)
            if journal.is_first:
                redo_samples(journal, folder)
        total = len(changes.runs) * sum(one.n_requests for one in read.values())
        with progress_bar(total, "eval", "request", quiet) as bar, journal:
            for run, task in product(changes.runs, tasks):
                if journal.takes(_key(run, task)):
                    with quietly() as more:
                        ask = partial(run_task, lm, manager, task, options, bar.update)
                        value = run_one(changes, lm, run, ask, folder)
                    journal.add(_key(run, task), value | {"said": more})
                    journal.commit()
                else:
                    bar.update(read[task].n_requests)
            journal.together()
        found = {
            (run, task): journal.done[_key(run, task)] for run, task in product(changes.runs, tasks)
        }
        more = each_once(text for value in found.values() for text in value["said"])
        notices += [f"lm_eval: {text}" for text in dict.fromkeys(said + more)]
        for notice in notices:
            warnings.warn(notice, stacklevel=2)
        scores = [
            one
            for (run, _), value in found.items()
            for one in scores_of(run.condition.name, run.set, value)
        ]
        if ranks.rank:
            return scores
        written = {
            folder / CSV: csv_bytes(Score._fields, scores),
            folder / JSON: json_bytes(whole(changes.runs, found)),
        }
        for file, data in written.items():
            atomic_write(file, data)
        samples = [folder / SAMPLES / name for one in found.values() for name in one["samples"]]
        remove_samples(folder, samples)
        manifest = Manifest(folder)
        if "model" not in manifest.data:
            manifest.describe(versions=versions(), model=described)
        manifest.finish(
            "eval",
            inputs,
            [*written, *sorted(samples)],
            reads=changes.reads,
            conditions=len(changes.runs),
            versions={task: one.versions for task, one in read.items()},
            notices=notices,
            commands=command(
                *("eval", name, "-o", STUDY),
                *(("--neurons", placed(neurons_path, folder)) if neurons_path else ()),
                *_placed(options, folder).words(),
                **(loading(described) | {"backend": None, "tensor_parallel_size": None}),
            ),
        )
        journal.remove()
    return scores


def check_neurons(neurons: Path | None, options: EvalOptions) -> None:
    """Refuse what is to become of neurons where none are given."""
    asked = options.part(ChangeOptions) != ChangeOptions() or options.random_seeds
    if neurons is None and asked and options.part(ChangeOptions) != ChangeOptions(off=(CLEAN,)):
        raise RelneuronError(
            "--off, --mode, --set and --random-seeds are of neurons, and none are given",
            "add --neurons FILE",
            2,
        )


def eval_inputs(
    model: Json, tokenizer: Any, changes: Changes, read: dict[str, Read], options: EvalOptions
) -> Json:
    """What the stage depends on, for the manifest; of the tasks all that they ask."""
    return {
        "model": same_model(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "lm_eval": version("lm_eval"),
        **options.recorded(),
        # Not by where they lie: what is in them is in the digests.
        **dict.fromkeys(("include_path", "moments", "counts")),
        "tasks": {task: one.digest for task, one in read.items()},
        "reads": {path.name: sha256(path) for path in changes.reads},
    }


def _placed(options: EvalOptions, folder: Path) -> EvalOptions:
    """The options with their paths as a command takes them."""

    def place(path: Path | None) -> Path | None:
        return None if path is None else Path(placed(path, folder))

    return replace(
        options,
        moments=place(options.moments),
        counts=place(options.counts),
        include_path=[placed(path, folder) for path in options.include_path],
    )


def _key(run: Run, task: str) -> str:
    return json.dumps([run.condition.name, run.set, task], ensure_ascii=False)


def run_one(changes: Changes, lm: NeuronLM, run: Run, ask: Callable[[], Any], folder: Path) -> Json:
    """A task under a condition, for the journal: results, and each file of samples' digest."""
    from relneuron.ablation.harness.tasks import sample_lines

    lm.change = lambda: changes.acting(run)
    try:
        results, samples = ask()
    except Exception as error:
        if is_out_of_memory(error):
            raise RelneuronError(
                f"memory ran out with {lm.batch_size} requests in a batch",
                "give a smaller --batch-size; what is finished is kept",
            ) from error
        raise
    digests = {}
    for task, lines in samples.items():
        about = {"condition": run.condition.name, "set": run.set, "task": task}
        path, data = folder / SAMPLES / sample_name(run, task), sample_lines(about, lines)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
        digests[path.name] = hashlib.sha256(data).hexdigest()
    return {"results": results, "samples": digests}


def sample_name(run: Run, task: str) -> str:
    """The file of a task's samples under a condition, another one for any two of them."""
    parts = [task, run.condition.name, *([f"set={run.set}"] if run.set else [])]
    return ".".join(quote(part, safe=" @~=+,") for part in parts) + ".jsonl"


def redo_samples(journal: Journal, folder: Path) -> None:
    """Have done again what the journal notes and whose samples are not as they were written."""
    bad = [
        key
        for key, value in journal.done.items()
        for name, digest in value["samples"].items()
        if not (path := folder / SAMPLES / name).is_file() or sha256(path) != digest
    ]
    journal.redo({*bad}, "samples are not as they were written")


def remove_samples(folder: Path, kept: Sequence[Path]) -> None:
    """Remove the samples of an earlier run that was made again."""
    before = Manifest(folder).data["stages"].get("eval", {"files": []})["files"]
    for name in before:
        if name.startswith(f"{SAMPLES}/") and folder / name not in kept:
            (folder / name).unlink(missing_ok=True)


def whole(runs: Sequence[Run], found: Mapping[tuple[Run, str], Json]) -> Json:
    """eval.json: the conditions, and all that the harness says of each task under each."""
    return {
        "schema": SCHEMA,
        "lm_eval": version("lm_eval"),
        "conditions": [
            {"condition": c.name, "set": s, "kind": c.kind, "n_neurons": c.n_neurons}
            | {"relation": c.relation, "seed": c.seed}
            for _, c, s in runs
        ],
        "runs": [
            {"condition": run.condition.name, "set": run.set, "asked": task, **value["results"]}
            for (run, task), value in found.items()
        ],
    }
