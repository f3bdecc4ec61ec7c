"""The `report` stage: a study directory in, one HTML file that opens offline out.

results.py reads the study, figures.py draws, report.html.j2 lays out; here are the words and the
tables. The same study gives the same bytes.
"""

from __future__ import annotations

import base64
import math
import re
import shlex
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.artifact import (
    SITES,
    Json,
    RelneuronError,
    atomic_write,
    csv_bytes,
    refuse_overwrite,
)
from relneuron.results import (
    INPUTS,
    Headline,
    Result,
    Spread,
    Study,
    examples,
    flips,
    headline,
    read_study,
    shared_neurons,
    site_counts,
    split_results,
    spread,
)

SPLITS = {
    "eva": "evaluation prompts",
    "eva2": "alternative templates",
    "det": "prompts that chose the neurons",
}
METHODS = {"ap": "average precision"}
HIDDEN = ("Cc", "Cf", "Cn", "Cs", "Zl", "Zp")
NBSP = "\N{NO-BREAK SPACE}"


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
        "left_out": [name for name, before in zip(asked, main.before, strict=True) if before == 0],
        "accuracy": figures.accuracy_plots([main], asked, [""], "accuracy")[0],
        "accuracy_tables": [accuracy_table(study, result) for result in results],
        "more": figures.accuracy_plots(more, asked, titles[1:], "more"),
        "splits_table": splits_table(results),
        "drop": figures.drop_heatmap(main, asked, off) if off else "",
        "drop_table": Table(
            "Accuracy drop per set switched off, %",
            ["relation asked", *off],
            _named(asked, (100 * main.drop).tolist()),
        ),
        "side_effect": _side_effect(main),
        "layers": figures.layers_plot(count, chosen, SITES) if count.any() else "",
        "layer_note": _layer_note(study, count),
        "layer_table": layer_table(chosen, count),
        "selection_table": selection_table(study, count),
        "overlap": figures.overlap_heatmap(shared, chosen) if len(chosen) > 1 and sizes[-1] else "",
        "overlap_note": _overlap_note(study, shared),
        "overlap_table": Table(
            "Neurons that two sets share", ["relation", *chosen], _named(chosen, shared.tolist())
        ),
        "examples": list(examples(study, main).items()),
        "commands": commands(study.manifest),
        "manifest": study.manifest,
    }


# Text


def visible(text: str) -> str:
    """`text` with controls, direction overrides and unencodable characters written as escapes."""
    return "".join(
        char.encode("unicode_escape", "surrogatepass").decode("ascii")
        # The zero-width joiners are part of ordinary words in several scripts.
        if unicodedata.category(char) in HIDDEN and char not in "\u200c\u200d"
        else char
        for char in text
    )


def label(name: str) -> str:
    """A relation's name for people: company_ceo -> company ceo."""
    return visible(name).replace("_", " ")


def split_title(split: str) -> str:
    """eva2.de -> alternative templates, de."""
    base, _, language = split.partition(".")
    title = SPLITS.get(base, base)
    return visible(f"{title}, {language}" if language else title)


def one_decimal(value: float) -> str:
    text = f"{round(value, 1) + 0.0:,.1f}".replace("-", "−")
    return text if math.isfinite(value) else "–"


def percent(value: float) -> str:
    return f"{one_decimal(100 * value)}{NBSP}%" if math.isfinite(value) else "–"


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
        text += f"; with as many random neurons off instead it {_change(numbers.random)}"
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


def commands(manifest: Json) -> list[str]:
    """The lines of a script that repeats the study, from the inputs each stage recorded."""
    model, stages = manifest.get("model") or {}, manifest.get("stages", {})
    name = str(model.get("id", "MODEL"))
    options = {stage: entry.get("inputs", {}) for stage, entry in stages.items()}
    if name == "relneuron demo":
        # The demo model has no name that the other commands take.
        top = options.get("identify", {}).get("top")
        seeds = options.get("ablate", {}).get("random_seeds")
        lines = [_command(["demo", "-o", "STUDY"], {"top": top, "random_seeds": seeds})]
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


# Tables


class Table(NamedTuple):
    """Cells are text, whole numbers, or floats that are shown with one decimal."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]

    @property
    def filename(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-") + ".csv"

    def uri(self) -> str:
        """The table as a csv file inside a link; no cell of text can act as a formula."""
        rows = [[_plain(value) for value in row] for row in (self.columns, *self.rows)]
        data = csv_bytes(rows[0], rows[1:])
        return "data:text/csv;charset=utf-8;base64," + base64.b64encode(data).decode("ascii")


def show(value: str | float) -> str:
    """A cell as a person reads it."""
    if isinstance(value, str):
        return visible(value)
    return one_decimal(value) if isinstance(value, float) else f"{value:,}"


def _plain(value: str | float) -> str:
    if isinstance(value, str):
        # Spreadsheets run a cell that begins like a formula; an apostrophe makes it text.
        text = visible(value)
        return f"'{text}" if text.lstrip().startswith(tuple("=+-@＝＋－＠")) else text
    if isinstance(value, int):
        return str(value)
    return f"{value:.6g}" if math.isfinite(value) else ""


def accuracy_table(study: Study, result: Result) -> Table:
    columns = [
        *("relation", "prompts", "before, %", "own set off, %", "answers lost", "answers gained"),
        *("random, mean %", "random, lowest %", "random, highest %"),
    ]
    rows: list[list[str | float]] = [
        [
            label(name),
            int(result.n_prompts[r]),
            *(100 * result.before[r], 100 * result.after[r]),
            *flips(study, name, result.split),
            *(100 * value for value in spread(result.random[r])),
        ]
        for r, name in enumerate(result.relations)
    ]
    return Table(f"Accuracy on {split_title(result.split)}", columns, rows)


def splits_table(results: Sequence[Result]) -> Table:
    columns = ["prompts", "own set, %", "other sets, %", "random sets, %"]
    means = [[100 * drop.mean for drop in headline(result)] for result in results]
    rows = _named([split_title(result.split) for result in results], means)
    return Table("Mean accuracy drop by kind of prompt", columns, rows)


def layer_table(names: Sequence[str], count: NDArray[np.int64]) -> Table:
    columns = ["relation", "site", "all layers", *(f"layer {i}" for i in range(count.shape[2]))]
    rows = [
        [name, site, sum(row), *row]
        for name, by_site in zip(names, count.tolist(), strict=True)
        for site, row in zip(SITES, by_site, strict=True)
    ]
    return Table("Chosen neurons by site and layer", columns, rows)


def selection_table(study: Study, count: NDArray[np.int64]) -> Table:
    """How each set was cut out of the ranking, and on how many prompts the ranking rests."""
    columns = [
        *("relation", "prompts", "answered right", "neurons", *SITES),
        *("best score", "score at cut", "ties at cut", "perfect"),
    ]
    rows: list[list[str | float]] = []
    sets = study.neurons.sets.items()
    for (name, chosen), by_site in zip(sets, count.sum(axis=2).tolist(), strict=True):
        n_prompts = sum(p.relation == name and p.split == "det" for p in study.prompts.values())
        cut = study.neurons.selection.get(name, {})
        right, *ties = (cut.get(key, 0) for key in ("positives", "ties_at_cut", "perfect"))
        ends = [f"{end:.4f}" for end in (chosen[0][3], chosen[-1][3])] if chosen else ["–", "–"]
        rows.append([label(name), n_prompts, right, sum(by_site), *by_site, *ends, *ties])
    return Table("How the sets were chosen", columns, rows)


def _named(names: Sequence[str], rows: list[list[float]]) -> list[list[str | float]]:
    return [[name, *row] for name, row in zip(names, rows, strict=True)]
