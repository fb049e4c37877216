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
}
# A matrix method takes these times p * p * q, p being the smaller side of the tensor and q the larger one: once, and
# for each input. Randomised decompositions count as whole ones.
MATRIX: Mapping[str, tuple[float, float]] = {
    "ace": (0.0, 0.31),
    "cart": (0.0, 0.46),
    "core_space": (0.0, 1.3),
    "iso_c": (0.5, 0.0),
    "iso_cts": (0.6, 0.65),
    "merge_in_shared": (0.0, 0.8),
    "regmean": (0.0, 0.1),
    "star": (0.0, 0.42),
    "svc": (0.0, 0.22),
    "tsv_m": (0.0, 0.6),
    "wudi": (0.0, 0.03),  # a step
}
MATRIX_OTHER = (0.0, 0.6)
