"""How the processes that torchrun started meet, and how they end: together, and one says why.

`ranks.py` has them share work once they have met. A process that ends with an error, or dies, ends
the others: on one machine they see it at once (`_watch`), on several torchrun does.
"""

from __future__ import annotations

import atexit
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import is_first, n_started

distributed: Any = torch.distributed  # a torch may be built without some of it

MEET = timedelta(minutes=10)  # processes are started together; on a cluster not at once
# They wait for what the first one does alone, such as ranking for hours. One that ends closes its
# connections, which the others see at once.
WAIT = timedelta(days=2)
# Seconds that a process which only saw another one end leaves it to say why, and itself to save
# what it has done; and that the one which keeps the store waits for the others to see it end.
PATIENCE_S = 2.0
LINGER_S = 5.0
_LOOK_EVERY_S = 0.2
# Keys of the store: how many processes end, how the first one did, how many know that.
_N_ENDED, _HOW, _N_TOLD = "ended", "how", "told"
_DONE, _N_HEARD = "done", "heard"  # what the first one did alone, and how many know that

# Where the processes meet, once they have: a store of keys and values; and the same on a line of
# its own, as one on which a value is waited for takes no other call.
_MET: list[Any] = []
_ENDING = threading.Lock()  # this process ends once


class OthersEnd(RelneuronError):
    """Another process ends, and says why."""

    def __init__(self) -> None:
        super().__init__("another process of torchrun has ended", "see what it says, then go on")


def meet(end: Callable[[BaseException], object] | None = None) -> Any:
    """What the processes tell each other by; `end` is called where one of them has ended."""
    if not _MET:
        try:
            store, _, _ = next(distributed.rendezvous("env://", timeout=MEET))
        except (RuntimeError, ValueError) as error:
            raise RelneuronError(
                f"the {n_started()} processes did not meet: {str(error).splitlines()[0]}",
                f"start all of them within {MEET.seconds // 60} minutes, by torchrun",
            ) from error
        _MET[:] = [store, store.clone()]
        if end is not None and hasattr(os, "pidfd_open"):
            store.set(f"process {os.environ['RANK']}", f"{_place()} {os.getpid()}")
            _begin_to_watch(_MET[1], end)
    return _MET[0]


def first_alone(work: Callable[[], Any]) -> Any:
    """`work()` in the first process, for which the others wait; they end as it does."""
    store = meet()
    if not is_first():
        store.wait([_DONE], WAIT)
        store.add(_N_HEARD, 1)
        return None
    found = work()
    store.set(_DONE, "")
    _linger(lambda: int(store.add(_N_HEARD, 0)) < n_started() - 1)
    return found


def _linger(others_wait: Callable[[], bool]) -> None:
    """Leave the others a while, as this process may be the one that keeps the store."""
    keeps = "TORCHELASTIC_USE_AGENT_STORE" not in os.environ and os.environ["RANK"] == "0"
    until = time.monotonic() + LINGER_S
    while keeps and time.monotonic() < until and others_wait():
        time.sleep(0.05)


def leave() -> None:
    """Say that this process has done what it was asked for, and ends well."""
    if _MET:
        with suppress(RuntimeError):
            _MET[1].set(f"left {os.environ['RANK']}", "")


def _place() -> str:
    """Where a process number means a process: the machine, and the container on it."""
    return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"


def _begin_to_watch(store: Any, end: Callable[[BaseException], object]) -> None:
    """Watch the others until Python ends; a thread that it finds in C++ then aborts the process."""
    stopped, stop = os.pipe()
    thread = threading.Thread(target=_watch, args=(store, end, stopped), daemon=True)
    thread.start()
    atexit.register(thread.join, LINGER_S)
    atexit.register(os.write, stop, b"x")  # before that


def _watch(store: Any, end: Callable[[BaseException], object], stopped: int) -> None:
    """See the others of this machine end, and end with those that did not end well.

    Until something can be read from `stopped`.
    """
    unknown = {str(rank) for rank in range(n_started())} - {os.environ["RANK"]}
    watched: dict[int, str] = {}
    # The process that keeps the store may be gone: what needs it then says so.
    with suppress(RuntimeError):
        while unknown or watched:
            for rank in [rank for rank in unknown if store.check([f"process {rank}"])]:
                unknown.remove(rank)
                place, _, pid = store.get(f"process {rank}").decode().rpartition(" ")
                if place == _place():
                    handle = _open(int(pid))
                    if handle is None and not store.check([f"left {rank}"]):
                        _end_with(end, stopped)
                    elif handle is not None:
                        watched[handle] = rank
            if store.add(_N_ENDED, 0):
                _end_with(end, stopped)
            seen = select.select([stopped, *watched], [], [], _LOOK_EVERY_S)[0]
            if stopped in seen:
                return
            for handle in seen:
                if not store.check([f"left {watched.pop(handle)}"]):
                    _end_with(end, stopped)
                os.close(handle)


def _open(pid: int) -> int | None:
    """What can be read where a process has ended; None if it is gone already."""
    try:
        return int(os.pidfd_open(pid))  # type: ignore[attr-defined,unused-ignore]
    except ProcessLookupError:
        return None


def _end_with(end: Callable[[BaseException], object], stopped: int) -> None:
    """End this process, whatever it is waiting for, unless it is about to end by itself."""
    if select.select([stopped], [], [], PATIENCE_S)[0] or _ENDING.locked():
        return
    code = 1
    try:
        end(OthersEnd())
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(*, saw: bool = False) -> int | None:
    """None if this process is the first one to end, and says why; else how that one ended.

    If it only `saw` another one end, that one is first for a while. It is asked once: a second
    thread waits for the end.
    """
    _ENDING.acquire()
    if not _MET:
        return None
    # One that is gone may be the one that keeps the store: nobody is there to ask.
    with suppress(RuntimeError):
        store = _MET[1]
        until = time.monotonic() + (PATIENCE_S if saw else 0)
        while time.monotonic() < until and not store.add(_N_ENDED, 0):
            time.sleep(0.05)
        if store.add(_N_ENDED, 1) > 1:
            # torchrun ends all where one has ended: not before the first one has said why.
            store.wait([_HOW], timedelta(seconds=LINGER_S))
            return int(store.get(_HOW))
    return None


def said(code: int) -> None:
    """Tell the others the exit code of the first one to end, and leave them a while to see it."""
    if not _MET:
        return
    with suppress(RuntimeError):
        store = _MET[1]
        store.set(_HOW, str(code))
        store.add(_N_TOLD, 1)
        _linger(lambda: int(store.add(_N_TOLD, 0)) < n_started())
