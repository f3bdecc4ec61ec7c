"""Neurons by the gradient of an answer's probability: knowledge neurons and their kin.

Of integrated gradients and relevance `rank` chooses: `facts`, `clusters`, `consistency` and
`shares` are what each paper chooses by, as pure functions. No torch here.
"""
