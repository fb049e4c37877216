"""Numbers that are NaN or infinite: counted, or refused. No torch."""

from __future__ import annotations

import numpy as np

from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.errors import InputError, Problem

# By dtype code: an unsigned integer of its size, and the bits that are all set in a number that is not finite.
_BITS = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),  # has NaN only
}


def nonfinite(dtype: str, data: memoryview) -> int:
    """How many of the stored numbers are NaN or infinite; 0 for dtypes that have none."""
    if dtype not in _BITS:
        return 0
    kind, bits = _BITS[dtype]
    values = np.frombuffer(data, dtype=kind)
    return int(np.count_nonzero((values & kind(bits)) == kind(bits)))


def note(meta: TensorMeta, count: int, found: dict[str, int], strict: bool) -> None:
    """Add `count` such numbers of a tensor to `found`, by `file:tensor`. Raises InputError where `strict`."""
    if not count:
        return
    if strict:
        message = f"`{meta.name}` in `{meta.file}` holds NaN or infinite numbers"
        raise InputError(Problem(message, None, "leave `--strict` out to merge all the same and have them counted"))
    name = f"{meta.file}:{meta.name}"
    found[name] = found.get(name, 0) + count
