"""The `identify` stage on gradients: attributions of prompts in, neurons of facts or relations out.

The command calls it. It needs no model; one fact's scores are in memory at a time.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    csv_bytes,
    real_path,
    refuse_output,
    sha256,
    writing,
)
from relneuron.artifact.gradients import FILES, IG, RELEVANCE
from relneuron.artifact.manifest import Manifest, locked
from relneuron.artifact.neurons import NeuronFile, ScoredNeuron
from relneuron.artifact.options import Options
from relneuron.artifact.stage import command, placed
from relneuron.methods.gradients.choices import (
    QUERY_TOP,
    SHARE_OF_ALL,
    ConsistencyOptions,
    KnowledgeOptions,
    QueryOptions,
    ShareOptions,
)
from relneuron.methods.gradients.clusters import Scores, cluster, passed, query_neurons
from relneuron.methods.gradients.consistency import consistency, consistency_aware, otsu
from relneuron.methods.gradients.facts import Array, Places, coarse, refined, stepped, without
from relneuron.methods.gradients.scored import FACT_COLUMNS, FACTS, Fact, Study, read_study
from relneuron.methods.gradients.shares import group_shares, specific

SAID = 20  # sets that the command names


def identify_gradients(
    folder: Path,
    output: Path,
    options: Options,
    *,
    method: str,
    force: bool = False,
    quiet: bool = False,
) -> NeuronFile:
    """Choose neurons by the gradients in `folder` and write them to `output`, facts.csv beside it.

    A set is named as its relation, or with `sets` "fact" as the fact; a relation has the neurons of
    all of its facts, each with the mean over the facts of its score there, 0 where the set of a
    fact lacks it. Scores: knowledge neurons have their mean attribution over the fact's prompts,
    query-relevant ones naica, those of query localization the consistency-aware score, those of
    relevance the mean relevance. Neurons are named by the site `gate`, since to zero a gate zeroes
    all that a neuron writes; `selection` says under "how" at which site they were attributed, which
    is where `ablate --mode scale` scales them, and how many there are.

    facts.csv (x.facts.csv beside x.json) has a row a fact: prompts, the mean size of their sets and
    that of their union, the neurons that were chosen, CS1 and CS2 (empty for one prompt or without
    a neuron), and of query localization whether the fact is consistent.
    """
    refuse_output(output, "identify", force)
    kind = RELEVANCE if method == "relevance" else IG
    study = read_study(folder, kind, quiet)
    choose: Mapping[str, Callable[[Study, Any], Json]] = {
        "knowledge_neurons": _knowledge,
        "qrnca": _queries,
        "query_localization": _consistent,
    }
    with locked(output.parent):
        if method == "relevance":
            assert isinstance(options, ShareOptions)
            sets, selection = _relevant(study, options)
        else:
            selection = choose[method](study, options)
            sets = _sets(study, by_fact=options.recorded()["sets"] == "fact")
        how = {"site": study.gradients.about.get("site", "product"), **selection}
        result = NeuronFile(study.model, method, sets, {"how": how})
        stem = "" if output.name == "neurons.json" else f"{output.stem}."
        table = output.parent / f"{stem}{FACTS}"
        written = [output] if method == "relevance" else [output, table]
        manifest = Manifest(output.parent)
        if real_path(output.parent) != real_path(folder) and "model" not in manifest.data:
            manifest.describe(model=study.model)
        with writing("identify", output.parent, written):
            if table in written:
                atomic_write(table, csv_bytes(FACT_COLUMNS, (f.cells() for f in study.facts)))
            result.write(output)
            stage = "identify" if output.name == "neurons.json" else f"identify_{method}"
            if stage == "identify":
                _remove_replaced(manifest, written)
            manifest.finish(
                stage,
                _inputs(folder, kind, method, options),
                written,
                reads=[folder / FILES[kind], folder / "prompts.jsonl"],
                commands=command(
                    "identify",
                    *(placed(folder, output.parent), "-o", placed(output, output.parent)),
                    *("--method", method, *options.words()),
                ),
            )
    return result


def rank(
    folder: Path, output: Path, options: Options, *, method: str, force: bool, quiet: bool
) -> Iterator[str]:
    """`identify` with one of the rankings of gradients: says the sets and how they came about."""
    chosen = identify_gradients(folder, output, options, method=method, force=force, quiet=quiet)
    found = chosen.selection["how"]
    for name, neurons in list(chosen.sets.items())[:SAID]:
        why = _why_empty(found, name) if not neurons else ""
        yield f"{name}: {len(neurons):,} neurons{why}"
    if len(chosen.sets) > SAID:
        yield f"... {len(chosen.sets) - SAID:,} more sets"
    if "facts" in found:
        yield (
            f"{found['facts']:,} facts, {found['neurons_per_fact']:.3g} neurons each on average, "
            f"{found['without']:,} without any"
        )
    if "share" in found:
        yield f"in more than {found['share']:g} of a fact's prompts"
    if "consistent" in found:
        cut = "no cut" if found["cut"] is None else f"{found['consistency']} > {found['cut']:.3g}"
        yield (
            f"{found['consistent']:,} facts are consistent ({cut}), {found['inconsistent']:,} not"
        )


def _why_empty(found: Json, name: str) -> str:
    """Why a relation has no neuron by its shares; of other rankings the sets of facts say it."""
    if "specific" not in found:
        return ""
    if found["with_their_share"][name]:
        return ": none has any relevance there"
    return f": none has a share of {found['specific']:g} of its relevance there (--specific)"


def _remove_replaced(manifest: Manifest, written: Sequence[Path]) -> None:
    """Delete what was said of the neurons that are replaced: another method's scores, labels."""
    replaced = manifest.data["stages"].get("identify", {"files": []})["files"]
    for name in {*replaced} - {path.name for path in written}:
        (manifest.path.parent / name).unlink(missing_ok=True)


def _inputs(folder: Path, kind: str, method: str, options: Options) -> Json:
    digests = {name: sha256(folder / name) for name in (FILES[kind], "prompts.jsonl")}
    return {"digests": digests, "method": method, **options.recorded()}


# --- the methods -------------------------------------------------------------------------------


def _knowledge(study: Study, options: KnowledgeOptions) -> Json:
    """Coarse sets, refined over a fact's prompts, without those of negatives."""
    means: dict[str, dict[int, float]] = {}

    def look(fact: Fact, values: Array) -> None:
        found = [coarse(one, options.kind, options.tau) for one in values]
        fact.sets = [study.there[places] for places in found]
        union = np.unique(np.concatenate(found))
        mean = values[:, union].mean(0)
        means[fact.name] = dict(zip(study.there[union].tolist(), mean.tolist(), strict=True))

    study.each_fact(look)
    _say_single(study.facts, "its refined set is its coarse one")
    said: Json = {"kind": options.kind, "threshold": options.tau}
    share: Any = options.share
    if options.stepped:
        share, size, in_aim = stepped([fact.sets for fact in study.facts])
        said |= {"mean_size": size, "in_aim": in_aim}
        if not in_aim:
            warnings.warn(
                f"no share gives facts 2 to 5 neurons on average: {float(share)} gives {size:.3g}",
                stacklevel=3,
            )
    for fact in study.facts:
        chosen = refined(fact.sets, share)
        if options.negative_prompts:
            chosen = without(chosen, _negatives(study.facts, fact, options))
        best = sorted(chosen.tolist(), key=lambda place: (-means[fact.name][place], place))
        fact.chosen = {place: means[fact.name][place] for place in best}
    return said | {
        "share": float(share),
        "negatives": options.negative_prompts,
        **_sizes(study.facts),
    }


def _negatives(facts: Sequence[Fact], fact: Fact, options: KnowledgeOptions) -> list[Places]:
    """The coarse sets of prompts drawn from other relations."""
    others = [one for other in facts if other.relation != fact.relation for one in other.sets]
    if not others:
        raise RelneuronError(
            "--negative-prompts draws prompts of other relations, and there is only one relation",
            "leave out --negative-prompts, or attribute prompts of several relations",
        )
    rng = random.Random(f"relneuron.negatives.{options.seed}.{fact.name}")
    return rng.sample(others, min(options.negative_prompts, len(others)))


def _queries(study: Study, options: QueryOptions) -> Json:
    """Clusters, inverse cluster attribution, common neurons."""
    clusters: list[Scores] = []

    def look(fact: Fact, values: Array) -> None:
        there = study.there
        prompts = [passed(one, options.tau, options.decimals) for one in values]
        mine = [{int(there[place]): value for place, value in one.items()} for one in prompts]
        fact.sets = [np.array(sorted(one), np.int64) for one in mine]
        clusters.append(cluster(mine))

    study.each_fact(look)
    found = query_neurons(
        clusters,
        top=options.top or QUERY_TOP,
        common=options.common,
        remove=not options.keep_common,
    )
    for fact, chosen in zip(study.facts, found.sets, strict=True):
        fact.chosen = dict(chosen)
    empty = [f.name for f, one in zip(study.facts, clusters, strict=True) if not one]
    if empty:
        warnings.warn(
            f"{len(empty)} queries have an empty cluster, no neuron raises their answer: "
            f"{', '.join(empty[:3])}",
            stacklevel=3,
        )
    n_common = len(found.common)
    return {"threshold": options.tau, "common_neurons": n_common, **_sizes(study.facts)}


def _consistent(study: Study, options: ConsistencyOptions) -> Json:
    """Consistency of each fact, its verdict, and its consistency-aware neurons."""
    if all(len(fact.rows) < 2 for fact in study.facts):
        raise RelneuronError(
            f"each fact in {study.folder} has one prompt: nothing can be consistent",
            "attribute prompts that ask each fact in several templates",
        )

    weights = options.mean_weight, options.deviation_weight

    def look(fact: Fact, values: Array) -> None:
        found = [coarse(one, "adaptive", options.tau) for one in values]
        fact.sets = [study.there[places] for places in found]
        scores = consistency_aware(values, weights, unbiased=options.unbiased)
        if options.neurons == "cas":
            chosen = coarse(scores, "adaptive", options.cas_share)
        else:
            chosen = found[0] if options.neurons == "query" else np.unique(np.concatenate(found))
        best = chosen[np.argsort(-scores[chosen], kind="stable")]
        pairs = zip(study.there[best].tolist(), scores[best].tolist(), strict=True)
        fact.chosen = dict(pairs)

    study.each_fact(look)
    _say_single(study.facts, "it has no verdict")
    which = 0 if options.consistency == "cs1" else 1
    scores = np.array([consistency(fact.sets)[which] for fact in study.facts])
    cut = otsu(scores) if options.otsu else options.cut
    if np.isnan(cut):
        warnings.warn("all facts are equally consistent: Otsu finds no cut", stacklevel=3)
    for fact, score in zip(study.facts, scores.tolist(), strict=True):
        if not (np.isnan(score) or np.isnan(cut)):
            fact.consistent = bool(score > cut)
    verdicts = [fact.consistent for fact in study.facts]
    return {
        "threshold": options.tau,
        "consistency": options.consistency,
        "cut": None if np.isnan(cut) else float(cut),
        "consistent": sum(v is True for v in verdicts),
        "inconsistent": sum(v is False for v in verdicts),
        **_sizes(study.facts),
    }


def _relevant(study: Study, options: ShareOptions) -> tuple[dict[str, list[ScoredNeuron]], Json]:
    """Each relation's neurons by its share of their relevance."""
    relations = list(dict.fromkeys(study.gradients.relations))
    if len(relations) < 2:
        raise RelneuronError(
            f"{study.folder} has one relation, which has all of the relevance",
            "attribute prompts of several relations",
        )
    sums = study.gradients.group_sums(relations)
    means = sums[options.sums] / sums["sentences"][:, None, None]
    means = means.reshape(len(relations), -1)[:, study.there]
    if not np.isfinite(means).all():
        raise RelneuronError(
            f"{study.gradients.path}: its scores are not all finite",
            "attribute with --dtype float32",
        )
    top = options.top or max(1, int(SHARE_OF_ALL * len(study.there)))
    chosen = specific(means, top, options.specific)
    able = (group_shares(means) >= options.specific).sum(1)
    sets = {
        name: _neurons(study, {int(study.there[p]): score for p, score in one})
        for name, one in zip(relations, chosen, strict=True)
    }
    with_share = dict(zip(relations, able.tolist(), strict=True))
    return sets, {"wanted": top, "specific": options.specific, "with_their_share": with_share}


# --- what is written -----------------------------------------------------------------------------


def _say_single(facts: Sequence[Fact], so: str) -> None:
    single = [fact.name for fact in facts if len(fact.rows) < 2]
    if single:
        warnings.warn(
            f"{len(single)} facts have one prompt, so {so}: {', '.join(single[:3])}", stacklevel=4
        )


def _sizes(facts: Sequence[Fact]) -> Json:
    sizes = [len(fact.chosen) for fact in facts]
    mean = sum(sizes) / len(sizes)
    return {"facts": len(facts), "neurons_per_fact": mean, "without": sizes.count(0)}


def _sets(study: Study, *, by_fact: bool) -> dict[str, list[ScoredNeuron]]:
    """The sets of the facts, or the union of each relation's."""
    if by_fact:
        return {fact.name: _neurons(study, fact.chosen) for fact in study.facts}
    sets = {}
    for relation in dict.fromkeys(fact.relation for fact in study.facts):
        own = [fact.chosen for fact in study.facts if fact.relation == relation]
        total = cluster(own)
        means = {place: value / len(own) for place, value in total.items()}
        best = sorted(means, key=lambda place: (-means[place], place))
        sets[relation] = _neurons(study, {place: means[place] for place in best})
    return sets


def _neurons(study: Study, scores: Mapping[int, float]) -> list[ScoredNeuron]:
    pairs = ((*divmod(place, study.gradients.width), score) for place, score in scores.items())
    return [(layer, "gate", index, score) for layer, index, score in pairs]
