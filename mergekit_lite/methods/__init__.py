"""Merge methods: small pure functions on tensors that know nothing of files, devices, names or ranks.

A new method is one file in this folder, or one installed package with an entry point in the group
`mergekit_lite.methods`. Importing this package is cheap; torch comes in with the first look at the registry.
"""

from mergekit_lite.methods.registry import all_methods, expand, get, method
from mergekit_lite.methods.spec import REQUIRED, Call, Method, Param, Slot

__all__ = ["REQUIRED", "Call", "Method", "Param", "Slot", "all_methods", "expand", "get", "method"]
