"""Which unit of one network plays the part of which unit of another: permutations of the spaces of `family/spaces.py`.

Solvers see tensors by name and give permutations; they know no file, no recipe and no plan.
"""
