"""What each output of `generate` costs: a column of a csv, a classifier's logit, or a function.

`effect.py` compares them, and `methods/contrast/probe.py` may learn them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from relneuron.ablation.effect_options import OUTPUT, EffectOptions
from relneuron.ablation.measures import find_function
from relneuron.ablation.outputs import Generated
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.installed import need
from relneuron.artifact.journal import Journal, progress_bar
from relneuron.artifact.prompts import FIELD
from relneuron.artifact.reading import read_csv
from relneuron.texts.tokens import listed

COSTS = ("mask", "id", "seed", "cost")


class Price(NamedTuple):
    """What says the cost of lines, as finite numbers.

    of      (lines, journal) to their costs; a model's processes share the journal's batches
    model   the one that is asked; None: a table, or a function
    inputs  what its answers depend on, beside the lines
    """

    of: Callable[[Sequence[Generated], Journal | None], list[float]]
    model: Any = None
    inputs: Json = {}


def find_price(options: EffectOptions, *, quiet: bool = False) -> Price:
    """What says the cost of lines, as `options.cost` names it."""
    path, _, column = options.cost.rpartition(":")
    if Path(options.cost).is_dir():
        return _classified(options, quiet)
    if path.endswith(".csv") and column:
        return _of_column(Path(path), column)
    own = find_function(
        "--cost",
        options.cost,
        "a prompt and an output; or FILE.csv:COLUMN, or a classifier's folder",
        lambda _, output: f"the output {output[:60]!r}",
    )
    return Price(lambda lines, _: [own(line.prompt, line.output) for line in lines])


def _of_column(path: Path, column: str) -> Price:
    """A column of a csv, by the mask and id of its rows, and by their seed where lines have one."""

    def price(lines: Sequence[Generated], _: Journal | None) -> list[float]:
        by = ("mask", "id", "seed") if any(line.seed is not None for line in lines) else COSTS[:2]
        found: dict[tuple[str, ...], float] = {}
        for row in read_csv(path, (*by, column)):
            key = tuple(row[name] for name in by)
            if key in found:
                raise RelneuronError(
                    f"{path}, line {row.line}: a second row of {', '.join(key)}",
                    "give each output one row",
                )
            found[key] = row.finite(column)
        keys = [tuple(str(getattr(line, name)) for name in by) for line in lines]
        missing = [" ".join(key) for key in keys if key not in found]
        if missing:
            raise RelneuronError(
                f"{path} has no {column} of the output {listed(missing, 1)}",
                f"give it a row of each output, with the columns {', '.join((*by, column))}",
            )
        return [found[key] for key in keys]

    return Price(price)


def _classified(options: EffectOptions, quiet: bool) -> Price:
    """A classifier's logit of prompt and output in the template."""
    need("a classifier as --cost", "transformers")
    # These bring torch.
    from relneuron.model.classifier import load_classifier
    from relneuron.model.identity import model_digest, tokenizer_digest

    classifier = load_classifier(options.cost, dtype=options.dtype, device=options.device)
    label = classifier.place_of(options.label)
    template = options.template or FIELD + OUTPUT

    def price(lines: Sequence[Generated], journal: Journal | None) -> list[float]:
        texts = [written(template, line) for line in lines]
        with progress_bar(len(texts), "effect", "text", quiet) as bar, journal or nullcontext():
            return classifier.logits(texts, label, options.batch_tokens, bar.update, journal)

    inputs = {
        "classifier": model_digest(classifier.model),
        "tokenizer": tokenizer_digest(classifier.tokenizer),
        "label": label,
        "template": template,
        "batch_tokens": options.batch_tokens,
    }
    return Price(price, classifier.model, inputs)


def written(template: str, line: Generated) -> str:
    """A template with the prompt and the output of a line, whatever these have in braces."""
    given = {FIELD: line.prompt, OUTPUT: line.output}
    return re.sub("|".join(map(re.escape, given)), lambda found: given[found[0]], template)
