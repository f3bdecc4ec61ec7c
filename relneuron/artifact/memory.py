"""What a process holds in memory, as the system tells it."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

PROCESSES = Path("/proc")  # of Linux
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def status_bytes(name: str, process: int | str = "self") -> int | None:
    """A line of a process's status: VmRSS is what is resident now, VmHWM the most that was.

    None where the system tells neither.
    """
    with suppress(OSError):
        status = PROCESSES / str(process) / "status"
        for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return None


def peak_bytes() -> int | None:
    """The most memory that this process has held so far; None where the system does not tell.

    The kernel's own record where there is one: what it says of use begins with that of who started
    the process.
    """
    peak = status_bytes("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def resident_bytes() -> int:
    """What this process holds now; the most so far where the system tells no more, else 0."""
    return status_bytes("VmRSS") or peak_bytes() or 0


def keep_freed() -> None:
    """Have malloc keep what is freed, where it is glibc's.

    It gives large pieces of memory back to the system, which clears them for the next forward's
    tensors; what these take is then in other places each time.
    """
    with suppress(AttributeError, OSError, TypeError):
        malloc = ctypes.CDLL(None)
        malloc.mallopt(_M_MMAP_MAX, 0)
        malloc.mallopt(_M_TRIM_THRESHOLD, -1)
