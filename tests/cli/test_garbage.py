"""Nothing large waits for Python's garbage collector, which the command line seldom runs."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.kit.forked import Forked, command

STAGES = {
    "record": "record MODEL PROMPTS -o OUT",
    "ablate": "ablate MODEL NEURONS PROMPTS -o OUT/effects.csv --any-set --random-seeds 1",
    "attribute": "attribute MODEL PROMPTS -o OUT --no-compare",
    "count": "count MODEL PROMPTS --text-column prompt --group-column relation --window 16 -o OUT",
}


def make_cycles() -> None:
    for _ in range(9):
        cycle: list[object] = [torch.zeros(4)]
        cycle.append(cycle)


def say_left(words: list[str], with_cycles: bool = False) -> None:
    """Run a command with the collector off: how many arrays only a collection would free."""
    from relneuron.cli.main import main

    sys.argv = ["relneuron", *words, "--quiet"]
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
    if with_cycles:
        make_cycles()
    gc.collect()
    held = {
        id(one)
        for left in gc.garbage
        for one in (left, *gc.get_referents(left))
        if isinstance(one, torch.Tensor | np.ndarray)
    }
    print(f"left {len(held)}")


def left(line: str, tokens: int, out: Path, places: dict[str, Path], *more: bool) -> int:
    for name, path in {**places, "OUT": out}.items():
        line = line.replace(name, str(path))
    out.mkdir()
    run = Forked(say_left, [*line.split(), "--batch-tokens", str(tokens)], *more)
    said, err = run.said()
    assert run.wait() == 0, err
    return int(said.split()[-1])


@pytest.fixture(scope="module")
def places(
    model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("asked")
    prompts, neurons = made / "prompts.jsonl", made / "neurons.json"
    lines = [
        f"prompts {fact_folder} -o {prompts} --eva 6",
        f"record {model_folder} {prompts} -o {made}",
        f"identify {made} -o {neurons} --top 4 --permutations 0 --bootstrap 0 --noise 0",
    ]
    for line in lines:
        run = command(*line.split())
        assert run.wait() == 0, run.said()
    return {"MODEL": model_folder, "PROMPTS": prompts, "NEURONS": neurons}


@pytest.mark.parametrize("stage", STAGES)
def test_no_batch_leaves_an_array_in_a_cycle(
    stage: str, places: dict[str, Path], tmp_path: Path
) -> None:
    few, many = (left(STAGES[stage], n, tmp_path / str(n), places) for n in (8192, 64))
    assert many == few


def test_an_array_in_a_cycle_is_seen(places: dict[str, Path], tmp_path: Path) -> None:
    line = STAGES["record"]
    plain, with_cycles = (left(line, 8192, tmp_path / str(n), places, n) for n in (False, True))
    assert with_cycles == plain + 9
