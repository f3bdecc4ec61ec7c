"""Faults of `ops`: the kernels' Python side."""

from tests.mutants.mutant import Mutant

FAULTS = {
    "ops.swiglu_stats.gradient: a neuron that is off has a gradient": Mutant(
        "return [d.masked_fill(off, 0.0) for d in found]",
        "return found",
        "ops/swiglu_stats/test_gradient.py::test_a_dropped_neuron_has_none_whatever_its_values",
    ),
    "ops.swiglu_stats.gradient: compiled code with a gradient records nothing": Mutant(
        "            launch(None)\n",
        "            pass\n",
        "ops/swiglu_stats/test_gradient.py::test_compiled_code_gives_the_same",
    ),
}
