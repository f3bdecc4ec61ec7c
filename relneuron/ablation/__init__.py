"""Neurons switched off, or set, side by side: answers, NLL and continuations.

May import `model`, `texts` and `artifact`. Begin with `conditions.plan_conditions`, which says what
is off when, and `evaluate.Evaluator`, which runs all of it in common batches.
"""
