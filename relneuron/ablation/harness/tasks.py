"""Tasks of the harness: found, read, and run on a model. `stage.py` calls it.

The harness writes bars, messages and the seeds of every generator as it goes; `quietly` keeps them
from whoever called us.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.models.huggingface
import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from tqdm import tqdm

from relneuron.ablation.harness.lm import NeuronLM
from relneuron.ablation.harness.options import EvalOptions
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.reading import one_line

KEPT = ("results", "versions", "n-shot", "n-samples", "higher_is_better", "group_subtasks")
# Said of a model that is made outside of the harness, and of options that were asked for.
_NOISE = re.compile(r"`?pretrained`|Passed an already-|Overwriting default num_fewshot|is defined,")


class Read(NamedTuple):
    """What a task, or a group of them, asks: all of it in the digest."""

    digest: str
    n_requests: int
    versions: Json  # of each task


class _Read(Exception):
    """Ends an evaluation of which only the questions were asked for."""


class Manager(TaskManager):  # type: ignore[misc]
    """A TaskManager that loads a task once, after the harness's own seeds, as a run of it would."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self._kept: dict[str, Any] = {}

    def load(self, task_list: Any) -> Any:
        (name,) = task_list
        if name not in self._kept:
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch.manual_seed(DEFAULT_OTHER_SEED)
            self._kept[name] = super().load([name])
        return self._kept[name]


def find_tasks(options: EvalOptions) -> tuple[Manager, list[str]]:
    """The manager that knows the tasks, and each of those asked for, patterns resolved.

    The harness's own tasks, which take seconds to list, are listed where the folders of
    `include_path` lack one that is asked for, or that a group of theirs has.
    """
    for folder in options.include_path:
        if not Path(folder).is_dir():
            raise RelneuronError(
                f"--include-path {folder} is no folder", "name a folder with YAML files of tasks", 2
            )
    own = list(options.include_path)
    known = Manager(include_path=own, include_defaults=False) if own else None
    if known is None or not all(_loads(known, name) for name in options.tasks):
        known = Manager(include_path=own or None)
    found: dict[str, None] = {}
    for name in options.tasks:
        matching = _matching(known, name)
        if not matching:
            near = difflib.get_close_matches(name, known.all_tasks, 3)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            raise RelneuronError(
                f"no task is named {name!r}",
                f"{hint}`lm_eval ls tasks` lists what there is; --include-path FOLDER adds more",
                2,
            )
        found |= dict.fromkeys(matching)
    return known, list(found)


def _matching(manager: Manager, name: str) -> list[str]:
    if name in manager.task_index or (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
        return [name]
    return sorted(manager.match_tasks([name]))


def _loads(manager: Manager, name: str) -> bool:
    matching = _matching(manager, name)
    try:
        for one in matching:
            manager.load([one])
    except (KeyError, ValueError):
        return False
    except Exception:  # `read_task` says what is wrong with it
        return True
    return bool(matching)


def read_task(lm: NeuronLM, manager: Manager, name: str, options: EvalOptions) -> Read:
    """What a task asks, without asking the model: documents, examples, templates, settings."""

    def stop(*_: Any, **__: Any) -> Any:
        raise _Read

    asked = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    for way in asked:
        setattr(lm, way, stop)
    try:
        _evaluate(lm, manager, name, options)
    except _Read:
        pass
    except RelneuronError:
        raise
    except Exception as error:  # of YAML files, data sets, templates and Python files of tasks
        raise RelneuronError(
            f"the task {name} cannot be read: {one_line(error) or type(error).__name__}",
            "check its YAML file and its data; a data set of the hub needs the network once",
        ) from error
    finally:
        for way in asked:
            delattr(lm, way)
    digest, n_requests, versions = hashlib.sha256(), 0, {}
    for task_name, task in sorted(manager.load([name])["tasks"].items()):
        versions[task_name] = task.VERSION
        config = _config(task.dump_config())
        for where in ("dataset_path", "dataset_kwargs"):  # the documents are in the requests
            config.pop(where, None)
        digest.update(json.dumps([task_name, config], default=_plain).encode())
        for one in task.instances:
            about = [one.request_type, one.doc_id, one.idx, one.repeats, one.args, one.doc]
            digest.update(json.dumps(about, default=_plain).encode())
            n_requests += one.repeats
    return Read(digest.hexdigest(), n_requests, versions)


def run_task(
    lm: NeuronLM,
    manager: Manager,
    name: str,
    options: EvalOptions,
    advance: Callable[[], object],
) -> tuple[Json, dict[str, list[Any]]]:
    """The harness's results of a task or group, and the samples of each task, if they are kept.

    `advance` hears of every request that is answered.
    """
    lm.set_cache_hook(_Advancing(advance))
    found = _evaluate(lm, manager, name, options)
    results = {key: found.get(key, {}) for key in KEPT}
    results["configs"] = {task: _config(own) for task, own in found["configs"].items()}
    return plain(results), found.get("samples", {})


class _Advancing:
    """In place of the harness's cache of answers, which it tells of each one."""

    def __init__(self, advance: Callable[[], object]) -> None:
        self._advance = advance

    def add_partial(self, *_: Any) -> None:
        self._advance()


def _evaluate(lm: NeuronLM, manager: Manager, name: str, options: EvalOptions) -> Any:
    limit = options.limit
    return simple_evaluate(
        model=lm,
        tasks=[name],
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=int(limit) if limit is not None and limit >= 1 else limit,
        log_samples=options.log_samples,
        apply_chat_template=options.apply_chat_template,
        confirm_run_unsafe_code=options.unsafe_code,
    )


def _config(config: Json) -> Json:
    """A task's settings without where its file stands."""
    about = config.get("metadata") or {}
    kept = {key: value for key, value in about.items() if key != "config_source"}
    return config | {"metadata": kept}


def plain(value: Any) -> Any:
    """What the harness gives, as JSON has it."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if callable(value):  # its own text would hold an address
        return getattr(value, "__qualname__", type(value).__qualname__)
    return handle_non_serializable(value)


def sample_lines(about: Json, samples: Sequence[Json]) -> bytes:
    """The JSON lines of a task's samples under a condition."""
    lines = (json.dumps(about | one, ensure_ascii=False, default=_plain) + "\n" for one in samples)
    return "".join(lines).encode()


def _silent(*given: Any, **how: Any) -> Any:
    return tqdm(*given, **how | {"disable": True})


def _nothing(*_: Any) -> None:
    """Adds nothing to the results."""


# What the harness does beside the task: bars of its own, and `pip freeze` and git, which take
# seconds a call, for parts of its results that are not kept.
MUTED: list[tuple[Any, str, Any]] = [
    (lm_eval.api.model, "tqdm", _silent),
    (lm_eval.api.task, "tqdm", _silent),
    (lm_eval.models.huggingface, "tqdm", _silent),
    (lm_eval.evaluator, "add_env_info", _nothing),
    (lm_eval.evaluator, "get_git_commit_hash", _nothing),
]


@contextmanager
def quietly() -> Iterator[list[str]]:
    """Without what is MUTED; what the harness warns of, each once; generators are put back."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if not _NOISE.search(text):
                said.append(text)

    bars = datasets.are_progress_bars_disabled()
    logger, keep, warned = logging.getLogger("lm_eval"), Keep(logging.WARNING), list[str]()
    before, propagates = [getattr(owner, name) for owner, name, _ in MUTED], logger.propagate
    states = random.getstate(), np.random.get_state()
    # Of torchrun's processes the harness gives results to the first one alone; each of ours runs
    # tasks of its own.
    number = os.environ.pop("LOCAL_RANK", None)
    logger.addHandler(keep)
    logger.propagate = False
    datasets.disable_progress_bars()
    for owner, name, new in MUTED:
        setattr(owner, name, new)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield warned
    finally:
        for (owner, name, _), own in zip(MUTED, before, strict=True):
            setattr(owner, name, own)
        if not bars:
            datasets.enable_progress_bars()
        logger.removeHandler(keep)
        logger.propagate = propagates
        random.setstate(states[0])
        np.random.set_state(states[1])
        if number is not None:
            os.environ["LOCAL_RANK"] = number
        warned += each_once(said)


def each_once(said: Iterable[str]) -> list[str]:
    """Texts that differ in more than their numbers; of the others the first one."""
    found: dict[str, str] = {}
    for text in said:
        found.setdefault(re.sub(r"\d+", "", text), text)
    return list(found.values())
