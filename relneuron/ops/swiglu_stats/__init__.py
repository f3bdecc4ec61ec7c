"""The op swiglu_stats; `op` has what it does."""
