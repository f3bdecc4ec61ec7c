"""Models whose group neurons are known, since they were planted: does the way from text find them.

At full strength just the planted neurons are active in the text of one group and in no other, and
switching off a group's neurons must make the answers of that group less likely, of no other.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench.planted import LAYER, N_WORDS, RELATIONS, make_model, make_tokenizer, planted_units
from relneuron.ablation.nll import nll
from relneuron.ablation.options import NllOptions
from relneuron.artifact.reading import read_csv
from relneuron.methods.counts.count import count
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.texts.options import CountOptions
from relneuron.texts.sources import parse_sources
from tests.kit.counted import rank_counts


def write_texts(folder: Path) -> None:
    """Of each group one text that is full of its own word, and one that asks for its answer."""
    rng = random.Random(0)
    words = [f"s{i}" for i in range(N_WORDS)]
    for name in RELATIONS:
        talk = [rng.choices([f"{name}-is", rng.choice(words)], [3, 1], k=20) for _ in range(100)]
        asked = [[*rng.sample(words, 2), f"{name}-is", f"{name}-answer"] for _ in range(40)]
        for kind, lines in (("talk", talk), ("asked", asked)):
            text = "\n".join(" ".join(line) for line in lines)
            (folder / f"{name}.{kind}.txt").write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_groups_are_found_and_only_their_own_answers_break(
    tmp_path: Path, seed: int
) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=seed)
    shape = model_shape(find_mlps(model))
    write_texts(tmp_path)
    study = tmp_path / "study"

    texts = parse_sources([f"{name}={tmp_path / name}.talk.txt" for name in RELATIONS])
    options = CountOptions(mode="documents", bos="none")  # as it is planted
    count("planted", model, tokenizer, texts, study, options, quiet=True)
    planted = {
        name: {(LAYER, "gate", unit) for unit in planted_units(number)}
        for number, name in enumerate(RELATIONS)
    }
    n_planted = sum(map(len, planted.values()))
    chosen = rank_counts(
        study, study / "neurons.json", top_rate=n_planted / (shape["layers"] * shape["width"])
    )
    found = {name: {neuron[:3] for neuron in sets} for name, sets in chosen.sets.items()}
    assert found == planted

    held = parse_sources([f"{name}={tmp_path / name}.asked.txt" for name in RELATIONS])
    nll(
        "planted",
        model,
        tokenizer,
        study / "neurons.json",
        held,
        study,
        NllOptions(mode="documents", bos="none"),
    )
    table = {
        (row["mask"], row["group"]): float(row["nll"])
        for row in read_csv(study / "nll.csv", ("mask", "group", "nll"))
    }
    for mask in RELATIONS:
        for group in RELATIONS:
            rise = table[mask, group] - table["clean", group]
            assert rise > 0.5 if mask == group else abs(rise) < 1e-3, (mask, group, rise)
