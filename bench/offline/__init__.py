"""`python -m bench.offline` compiles the Triton kernels for GPUs that are not here, and gates them.

For every target and every kind of call (`cases.py`) it compiles the launches that the op would make
and reads the machine code: registers, spills, shared memory, the width of loads, how often a turn
of a loop waits for them, and instructions per element. It fails on a spill, a load narrower than 16
bytes, a second wait for what one turn loads, loads that stand apart, a 32-bit product in an offset,
more than 110% of an instruction budget, less bytes under way while a multiprocessor waits, and
another limiter of the predicted time (`model.py`) than `budgets/<version of Triton>.csv` has.

`--predict` prints the predicted times and what they are assumed from (`predict.py`).

That file says of each kernel what was measured, and the digest of what it was compiled from. What
has another digest is compiled: a change of a kernel, of a launch or of Triton is measured wherever
it reaches. What has the same one is the same code, so the file's row is gated as it stands. That
the file tells the truth is seen on `cover()`, each kernel once: they are compiled each time, and
must give the rows of the file to the last digit. `--update` also rewrites the file, `--all`
compiles everything, which a change of what is measured needs.

Each version of Triton has a file of its own, as it makes other code. Those of versions that are not
here are gated as they stand, and must be of the kernels that are here.

Instructions per element are all instructions from the head of a loop to its backward branch,
predicated or not, divided by the elements one thread handles in one turn. The kernels of
swiglu_stats have two loops: `blocks` over whole blocks of rows, and `rows` over the rest of a run,
over rows out of order and over rows with different masks. What happens once per run (flush, sort)
is not in them. Of average_precision, `rows` is the loop of `_sum_kernel`, per row and relation;
`_sort_kernel` has no loop, and its `blocks` are all its instructions per row. Of logprob_gain, an
element is a token of a pair of neuron and sentence: `rows` is the loop with an exponential each, or
with the products of matrices of the moments; `blocks` is the one without exponentials.
"""

import os

# Read when triton is imported: this is about the compiler, never about the interpreter.
os.environ["TRITON_INTERPRET"] = "0"
# Read when torch is imported: no thread of OpenMP may be there before processes are forked.
os.environ["OMP_NUM_THREADS"] = "1"
