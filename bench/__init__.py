"""Measurements: `pytest bench` (all ops), `python -m bench.gpu`, `python -m bench.offline`."""
