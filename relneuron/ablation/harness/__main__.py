"""`python -m relneuron.ablation.harness`: lm_eval's command line, with the model `relneuron`."""

from __future__ import annotations

import relneuron.ablation.harness.lm  # noqa: F401  registers the model

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
