"""A folder of facts as the report needs it: neurons chosen by gradients, and what they do.

page.py calls `read_fact_study`, without a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from relneuron.analyses.changes import changes
from relneuron.artifact.effects import (
    Grid,
    fact_numbers,
    main_split,
    read_conditions,
    read_effects,
)
from relneuron.artifact.files import Json, RelneuronError, sha256
from relneuron.artifact.gradients import COMPLETENESS, COMPLETENESS_COLUMNS
from relneuron.artifact.neurons import NeuronFile, check_neurons
from relneuron.artifact.prompts import Prompt, read_prompts
from relneuron.artifact.reading import Cells, read_csv
from relneuron.methods.gradients.scored import FACT_COLUMNS, FACTS
from relneuron.report.page import PageKind, opened
from relneuron.report.tables import Table

_ATTRIBUTE = "attribute MODEL PROMPTS -o DIR --method ig"
_IDENTIFY = "identify DIR -o DIR/neurons.json --method knowledge_neurons"
_ABLATE = (
    "ablate MODEL DIR/neurons.json DIR/prompts.jsonl -o DIR/effects.csv --mode scale --factor 0 "
    "--positions last"
)
PAGE = PageKind(
    "study of facts",
    reads={
        "manifest.json": _IDENTIFY,
        "prompts.jsonl": _ATTRIBUTE,
        "neurons.json": _IDENTIFY,
        FACTS: _IDENTIFY,
        COMPLETENESS: _ATTRIBUTE,
        "effects.csv": _ABLATE,
        "effects.parquet": _ABLATE,
        "conditions.csv": _ABLATE,
    },
    needs=("manifest.json", "prompts.jsonl", "neurons.json", FACTS),
    marks=(FACTS,),
    hints=(),
    again="run the stages from identify on again",
    build="relneuron.methods.gradients.page:build",
    first=True,  # its effects are those of any study
)


@dataclass(frozen=True)
class FactStudy:
    """What the files say.

    changes   of each way that the sets were switched off, those that have any
    gaps      the rows of completeness.csv; none of gradients that were not of a path
    """

    manifest: Json
    neurons: NeuronFile
    prompts: Mapping[str, Prompt]
    facts: list[Cells]
    gaps: list[Cells]
    changes: Table | None

    @property
    def how(self) -> Json:
        """How the neurons were chosen."""
        found: Json = self.neurons.selection.get("how", {})
        return found

    @property
    def off(self) -> Json:
        """The options that `ablate` recorded."""
        found: Json = self.manifest["stages"].get("ablate", {}).get("inputs", {})
        return found


def read_fact_study(folder: Path) -> FactStudy:
    """Read a folder; a file whose digest is not the manifest's raises."""
    with opened(folder, PAGE) as manifest:
        prompts = {prompt.id: prompt for prompt in read_prompts(folder / "prompts.jsonl")}
        gaps = folder / COMPLETENESS
        study = FactStudy(
            manifest,
            NeuronFile.read(folder / "neurons.json"),
            prompts,
            list(read_csv(folder / FACTS, FACT_COLUMNS)),
            list(read_csv(gaps, COMPLETENESS_COLUMNS)) if gaps.exists() else [],
            _changes(folder, manifest, prompts),
        )
        _check(folder, study)
        return study


def _check(folder: Path, study: FactStudy) -> None:
    """Raise unless facts.csv is of the sets of neurons.json."""
    method = study.neurons.method
    if "how" not in study.neurons.selection:
        raise RelneuronError(
            f"{folder / FACTS} is not of the neurons beside it, which {method} chose",
            f"delete {FACTS}, or run again: relneuron {_IDENTIFY} --force",
        )
    known = {row[name] for row in study.facts for name in ("relation", "fact")}
    for name, rows in study.neurons.sets.items():
        check_neurons(rows, study.neurons.model)
        if name not in known:
            raise ValueError(f"{FACTS} has no fact or relation {name}")


def _changes(folder: Path, manifest: Json, prompts: Mapping[str, Prompt]) -> Table | None:
    names = [name for name in ("effects.csv", "effects.parquet") if (folder / name).exists()]
    asked = manifest["stages"].get("ablate", {}).get("inputs")
    if not names or asked is None or asked.get("neurons") != sha256(folder / "neurons.json"):
        return None  # of other neurons than these
    grids = read_effects(folder / names[0], read_conditions(folder / "conditions.csv"))
    grid: Grid = grids[main_split(grids)]
    grid.facts = fact_numbers(grid.ids, prompts)
    found = changes(grid, prompts)
    return found if found.rows else None
