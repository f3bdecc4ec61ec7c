"""Parts of a stage that machines did which share nothing (`--shard`), put together for its end.

`relneuron merge` calls it. A part is a journal, and the rows of a file that its blocks note.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from relneuron.artifact.blocks import BUDGET, Blocks
from relneuron.artifact.dense import map_safetensors, release
from relneuron.artifact.files import Json, RelneuronError, real_path, refuse_overwrite
from relneuron.artifact.gains import GAINS
from relneuron.artifact.gradients import FILES
from relneuron.artifact.journal import Journal, first_line, has_rows, parts_of
from relneuron.artifact.manifest import differences, locked, versions
from relneuron.artifact.reading import parse_json

# The file whose rows a stage's blocks note.
ROWS = {"record.journal": "responses.safetensors", "attribute.journal": GAINS}
ROWS |= {f"attribute_{method}.journal": name for method, name in FILES.items()}
ROWS |= {f"{stage}.journal": f"{stage}.values" for stage in ("probe", "probe_apply")}
SAMPLES = "samples"  # files that blocks of eval note, in a folder of this name

_ROWS = 256  # that are copied at a time


def journals_in(folder: Path) -> list[str]:
    """The names of the journals of stages that are not finished in a folder."""
    return sorted(path.name for path in folder.glob("*.journal") if path.is_file())


def merge_parts(folders: Sequence[Path], output: Path, *, force: bool = False) -> dict[str, int]:
    """Put the finished blocks of all folders into `output`; how many there are, by journal.

    The stage's own command, without --shard, does there what is left of it and writes its files.
    Rows of a file are copied; that command compares them with their digests, as it always does.
    """
    names = journals_in(folders[0])
    for folder in folders:
        if journals_in(folder) != names:
            raise RelneuronError(
                f"{folder} does not hold the unfinished stages of {folders[0]}: {', '.join(names)}",
                "merge parts of the same stage, made by --shard",
            )
    if real_path(output) in [real_path(folder) for folder in folders]:
        raise RelneuronError(f"{output} is one of the parts", "choose another output", 2)
    heads = {name: _head(folders, name) for name in names}
    files = {name: ROWS[name] for name in names if name in ROWS}
    for name in names:
        for file in (name, *([files[name]] if name in files else [])):
            refuse_overwrite(output / file, force)
    with locked(output):
        return {name: _merge(folders, output, name, heads[name], files.get(name)) for name in names}


def _head(folders: Sequence[Path], name: str) -> Json:
    """What the parts were made from, which is the same for all of them, and of these versions."""
    heads = []
    for folder in folders:
        where = f"{folder / name}, line 1"
        line = first_line(folder / name).decode(errors="replace")
        head = parse_json(line, where, "make the part again")
        if not isinstance(head, dict) or not isinstance(head.get("inputs"), dict):
            raise RelneuronError(f"{folder / name} is no journal", "make the part again")
        heads.append(head)
    for folder, head in zip(folders, heads, strict=True):
        changed = differences(heads[0], head)
        if changed:
            raise RelneuronError(
                f"{folders[0]} and {folder} are parts of different runs: {'; '.join(changed)}",
                "give each part the same model, files, options and versions",
            )
    changed = differences(heads[0].get("versions") or {}, versions())
    if changed:
        raise RelneuronError(
            f"{folders[0]} was made with other versions: {'; '.join(changed)}",
            "merge the parts with the versions that made them",
        )
    return heads[0]


def _merge(folders: Sequence[Path], output: Path, name: str, head: Json, file: str | None) -> int:
    whole: dict[str, Blocks] = {}
    budgets: list[int] = []
    rows: list[set[int]] = []
    samples: set[str] = set()
    for folder in folders:
        done = Blocks()
        for path in (folder / name, *parts_of(folder / name)):
            done.read(path, head)
        for key in done:
            if key == BUDGET:
                budgets.append(done[key])
            elif key not in whole:
                whole[key] = done
            elif [*done.texts(key)] != [*whole[key].texts(key)]:
                raise RelneuronError(
                    f"{folder} and a part before it have other results of the same batch",
                    "make the parts on machines of one kind, each part once",
                )
        rows.append(set())
        for value in done.values():
            if has_rows(value):
                rows[-1].update(value["rows"])
            if isinstance(value, dict):
                samples.update(value.get(SAMPLES, ()))
    files = [folder / file for folder in folders] if file is not None and any(rows) else []
    _check_rows(files, rows)
    (output / name).unlink(missing_ok=True)  # its rows are written next
    if file is not None and files:
        _copy_rows(files, rows, output / file)
    for folder in folders:
        _copy_samples(folder / SAMPLES, samples, output / SAMPLES)
    with Journal(output / name, head["inputs"]) as journal:
        if budgets:
            journal.add(BUDGET, min(budgets))
        for key, blocks in whole.items():
            for number in range(blocks.n_pieces(key)):
                journal.keep(key, number, blocks.piece(key, number))
            journal.add(key, blocks[key])
    return len(whole)


def _copy_samples(folder: Path, names: Iterable[str], output: Path) -> None:
    """Those of a part's files that blocks note; `eval` compares them with their digests."""
    for name in sorted(names):
        if (folder / name).is_file():
            output.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, output / name)


def _tensors(path: Path, *, writable: bool = False) -> Json:
    try:
        return map_safetensors(path, writable=writable)
    except ValueError as error:
        raise RelneuronError(f"{path} is damaged", "make the part again") from error


def _check_rows(files: Sequence[Path], rows: Sequence[set[int]]) -> None:
    """Refuse, before anything is written, files that have not the rows that the parts note."""
    shapes = [{name: a.shape for name, a in _tensors(file).items()} for file in files]
    for file, shape, chosen in zip(files, shapes, rows, strict=False):
        n_rows = min((sum(sizes[:1]) for sizes in shape.values()), default=0)
        if shape != shapes[0] or not all(0 <= row < n_rows for row in chosen):
            raise RelneuronError(f"{file} is not of the shape of {files[0]}", "make it again")


def _copy_rows(files: Sequence[Path], rows: Sequence[set[int]], output: Path) -> None:
    """The first file with the rows of the others."""
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(files[0], output)
    total = _tensors(output, writable=True)
    for file, chosen in zip(files[1:], rows[1:], strict=True):
        places = np.array(sorted(chosen), np.int64)
        for name, array in _tensors(file).items():
            for first in range(0, len(places), _ROWS):
                some = places[first : first + _ROWS]
                total[name][some] = array[some]
                release([array, total[name]])
    for array in total.values():
        array.flush()
