"""What `attribute --method ig` and `--method relevance` would take: `attribute --dry-run`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from relneuron.artifact.files import RelneuronError, csv_bytes
from relneuron.artifact.gradients import (
    COMPLETENESS,
    COMPLETENESS_COLUMNS,
    FILES,
    IG,
    RELEVANCE,
    gradients_bytes,
)
from relneuron.artifact.options import LoadOptions
from relneuron.artifact.planned import Planned
from relneuron.artifact.prompts import Prompt, check_copy
from relneuron.methods.gradients.asking import asked_lengths, end_of_text
from relneuron.methods.gradients.attribute import refuse_outputs
from relneuron.methods.gradients.commands import check
from relneuron.methods.gradients.options import GradientOptions, IgOptions
from relneuron.model.batches import cut
from relneuron.model.dry import DIGEST, Dry, Work, dry_model
from relneuron.model.gradients.reference import alphas
from relneuron.model.mlps.shape import refuse_sites
from relneuron.model.targets import Targets, read_asked

_NUMBER = f"{0.123456789:.9g}"  # as long as most scores are


def attribute(
    model: str,
    prompts: Path,
    output: Path,
    options: GradientOptions,
    load_options: LoadOptions,
    *,
    method: str,
    force: bool,
    quiet: bool,
) -> Iterator[Planned]:
    """The plan of `attribute --method ig` and `--method relevance`, with their parameters."""
    check(prompts, output, options, load_options)
    dry = dry_model(model, load_options)
    refuse_sites(dry.shape, [options.site] if options.site in ("up", "gate") else [])
    if dry.order.experts[0]:
        raise RelneuronError(
            "the layers have experts: which of them a token goes to has no gradient",
            "give a model without experts",
        )
    asked = read_asked(prompts, output, dry.model, dry.tokenizer, options)
    prompted, targets = asked.prompts, asked.targets
    lengths = asked_lengths(dry.model, prompted, targets, options)
    refuse_outputs(output, IG if isinstance(options, IgOptions) else RELEVANCE, force)
    check_copy(output / "prompts.jsonl", prompts, asked.copy, force)
    if getattr(options, "baseline", "") == "replaced":
        end_of_text(dry.tokenizer)
    yield plan_attribute(dry, prompted, targets, lengths, options, len(asked.copy))


def plan_attribute(
    dry: Dry,
    prompts: Sequence[Prompt],
    targets: Targets,
    lengths: Sequence[int],
    options: GradientOptions,
    copy_bytes: int,
) -> Planned:
    """The plan of sentences with their targets; `copy_bytes` are those of prompts.jsonl.

    Weights have no gradient here, so that a backward costs what the forward does. Of integrated
    gradients by the staircase: a forward of the sentence, and for each layer and step a row at the
    last token, which climbs the layers above it and comes down again: of E sentences with s steps,
    the baseline's among them, 2 E s (L + 1) / 2 of a token's operations, and 2 E s L of the head's.
    """
    work, n_layers = Work(dry), dry.order.layers
    method = IG if isinstance(options, IgOptions) else RELEVANCE
    is_all = isinstance(options, IgOptions) and options.asks_all
    goals = [len(own) if is_all else 1 for own in targets.tokens or [[0]] * len(prompts)]
    n_steps = 0
    if isinstance(options, IgOptions):
        points = list(alphas(options.schedule, options.steps))
        columns = [
            (n + n_layers * (len(points) + 1)) * k for n, k in zip(lengths, goals, strict=True)
        ]
        n_steps = len(points) + (0.0 not in points)
    else:
        columns = list(lengths)
    by_length = sorted(range(len(prompts)), key=lambda row: lengths[row])
    costs = dry.costs
    for rows in cut(by_length, columns.__getitem__, options.batch_tokens):
        own = [lengths[row] for row in rows]
        n, longest = sum(goals[row] for row in rows), max(own)
        more = costs.flops(n, longest)  # back again
        if n_steps:
            climbed = (costs.token + costs.pair * longest) * (n_layers + 1) // 2
            more = 2 * n * n_steps * (climbed + costs.logit * n_layers)
        # Every token of an answer is asked for in a row of its own.
        more += costs.flops(n, longest) - costs.flops(len(own), longest)
        work.batch(own, less=-more)
    about = {
        "prompts": DIGEST,
        "ids": [p.id for p in prompts],
        "relations": [p.relation for p in prompts],
        "targets": [own if is_all else own[:1] for own in targets.tokens]
        or [[token] for token in targets.targets],
        "model": DIGEST,
        "position": "last" if method == IG else "all",
        "probability": "float32",
        **options.recorded(),
    }
    files: dict[str, int | None] = {
        FILES[method]: gradients_bytes(method, dry.shape, about),
        "prompts.jsonl": copy_bytes,
    }
    if method == IG:
        rows_ = ((p.id, p.relation, la, *[_NUMBER] * 5) for p in prompts for la in range(n_layers))
        files[COMPLETENESS] = len(csv_bytes(COMPLETENESS_COLUMNS, rows_))
    n_scores = files[FILES[method]] or 0
    return dry.planned(
        f"attribute {method}",
        {"sentences": len(prompts), "asked for": sum(goals)},
        **work.told,
        tensors={"activations": _graph_bytes(dry, work, n_steps)},
        host={"scores, of the disk": n_scores},
        files=files,
        notes=[
            "attribute ig: by one prefill; a model that is integrated layer by layer takes up to "
            f"{n_layers} times as long"
        ]
        if n_steps
        else [],
    )


def _graph_bytes(dry: Dry, work: Work, n_steps: int) -> int:
    """What a backward needs of a forward: of each token and layer its stream and its neurons."""
    rows, width, _ = work.largest
    hidden, neurons = dry.order.widths["down"], dry.order.widths["gate"]
    tokens = rows * width + rows * n_steps * (dry.order.layers + 1) // 2
    kept = tokens * dry.order.layers * (8 * hidden + 4 * neurons)
    logits = 3 * max(rows, rows * n_steps * dry.order.layers) * dry.vocabulary
    return int(dry.model.dtype.itemsize * kept + 4 * logits)
