"""Command lines and functions in forks of one process that has imported all that they need.

A process that is killed, interrupted or must be a fresh one costs seconds of imports; a fork of
this server costs milliseconds. One server per process of pytest is started at first use. What must
hold of Python's own start (hash seeds, imports that fail) still starts a Python.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.conftest import ROOT

Act = Callable[..., object]


class Forked:
    """`act(*args)` in a fork: its process id, its exit code, what it says.

    An exit code is negative after a signal, as subprocess has it. `environment` replaces the one of
    this process.
    """

    def __init__(
        self, act: Act, *args: object, environment: Mapping[str, str] | None = None
    ) -> None:
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder)
        self._files = [Path(folder) / name for name in ("out", "err")]
        for path in self._files:
            path.touch()
        asked = (act, args, dict(environment or os.environ), Path.cwd(), *self._files)
        self._process = _server().Process(target=_become, args=asked)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> int:
        self._process.join(seconds)
        assert self._process.exitcode is not None, "it does not end"
        return self._process.exitcode

    def said(self) -> tuple[str, str]:
        """Its output and its errors, once it has ended."""
        self.wait()
        out, err = (path.read_text(encoding="utf-8") for path in self._files)
        return out, err


def nothing() -> None:
    """What is done before a command of which nothing is asked."""


def command(
    *words: object, before: Act = nothing, environment: Mapping[str, str] | None = None
) -> Forked:
    """`python -m relneuron WORDS`; `before()`, a function of a module, is called in it first."""
    return Forked(_command, tuple(map(str, words)), before, environment=environment)


def _command(words: tuple[str, ...], before: Act) -> None:
    from relneuron.__main__ import main

    before()
    sys.argv = ["relneuron", *words]
    main()


def _become(
    act: Act, args: tuple[Any, ...], environment: dict[str, str], cwd: Path, out: Path, err: Path
) -> None:
    """As a new interpreter would have it: output, environment, warnings."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115, PTH123
    warnings.resetwarnings()
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)
    try:
        act(*args)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@cache
def _server() -> Any:
    if not hasattr(os, "fork"):
        pytest.skip("this system forks no processes")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kit.preloaded"])
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):
        forkserver.ensure_running()
    return context
