"""Numbers that are NaN or infinite: found, counted, or refused. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.errors import InputError, Problem, StoppedError

# By dtype code: an unsigned integer of its size, and the bits that are all set in a number that is not finite.
_BITS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),  # has NaN only
    "C64": (np.uint32, 0x7F80_0000),  # its real and its imaginary part are two numbers
}
# Dtypes of one byte in which nothing but these bits is not finite: their only NaN.
_ONLY = {"F8_E4M3FNUZ": 0x80, "F8_E5M2FNUZ": 0x80, "F8_E8M0": 0xFF}
_CARELESS = "leave `--strict` out to merge all the same and have them counted"


def nonfinite(dtype: str, data: memoryview) -> int:
    """How many of the stored numbers are NaN or infinite; 0 for dtypes that have none, and for those below a byte."""
    if dtype in _ONLY:
        return int(np.count_nonzero(np.frombuffer(data, dtype=np.uint8) == _ONLY[dtype]))
    if dtype not in _BITS or not len(data):
        return 0
    kind, bits = _BITS[dtype]
    values = np.frombuffer(data, dtype=kind)
    if not reaches(values, bits):
        return 0
    return int(np.count_nonzero((values & kind(bits)) == kind(bits)))


def reaches(values: NDArray[Any], bits: int) -> bool:
    """Whether one of the numbers with these `values` as unsigned integers has the magnitude `bits` or a larger one. Two
    passes without a temporary: among negative numbers as unsigned, among others as signed integers they are largest."""
    signed = values.view(f"i{values.itemsize}")
    return bool(signed.max() >= bits or values.max() >= bits | 1 << 8 * values.itemsize - 1)


def note(meta: TensorMeta, count: int, found: dict[str, int], strict: bool) -> None:
    """Add `count` such numbers of an input's tensor to `found`, by `file:tensor`. Raises InputError where `strict`."""
    if not count:
        return
    if strict:
        message = f"`{meta.name}` in `{meta.file}` holds NaN or infinite numbers"
        raise InputError(Problem(message, None, _CARELESS))
    name = f"{meta.file}:{meta.name}"
    found[name] = found.get(name, 0) + count


def note_output(name: str, count: int, found: dict[str, int], strict: bool) -> None:
    """Add `count` such numbers of an output's tensor to `found`, by its name. Raises StoppedError where `strict`."""
    if not count:
        return
    if strict:
        message = f"the merge makes NaN or infinite numbers in `{name}`, which the inputs do not hold"
        raise StoppedError(Problem(message, None, f"{_CARELESS}; with `--resume` nothing is done twice"))
    found[name] = found.get(name, 0) + count
