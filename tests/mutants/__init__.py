"""Faults of the pipeline's own decisions, each with a test that must find it: a file a room.

`python -m tests.mutants` puts them into a copy of the package; tests/testing/mutants.py has those
of the kernels.
"""

from __future__ import annotations

from tests.mutants import (
    ablation,
    analyses,
    artifact,
    bench,
    methods,
    model,
    ops,
    report,
    study,
    texts,
)
from tests.mutants.mutant import Mutant

ROOMS = {
    "texts": texts.FAULTS,
    "model": model.FAULTS,
    "methods": methods.FAULTS,
    "ablation": ablation.FAULTS,
    "analyses": analyses.FAULTS,
    "study": study.FAULTS,
    "artifact": artifact.FAULTS,
    "report": report.FAULTS,
    "ops": ops.FAULTS,
    "bench": bench.FAULTS,
}
# "module: what is wrong" -> the fault
MUTANTS: dict[str, Mutant] = {
    name: fault for faults in ROOMS.values() for name, fault in faults.items()
}
