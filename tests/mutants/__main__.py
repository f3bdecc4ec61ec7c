"""`python -m tests.mutants [NAMES]`: each fault is put in, alone, and must be found by its test.

Those with one of NAMES in their name; a name begins with its module. An exit code of 1 says that a
fault survived. They are put into a copy of the package: the checkout is never changed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.machinery import PathFinder
from multiprocessing import get_context
from pathlib import Path

from tests.mutants import MUTANTS
from tests.mutants.mutant import module_of

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # of one test, which takes a few: a fault may run forever
PASSED, FAILED = 10, 11  # a fork's exit codes: pytest's own and 10, as Python's errors are 1


def run(folder: Path, tests: Sequence[str], module: Path | None = None) -> tuple[int, str]:
    """The end of a fork that runs tests with the package of `folder`, and what pytest said."""
    said = folder / "said"
    process = get_context("fork").Process(target=_become, args=(folder, tests, module, said))
    process.start()
    try:
        process.join(SECONDS * len(tests))
    finally:  # also on Ctrl-C
        process.kill()
        process.join()
    return process.exitcode or 0, said.read_text(encoding="utf-8", errors="replace")


def _become(folder: Path, tests: Sequence[str], module: Path | None, said: Path) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # Before the finder of an editable install, which knows the checkout's modules.
    sys.meta_path.insert(0, PathFinder)
    sys.path.insert(0, str(folder))
    import pytest

    import relneuron  # noqa: F401  (now all of its modules are found beside it)

    options = ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "--basetemp", f"{folder}/tmp"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported already
    code = int(pytest.main([*options, *(f"tests/{test}" for test in tests)]))
    files = {getattr(found, "__file__", None) for found in list(sys.modules.values())}
    if str(folder / (module or "relneuron/__init__.py")) not in files:
        sys.exit("the tests import another package than the copy")
    sys.exit(PASSED + code)


def copy_package(folder: Path) -> None:
    """The checkout's package, with the C++ extension from where it is installed."""
    shutil.copytree(
        ROOT / "relneuron", folder / "relneuron", ignore=shutil.ignore_patterns("__pycache__")
    )
    found = importlib.util.find_spec("relneuron._cpu")
    if found is not None and found.origin is not None:
        shutil.copy2(found.origin, folder / "relneuron")
    for name in [name for name in sys.modules if name.partition(".")[0] == "relneuron"]:
        del sys.modules[name]


def main(names: Sequence[str]) -> int:
    chosen = {n: m for n, m in MUTANTS.items() if not names or any(part in n for part in names)}
    if not chosen:
        print(f"no fault is named so; they are:\n{chr(10).join(MUTANTS)}")
        return 2
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    import pytest  # noqa: F401  (what every fork needs is imported once)
    import torch  # noqa: F401
    import transformers  # noqa: F401

    survived = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
        copy_package(folder)
        code, said = run(folder, list(dict.fromkeys(m.test for m in chosen.values())))
        if code != PASSED:
            print(f"{said}\nthe tests fail without a fault: {code}")
            return 2
        for number, (name, mutant) in enumerate(chosen.items()):
            module, began = module_of(name), time.monotonic()
            path = folder / module
            whole = path.read_text(encoding="utf-8")
            assert whole.count(mutant.old) == 1, f"{name}: its text does not stand there once"
            path.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")
            os.utime(path, (number, number))  # its bytecode is told from another one's by the time
            code, said = run(folder, [mutant.test], module)
            path.write_text(whole, encoding="utf-8")
            what = {PASSED: "SURVIVED", FAILED: "caught"}.get(code, f"BROKEN ({code})")
            print(f"{what:9}{time.monotonic() - began:5.1f} s  {name}", flush=True)
            if code != FAILED:
                survived += 1
                print(f"{said[-2000:]}\n{mutant.test}", flush=True)
    n_seconds = sum(os.times()[:4])
    print(f"{len(chosen) - survived} of {len(chosen)} faults caught, {n_seconds:.0f} CPU-seconds")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
