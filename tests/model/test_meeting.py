"""Processes that have met end by themselves, whatever the thread that watches the others does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import torch
from pytest import mark

# The thread is in the store's C++ nearly always: a process that ended there was aborted.
MEETS = """
import time
from relneuron.model import meeting
meeting._LOOK_EVERY_S = 0
meeting.meet(lambda error: None)
time.sleep(0.3)
meeting.leave()
"""


@mark.skipif(
    not (torch.distributed.is_available() and hasattr(os, "pidfd_open")), reason="none watches"
)
def test_the_end_does_not_meet_the_thread_that_watches() -> None:
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", MEETS],
                env=os.environ | place | {"WORLD_SIZE": "2", "RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = [process.communicate(timeout=120)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
