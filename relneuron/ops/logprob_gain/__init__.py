"""The op logprob_gain; `op` has what it does."""
