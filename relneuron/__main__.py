"""`relneuron` and `python -m relneuron`: the command line, if what it is made of is installed.

Ctrl-C ends it in two lines at any time: what is imported here is imported behind `_leave`.
"""

from __future__ import annotations

import atexit
import os
import shlex
import signal
import sys
from typing import NoReturn

# What relneuron.cli imports; the commands themselves check what they need.
PACKAGES = ("typer", "rich", "pydantic")


def program() -> None:
    """`main` as a whole process, which ends without having Python take apart what is in memory.

    That is a second for the modules of torch and transformers alone, and the system takes the
    memory back at once. Threads have ended by then, what was registered with `atexit` since has
    been called (the last one first), and output is written.
    """
    codes: list[int] = []

    def leave() -> None:
        if codes:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
            os._exit(codes[0])

    atexit.register(leave)
    try:
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            codes.append(end.code or 0)
        raise


def main() -> None:
    """Run the command line, or say in two lines that relneuron was installed without it."""
    # A shell may have had it ignored, for a command in the background.
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, _leave)
    from relneuron.artifact.installed import install_command, missing

    absent = missing(*PACKAGES)
    if absent:
        sys.stderr.write(
            f"error: the command line needs {', '.join(absent)}: not installed\n"
            f"fix:   {install_command('all')}\n"
        )
        sys.exit(1)
    from relneuron.cli.errors import interrupt, unraised
    from relneuron.cli.main import main as run

    sys.unraisablehook = unraised
    try:
        if heard:
            signal.signal(signal.SIGINT, interrupt)
        run()
    except KeyboardInterrupt:  # once more, while the first was being said
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # there is nothing left to interrupt


def _leave(number: int, frame: object) -> NoReturn:
    """End at once: nothing is begun, and imports would make other errors of an exception."""
    again = shlex.join(sys.argv[1:])
    os.write(2, f"error: interrupted\nfix:   go on with: relneuron {again}\n".encode())
    os._exit(130)


if __name__ == "__main__":
    program()
