"""What a crash damaged: rows, journals and checkpoints are found and done again, or refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import relneuron.model.ask
from relneuron.ablation.effect import effect
from relneuron.ablation.effect_options import EffectOptions
from relneuron.ablation.nll import nll
from relneuron.ablation.outputs import Generated, lines_bytes
from relneuron.artifact.blocks import Blocks
from relneuron.artifact.dense import map_safetensors
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal, PartDone, first_line
from relneuron.artifact.parts import ROWS, merge_parts
from relneuron.methods.contrast.options import ProbeOptions
from relneuron.methods.contrast.probe import probe
from relneuron.methods.counts.count import count
from relneuron.methods.gains.attribute import attribute
from relneuron.methods.responses.options import RecordOptions
from relneuron.methods.responses.record import record
from relneuron.model.batches import Budget
from relneuron.study.look import look
from relneuron.study.settings import LookOptions
from relneuron.texts.options import CountOptions
from relneuron.texts.sources import parse_sources
from tests.artifact.handed import ATTRIBUTED, NLL, attributed, flip
from tests.artifact.test_integrity import ablated, generated
from tests.kit.speakers import classifier_folder


class Crash(Exception):
    """In the middle of a stage: what was finished before is in the journal."""


def crashed(run: Callable[[], object], owner: Any, name: str, n: int) -> None:
    """Run a stage that dies in its `n`-th call of a function, having saved all before."""
    true, calls = getattr(owner, name), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == n:
            raise Crash
        return true(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, suppress(Crash):
        patch.setattr(Journal, "SAVE_EVERY_S", 0.0)
        patch.setattr(owner, name, dying)
        run()
        pytest.fail("it did not die")


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip_header(path: Path) -> None:
    flip(path, random.Random(1), end=40)


def flip_data(path: Path) -> None:
    """A bit of a row that is written: of the first layer's first site."""
    with safe_open(path, "np") as file:
        name = min(file.keys())
        row = next(i for i, row in enumerate(file.get_tensor(name)) if row.any())
        n_row = file.get_slice(name).get_shape()[1]
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    begin = json.loads(data[8:header])[name]["data_offsets"][0]
    data[header + begin + 4 * n_row * row + 7] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "rows of .* are not as they were written: [0-9]+ of [0-9]+ blocks are done again"),
    "a bit": (flip_data, "rows of .* are not as they were written: 1 of [0-9]+ blocks"),
    "its header": (flip_header, "rows of .* are not as they were written"),
    "gone": (Path.unlink, "rows of .* are not as they were written"),
}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


Half = tuple[Callable[..., object], Path, dict[str, bytes]]
"""What runs a stage in a folder, a folder in which it died, the files of a whole run."""


@pytest.fixture(scope="module")
def recorded(made: Path, loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Half:
    root, prompts = tmp_path_factory.mktemp("recorded"), made / "study" / "prompts.jsonl"
    asked = {"options": RecordOptions(batch_tokens=128), "quiet": True}
    run = partial(record, "m", *loaded, prompts, **asked)
    run(root / "whole")
    crashed(partial(run, root / "half"), relneuron.model.ask.Asker, "_forward", 16)
    return run, root / "half", files(root / "whole")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("damage", [*DAMAGE, "journal"])
def test_record_does_damaged_rows_again(
    recorded: Half, tmp_path: Path, damage: str, force: bool
) -> None:
    run, half, whole = recorded
    folder = tmp_path / "out"
    shutil.copytree(half, folder)
    n_lines = (folder / "record.journal").read_bytes().count(b"\n")
    assert n_lines > 5
    if damage == "journal":
        lines = (folder / "record.journal").read_bytes().split(b"\n")
        lines[2] = lines[2][:80] + b"{" + lines[2][80:]
        (folder / "record.journal").write_bytes(b"\n".join(lines))
        said = f"{n_lines - 2} of {n_lines} lines are not as they were written"
    else:
        act, said = DAMAGE[damage]
        act(folder / "responses.safetensors")
    with pytest.warns(match=said):
        run(folder, force=force)
    assert files(folder) == whole


@pytest.mark.parametrize("damage", DAMAGE)
def test_attribute_does_damaged_gains_again(
    made: Path, loaded: tuple[Any, Any], tmp_path: Path, damage: str
) -> None:
    from relneuron.methods.gains.scorer import Scorer

    run = partial(attributed, loaded, made / "study" / "prompts.jsonl")
    crashed(partial(run, tmp_path / "out"), Scorer, "score", 4)
    act, said = DAMAGE[damage]
    act(tmp_path / "out" / "gains.safetensors")
    with pytest.warns(match=said):
        run(tmp_path / "out")
    before = files(made / "attribution")
    for name, data in files(tmp_path / "out").items():
        if name not in ("manifest.json",):
            assert data == before[name], name


@pytest.mark.parametrize("damage", DAMAGE)
def test_probe_does_damaged_values_again(
    made: Path, loaded: tuple[Any, Any], tmp_path: Path, damage: str
) -> None:
    learned = {"neurons": made / "counts" / "neurons.json", "of_set": "a", "top": 3, "folds": 2}
    learned |= {"labels": f"{made / 'labels.csv'}:y", "batch_tokens": 64}
    prompts, options = made / "study" / "prompts.jsonl", ProbeOptions(**learned)

    def run(folder: Path) -> None:
        probe("m", *loaded, prompts, folder, options, quiet=True)

    run(tmp_path / "whole")
    crashed(partial(run, tmp_path / "out"), Budget, "run", 12)
    act, said = DAMAGE[damage]
    act(tmp_path / "out" / "probe.values")
    with pytest.warns(match=said):
        run(tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def judged(outputs: Path, judge: Path, out: Path) -> object:
    options = EffectOptions(cost=str(judge), label="1", batch_tokens=8, device="cpu")
    return effect(outputs, out / "effect.csv", options, quiet=True)


def shown(loaded: tuple[Any, Any], study: Path, out: Path) -> object:
    """Cards of a study, whose files are put into the folder first."""
    shutil.copytree(study, out, dirs_exist_ok=True)
    return look(
        "m", *loaded, out, None, LookOptions(cards=3, batch_tokens=64), force=True, quiet=True
    )


@pytest.mark.filterwarnings("ignore:the donor.s cost differs")
@pytest.mark.parametrize("stage", ["ablate", "nll", "generate", "effect", "look"])
def test_a_flipped_bit_of_a_journal_changes_no_result(
    made: Path,
    loaded: tuple[Any, Any],
    corpus: list[str],
    tmp_path: Path,
    stage: str,
) -> None:
    asked = {"ablate": {"batch_tokens": 100}, "nll": {"batch_tokens": 20}}.get(
        stage, {"batch_tokens": 100, "max_new_tokens": 4}
    )
    run: Callable[[Path], object] = {
        "ablate": lambda o: ablated(loaded, corpus, made, o, **asked),
        "generate": lambda o: generated(loaded, corpus, made, o, **asked),
        "effect": lambda o: judged(tmp_path / "said.jsonl", tmp_path / "judge", o),
        "look": lambda o: shown(loaded, made / "study", o),
        "nll": lambda o: nll(
            "m",
            *loaded,
            made / "counts" / "neurons.json",
            parse_sources(corpus),
            o,
            replace(NLL, **asked),
            quiet=True,
        ),
    }[stage]
    if stage == "effect":
        classifier_folder(tmp_path / "judge")
        said = {"clean": "a ", "donor": "c b ", "s": "c "}
        lines = [
            Generated(mask, "", str(n), "a ", text * n, 1, "length")
            for mask, text in said.items()
            for n in (1, 2, 3)
        ]
        (tmp_path / "said.jsonl").write_bytes(lines_bytes(lines))
    run(tmp_path / "whole")
    folder, blocks = tmp_path / "out", []
    add = Journal.add

    def dying(self: Journal, *args: Any) -> None:
        add(self, *args)
        blocks.append(1)
        if len(blocks) == 4:
            raise Crash

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Journal, "SAVE_EVERY_S", 0.0)
        patch.setattr(Journal, "add", dying)
        run(folder)
    for seed in range(6):
        place = tmp_path / str(seed)
        shutil.copytree(folder, place)
        (journal,) = place.glob("*.journal")
        flip(journal, random.Random(seed), end=len(journal.read_bytes()) - 1)
        with pytest.warns(match=r"\.journal: .* not as they were written"):
            run(place)
        assert files(place) == files(tmp_path / "whole")


# --- journals of several processes, and parts of machines ----------------------------------------

Stage = Callable[..., object]


def split(whole: Path, folder: Path, n: int) -> None:
    """The finished journal of one process as `n` of them leave it, each with its own blocks."""
    blocks, head = Blocks(), json.loads(first_line(whole))
    blocks.read(whole, head)
    for rank in range(n):
        write_blocks(folder / "one", head["inputs"], blocks, [*blocks][rank::n])
        (folder / "one").rename(folder / (f"{whole.name}.{rank}" if rank else whole.name))


def write_blocks(path: Path, inputs: Any, blocks: Blocks, keys: list[str]) -> None:
    with Journal(path, inputs) as journal:
        for key in keys:
            for number in range(blocks.n_pieces(key)):
                journal.keep(key, number, blocks.piece(key, number))
            journal.add(key, blocks[key])


def of_other_inputs(path: Path) -> None:
    blocks, head = Blocks(), json.loads(first_line(path))
    blocks.read(path, head)
    keys = [*blocks]
    write_blocks(path.with_name("other"), head["inputs"] | {"batch_tokens": 1}, blocks, keys)
    path.with_name("other").rename(path)


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 9)


def twice(path: Path) -> None:
    """Its own blocks, and those of the first process, too."""
    shutil.copyfile(path.with_name(path.name.removesuffix(".1")), path.with_name(f"{path.name}1"))


PARTS_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda path: flip(path, random.Random(3)), "not as they were written|other inputs"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), ""),
    "cut in its head": (lambda path: path.write_bytes(path.read_bytes()[:40]), "it is cut short"),
    "empty": (lambda path: path.write_bytes(b""), ""),
    "garbage": (garbage, "not as they were written"),
    "of other inputs": (of_other_inputs, "it is of other inputs"),
    "gone": (Path.unlink, ""),
    "twice": (twice, ""),
}


def stage_runs(made: Path, loaded: Any, corpus: list[str]) -> dict[str, Stage]:
    prompts = made / "study" / "prompts.jsonl"
    asked: dict[str, Any] = {"options": RecordOptions(batch_tokens=128), "quiet": True}
    return {
        "record": lambda o, **more: record(
            "m", *loaded, prompts, o, **asked | {"options": replace(asked["options"], **more)}
        ),
        "attribute": lambda o, **more: attribute(
            "m", *loaded, prompts, o, replace(ATTRIBUTED, **more), quiet=True
        ),
        "ablate": lambda o, **more: ablated(loaded, corpus, made, o, batch_tokens=100, **more),
        "generate": lambda o, **more: generated(
            loaded, corpus, made, o, batch_tokens=100, max_new_tokens=4, **more
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["record", "attribute", "ablate", "generate"])
def test_damaged_journals_of_other_processes_change_no_result(
    made: Path, loaded: tuple[Any, Any], corpus: list[str], tmp_path: Path, stage: str
) -> None:
    run, done = stage_runs(made, loaded, corpus)[stage], tmp_path / "done"
    run(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "remove", lambda self: None)
        run(done)
    (journal,) = done.glob("*.journal")
    for number, (damage, (act, said)) in enumerate(PARTS_DAMAGE.items()):
        place = tmp_path / damage
        place.mkdir()
        for name in ("prompts.jsonl", ROWS.get(journal.name, "")):
            if (done / name).is_file():
                shutil.copy(done / name, place)
        split(journal, place, 3)
        act(place / f"{journal.name}.{2 if damage != 'twice' and number % 2 else 1}")
        with pytest.warns(match=said) if said else nullcontext():
            run(place)
        assert files(place) == files(tmp_path / "whole"), damage


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["attribute", "ablate"])
def test_damaged_parts_of_machines_are_refused_or_done_again(
    made: Path, loaded: tuple[Any, Any], corpus: list[str], tmp_path: Path, stage: str
) -> None:
    run: Any = stage_runs(made, loaded, corpus)[stage]
    run(tmp_path / "whole")
    parts = [tmp_path / f"part{i}" for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        with pytest.raises(PartDone):
            run(part, shard=(i, 2))
    (journal,) = parts[1].glob("*.journal")
    name = journal.name
    for damage, (act, said) in PARTS_DAMAGE.items():
        if damage in ("gone", "twice"):
            continue
        second, output = tmp_path / f"{damage} 2", tmp_path / f"{damage} all"
        shutil.copytree(parts[1], second)
        act(second / name)
        is_refused = damage in ("cut in its head", "empty", "garbage", "of other inputs")
        with (
            pytest.raises(RelneuronError, match="line 1|no journal|different runs|journal")
            if is_refused
            else (pytest.warns(match=said) if said else nullcontext())
        ):
            merge_parts([parts[0], second], output)
        if not is_refused:
            run(output)
            assert files(output) == files(tmp_path / "whole"), damage
    if name in ROWS:
        second, output = tmp_path / "rows 2", tmp_path / "rows all"
        shutil.copytree(parts[1], second)
        with_row = json.loads(first_line(second / name)) and Blocks()
        with_row.read(second / name, json.loads(first_line(second / name)))
        row = next(iter(with_row.values()))["rows"][0]
        for array in map_safetensors(second / ROWS[name], writable=True).values():
            array[row, 0] += 1
            array.flush()
        merge_parts([parts[0], second], output)
        with pytest.warns(match="rows of .* are not as they were written: 1 of"):
            run(output)
        assert files(output) == files(tmp_path / "whole")


def test_a_flipped_checkpoint_is_refused(
    loaded: tuple[Any, Any], corpus: list[str], tmp_path: Path
) -> None:
    from relneuron.methods.counts.counter import Speed

    true, calls = Speed.count, []

    def dying(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise Crash
        true(*args)

    options = CountOptions(window=16, batch_tokens=32)
    run = partial(count, "m", *loaded, parse_sources(corpus), tmp_path, quiet=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Speed, "count", dying)
        run(replace(options, checkpoint_batches=1))
    flip(tmp_path / "count.checkpoint", random.Random(0))
    with pytest.raises(RelneuronError, match="count.checkpoint is not the file that was written"):
        run(options)
    run(options, force=True)
