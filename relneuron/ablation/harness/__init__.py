"""Tasks of lm-evaluation-harness with neurons off or set: `relneuron eval`, and its model.

May import what `ablation` may, and lm_eval, which no other room does. Begin with `stage.evaluate`;
`changes.py` says what becomes of the neurons, `lm.py` is the harness's model that they are changed
in, `tasks.py` finds tasks, reads what they ask and runs them. `python -m
relneuron.ablation.harness` is the harness's own command line, which knows the model `relneuron`.
"""
