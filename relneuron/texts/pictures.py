"""A record with pictures: what its fields hold, the pictures themselves, their digests.

`read.py` makes them of the records of a source with an `image_column`; `picture_feed.py` gives them
out one by one, and whatever asks a model about pictures opens them here.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.installed import need

COLUMN = "image"  # where it is not named


@dataclass(frozen=True)
class Record:
    """One record: a text and its pictures, each a path, the bytes of a file, or a PIL image.

    `where` is how an error calls it: its file and its line or row.
    """

    group: str
    text: str
    pictures: tuple[Any, ...]
    where: str

    def open(self) -> list[Any]:
        """The pictures as PIL images in RGB."""
        return [open_picture(picture, self.where) for picture in self.pictures]


def pictures_of(value: Any, folder: Path, where: str) -> tuple[Any, ...]:
    """The pictures of a field: one or a list of paths, of {bytes, path} or of PIL images.

    A path is relative to `folder`, that of the file which names it. None, no picture, and a path
    where no file is raise.
    """
    several = value if isinstance(value, list | tuple) else [value]
    found = tuple(_picture(one, folder, where) for one in several)
    if not found:
        raise RelneuronError(f"{where}: it has no picture", "give every record at least one")
    return found


def _picture(value: Any, folder: Path, where: str) -> Any:
    if isinstance(value, dict):  # as Hugging Face embeds a picture
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) or hasattr(value, "convert"):
        return value
    if not isinstance(value, str) or not value:
        raise RelneuronError(
            f"{where}: its picture is {_shown(value)}",
            "give the path of a file, relative to the folder of the file that names it",
        )
    path = folder / value
    if not path.is_file():
        raise RelneuronError(f"{where}: there is no picture {path}", "correct the path")
    return path


def _shown(value: Any) -> str:
    return "missing" if value is None or value == "" else f"{value!r}"[:80]


def open_picture(picture: Any, where: str) -> Any:
    """A picture, a path, bytes or a PIL image, as a PIL image in RGB, turned as its EXIF says."""
    need("reading pictures", "PIL")
    from PIL import Image, ImageOps

    name = f"{picture}" if isinstance(picture, Path) else "its picture"
    try:
        with warnings.catch_warnings():
            # PIL warns of a picture that is too large to be one, then refuses a larger one.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(picture, Path):
                picture = picture.read_bytes()  # PIL leaves a damaged file open
            opened = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # each format has errors of its own
        line = " ".join(str(error).split()) or type(error).__name__
        raise RelneuronError(
            f"{where}: {name} is no picture that can be read ({line})",
            "give a whole file of a format that Pillow reads, such as PNG or JPEG",
        ) from error


def picture_digests(pictures: Sequence[Any], known: dict[Path, bytes]) -> Iterator[bytes]:
    """The SHA-256 of each picture as it lies; `known` are those of files that were read before."""
    for picture in pictures:
        if isinstance(picture, Path):
            if picture not in known:
                with picture.open("rb") as file:
                    known[picture] = hashlib.file_digest(file, "sha256").digest()
            yield known[picture]
        elif isinstance(picture, bytes):
            yield hashlib.sha256(picture).digest()
        else:
            about = f"{picture.mode} {picture.size}".encode()
            yield hashlib.sha256(about + picture.tobytes()).digest()
