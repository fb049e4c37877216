"""What work takes on the machine of benchmarks/RESULTS.md, fitted to the processor times in benchmarks/results.json.

Nanoseconds of one core unless it says otherwise; inputs lie in the page cache. Two threads share one such machine, and
what others do there at the same time is in the figures too: they tell the size of a run, not its seconds.
"""

from __future__ import annotations

from collections.abc import Mapping

START = 2.4  # seconds until a run that computes is under way: Python, torch, the plan
START_COPYING = 0.6  # seconds where tensors are only copied, without torch
READ = 0.45  # a byte read, digested and converted
WRITE = 0.65  # a byte converted, written and digested
KERNEL = 0.5  # an element and input of a method that works element by element
PRODUCT = 0.025  # a number of one unit times one of another
STATISTIC = 1.5  # an element and input in one pass of a statistic
RANDOM = 3.5  # an element of a random mask
ROWS = 5.0  # an element and input of a method that works on whole rows
# Bytes in a second that all cores together can read at most, and write.
READ_LIMIT, WRITE_LIMIT = 10e9, 2e9
# An element of methods that take longer than their kind.
ELEMENT: Mapping[str, float] = {
    "cabs": 100.0,
    "importance": 18.0,
    "magprune": 15.0,
    "pcb": 40.0,
    "ramplus_tl": 18.0,
    "sce": 35.0,
    "weighted_adapter": 30.0,
}
# A matrix method takes these times p * p * q, p being the smaller side of the tensor and q the larger one: once, and
# for each input. Randomised decompositions count as whole ones.
MATRIX: Mapping[str, tuple[float, float]] = {
    "ace": (0.0, 0.31),
    "cart": (0.0, 0.46),
    "core_space": (0.0, 1.3),
    "decompose": (1.2, 0.0),
    "iso_c": (0.5, 0.0),
    "iso_cts": (0.6, 0.65),
    "flora": (0.03, 0.0),
    "merge_in_shared": (0.0, 0.8),
    "part": (0.0, 0.0),
    "regmean": (0.0, 0.1),
    "star": (0.0, 0.42),
    "svc": (0.0, 0.22),
    "tsv_m": (0.0, 0.6),
    "tucker": (0.3, 0.0),
    "wudi": (0.0, 0.03),  # a step
}
# Methods on factors take this times k * k * (m + n), for deltas of m by n whose factors have k columns together.
FACTORS: Mapping[str, float] = {
    "combine_factors": 0.5,
    "core_factors": 0.9,
    "low_rank_of_factors": 0.8,
    "merge_factors": 1.0,
    "needed_of_factors": 0.6,
}
# An element of a product and a column of its factors.
PRODUCTS: Mapping[str, float] = {"multiply": 1.2, "multiply_turned": 1.2, "widen": 0.1}
MATRIX_OTHER = (0.0, 0.6)
