"""Ways to find neurons, a folder each: `responses`, `counts`, `gains`.

A method may import all rooms but `cli`, and no other method. Begin with its `rank`.
"""
