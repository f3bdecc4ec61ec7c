"""The MLPs of a model and the experts of its mixtures: described, found, proved by numbers.

Begin with `find.find_mlps`; it gives a flat list of parts, `mlp.MLP` and `experts.Experts`, in the
order of the layers, and `shape.model_shape` says how many neurons they have. May import what
`model` may; a patch (`model/patch.py`) acts on the parts.
"""
