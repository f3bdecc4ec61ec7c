"""The `report` stage: a study directory in, one HTML file that opens offline out.

analyses/study.py reads the study, analyses/chosen.py and analyses/page.py make the sections,
report/kit.py and analyses/figures.py draw, report/report.html.j2 lays out; here are the first words
and the last. A study of a corpus has methods/counts for that, an attribution methods/gains. The
same study gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relneuron.analyses.study import Study, examples, read_study
from relneuron.artifact.command import commands
from relneuron.artifact.files import Json, RelneuronError, atomic_write
from relneuron.artifact.installed import need
from relneuron.artifact.manifest import locked
from relneuron.artifact.writing import refuse_output, writing
from relneuron.methods.counts.study import (
    GROUP_INPUTS,
    GroupStudy,
    is_group_study,
    read_group_study,
)
from relneuron.methods.gains.study import (
    ATTRIBUTION_INPUTS,
    AttributionStudy,
    is_attribution,
    read_attribution_study,
)
from relneuron.report.results import INPUTS, Headline, Result, Spread, headline, split_results
from relneuron.report.tables import NBSP, Number, Table, label, percent, show, split_title, visible

if TYPE_CHECKING:
    from relneuron.report.parts import Section

AnyStudy = Study | GroupStudy | AttributionStudy

METHODS = {"ap": "average precision", "logprob_gain": "log-probability gain"}
ORDER = (
    *("accuracy", "prompts", "drop", "interference", "perplexity"),
    *("sizes", "cumulativity", "sites", "layers", "scores", "overlap", "versatility", "concepts"),
    *("gain", "resilience", "errors"),
)


def write_report(
    study: Path,
    output: Path,
    *,
    force: bool = False,
    finish: Callable[[list[Path]], object] = lambda tables: None,
) -> Path:
    """Write the report on the study directory `study` to `output`, one self-contained HTML file.

    Inside the study directory the tables of its analyses are written too. `finish` is called with
    their paths once all is written; without it the files count as unfinished.
    """
    refuse_output(output, "report", force)
    inputs = (*INPUTS, *GROUP_INPUTS, *ATTRIBUTION_INPUTS)
    if output.resolve() in [(study / name).resolve() for name in inputs]:
        raise RelneuronError(f"{output} is a file of the study", "choose another output", 2)
    folder, found = output.parent, read_any(study)
    is_inside = folder.resolve() == study.resolve()
    with locked(folder, *([folder / "analyses"] if is_inside else [])):
        html = render(found)
        made = tables(found) if is_inside else {}
        paths = [folder / "analyses" / f"{key}.csv" for key in made]
        with writing("report", folder, [output, *paths]):
            if is_inside:
                write_tables(folder, made)
            atomic_write(output, html.encode())
            finish(paths)
    return output


def read_any(folder: Path) -> AnyStudy:
    """Read a folder as what it is, by the files it holds."""
    if is_attribution(folder):
        return read_attribution_study(folder)
    return read_group_study(folder) if is_group_study(folder) else read_study(folder)


def tables(study: AnyStudy) -> dict[str, Table]:
    """The tables that other programs read."""
    if isinstance(study, Study):
        return study.tables
    if isinstance(study, AttributionStudy):
        from relneuron.methods.gains.tables import attribution_tables

        return attribution_tables(study)
    from relneuron.methods.counts.tables import group_tables

    return group_tables(study)


def write_tables(folder: Path, tables: Mapping[str, Table]) -> list[Path]:
    """Write each table to analyses/<key>.csv in `folder`, in full precision; others there go."""
    paths = [folder / "analyses" / f"{key}.csv" for key in tables]
    for old in set((folder / "analyses").glob("*.csv")) - set(paths):
        old.unlink()
    for path, table in zip(paths, tables.values(), strict=True):
        atomic_write(path, table.csv())
    return paths


def render(study: AnyStudy) -> str:
    """The report as HTML text; whatever the study holds is shown as text."""
    need("a report", "jinja2", "matplotlib", "scipy")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    if isinstance(study, Study):
        template, context = "report.html.j2", page(study)
    elif isinstance(study, AttributionStudy):
        from relneuron.methods.gains.report import attribution_page

        template, context = "report_attribution.html.j2", attribution_page(study)
        context["commands"] = commands(study.manifest)
    else:
        from relneuron.methods.counts.report import group_page

        template, context = "report_groups.html.j2", group_page(study)
        context["commands"] = commands(study.manifest)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "report"),
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else visible(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"show": show, "label": label, "percent": percent}
    environment.tests["text"] = lambda cell: isinstance(cell, str) and not isinstance(cell, Number)
    return environment.get_template(template).render(context) + "\n"


def page(study: Study) -> Json:
    """Everything that report.html.j2 names."""
    results = split_results(study.grids)
    main = results[0]
    numbers = headline(main)
    sizes = sorted(len(chosen) for chosen in study.sets.values() if chosen)
    return {
        "model": study.neurons.model.get("id", "an unnamed model"),
        "method": METHODS.get(study.neurons.method, study.neurons.method),
        "main": main,
        "main_title": split_title(main.split),
        "sizes": _span(sizes),
        "answer": unknown(main) or answer(numbers, sizes, study.n_neurons),
        "off": off(study.manifest),
        "headline": numbers,
        "n_seeds": main.random.shape[1],
        "left_out": [label(main.relations[r]) for r in np.flatnonzero(~main.known)],
        "sections": sections(study, results),
        "examples": list(examples(study, main).items()),
        "commands": commands(study.manifest),
        "manifest": study.manifest,
    }


def sections(study: Study, results: Sequence[Result]) -> list[Section]:
    """What the study has data for, in the order of the page."""
    from relneuron.analyses.chosen import neuron_sections
    from relneuron.analyses.page import analysis_sections

    found = analysis_sections(study, results) + neuron_sections(study, results)
    return sorted(found, key=lambda section: ORDER.index(section.key))


# Text


def unknown(result: Result) -> str:
    """Why nothing can be answered where the model knows none of the relations; "" if it does."""
    measured = result.before[np.isfinite(result.before)]
    if not measured.size or result.known.any():
        return ""
    return (
        f"Nothing can be said: the model as it is answers {percent(measured.mean())} of the "
        f"prompts right, at most {percent(measured.max())} of a relation's, too few for a drop or "
        "a rise to mean anything."
    )


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


def off(manifest: Json) -> str:
    """What sets and "off" are where not as in the paper: the best, at zero at every position."""
    asked = manifest.get("stages", {}).get("ablate", {}).get("inputs", {})
    of = {"all": "all det prompts", "relation": "the relation's det prompts"}
    means = {
        "scale": f"outputs times {asked.get('factor')}",
        "mean": f"outputs at their mean over {of.get(asked.get('mean_of', ''), 'det prompts')}",
        "p50": "outputs at their median over what the relation was found with",
        "p90": "outputs at their 90th percentile over what the relation was found with",
        "off_mean": "outputs at their mean over what the relation was compared with",
    }
    tokens = {
        "prompt": "at the tokens of the prompt only",
        "last": "at the last token of the prompt and those of the answer only",
    }
    known = [means.get(asked.get("mode", "")), tokens.get(asked.get("positions", ""))]
    found = manifest.get("stages", {}).get("identify", {}).get("inputs", {})
    ends = {
        "bottom": "A set holds the neurons with the lowest scores.",
        "both": "A set holds the neurons with the highest scores and as many with the lowest.",
    }
    sentences = [ends.get(found.get("ends", ""), "")]
    if any(known):
        where = f", {known[1]}" if known[1] else ""
        sentences.append(f"“Off” means here: {known[0] or 'outputs at zero'}{where}.")
    return " ".join(filter(None, sentences))


def _span(sizes: Sequence[int]) -> str:
    return " to ".join(dict.fromkeys(f"{n:,}" for n in (sizes[0], sizes[-1]))) if sizes else "no"


def _change(drop: Spread) -> str:
    if not math.isfinite(drop.mean):
        return "cannot be compared"
    text = percent(abs(drop.mean))
    if text == percent(0):
        return "stays the same"
    return f"{'falls' if drop.mean > 0 else 'rises'} by {text}"
