"""What the server of forked.py imports before it forks: all of relneuron and of what it uses."""

import torch

from tests.fuzz.child import import_all

torch.set_num_threads(1)
import_all()
