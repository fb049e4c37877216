"""The setting `compat`: the numbers that mergekit 0.1.5 gives where this program decides otherwise."""

from __future__ import annotations

from mergekit_lite.methods.spec import Param

COMPAT = Param("compat", "flag", False, "do as mergekit 0.1.5 where it decides otherwise")
NO_SUM = 1e-8  # there weights whose sum is closer to 0 are not normalised
NO_ENERGY = 1e-6  # there changes whose mean squares add up to less all weigh the same
NO_SHARE = 1e-6  # there weights of agreeing models that add up to less count as this much
NO_PLACE = 1e-6  # there two weights whose sum is closer to 0 mean the middle
