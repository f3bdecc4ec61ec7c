"""Runs a command line in a fork of this process, which has imported all that a command needs.

run.py calls it. No parallel work is done before a fork: threads do not survive one.
"""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import typer.main

import relneuron
from relneuron.cli import main as cli
from relneuron.model.load import load_model, load_tokenizer

LIMIT_S = 60
ROOM_BYTES = 6 << 30  # of addresses beside what the parent has: a bomb ends in a MemoryError


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (negative: the signal's number), what it said, its peak RSS.

    The peak is what came to the memory that it had from its parent.
    """

    code: int
    out: str
    err: str
    peak_bytes: int
    seconds: float  # of CPU


def import_all() -> None:
    """All modules of relneuron, and the packages that they import late."""
    for found in pkgutil.walk_packages(relneuron.__path__, "relneuron."):
        if ".triton_" not in found.name and not found.name.endswith(("__main__", "_cpu")):
            importlib.import_module(found.name)
    late = ("safetensors.torch", "pyarrow.parquet", "filelock", "tqdm", "jinja2", "scipy.stats")
    for name in (*late, "matplotlib.figure", "matplotlib.backends.backend_svg"):
        importlib.import_module(name)
    from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401


def warm_up(model: Path) -> None:
    """Have done what every command does again: the commands' own tables, transformers' patterns.

    The threads that load a model end with it.
    """
    typer.main.get_command = cache(typer.main.get_command)
    typer.main.get_command(cli.app)
    load_model(str(model))
    load_tokenizer(str(model))
    gc.collect()
    gc.freeze()  # pages that no fork writes to
    assert threading.active_count() == 1


def run_forked(
    words: Sequence[str], folder: Path, before: Callable[[], None] = lambda: None
) -> Ended:
    """`relneuron WORDS` in `folder`, in a process of its own that ends after a minute at most."""
    paths = [folder.with_name(f"{folder.name}.{name}") for name in ("out", "err")]
    inherited = _own_bytes()
    pid = os.fork()
    if not pid:
        _be_command(words, folder, paths, before)
    _, status, usage = os.wait4(pid, 0)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # a worker that does not end with it
    out, err = (path.read_bytes().decode(errors="replace") for path in paths)
    peak = max(0, 1024 * usage.ru_maxrss - inherited)
    return Ended(os.waitstatus_to_exitcode(status), out, err, peak, usage.ru_utime + usage.ru_stime)


def _own_bytes() -> int:
    """Memory of this process that a fork shares with it: resident, and of no file."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _be_command(
    words: Sequence[str], folder: Path, paths: Sequence[Path], before: Callable[[], None]
) -> None:
    """Become the command; never returns."""
    code = 70  # what is not caught ends in a traceback and this
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LIMIT_S)
        _limit_memory()
        for number, path in enumerate(paths, 1):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
            os.close(file)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115, PTH123
        os.chdir(folder)
        _reset_warnings()
        before()
        code = _call(words)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _call(words: Sequence[str]) -> int:
    sys.argv = ["relneuron", *words]
    try:
        cli.main()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    return 0


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _reset_warnings() -> None:
    """As they are in a new interpreter, not as pytest has them."""
    warnings.resetwarnings()
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)
