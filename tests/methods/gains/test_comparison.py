"""The sets that eight scores choose, the controls, and the table of what they break.

Sets are compared with a sort of all neurons, intervals with plain resampling.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.ablation.rows import intervene
from relneuron.artifact.files import RelneuronError
from relneuron.methods.gains.comparison import (
    METHODS,
    Row,
    Sizes,
    best,
    choose,
    method_scores,
    plan,
    rows_of,
    top_heads,
)
from relneuron.methods.gains.drops import Summary, summary
from relneuron.methods.gains.scores import query_scores
from relneuron.methods.gains.values import ValueScores, value_scores
from relneuron.model.stream.parts import ResidualModel
from relneuron.model.stream.read import read_residual_model
from relneuron.model.stream.trace import Trace, trace
from relneuron.ops.logprob_gain.op import TopGains
from tests.kit.attributed import (
    FAMILIES,
    HEAD_DIM,
    N_HEADS,
    N_LAYERS,
    WIDTH,
    attributed_model,
    sentences,
    targets_of,
)

HEADS_WIDTH = N_HEADS * HEAD_DIM
Traced = tuple[ResidualModel, Trace, torch.Tensor]


@pytest.fixture(scope="module", params=FAMILIES)
def traced(request: pytest.FixtureRequest) -> Traced:
    residual = read_residual_model(attributed_model(request.param))
    found = trace(residual, sentences())
    return residual, found, targets_of(found)


# --- which neurons are off -------------------------------------------------------------------


def test_the_later_of_equal_scores_comes_first() -> None:
    scores = torch.tensor([[1.0, 3, 3, 0, 3, 2], [0, 0, 0, 0, 0, 0]])
    assert best(scores, 4).tolist() == [[4, 2, 1, 5], [5, 4, 3, 2]]
    assert best(scores, 99).shape == (2, 6)


def test_chosen_neurons_are_the_first_of_a_sort_of_all(traced: Traced) -> None:
    residual, found, targets = traced
    sizes = Sizes(10, 20, 7, 30, 1)
    value = value_scores(residual, found, targets, ffn="exact", attention="exact")
    tops = value_scores(residual, found, targets, ffn="top", attention="top")
    query = query_scores(residual, found, tops.attention_top)  # type: ignore[arg-type]
    chosen = choose(residual, found, targets, tops, query, sizes)
    assert chosen == choose(residual, found, targets, value, query, sizes)
    assert chosen == choose(residual, found, targets, tops, query, sizes, gains=value.ffn_neuron)
    assert list(chosen[0]) == [*METHODS, "value_ffn", "value_attention", "query"]

    def first(scores: torch.Tensor, n: int) -> list[int]:
        flat = scores.reshape(-1).tolist()
        return sorted(range(len(flat)), key=lambda place: (-flat[place], -place))[:n]

    assert value.ffn_neuron is not None and value.attention_neuron is not None
    for method in METHODS:
        scores = torch.stack(method_scores(residual, found, targets, method), 1)
        for e, row in enumerate(chosen):
            assert row[method] == first(scores[e], 10)
    for e, row in enumerate(chosen):
        assert row["value_ffn"] == first(value.ffn_neuron[e], 7)
        assert row["query"] == first(query.ffn_neuron[e], 30)
        units = first(value.attention_neuron[e].nan_to_num(nan=-99.0), 10**6)
        width, n_tokens = HEADS_WIDTH, found.mask.shape[1]
        places = [unit // (n_tokens * width) * width + unit % width for unit in units]
        assert row["value_attention"] == list(dict.fromkeys(places))[:20]
    assert "query" not in choose(residual, found, targets, tops, None, sizes)[0]


def test_scores_that_were_not_asked_for_are_missed(traced: Traced) -> None:
    residual, found, targets = traced
    sizes = Sizes.of(residual)
    without = value_scores(residual, found, targets, ffn=None)
    with pytest.raises(ValueError, match="no scores of FFN neurons"):
        choose(residual, found, targets, without, None, sizes)
    without = value_scores(residual, found, targets, attention=None)
    with pytest.raises(ValueError, match="no scores of attention neurons"):
        choose(residual, found, targets, without, None, sizes)


def test_missing_units_of_a_short_top_are_left_out(traced: Traced) -> None:
    residual, found, targets = traced
    n = len(targets)
    layer = torch.tensor([[1, -1]]).repeat(n, 1)
    top = TopGains(torch.tensor([[0.5, -torch.inf]]).repeat(n, 1), layer, layer * 2 + 1)
    empty = torch.zeros(n, 0)
    value = ValueScores(empty, empty, empty, empty, None, None, top, top)
    chosen = choose(residual, found, targets, value, None, Sizes.of(residual))
    assert all(row["value_ffn"] == [WIDTH + 3] for row in chosen)
    assert all(row["value_attention"] == [HEADS_WIDTH + 3] for row in chosen)


@pytest.mark.parametrize(
    ("layers", "width", "heads", "head_dim", "wanted"),
    [
        (32, 11008, 32, 128, Sizes(10, 200, 100, 1000, 10)),  # Llama-7B
        (36, 5120, 20, 64, Sizes(10, 200, 100, 1000, 7)),  # GPT2-large
        (4, 512, 4, 32, Sizes(10, 3, 7, 68, 1)),
        (1, 30, 1, 2, Sizes(3, 1, 1, 1, 1)),
    ],
)
def test_sizes_are_the_papers_or_in_proportion(
    layers: int, width: int, heads: int, head_dim: int, wanted: Sizes, traced: Traced
) -> None:
    like = {"layers": [None] * layers, "width": width, "n_heads": heads, "head_dim": head_dim}
    assert Sizes.of(ResidualModel(**(vars(traced[0]) | like))) == wanted


def some_plan(residual: ResidualModel, ids: list[str], **changes: Any) -> Any:
    rng = random.Random(0)
    chosen = [
        {name: rng.sample(range(N_LAYERS * WIDTH), 4) for name in (*METHODS, "value_ffn", "query")}
        | {"value_attention": rng.sample(range(N_LAYERS * HEADS_WIDTH), rng.randint(1, 9))}
        for _ in ids
    ]
    heads = np.random.default_rng(0).normal(size=(len(ids), N_LAYERS, N_HEADS))
    options: dict[str, Any] = {"chosen": chosen, "heads": heads, "sizes": Sizes(4, 9, 4, 4, 2)}
    types = [("month", "color")[i % 2] for i in range(len(ids))]
    return plan(residual, ids, types, **(options | changes)), chosen, heads


def test_a_plan_has_every_condition_and_its_control(traced: Traced) -> None:
    residual, ids = traced[0], list("abcdefg")
    conditions, chosen, heads = some_plan(residual, ids, n_seeds=2)
    offs = {condition.name: condition.offs for condition in conditions}
    seeds = ("0", "1")
    assert list(offs) == [
        "clean",
        *METHODS,
        *(f"random.{seed}" for seed in seeds),
        *("value", *(f"random_value.{seed}" for seed in seeds)),
        *("query", *(f"random_query.{seed}" for seed in seeds)),
        *("heads:color", "heads:month", *(f"random_heads.{seed}" for seed in seeds)),
    ]
    assert all(len(of) == 7 for of in offs.values())
    for e, row in enumerate(chosen):
        sizes = {name: (len(of[e].ffn), len(of[e].attention)) for name, of in offs.items()}
        assert sizes["clean"] == (0, 0)
        for method in METHODS:
            assert offs[method][e].ffn.tolist() == sorted(row[method])
        assert offs["value"][e].attention.tolist() == sorted(row["value_attention"])
        assert sizes["value"] == (4, len(row["value_attention"]))
        for seed in seeds:
            assert sizes[f"random.{seed}"] == (4, 0) == sizes[f"random_query.{seed}"]
            assert sizes[f"random_value.{seed}"] == sizes["value"]
            assert sizes[f"random_heads.{seed}"] == (0, 2 * HEAD_DIM)
        for e2 in range(e):
            assert offs["random.0"][e].ffn.tolist() != offs["random.0"][e2].ffn.tolist()
    best_two = np.argsort(-heads[1::2].mean(0).ravel())[:2]
    wanted = sorted(int(head) * HEAD_DIM + k for head in best_two for k in range(HEAD_DIM))
    assert all(one.attention.tolist() == wanted for one in offs["heads:color"])


def test_random_sets_depend_on_the_seed_and_the_sentence_alone(traced: Traced) -> None:
    first, chosen, _ = some_plan(traced[0], list("abc"))
    again = some_plan(traced[0], list("xbc"), chosen=chosen)[0]
    one, two = ({c.name: c.offs for c in conditions} for conditions in (first, again))
    for name in ("random.0", "random.1", "random_value.0", "random_query.2"):
        for e, is_same in enumerate((False, True, True)):
            both = [[part.tolist() for part in offs[name][e]] for offs in (one, two)]
            assert (both[0] == both[1]) == is_same
    assert one["random.0"][1].ffn.tolist() != one["random.1"][1].ffn.tolist()
    drawn = np.concatenate([o.ffn for name in ("random.0", "random.1") for o in one[name]])
    assert drawn.max() >= WIDTH  # from all layers


def test_without_query_scores_there_is_no_query_condition(traced: Traced) -> None:
    _, chosen, _ = some_plan(traced[0], ["a"])
    del chosen[0]["query"]
    names = [c.name for c in some_plan(traced[0], ["a"], chosen=chosen)[0]]
    assert not any("query" in name for name in names)


def test_neurons_that_nothing_reads_are_no_query_neurons(traced: Traced) -> None:
    residual, found, targets = traced
    value = value_scores(residual, found, targets, ffn="top")
    query = query_scores(residual, found, value.attention_top)  # type: ignore[arg-type]
    query.ffn_neuron[0] = 0
    query.ffn_neuron[1] = 0
    query.ffn_neuron[1, 1, 5], query.ffn_neuron[1, 0, 7] = 0.1, 0.2
    chosen = choose(residual, found, targets, value, query, Sizes(10, 20, 7, 30, 1))
    assert [row["query"] for row in chosen[:2]] == [[], [7, WIDTH + 5]]
    assert len(chosen[2]["query"]) == 30
    ids, types = list("abcd"), ["r"] * 4
    heads = np.zeros((4, N_LAYERS, N_HEADS))
    conditions = plan(residual, ids, types, chosen, heads, Sizes.of(residual), n_seeds=1)
    offs = {c.name: [len(one.ffn) for one in c.offs] for c in conditions}
    assert offs["query"] == offs["random_query.0"] == [0, 2, 30, len(chosen[3]["query"])]
    nobody = [row | {"query": []} for row in chosen]
    names = [c.name for c in plan(residual, ids, types, nobody, heads, Sizes.of(residual))]
    assert "value" in names and not any("query" in name for name in names)


def test_heads_are_ranked_by_their_mean_over_a_type() -> None:
    heads = np.zeros((3, 2, 2))
    heads[0, 0, 1], heads[1, 1, 0], heads[2, 1, 0] = 5, 4, 4
    found = top_heads(heads, ["a", "a", "b"], Sizes(1, 1, 1, 1, 3))
    assert found == {"a": [1, 2, 3], "b": [2, 3, 1]}


# --- the measurement -------------------------------------------------------------------------


def test_rows_are_conditions_by_sentences(traced: Traced) -> None:
    residual, found, targets = traced
    ids = sentences()
    conditions = some_plan(residual, list("abcd"), n_seeds=1)[0]
    seen: list[int] = []
    answered = intervene(
        *(residual, ids, targets.tolist(), [c.offs for c in conditions]),
        batch_tokens=64,
        advance=seen.append,
    )
    rows = [*rows_of([c.name for c in conditions], "abcd", "xyxy", answered)]
    assert sum(seen) == len(rows) == 4 * len(conditions)
    for number, row in enumerate(rows):
        c, s = divmod(number, 4)
        assert (row.condition, row.id, row.relation) == (conditions[c].name, "abcd"[s], "xyxy"[s])
        assert row[3:] == (answered.rank[c, s], answered.prob[c, s], answered.logprob[c, s])
    clean = found.logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    np.testing.assert_allclose([row.logprob for row in rows[:4]], clean, atol=1e-4)


def test_zeroed_gain_neurons_cost_more_than_random_ones(traced: Traced) -> None:
    residual = traced[0]
    ids = sentences([5] * 24, seed=3)
    found = trace(residual, ids)
    targets = found.logits.argmax(1)
    value = value_scores(residual, found, targets)
    sizes = Sizes.of(residual)
    chosen = choose(residual, found, targets, value, None, sizes)
    names = [str(i) for i in range(24)]
    conditions = plan(residual, names, ["r"] * 24, chosen, np.asarray(value.head), sizes)
    offs = [condition.offs for condition in conditions]
    answered = intervene(residual, ids, targets.tolist(), offs, batch_tokens=999)
    rows = rows_of([c.name for c in conditions], names, ["r"] * 24, answered)
    table = {row.condition: row for row in summary(rows) if not row.relation}
    for seed in range(3):
        assert table["log_prob_gain"].logprob_drop > table[f"random.{seed}"].logprob_drop + 0.5


def random_rows(n: int) -> list[Row]:
    rng = np.random.default_rng(0)
    rows = []
    for condition, low in (("clean", 0.3), ("a", 0.1), ("b", 0.05)):
        for i in range(n):
            prob = float(rng.uniform(low, low + 0.4))
            rank = int(rng.integers(1, 5))
            rows.append(Row(condition, str(i), "xy"[i % 3 == 0], rank, prob, float(np.log(prob))))
    return rows


def naive_drops(rows: list[Row], ids: list[str]) -> list[float]:
    """Of condition `a` over sentences that may be there several times."""
    clean = {row.id: row for row in rows if row.condition == "clean"}
    off = {row.id: row for row in rows if row.condition == "a"}
    means = [
        [sum(f(of[i]) for i in ids) / len(ids) for of in (clean, off)]
        for f in (lambda row: 1 / row.rank, lambda row: row.prob, lambda row: row.logprob)
    ]
    return [(b - a) / b for b, a in means[:2]] + [means[2][0] - means[2][1]]


def test_the_table_is_that_of_plain_means_and_resampling() -> None:
    rows = random_rows(60)
    found = summary(rows)
    assert [(row.relation, row.condition) for row in found] == [
        (relation, condition) for relation in ("", "y", "x") for condition in ("clean", "a", "b")
    ]
    for relation in ("", "x", "y"):
        ids = [row.id for row in rows[:60] if not relation or row.relation == relation]
        (ours,) = [row for row in found if (row.relation, row.condition) == (relation, "a")]
        of = [row for row in rows if row.condition == "a" and row.id in ids]
        assert ours.n == len(of)
        assert ours.mrr == pytest.approx(sum(1 / row.rank for row in of) / len(of))
        assert ours.prob == pytest.approx(sum(row.prob for row in of) / len(of))
        assert ours.logprob == pytest.approx(sum(row.logprob for row in of) / len(of))
        drops = [ours.mrr_drop, ours.prob_drop, ours.logprob_drop]
        assert drops == pytest.approx(naive_drops(rows, ids))
        rng = random.Random(0)
        drawn = [naive_drops(rows, rng.choices(ids, k=len(ids))) for _ in range(3000)]
        wanted = np.percentile(drawn, [2.5, 97.5], axis=0).T
        np.testing.assert_allclose(np.reshape(ours[9:], (3, 2)), wanted, atol=0.05)
        assert all(low < drop < high for (low, high), drop in zip(wanted, drops, strict=True))
    assert summary(rows) == found and summary(rows, seed=1) != found


def test_a_drop_is_paired_with_clean() -> None:
    """Half of every probability is a drop of one half in every resample."""
    rows = random_rows(30)[:30]
    rows += [row._replace(condition="a", prob=row.prob / 2) for row in rows]
    (off,) = [row for row in summary(rows) if (row.condition, row.relation) == ("a", "")]
    np.testing.assert_allclose([off.prob_drop_low, off.prob_drop_high], 0.5, rtol=1e-12)
    assert (off.mrr_drop, off.mrr_drop_low, off.mrr_drop_high) == (0, 0, 0)


def test_tables_of_few_or_bad_rows() -> None:
    one = Row("clean", "s", "r", 2, 0.5, float(np.log(0.5)))
    every = summary([one, one._replace(condition="a", rank=4, prob=0.1)])
    row = every[1]
    assert (row.mrr_drop, row.prob_drop, row.n) == (0.5, pytest.approx(0.8), 1)
    assert np.isnan(row[9:]).all() and len(Summary._fields) == 15
    nothing = summary([one._replace(prob=0.0)])[0]
    assert np.isnan(nothing.prob_drop)
    assert summary([]) == []
    with pytest.raises(RelneuronError, match="a was not asked the sentences"):
        summary([one, one._replace(condition="a", id="t")])
