"""What is noted of files that belong together while a stage writes them: `.unfinished` beside them.

Stages that keep no journal write through `writing`; `refuse_output` lets the same command go on
where it was killed, and artifact/manifest.py's readers refuse what was half written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from relneuron.artifact.files import RelneuronError, atomic_write, json_bytes, refuse_overwrite

NOTE = ".unfinished"


def unfinished(folder: Path) -> dict[str, str]:
    """The files in `folder` that a killed or failed stage did not finish, each with that stage."""
    try:
        found = json.loads((folder / NOTE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RelneuronError(f"{folder / NOTE} is damaged", "delete it, and make the files anew")
    return found


@contextmanager
def writing(stage: str, folder: Path, files: Iterable[Path]) -> Iterator[None]:
    """Note in `folder` that `stage` writes `files` there or below, until the block ends well.

    The folder is held (manifest.locked). What another run left unfinished there stays noted.
    """
    names = [file.relative_to(folder).as_posix() for file in files]
    _save(folder, unfinished(folder) | dict.fromkeys(names, stage))
    yield
    _save(folder, {name: by for name, by in unfinished(folder).items() if name not in names})


def _save(folder: Path, noted: dict[str, str]) -> None:
    if noted:
        atomic_write(folder / NOTE, json_bytes(noted))
    else:
        (folder / NOTE).unlink(missing_ok=True)


def refuse_output(path: Path, stage: str, force: bool, folder: Path | None = None) -> None:
    """`refuse_overwrite`, but what `stage` did not finish is written again without --force.

    `folder` has the note; default: the one of `path`.
    """
    place = folder or path.parent
    is_left = unfinished(place).get(path.relative_to(place).as_posix()) == stage
    refuse_overwrite(path, force or is_left)


def refuse_unfinished(path: Path) -> None:
    """Raise if `path` is one of several files that were not all written."""
    stage = unfinished(path.parent).get(path.name)
    if stage is not None:
        raise RelneuronError(
            f"{path} is of a run of relneuron {stage} that was not finished",
            f"run that relneuron {stage} again",
        )
