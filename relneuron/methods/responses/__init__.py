"""Relation neurons by their responses to prompts: average precision (arXiv 2502.17355).

`record` asks and keeps responses, `rank` chooses (`relneuron identify`), `significance` says how
sure a score is, `concepts` does it for kinds of subject.
"""
