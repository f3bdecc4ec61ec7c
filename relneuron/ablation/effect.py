"""The `effect` command's work: how much of what the donor changes do patched neurons change.

It reads what `generate` wrote under the masks `clean` (the model itself), `donor` (the other model)
and those of patched neurons, and what each output costs (costs.py).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.ablation.costs import COSTS, find_price
from relneuron.ablation.effect_options import EffectOptions
from relneuron.ablation.measures import INSIDE, resampled
from relneuron.ablation.options import CLEAN, DONOR
from relneuron.ablation.outputs import Generated, read_outputs
from relneuron.artifact.files import (
    RelneuronError,
    atomic_write,
    csv_bytes,
    refuse_output,
    sha256,
    writing,
)
from relneuron.artifact.journal import Journal, n_started
from relneuron.artifact.manifest import checked, locked
from relneuron.artifact.stage import Printed

# A mask of random neurons: its seed and, where there are several sets, the one that it is beside.
_RANDOM = re.compile(r"random\.\d+(\..+)?")

Costs = NDArray[np.float64]


class Effect(NamedTuple):
    """One row of effect.csv: what patching under a mask does to the cost, beside the donor.

    effect     C = E[cost - cost_clean] / E[cost_donor - cost_clean]
    low, high  a 95 % interval of it; None where that of the denominator holds 0
    sd_masks   of `random.*`, the mean of all random masks: the standard deviation of their own
               effects (n - 1 in its denominator); None of a single mask
    donor_low, donor_high  a 95 % interval of the denominator
    """

    mask: str
    n_prompts: int
    n_seeds: int
    cost_clean: float
    cost_donor: float
    cost: float
    effect: float | None
    low: float | None
    high: float | None
    sd_masks: float | None
    donor_low: float
    donor_high: float


def causal_effects(costs: Mapping[str, Costs]) -> list[Effect]:
    """The causal effect of each mask, from costs (prompts, seeds) of every mask, clean and donor.

    C = E[F(w1~) - F(w1)] / E[F(w2) - F(w1)] (arXiv 2406.14144) over prompts and seeds, where w1 is
    the text of the model itself, w1~ that of the patched model and w2 that of the donor, to the
    same prompt. The interval is a bootstrap by percentiles: prompts are drawn with all of their
    seeds and masks, so that numerator and denominator are of one draw.
    """
    clean, donor = costs[CLEAN], costs[DONOR]
    n_prompts, n_seeds = clean.shape
    masks = {name: [name] for name in costs if name not in (CLEAN, DONOR)}
    for name in list(masks):
        if drawn_by := _RANDOM.fullmatch(name):
            masks.setdefault(f"random.*{drawn_by[1] or ''}", []).append(name)
    changes = {name: (costs[name] - clean).mean(1) for name in (DONOR, *costs)}
    columns = [np.mean([changes[name] for name in of], axis=0) for of in masks.values()]
    drawn = resampled(np.stack([changes[DONOR], *columns], axis=1))
    whole = float(changes[DONOR].mean())
    donor_low, donor_high = np.quantile(drawn[:, 0], INSIDE).tolist()
    is_certain = not donor_low <= 0 <= donor_high
    found = []
    for number, (mask, of) in enumerate(masks.items(), 1):
        effects = [float(changes[name].mean()) / whole for name in of if whole]
        low = high = None
        if is_certain:
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = drawn[:, number] / drawn[:, 0] + 0.0  # no -0
            # A rare draw may have a denominator of 0: no quantile is taken between two draws.
            low, high = np.nanquantile(ratios, INSIDE, method="nearest").tolist()
        change = float(columns[number - 1].mean())
        found.append(
            Effect(
                mask,
                n_prompts,
                n_seeds,
                float(clean.mean()),
                float(donor.mean()),
                float(np.mean([costs[name] for name in of])),
                change / whole + 0.0 if whole else None,
                low,
                high,
                float(np.std(effects, ddof=1)) if whole and of[1:] else None,
                donor_low,
                donor_high,
            )
        )
    return found


def by_mask(lines: Sequence[Generated], costs: Sequence[float], where: Path) -> dict[str, Costs]:
    """Costs (prompts, seeds) of each mask in a file: each has outputs to the prompts of `clean`."""
    found: dict[str, dict[tuple[str, int | None], float]] = {}
    for line, cost in zip(lines, costs, strict=True):
        found.setdefault(line.mask, {})[line.id, line.seed] = cost
    ids = list(dict.fromkeys(key for key, _ in found[CLEAN]))
    seeds = list(dict.fromkeys(seed for _, seed in found[CLEAN]))
    asked = [(key, seed) for key in ids for seed in seeds]
    for mask, of in found.items():
        if {*of} != {*asked}:
            key, seed = next(iter({*asked} ^ {*of}))
            which = key if seed is None else f"{key} (seed {seed})"
            raise RelneuronError(
                f"{where}: of {mask} and {CLEAN} only one has an output for {which}",
                "generate all masks in one command",
            )
    return {
        mask: np.array([of[key] for key in asked]).reshape(len(ids), len(seeds))
        for mask, of in found.items()
    }


def effect(
    outputs: Path,
    output: Path,
    options: EffectOptions,
    *,
    force: bool = False,
    quiet: bool = False,
) -> list[Effect]:
    """Write what each mask of `outputs` does (`output`), and what each line costs beside it.

    The costs (`<stem>.costs.csv`) can be given again as `<stem>.costs.csv:cost`. A classifier that
    says them keeps `<output>.journal`, by which a killed run goes on.
    """
    if output.suffix != ".csv":
        raise RelneuronError(f"{output} is no .csv", "give a name that ends in .csv", 2)
    beside = output.with_name(f"{output.stem}.costs.csv")
    for path in (output, beside):
        refuse_output(path, "effect", force)
    lines = read_outputs(checked(outputs))
    masks = list(dict.fromkeys(line.mask for line in lines))
    missing = [name for name in (CLEAN, DONOR) if name not in masks]
    if missing or len(masks) < 3:
        what = f"the mask {missing[0]}" if missing else "a mask of patched neurons"
        raise RelneuronError(
            f"{outputs} lacks {what}: it has {', '.join(masks)}",
            "make it with: relneuron generate MODEL PROMPTS --mode patch --from DONOR --neurons "
            "NEURONS --off clean,donor,SET -o OUTPUTS",
            2,
        )
    by_mask(lines, [0.0] * len(lines), outputs)
    price = find_price(options, quiet=quiet)
    with _sharing(price.model, output.parent) as ranks:
        journal = None
        if price.model is not None:
            inputs = {"outputs": sha256(outputs), **price.inputs}
            path = output.with_name(f"{output.name}.journal")
            with ranks.in_turn():
                journal = Journal(path, inputs, ranks=ranks, shard=options.shard)
            costs = price.of(lines, journal)
        elif ranks is None:
            costs = price.of(lines, None)
        else:  # only the first process reads the table, or calls the function
            costs = ranks.told(price.of(lines, None) if ranks.rank == 0 else None)
        found = causal_effects(by_mask(lines, costs, outputs))
        if found[0].low is None:
            low, high = found[0].donor_low, found[0].donor_high
            warnings.warn(
                f"the donor's cost differs by {low:.4g} to {high:.4g} from the model's own, an "
                "interval that holds 0: effects are parts of what may be nothing, and have no "
                "interval",
                stacklevel=2,
            )
        if ranks is None or ranks.rank == 0:
            rows = [
                (line.mask, line.id, "" if line.seed is None else line.seed, cost)
                for line, cost in zip(lines, costs, strict=True)
            ]
            with writing("effect", output.parent, [beside, output]):
                atomic_write(beside, csv_bytes(COSTS, rows))
                atomic_write(output, csv_bytes(Effect._fields, [_cells(one) for one in found]))
                if journal is not None:
                    journal.remove()
    return found


@contextmanager
def _sharing(model: Any, folder: Path) -> Iterator[Any]:
    """The processes that share the work in `folder`, held by the first one.

    None where no model is asked and there is one process: torch takes longer than a table.
    """
    if model is None and n_started() == 1:
        with locked(folder):
            yield None
        return
    from relneuron.model.ranks import sharing

    with sharing(model, folder) as ranks:
        yield ranks


def _cells(one: Effect) -> list[object]:
    return ["" if value is None else value for value in one]


def effect_table(found: Sequence[Effect]) -> Printed:
    """The cost and the effect of each mask."""
    rows = [[CLEAN, f"{found[0].cost_clean:.4g}", ""], [DONOR, f"{found[0].cost_donor:.4g}", "1"]]
    for one in found:
        said = "" if one.effect is None else f"{one.effect:.3f}"
        said += "" if one.low is None else f" [{one.low:.3f}, {one.high:.3f}]"
        said += "" if one.sd_masks is None else f" ±{one.sd_masks:.3f}"
        rows.append([one.mask, f"{one.cost:.4g}", said])
    return Printed(("mask", "mean cost", "causal effect"), rows)
