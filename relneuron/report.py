"""The `report` stage: a study directory in, one HTML file that opens offline out.

results.py reads the study, figures.py draws, tables.py tabulates, report.html.j2 lays out; here are
the words. The same study gives the same bytes.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from relneuron.artifact import (
    SITES,
    Json,
    RelneuronError,
    atomic_write,
    refuse_overwrite,
)
from relneuron.results import (
    INPUTS,
    Headline,
    Result,
    Spread,
    Study,
    examples,
    headline,
    read_study,
    shared_neurons,
    site_counts,
    split_results,
)
from relneuron.tables import (
    NBSP,
    Table,
    accuracy_table,
    label,
    layer_table,
    named,
    neuron_table,
    percent,
    selection_table,
    show,
    split_title,
    splits_table,
    visible,
)

METHODS = {"ap": "average precision"}
DEMO_OPTIONS = ("top", "fdr", "permutations", "bootstrap", "noise")  # of identify


def write_report(study: Path, output: Path, *, force: bool = False) -> Path:
    """Write the report on the study directory `study` to `output`, one self-contained HTML file."""
    refuse_overwrite(output, force)
    if output.resolve() in [(study / name).resolve() for name in INPUTS]:
        raise RelneuronError(f"{output} is a file of the study", "choose another output", 2)
    atomic_write(output, render(read_study(study)).encode())
    return output


def render(study: Study) -> str:
    """The report as HTML text; whatever the study holds is shown as text."""
    try:
        from jinja2 import Environment, StrictUndefined

        context = page(study)
    except ImportError as error:
        raise RelneuronError(f"{error}", "pip install 'relneuron[all]'") from error
    environment = Environment(
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else visible(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"show": show, "label": label, "percent": percent}
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(context) + "\n"


def page(study: Study) -> Json:
    """Everything that report.html.j2 names."""
    from relneuron import figures

    results = split_results(study)
    main, more = results[0], results[1:]
    numbers, titles = headline(main), [split_title(result.split) for result in results]
    chosen, asked, off = (
        [label(name) for name in names] for names in (study.sets, main.relations, main.sets)
    )
    count = site_counts(study.sets.values(), study.neurons.model["layers"])
    shared = shared_neurons(study.sets.values())
    sizes = sorted(map(len, study.sets.values()))
    return {
        "model": study.neurons.model.get("id", "an unnamed model"),
        "method": METHODS.get(study.neurons.method, study.neurons.method),
        "main": main,
        "main_title": titles[0],
        "sizes": _span(sizes),
        "answer": answer(numbers, sizes, study.n_neurons),
        "headline": numbers,
        "n_seeds": main.random.shape[1],
        "is_one_size": not sizes or sizes[0] == sizes[-1],
        "left_out": [name for name, before in zip(asked, main.before, strict=True) if before == 0],
        "accuracy": figures.accuracy_plots([main], asked, [""], "accuracy")[0],
        "accuracy_tables": [accuracy_table(study, result) for result in results],
        "more": figures.accuracy_plots(more, asked, titles[1:], "more"),
        "splits_table": splits_table(results),
        "drop": figures.drop_heatmap(main, asked, off) if off else "",
        "drop_table": Table(
            "Accuracy drop per set switched off, %",
            ["relation asked", *off],
            named(asked, (100 * main.drop).tolist()),
        ),
        "side_effect": _side_effect(main),
        "layers": figures.layers_plot(count, chosen, SITES) if count.any() else "",
        "layer_note": _layer_note(study, count),
        "layer_table": layer_table(chosen, count),
        "selection_table": selection_table(study, count),
        "selection_note": _selection_note(study),
        "neuron_table": neuron_table(study),
        "significance": significance_notes(study),
        "overlap": figures.overlap_heatmap(shared, chosen) if len(chosen) > 1 and sizes[-1] else "",
        "overlap_note": _overlap_note(study, shared),
        "overlap_table": Table(
            "Neurons that two sets share", ["relation", *chosen], named(chosen, shared.tolist())
        ),
        "examples": list(examples(study, main).items()),
        "commands": commands(study.manifest),
        "manifest": study.manifest,
    }


# Text


def answer(numbers: Headline, sizes: Sequence[int], n_neurons: int) -> str:
    """The answer to the question, in one sentence."""
    if not sizes or not sizes[-1]:
        return "Nothing can be said: no neuron was chosen for any relation."
    share = " to ".join(dict.fromkeys(f"{100 * n / n_neurons:.2g}" for n in (sizes[0], sizes[-1])))
    text = (
        f"When the {_span(sizes)} neurons chosen for a relation ({share}{NBSP}% of the model's "
        f"{n_neurons:,} MLP neurons) are off, accuracy on that relation "
        f"{_change(numbers.own)} on average"
    )
    if math.isfinite(numbers.other.mean):
        text += f"; on the other relations it {_change(numbers.other)}"
    if math.isfinite(numbers.random.mean):
        # Random sets are as large as the largest set.
        number = "as many" if sizes[0] == sizes[-1] else f"{sizes[-1]:,}"
        text += f"; with {number} random neurons off instead it {_change(numbers.random)}"
    return f"{text}."


def _span(sizes: Sequence[int]) -> str:
    return " to ".join(dict.fromkeys(f"{n:,}" for n in (sizes[0], sizes[-1]))) if sizes else "no"


def _change(drop: Spread) -> str:
    if not math.isfinite(drop.mean):
        return "cannot be compared"
    text = percent(abs(drop.mean))
    if text == percent(0):
        return "stays the same"
    return f"{'falls' if drop.mean > 0 else 'rises'} by {text}"


def _side_effect(result: Result) -> str:
    foreign = np.where(result.own | np.isnan(result.drop), -np.inf, result.drop)
    if not foreign.size or not foreign.max() > 0:
        return ""
    r, c = np.unravel_index(foreign.argmax(), foreign.shape)
    return (
        f"The largest side effect: “{label(result.relations[r])}” loses {percent(foreign[r, c])} "
        f"of its accuracy when the neurons of “{label(result.sets[c])}” are off."
    )


def _layer_note(study: Study, count: NDArray[np.int64]) -> str:
    if not count.any():
        return "No neuron was chosen."
    shape = study.neurons.model
    widths = np.array([shape["width"], shape["width"], shape["hidden"]])
    chosen, all_neurons = (
        ", ".join(f"{site} {percent(n / sum(ns))}" for site, n in zip(SITES, ns, strict=True))
        for ns in (count.sum(axis=(0, 2)), widths)
    )
    return f"Of the chosen neurons: {chosen}; of all neurons: {all_neurons}."


def _overlap_note(study: Study, shared: NDArray[np.int64]) -> str:
    names, pairs = list(study.sets), np.triu(shared, 1)
    if not pairs.any():
        return "No two sets share a neuron."
    i, j = np.unravel_index(pairs.argmax(), pairs.shape)
    sizes = shared.diagonal().astype(float)
    chance = np.outer(sizes, sizes)[np.triu_indices(len(sizes), 1)].mean() / study.n_neurons
    return (
        f"Most shared: {pairs[i, j]:,}, by “{label(names[i])}” and “{label(names[j])}”. "
        f"Two random sets of such sizes would share {chance:.2g} on average."
    )


def _selection_note(study: Study) -> str:
    """How the sets were cut, if by q, and why some are empty."""
    rates = {f"{cut['fdr']}" for cut in study.neurons.selection.values() if "fdr" in cut}
    notes = [f"A set is every neuron with q ≤ {rate}." for rate in sorted(rates)]
    empty = [
        f"{label(name)} ({study.neurons.selection.get(name, {}).get('reason', 'no reason given')})"
        for name, chosen in study.neurons.sets.items()
        if not chosen
    ]
    if empty:
        notes.append(f"No neurons: {', '.join(empty)}.")
    return " ".join(notes)


def significance_notes(study: Study) -> list[str]:
    """What the interval, p and q of a score are, and the least sure ones; of those that are there.

    The numbers of draws are those that identify noted.
    """
    measured = [rows for rows in study.significance.values() if len(rows)]
    rows = np.concatenate(measured) if measured else np.empty((0, 4))
    has_p, has_q, has_interval = (bool(np.isfinite(rows[:, c]).any()) for c in range(3))
    stages = study.manifest.get("stages", {})
    inputs = stages.get("identify", {}).get("inputs", {})

    def count(name: str) -> str:
        n = inputs.get(name)
        return f"{n:,} " if isinstance(n, int) else ""

    notes = []
    if has_interval:
        notes.append(
            f"The 95{NBSP}% interval of a score is that of {count('bootstrap')}bootstrap resamples "
            "of the relation's prompts, positives and negatives apart."
        )
    if has_p:
        notes.append(
            f"p: the share of {count('permutations')}shufflings of the relation's labels that "
            f"score the neuron as high, itself counted; at most {np.nanmax(rows[:, 0]):.2g} here."
        )
    if has_q:
        notes.append(
            "q: among all neurons that rank as high, the expected share that carry nothing "
            f"(Benjamini–Hochberg over the model's {study.n_neurons:,} neurons, against "
            f"{count('noise')}columns of noise); at most {np.nanmax(rows[:, 1]):.2g} here."
        )
    if has_p or has_q:
        notes.append(
            "Low p and q say that a neuron tells the relation's prompts from the others', "
            "not that it does nothing else. Prompts count as independent of each other."
        )
    return notes


def commands(manifest: Json) -> list[str]:
    """The lines of a script that repeats the study, from the inputs each stage recorded."""
    model, stages = manifest.get("model") or {}, manifest.get("stages", {})
    name = str(model.get("id", "MODEL"))
    options = {stage: entry.get("inputs", {}) for stage, entry in stages.items()}
    if name == "relneuron demo":
        # The demo model has no name that the other commands take.
        taken = {key: options.get("identify", {}).get(key) for key in DEMO_OPTIONS}
        taken["random_seeds"] = options.get("ablate", {}).get("random_seeds")
        lines = [_command(["demo", "-o", "STUDY"], taken)]
    else:
        loading = {key: model.get(key) for key in ("dtype", "revision")}
        prompts, neurons = "STUDY/prompts.jsonl", "STUDY/neurons.json"
        fixed: dict[str, tuple[list[str], Json]] = {
            "prompts": (["FACTS_DIR", "-o", prompts], {}),
            "record": ([name, prompts, "-o", "STUDY"], loading),
            "identify": (["STUDY", "-o", neurons], {}),
            "ablate": ([name, neurons, prompts, "-o", "STUDY/effects.csv"], loading),
        }
        lines = [
            _command([stage, *words], {**options[stage], **more})
            for stage, (words, more) in fixed.items()
            if stage in options
        ]
    return "\n".join([*lines, "relneuron report STUDY -o report.html"]).split("\n")


def _command(words: list[str], options: Json) -> str:
    line = shlex.join(["relneuron", *words])
    for key, value in options.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        # What a stage was made from stands there too, by its digest: that is no option.
        is_digest = isinstance(value, dict) or re.fullmatch("[0-9a-f]{64}", text)
        if value is None or value is False or is_digest:
            continue
        line += " \\\n    " + shlex.join(
            ["--" + key.replace("_", "-"), text][: 1 if value is True else 2]
        )
    return line
