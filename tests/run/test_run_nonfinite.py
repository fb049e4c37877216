"""Stored numbers that are not finite, counted without torch as torch counts them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.meta import MERGEABLE, TensorMeta
from mergekit_lite.errors import InputError
from mergekit_lite.run.nonfinite import nonfinite, note


@given(st.sampled_from(sorted(TORCH_DTYPES)), st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=9))
def test_as_torch_counts(code: str, data: bytes, ones: list[int]) -> None:
    dtype = TORCH_DTYPES[code]
    raw = bytearray(data[: len(data) // dtype.itemsize * dtype.itemsize])
    for place in ones:
        # Exponents of ones are rare in random bytes.
        if place < len(raw):
            raw[place] = 0xFF if place % 2 else 0x7F
    stored = torch.frombuffer(raw, dtype=torch.uint8).view(dtype) if raw else torch.empty(0, dtype=dtype)
    expected = int((~torch.isfinite(stored.to(torch.float64))).sum()) if code in MERGEABLE else 0
    assert nonfinite(code, memoryview(raw)) == expected


def test_noted_or_refused() -> None:
    meta = TensorMeta("w", (4,), "F32", "a.safetensors", 8, 16)
    found: dict[str, int] = {}
    note(meta, 0, found, True)
    assert found == {}
    note(meta, 2, found, False)
    note(meta, 1, found, False)
    assert found == {"a.safetensors:w": 3}
    with pytest.raises(InputError, match=r"`w` in `a\.safetensors`"):
        note(meta, 1, found, True)
