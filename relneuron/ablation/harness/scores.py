"""What `eval` measured: a row of eval.csv a metric, and the table that is printed.

stage.py makes the rows of what the harness says; no torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from relneuron.artifact.files import Json
from relneuron.artifact.stage import Printed

CSV = "eval.csv"


class Score(NamedTuple):
    """One row of eval.csv.

    condition  clean, a set, or random.<seed>; set: whose neurons are at their mean besides
    filter     the harness's, by which an answer was read; "none" mostly
    stderr     the harness's, None where it has none
    n          documents that the value is of
    """

    condition: str
    set: str
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int
    n_shot: int | None


def scores_of(condition: str, of_set: str, value: Json) -> Iterator[Score]:
    """The rows of one task or group under a condition: each metric that is a number."""
    results = value["results"]
    for task, metrics in results["results"].items():
        counts = metrics.get("sample_count") or {}
        for key, number in metrics.items():
            metric, comma, how = key.partition(",")
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if not comma or metric.endswith("_stderr") or not is_number:
                continue
            error = metrics.get(f"{metric}_stderr,{how}")
            yield Score(
                *(condition, of_set, task, metric, how, number),
                error if isinstance(error, int | float) else None,
                counts.get(key, metrics["sample_len"]),
                results["n-shot"].get(task),
            )


def score_table(scores: Sequence[Score], tasks: Sequence[str]) -> Printed:
    """Each metric of the tasks, clean, and how much it changes under each condition.

    Of a group its own metrics, where it has some; a column is a task and a metric.
    """
    keys = list(dict.fromkeys((s.task, s.metric, s.filter) for s in scores))
    named = [key for key in keys if key[0] in tasks] or keys
    filters = {key[:2]: len({k[2] for k in named if k[:2] == key[:2]}) for key in named}
    heads = [" ".join((*key[:2], *([key[2]] if filters[key[:2]] > 1 else []))) for key in named]
    runs = list(dict.fromkeys((s.condition, s.set) for s in scores))
    values = {(s.condition, s.set, s.task, s.metric, s.filter): s for s in scores}
    rows = []
    for run in runs:
        name = run[0] if not run[1] else f"{run[0]}, {run[1]} set"
        cells = [_change(values.get((*runs[0], *key)), values.get((*run, *key))) for key in named]
        rows.append([name, *cells])
    return Printed(("off", *heads), rows, "clean ± standard error, and how much it changes")


def _change(clean: Score | None, own: Score | None) -> str:
    """The clean score as it is, another one as how much it is more; nothing where one is none."""
    if clean is None or own is None:
        return ""
    if own is not clean:
        return f"{own.value - clean.value:+.4f}"
    return f"{own.value:.4f}" + ("" if own.stderr is None else f" ±{own.stderr:.4f}")
