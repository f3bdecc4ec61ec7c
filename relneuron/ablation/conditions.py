"""Which neurons are off under which condition: the sets that `ablate` compares, and their prompts.

The stage calls it; nothing here needs a model. Neurons are their places in the order (layer,
gate < up < down, index), as everywhere in a ranking.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relneuron.artifact.effects import Condition, main_split, own_languages, split_name
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.modules import QFORMER, is_asked, module_layers
from relneuron.artifact.neurons import NeuronFile, Shape, all_scores, check_neurons, random_neurons
from relneuron.artifact.prompts import Prompt, rows_about
from relneuron.artifact.reading import open_tensors

Places = NDArray[np.int64]
_NONE: Places = np.empty(0, np.int64)

# What can be asked beside the clean model, the relations' sets and the random ones.
PAPER_SIZES = (10, 50, 200, 500, 1000, 3000, 10000, 20000, 50000)  # arXiv 2502.17355, section 5.1
PAPER_TOP = 3000
_GAIN = "logprob_gain.gate"


@dataclass(frozen=True)
class Ablation:
    """One condition, the places of its neurons (K,) ascending, and the prompts it is asked."""

    condition: Condition
    places: Places
    prompts: Sequence[int]


def read_sets(
    neurons: NeuronFile, shape: Mapping[str, int]
) -> tuple[dict[str, Places], dict[str, int]]:
    """Each set's places, best first and each once; and how many doubles each set had."""
    order = Shape.of(shape)
    sets, doubles = {}, {}
    for name, rows in neurons.sets.items():
        sets[name] = order.places(check_neurons(rows, shape))
        if len(rows) > len(sets[name]):
            doubles[name] = len(rows) - len(sets[name])
    return sets, doubles


def empty_sets(sets: Mapping[str, Sized]) -> list[str]:
    """A notice for each set without neurons; if there is no other, RelneuronError."""
    empty = [name for name, chosen in sets.items() if not len(chosen)]
    if len(empty) == len(sets):
        raise RelneuronError(
            f"no neuron to switch off: {', '.join(empty) or 'the file'} "
            f"{'have' if empty[1:] else 'has'} none",
            "give sets with neurons: identify with other options, such as a larger --top",
        )
    return [f"{name}: its set has no neuron, so that nothing is off for it" for name in empty]


def scores_beside(neurons: Path) -> Path:
    """The scores that neurons were cut from: of x.json x.scores.safetensors, if it is there."""
    own = neurons.with_name(f"{neurons.stem}.scores.safetensors")
    return own if own.exists() else neurons.with_name("scores.safetensors")


def read_rankings(
    path: Path, sets: Mapping[str, Places], shape: Mapping[str, int]
) -> dict[str, Places]:
    """All neurons, best first, by the scores that each set was cut from.

    Of log-probability gains these are the neurons of the site `gate` only. Without
    scores.safetensors, or with one that ranks others first or has scores of another kind, the set
    itself is all that is known of the ranking.
    """
    rankings = dict(sets)
    for name, (flat, places) in _read_scores(path, shape).items():
        chosen = sets.get(name)
        if chosen is None or not np.isfinite(flat).all():
            continue
        best = places[np.argsort(-flat, kind="stable")]
        if np.array_equal(np.sort(best[: len(chosen)]), np.sort(chosen)):
            rankings[name] = best
    return rankings


def _read_scores(
    path: Path, shape: Mapping[str, int]
) -> dict[str, tuple[NDArray[np.float32], Places]]:
    """Each relation's scores (K,) and the places (K,) of the neurons that have them."""
    if not path.exists():
        return {}
    sites = Shape.of(shape)
    keys = {f"ap.{site}": site for site in sites.widths}
    with open_tensors(path, "identify DIR -o DIR/neurons.json") as file:
        order = file.names_of("relations")
        widths = {key: sites.widths[site] for key, site in keys.items()}
        widths |= {_GAIN: sites.widths["gate"]}
        scores = {
            name: file.get(name, (len(order), sites.layers, width))
            for name, width in widths.items()
            if name in file.names
        }
    if scores.keys() >= keys.keys():
        everything = np.arange(sites.total)
        return {
            name: (
                all_scores({site: scores[key][row] for key, site in keys.items()}, sites),
                everything,
            )
            for row, name in enumerate(order)
        }
    if _GAIN in scores:
        gates = Shape(sites.layers, {"gate": sites.widths["gate"]}, sites.inner)
        places = sites.site_places("gate")
        return {
            name: (gates.flat({"gate": scores[_GAIN][row]}), places)
            for row, name in enumerate(order)
        }
    return {}


def module_sets(modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The sets of modules whose neurons MMNeuron switches off (arXiv 2406.11193), by name.

    `modules`: those that neurons were found in. Of a model like LLaVA: none, language,
    vision+projector, projector, all; with a Q-Former, as InstructBLIP: none, language, vision,
    qformer, vision+qformer, all. What has none of the modules named is left out.

    Their code switches the projector off wherever it switches off the vision tower, and where the
    projector alone is asked for it switches off nothing, because the mask is kept under another
    name than the one that is looked for. Here `projector` is the projector.
    """
    names = ["language", "vision+projector", "projector"]
    if any(is_asked(module, QFORMER) for module in modules):
        names = ["language", "vision", QFORMER, f"vision+{QFORMER}", *names[2:]]
    found: dict[str, tuple[str, ...]] = {"none": ()}
    for name in names:
        own = {word: [m for m in modules if is_asked(m, word)] for word in name.split("+")}
        parts = tuple(module for some in own.values() for module in some)
        if parts and parts not in found.values():
            found["+".join(word for word, some in own.items() if some)] = parts
    if len(modules) < 2:
        raise RelneuronError(
            f"--module-sets: the neurons are of the {modules[0]} module alone",
            "count and identify several modules: --module all",
            2,
        )
    return found | {"all": tuple(modules)}


def module_places(shape: Mapping[str, Any], module: str) -> Places:
    """The places of all neurons of a module of the model."""
    order, layers = Shape.of(shape), module_layers(shape)[module]
    spans = [order.span(layer, site) for layer in layers for site in order.widths]
    return np.concatenate([np.arange(span.start, span.stop) for span in spans])


def module_conditions(
    sets: Mapping[str, Places], shape: Mapping[str, Any], asked: Mapping[str, Sequence[int]]
) -> dict[str, list[Ablation]]:
    """By set of modules the ablations of each group's own neurons, which is asked its own prompts.

    `asked`: the prompts of each group; all of them are asked `none`, once. Raises RelneuronError
    for a group without a set.
    """
    strangers = [group for group in asked if group not in sets]
    if strangers:
        raise RelneuronError(
            f"the neurons have no set for the group {strangers[0] or '(none)'} of some prompts",
            f"give each line its group: one of {', '.join(sets)}",
        )
    plan: dict[str, list[Ablation]] = {}
    for name, modules in module_sets(list(module_layers(shape))).items():
        inside = np.concatenate([_NONE, *(module_places(shape, module) for module in modules)])
        for group, rows in asked.items():
            places = np.sort(sets[group][np.isin(sets[group], inside)])
            about = Condition(f"{group}@{name}", "modules", group, None, None, None, name)
            about = replace(about, n_neurons=len(places))
            plan.setdefault(name, []).append(Ablation(about, places, rows))
    everyone = sorted(row for rows in asked.values() for row in rows)
    plan["none"] = [Ablation(Condition("clean", "clean"), _NONE, everyone)]
    return plan


def default_sizes(set_size: int, total: int) -> tuple[int, ...]:
    """The paper's nine sizes; in a model too small for them, in proportion to its sets."""
    if total >= 2 * PAPER_SIZES[-1]:
        return PAPER_SIZES
    scaled = (min(total, max(1, round(size * set_size / PAPER_TOP))) for size in PAPER_SIZES)
    return tuple(sorted(set(scaled))) if set_size else ()


def matched_places(places: Places, shape: Mapping[str, int], seed: int, name: str) -> Places:
    """As many neurons of each layer and site as `places` has, drawn from all without doubles."""
    order = Shape.of(shape)
    cells = Counter((layer, site) for layer, site, _ in order.neurons(np.sort(places)))
    rng = random.Random(f"relneuron.matched.{seed}.{name}")
    drawn: list[int] = []
    for (layer, site), count in cells.items():
        span = order.span(layer, site)
        drawn += rng.sample(range(span.start, span.stop), count)
    return np.array(sorted(drawn), np.int64)


def other_places(
    places: Places, shape: Mapping[str, int], seed: int, name: str, *, products: bool = False
) -> Places:
    """As many neurons of each layer and site as `places` has, drawn from those that it has not.

    With `products` gate and up of one number are the same neuron, and what is drawn is of gate.
    Raises RelneuronError where a layer has too few others.
    """
    order = Shape.of(shape)
    rows = order.neurons(np.sort(places))
    if products:
        rows = [(layer, "gate" if site == "up" else site, index) for layer, site, index in rows]
    chosen: dict[tuple[int, str], set[int]] = {}
    for layer, site, index in rows:
        chosen.setdefault((layer, site), set()).add(index)
    rng = random.Random(f"relneuron.others.{seed}.{name}")
    drawn: list[int] = []
    for (layer, site), own in sorted(chosen.items()):
        span = order.span(layer, site)
        rest = [i for i in range(order.width(layer, site)) if i not in own]
        if len(rest) < len(own):
            raise RelneuronError(
                f"{name} has {len(own)} of the {order.width(layer, site)} neurons of {site} in "
                f"layer {layer}: there are not as many others for a random set",
                "leave out --random-seeds, or give a smaller set",
            )
        drawn += [span.start + i for i in rng.sample(rest, len(own))]
    return np.array(sorted(drawn), np.int64)


def plan_conditions(
    sets: Mapping[str, Places],
    rankings: Mapping[str, Places],
    concepts: Mapping[str, Places],
    gains: Mapping[str, Places],
    prompts: Sequence[Prompt],
    shape: Mapping[str, int],
    *,
    analyses: Sequence[str],
    sizes: Sequence[int],
    random_seeds: int,
    with_modules: bool = False,
    own: Mapping[str, str] | None = None,
    unrelated: int | None = None,
    products: bool = False,
) -> list[Ablation]:
    """All conditions of a study, `clean` first, each with the prompts it is asked.

    A set is about the prompts of its relation, or of the fact that it is named after. With
    `unrelated` it and its matched sets are asked only these and so many others, drawn.

    Clean, sets and random sets are asked everything; sizes, sites, concepts and gains the prompts
    of the main split (eva in the files' own language, or else the first by `split_order`); matched
    sets, ranges of ranks and sets of modules (`with_modules`) only those of it that their own set
    is about. `own`: each relation's own language, where that of `prompts` is not known from them.
    With `products` a random set has as many other neurons of each layer as the largest set has.
    """
    everything = range(len(prompts))
    languages = own_languages(prompts) if own is None else own
    splits = [split_name(prompt, languages) for prompt in prompts]
    main = main_split(splits)
    eva = [i for i in everything if splits[i] == main]
    plan: list[Ablation] = []
    order, rows_of = Shape.of(shape), rows_about(prompts)
    drawn_for = {name: _with_others(name, rows_of, prompts, unrelated) for name in sets}

    def add(name: str, places: Places, rows: Sequence[int], kind: str, **about: Any) -> None:
        condition = Condition(name, kind, n_neurons=len(places), **about)
        plan.append(Ablation(condition, np.sort(places), rows))

    add("clean", np.empty(0, np.int64), everything, "clean")
    for name, places in sets.items():
        rows = everything if unrelated is None else drawn_for[name]
        add(name, places, rows, "set", relation=name)
    largest = max(sets, key=lambda name: len(sets[name]), default="")
    for seed in range(random_seeds):
        if products:
            drawn = other_places(sets[largest], shape, seed, largest, products=True)
        else:
            drawn = order.places(random_neurons(shape, len(sets.get(largest, _NONE)), seed))
        add(f"random.{seed}", drawn, everything, "random", seed=seed)
    for name, places in sets.items():
        asked = [i for i in drawn_for[name] if splits[i] == main]
        if "matched" in analyses and asked:
            for seed in range(random_seeds):
                drawn = matched_places(places, shape, seed, name)
                add(f"{name}~{seed}", drawn, asked, "matched", relation=name, seed=seed)
        if "sizes" in analyses:
            known = [size for size in sorted({*sizes}) if size <= len(rankings[name])]
            for size in known:
                best = rankings[name][:size]
                add(f"{name}@{size}", best, eva, "size", relation=name, first=1, last=size)
            for a, b in zip(known, known[1:], strict=False):
                between, about = rankings[name][a:b], {"first": a + 1, "last": b}
                if asked:
                    add(f"{name}@{a + 1}-{b}", between, asked, "range", relation=name, **about)
        if "sites" in analyses:
            for site in order.widths:
                inside = order.site_places(site)
                best = rankings[name][np.isin(rankings[name], inside)][: len(places)]
                # Of a ranking that is only known in part the best of a site are not known.
                if len(rankings[name]) == order.total:
                    add(f"{name}@{site}", best, eva, "site", relation=name, site=site)
    if "concepts" in analyses:
        for name, places in concepts.items():
            add(f"concept:{name}", places, eva, "concept", relation=name)
    if "gain" in analyses:
        for name, places in gains.items():
            add(f"gain:{name}", places, eva, "gain", relation=name)
    if with_modules:
        asked_of = {name: [i for i in eva if prompts[i].relation == name] for name in sets}
        asked_of = {name: rows for name, rows in asked_of.items() if rows}
        for name, some in module_conditions(sets, shape, asked_of).items():
            plan += some if name != "none" else []  # that is clean
    names = [ablation.condition.name for ablation in plan]
    clash = [name for name, n in Counter(names).items() if n > 1]
    if clash:
        raise RelneuronError(f"two conditions are named {min(clash)}", "rename the relation's file")
    return plan


def _with_others(
    name: str, about: Mapping[str, Sequence[int]], prompts: Sequence[Prompt], n: int | None
) -> list[int]:
    """The prompts that a set is about, and `n` drawn from the others, in order.

    Those of other relations, or of other facts where there is but one relation.
    """
    own = about.get(name, [])
    relations = {prompts[row].relation for row in own}
    everything = range(len(prompts))
    others = [row for row in everything if prompts[row].relation not in relations]
    if not others:
        others = sorted({*everything} - {*own})
    rng = random.Random(f"relneuron.unrelated.{name}")
    return sorted([*own, *rng.sample(others, min(n or 0, len(others)))])


def check_names(
    relations: Sequence[str],
    concepts: Sequence[str],
    prompts: Sequence[Prompt],
    shape: Mapping[str, int],
    *,
    top: int,
    analyses: Sequence[str],
    sizes: Sequence[int] | None,
    random_seeds: int,
) -> None:
    """Raise if two conditions would have one name, before any neuron is known.

    That is the plan of sets of `top` neurons, whichever they are.
    """
    total = Shape.of(shape).total
    some, everything = np.arange(min(top, total)), np.arange(total)
    plan_conditions(
        dict.fromkeys(relations, some),
        dict.fromkeys(relations, everything),
        dict.fromkeys(concepts, some),
        dict.fromkeys(relations, some),
        prompts,
        shape,
        analyses=analyses,
        sizes=sizes or default_sizes(len(some), total),
        random_seeds=random_seeds,
    )
