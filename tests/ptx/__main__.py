"""`python -m tests.ptx`: the kernels' PTX, run without a GPU and compared with the reference.

python -m tests.ptx --quick 90          # what make test runs, as JSON: {call: seconds or fault}
python -m tests.ptx --faults            # what is said of seeded faults, as JSON
python -m tests.ptx --long              # all Triton tests, and 2,000 random calls of each op
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

# Read when triton is imported: this is about the compiler, never about the interpreter.
os.environ["TRITON_INTERPRET"] = "0"

from tests.ptx.driver import Stand


def outcome(stand: Stand, call: Callable[[], None]) -> str:
    """Nothing, or what is wrong with a call."""
    before = stand.log.reports.copy()
    try:
        call()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} ({last.name}): {error}"
    return "; ".join((stand.log.reports - before).keys())


def quick(capability: int) -> dict[str, Any]:
    stand = Stand(capability)
    found = {}
    with stand.installed():
        from tests.ptx import calls

        for name, call in calls.quick(capability).items():
            start = time.perf_counter()
            wrong = outcome(stand, call)
            found[name] = wrong or round(time.perf_counter() - start, 2)
    return found | {"forms": sorted(stand.log.forms)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__)
    parser.add_argument("--quick", type=int, metavar="CAPABILITY")
    options = parser.parse_args()
    if options.quick:
        json.dump(quick(options.quick), sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
