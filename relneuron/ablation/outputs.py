"""What `generate` writes: a line for each text, the means of their scores, and what layers say.

`ablation/generate.py` calls it, the command for the table that it prints, and `effect.py`, which
reads the lines again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from relneuron.ablation.measures import summarise
from relneuron.artifact.files import RelneuronError, csv_bytes, require
from relneuron.artifact.reading import one_line, parse_json, read_lines
from relneuron.artifact.stage import Printed

if TYPE_CHECKING:
    from relneuron.model.lens import Read

SCORES = (
    *("mask", "group", "measure", "n_prompts", "n_seeds", "score", "sd_seeds", "low", "high"),
)
LENS = ("mask", "group", "id", "seed", "token", "layer", "entropy", "top")
STAGES = ("mask", "group", "n_tokens", "layer", "entropy", "stage")


class Generated(NamedTuple):
    """One line of the output; `n_tokens` are all tokens made, EOS left out.

    What is None stands in no line.
    """

    mask: str  # whose neurons are off, or those of which modules
    set: str  # whose neurons are at their mean activation
    id: str
    prompt: str
    output: str  # up to the first stop string
    n_tokens: int
    stopped: str  # by eos, a stop string, or the length
    group: str | None = None
    seed: int | None = None
    score: float | None = None


def beside(output: Path) -> tuple[Path, Path, Path]:
    """Where the scores, the lens and the stages stand."""
    return (
        output.with_name(f"{output.stem}.scores.csv"),
        output.with_name(f"{output.stem}.lens.csv"),
        output.with_name(f"{output.stem}.stages.csv"),
    )


def lines_bytes(lines: Sequence[Generated]) -> bytes:
    """The JSONL of all lines."""
    given = ({k: v for k, v in line._asdict().items() if v is not None} for line in lines)
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in given).encode()


_FIX = "give the .jsonl that relneuron generate wrote"


def read_outputs(path: Path) -> list[Generated]:
    """The lines of a JSONL that `lines_bytes` made, each mask, prompt and seed once."""
    found: dict[tuple[str, str, int | None], Generated] = {}
    for number, text in read_lines(require(path, "generate MODEL PROMPTS -o outputs.jsonl")):
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = parse_json(text, where, _FIX)
            line = Generated(**{name: record[name] for name in Generated._fields if name in record})
            if not all(isinstance(one, str) for one in line[:5]):
                raise TypeError("a field is no text")
            if not isinstance(line.seed, int | None):
                raise TypeError("its seed is no number")
        except TypeError as error:
            raise RelneuronError(f"{where}: no output ({one_line(error)})", _FIX) from error
        if found.setdefault((line.mask, line.id, line.seed), line) is not line:
            raise RelneuronError(f"{where}: a second output of {line.mask} for {line.id}", _FIX)
    if not found:
        raise RelneuronError(f"{path} holds no output", _FIX)
    return list(found.values())


def score_rows(lines: Sequence[Generated], measure: str) -> list[tuple[Any, ...]]:
    """scores.csv: of each mask and group what `measures.summarise` says.

    `score` is the mean over prompts and seeds; `sd_seeds` the standard deviation of the seeds' own
    means (empty of one seed); `low` and `high` a 95 % interval of the mean.
    """
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for line in lines:
        of = found.setdefault((line.mask, line.group or ""), {})
        of.setdefault(line.id, []).append(line.score or 0.0)
    rows = []
    for (mask, group), of in found.items():
        own = summarise(np.array(list(of.values())))
        spread = "" if own.sd_seeds is None else own.sd_seeds
        about = (mask, group, measure, own.n_prompts, own.n_seeds)
        rows.append((*about, own.mean, spread, own.low, own.high))
    return rows


def score_table(lines: Sequence[Generated], measure: str) -> Printed:
    """The mean score of each group under each mask, with the spread over several seeds."""
    rows = score_rows(lines, measure)
    groups = list(dict.fromkeys(row[1] for row in rows))
    cells = {
        (row[0], row[1]): f"{row[5]:.1%}" + (f" ±{row[6]:.1%}" if row[6] != "" else "")
        for row in rows
    }
    masks = dict.fromkeys(row[0] for row in rows)
    shown = [[mask, *(cells.get((mask, group), "") for group in groups)] for mask in masks]
    return Printed(("off", *(group or "all" for group in groups)), shown, f"mean {measure}")


def lens_tables(
    lines: Sequence[Generated], read: Sequence[Sequence[Sequence[Read]]], tokenizer: Any
) -> tuple[bytes, bytes]:
    """lens.csv and stages.csv, of what was read of each line's first tokens.

    lens.csv has a row for each token and layer: the entropy in nats of what the layer would say in
    place of the token, and its most probable tokens as a JSON list of texts. stages.csv has the
    mean entropy of each layer over the tokens of a mask and group, and the stage, 1 to 3, that
    `lens.stages` puts the layer in (empty with fewer than three layers).
    """
    from relneuron.model.lens import stages as stages_of  # which brings torch

    texts: dict[int, str] = {}
    rows: list[tuple[Any, ...]] = []
    curves: dict[tuple[str, str], list[list[float]]] = {}
    for line, tokens in zip(lines, read, strict=True):
        of = (line.mask, line.group or "")
        for number, layers in enumerate(tokens):
            curves.setdefault(of, []).append([entropy for entropy, _ in layers])
            for layer, (entropy, top) in enumerate(layers):
                for token in top:
                    if token not in texts:
                        texts[token] = str(tokenizer.decode([token]))
                said = json.dumps([texts[token] for token in top], ensure_ascii=False)
                seed = "" if line.seed is None else line.seed
                rows.append((*of, line.id, seed, number, layer, entropy, said))
    means = []
    for of, some in curves.items():
        curve = np.array(some).mean(0)
        borders = stages_of(curve)
        for layer, entropy in enumerate(curve.tolist()):
            stage = "" if borders is None else 1 + sum(layer >= border for border in borders)
            means.append((*of, len(some), layer, entropy, stage))
    return csv_bytes(LENS, rows), csv_bytes(STAGES, means)
