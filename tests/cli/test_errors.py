"""Ctrl-C, a closed pipe and errors of the system end the command line in lines, not a traceback."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

import relneuron
from relneuron.artifact.dense import create_safetensors
from relneuron.artifact.files import atomic_write
from relneuron.artifact.journal import Journal
from relneuron.cli import errors as cli_errors
from relneuron.cli import main as cli

# Ctrl-C comes when a module is looked for, and the import makes another error of it.
SCRIPT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == os.environ["AT"]:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                sum(range(1000))
            except KeyboardInterrupt:
                raise ImportError("a C extension failed")
sys.meta_path.insert(0, Finder())
from relneuron.__main__ import main
main()
"""


@pytest.mark.parametrize("at", ["numpy", "torch", "relneuron.cli.doctor"])
def test_ctrl_c_while_python_imports(at: str) -> None:
    """Before torch, at it, and in the imports of a command."""
    words = [sys.executable, "-c", SCRIPT, "doctor"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "AT": at})
    assert done.returncode == 130, done.stderr
    assert done.stderr == "error: interrupted\nfix:   go on with: relneuron doctor\n"
    assert done.stdout == ""


def test_ctrl_c_where_it_cannot_be_raised_comes_once_more() -> None:
    code = """
import sys, time
from relneuron.cli.errors import unraised
sys.unraisablehook = unraised
class Deaf:
    def __del__(self): raise KeyboardInterrupt
try:
    Deaf()
    time.sleep(20)
except KeyboardInterrupt:
    print("heard")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("heard\n", "")


def ended(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as end:
        cli_errors.end(error)
    return int(end.value.code or 0), capsys.readouterr().err.splitlines()


def failing(number: int) -> Any:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))  # as the system does it: with no name

    return fail


@pytest.mark.parametrize(
    "number", [n for n in cli_errors.FIXES if n not in (errno.ENOENT, errno.ELOOP)]
)
def test_an_error_of_the_system_names_its_path(
    tmp_path: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def write() -> None:
        atomic_write(tmp_path / "a.csv", b"text")

    def reserve() -> None:
        create_safetensors(tmp_path / "a.safetensors", {"x": (2,)})

    def note() -> None:
        journal = Journal(tmp_path / "a.journal", {})
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(number))
            journal.commit()

    for act, name, owner, call in (
        (write, "a.csv", os, "fsync"),
        (write, "a.csv", "tempfile", "mkstemp"),
        (reserve, "a.safetensors", os, "posix_fallocate"),
        (note, "a.journal", None, ""),
    ):
        with monkeypatch.context() as patch, pytest.raises(OSError) as raised:
            if isinstance(owner, str):
                patch.setattr(f"{owner}.{call}", failing(number))
            elif owner:
                patch.setattr(owner, call, failing(number))
            act()
        code, (cause, fix) = ended(raised.value, capsys)
        assert code == 1 and cause == f"error: {os.strerror(number)} ({tmp_path / name})"
        assert fix == f"fix:   {cli_errors.FIXES[number]}; then run the same command again"


def test_an_error_of_rust_is_one_of_the_system(capsys: pytest.CaptureFixture[str]) -> None:
    code, (cause, fix) = ended(Exception("IO: No space left (os error 28)"), capsys)
    assert code == 1 and cause == f"error: {os.strerror(errno.ENOSPC)}"
    assert fix.startswith("fix:   free space on the disk")


def test_a_closed_pipe_ends_without_a_word(tmp_path: Path) -> None:
    """`relneuron ... | head -1`, in a fork: pytest has its own standard output."""
    reader, writer = os.pipe()
    os.close(reader)
    said = os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT)
    pid = os.fork()
    if not pid:
        code = 99
        try:
            os.dup2(writer, 1)
            os.dup2(said, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = ["relneuron", "doctor"]
            cli.main()
        except SystemExit as error:
            sys.stdout.flush()
            sys.stderr.flush()
            code = int(error.code or 0)
        finally:
            os._exit(code)
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert (tmp_path / "said").read_text() == ""


def test_names_in_letters_that_the_output_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pipe is not UTF-8, as on Windows, a name is spelled out."""
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, "cp1252", write_through=True))
    monkeypatch.setattr(cli, "app", lambda **_: print("\u0141\xf3d\u017a"))
    with pytest.raises(SystemExit):
        cli.main()
    assert pipe.getvalue() == b"\\u0141\xf3d\\u017a" + os.linesep.encode()


ENDS = """
import atexit, sys, threading, time
from relneuron import __main__ as entry

class Held:
    def __del__(self):
        print("taken apart", flush=True)

held = Held()
run = entry.main

def main():
    atexit.register(print, "called")
    threading.Thread(target=lambda: (time.sleep(0.2), print("waited for"))).start()
    run()

entry.main = main
sys.argv = ["relneuron", *sys.argv[1:]]
entry.program()
"""


@pytest.mark.parametrize("word, code", [("--version", 0), ("--no-such", 2)])
def test_a_process_ends_without_taking_itself_apart(word: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS, word], capture_output=True, text=True, check=False
    )
    written = [f"relneuron {relneuron.__version__}"] if word == "--version" else []
    assert done.returncode == code, done
    assert sorted(done.stdout.splitlines()) == sorted(["waited for", "called", *written])
