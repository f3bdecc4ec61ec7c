"""The bundled demo: invented facts, a small Llama trained on them, and where both lie.

`relneuron demo` runs the whole study on it; `world.py` makes the facts, `train.py` the checkpoint.
"""

from pathlib import Path

FACTS = Path(__file__).parent / "facts"
CHECKPOINT = Path(__file__).parent / "checkpoint"
TOP = 220  # neurons per relation: a tenth of the model's 2,208
