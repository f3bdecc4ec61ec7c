"""How the command line ends that cannot go on: one line of cause, one of fix, an exit code.

cli/main.py hands every error to `end`; __main__.py has Ctrl-C come to `interrupt`.
"""

from __future__ import annotations

import _thread
import errno
import os
import re
import shlex
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.installed import install_command
from relneuron.artifact.journal import n_started
from relneuron.cli.flags import state

_OTHER_PLACE = "give a path that exists, of the right kind"
_CLOSE = "close other programs, or raise the limit of open files (ulimit -n)"
# What to do about an error of the system, by its number.
FIXES = {
    errno.ENOSPC: "free space on the disk, or write elsewhere",
    errno.EDQUOT: "free space in your quota, or write elsewhere",
    errno.EFBIG: "raise the file size limit (ulimit -f), or write elsewhere",
    errno.EROFS: "write to a folder that is not read-only",
    errno.EACCES: "give yourself the right to it (chmod), or use a place where you have it",
    errno.EPERM: "give yourself the right to it (chmod), or use a place where you have it",
    errno.ENOENT: _OTHER_PLACE,
    errno.EISDIR: "it is a folder: name a file",
    errno.ENOTDIR: "a part of the path is a file: name a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "correct the links on the way to it",
    errno.EMFILE: _CLOSE,
    errno.ENFILE: _CLOSE,
    errno.ENOMEM: "free memory",
    errno.EIO: "check the disk or the network drive, or use a copy elsewhere",
    errno.ESTALE: "mount the network drive again",
}
_DEBUG = "run again with --debug to see where"
# What gloo, NCCL and the store of torch.distributed say of a process that is gone.
_PEER = re.compile(r"Connection (reset|closed) by peer|ncclRemoteError|DistNetworkError")


def interrupt(number: int, frame: object) -> NoReturn:
    """Ctrl-C: noted, since code that is being imported may make another error of it."""
    state["interrupted"] = True
    raise KeyboardInterrupt


def unraised(about: Any) -> None:
    """A sys.unraisablehook: Ctrl-C in a callback that cannot raise comes once more, outside."""
    if about.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(about)


def end(error: BaseException) -> NoReturn:
    """Say what an error is, and end the process."""
    if n_started() > 1:
        _end_together(error)
    _end(error)


def _end(error: BaseException) -> NoReturn:
    if _is_interrupt(error):
        fail("interrupted", f"go on with: relneuron {shlex.join(sys.argv[1:])}", 130)
    if isinstance(error, RelneuronError):
        fail(error.cause, error.fix, error.exit_code)
    if isinstance(error, BrokenPipeError):  # nobody reads on: relneuron ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    number = _number(error)
    if number:
        where = place_of(error)
        said = os.strerror(number)
        fix = FIXES.get(number)
        fail(
            f"{said} ({where})" if where else said,
            f"{fix}; then run the same command again" if fix else _DEBUG,
            1,
        )
    if isinstance(error, ImportError):
        fail(str(error), install_command("all"), 1)
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of typer's
        error.show()
        sys.exit(error.exit_code)
    fail(f"{type(error).__name__}: {error}", _DEBUG, 1)


def _is_interrupt(error: BaseException) -> bool:
    return state["interrupted"] or isinstance(error, KeyboardInterrupt | typer.Abort)


def _end_together(error: BaseException) -> NoReturn:
    """Of several processes that end, the first one says why; the others end as it does."""
    from relneuron.model.meeting import OthersEnd, ended, said

    code = 130 if _is_interrupt(error) else getattr(error, "exit_code", 1)
    is_of_others = isinstance(error, OthersEnd) or _PEER.search(f"{type(error).__name__}: {error}")
    saw = code != 130 and bool(is_of_others)
    other = ended(saw=saw)
    try:
        if other is None:
            _end(OthersEnd() if saw else error)
        sys.exit(other)
    finally:
        said(code if other is None else other)


def _number(error: BaseException) -> int:
    """The system's number of an error, also where a library in Rust has made a text of it."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def place_of(error: BaseException) -> str:
    """The path that an error of the system is about: as it says, or else what our code was at.

    Reads and writes of an open file, and libraries, name none; a temporary file is nobody's.
    """
    named = getattr(error, "filename", None)
    if isinstance(named, str | bytes | Path) and not os.fsdecode(named).endswith(".tmp"):
        return os.fsdecode(named)
    places = [
        place
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").startswith("relneuron.")
        for place in _paths(frame.f_locals)
    ]
    return str(places[-1]) if places else ""


def _paths(here: dict[str, Any]) -> list[Path]:
    """The file that a call is about, by its names; its folder counts less."""
    known = [here.get(name) for name in ("folder", "output", "file", "path")]
    known.append(getattr(here.get("self"), "path", None))
    return [place for place in known if isinstance(place, Path)]


_LONGEST = 2000  # characters of a line; a name that is longer says no more


def fail(cause: str, fix: str, code: int) -> NoReturn:
    """Say what went wrong and what mends it, on standard error, and end the process."""
    if state["debug"]:
        traceback.print_exc()
    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    for word, text in (("error:", cause), ("fix:  ", fix)):
        line = " ".join(text.split())
        line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
        console.print(f"{word} {line}", markup=False)
    sys.exit(code)
