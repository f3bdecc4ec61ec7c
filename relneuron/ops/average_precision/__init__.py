"""The op average_precision; `op` has what it does."""
