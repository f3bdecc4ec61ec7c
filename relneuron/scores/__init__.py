"""What turns statistics into a ranking of neurons: small pure functions, one file a method.

The `identify` stage calls them; they need no model.
"""
