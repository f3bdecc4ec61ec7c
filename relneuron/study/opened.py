"""An opened study folder: what is there, its files checked, and how it looks; no table yet.

`folder.Study` adds the tables, which `held.HELD` lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relneuron.artifact.counts import Counts
from relneuron.artifact.files import Json, RelneuronError, require, unfinished
from relneuron.artifact.manifest import checked
from relneuron.artifact.neurons import Shape
from relneuron.report.page import PageKind
from relneuron.study import shown, tensors
from relneuron.study.frames import Frame, frame, read_columns
from relneuron.study.held import HELD, Held


@dataclass(frozen=True, repr=False, eq=False)
class Opened:
    """A folder, its kind of study and its manifest."""

    folder: Path
    kind: PageKind
    manifest: Json

    @property
    def there(self) -> list[str]:
        """The tables whose files are there."""
        return [name for name, held in HELD.items() if held.path(self.folder) is not None]

    def _path(self, name: str) -> Path:
        """The file of a table, checked; one that is not there, or not whole, raises."""
        held = HELD[name]
        path = held.path(self.folder)
        if path is None:
            return require(self.folder / held.files[0], self._made_by(held))
        if self._is_begun(held, path):
            raise RelneuronError(
                f"{path} is of a run that was not finished", f"go on with: relneuron {held.made_by}"
            )
        return checked(path)

    def _is_begun(self, held: Held, path: Path) -> bool:
        """Whether a long stage is still writing a file, or was killed meanwhile."""
        is_known = path.name in self.manifest["files"]
        return not is_known and any((self.folder / name).exists() for name in held.journals)

    def _made_by(self, held: Held) -> str:
        """The command that makes it, as the folder's kind of study says it."""
        found = (self.kind.reads.get(name) for name in held.files)
        return next((command for command in found if command), held.made_by)

    def _table(self, name: str, more: tuple[str, ...] = ()) -> Frame:
        return frame(read_columns(self._path(name), HELD[name].columns, more))

    def _counts(self, group: str | None) -> dict[str, Any]:
        path, asked = self._path("counts"), None if group is None else [group]
        return tensors.counts(path, Counts, asked, self._order)

    @property
    def _order(self) -> Shape | None:
        """Which neurons the model has, as far as the manifest says."""
        model = self.manifest.get("model")
        return Shape.of(model) if model else None

    def _model(self, path: Path) -> Json:
        """What the manifest says of the model, which the rows of a file need."""
        model: Json | None = self.manifest.get("model")
        if not model:
            raise RelneuronError(
                f"no manifest says of which model {path} is", "give the folder that it was made in"
            )
        return model

    def __repr__(self) -> str:
        return shown.as_text(self.kind.name, self.folder, self._states())

    def _repr_html_(self) -> str:
        """For notebooks: what is there, what is missing, and the commands that make it."""
        model = (self.manifest.get("model") or {}).get("id")
        return shown.as_html(self.kind.name, self.folder, model, self._states())

    def _states(self) -> list[shown.State]:
        """Of each table of this kind of study, and of each that is there."""
        left = unfinished(self.folder)
        rows = []
        for name, held in HELD.items():
            path, of_kind = held.path(self.folder), {*held.files} & self.kind.reads.keys()
            command = f"relneuron {self._made_by(held)}"
            if path is None and not of_kind:
                continue
            if path is None:
                known = any(self.manifest["files"].get(f, {}).get("dropped") for f in held.files)
                state = "deleted to save space" if known else "missing"
            elif path.name in left or self._is_begun(held, path):
                state = "unfinished"
            else:
                state, command = shown.file_of(path), ""
            rows.append(shown.State(held.call or name, held.words, state, command))
        return rows
