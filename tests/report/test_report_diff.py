"""Comparisons against numpy on whole tensors, and the cases that floating point makes hard."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_files import noise, write, write_raw
from torch import Tensor

from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.report.diff import Comparison, TensorDiff, config_diff, diff

FLOATING = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def compare(tmp_path: Path, a: Tensor, b: Tensor, **options: Any) -> TensorDiff:
    found = diff(write(tmp_path / "a", {"x": a}), write(tmp_path / "b", {"x": b}), **options)
    (tensor,) = found.tensors
    return tensor


def raw(tensor: Tensor) -> np.ndarray:
    """One row of bytes for each real number."""
    parts = tensor.element_size() // (2 if tensor.is_complex() else 1)
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().reshape(-1, parts)


def expect(found: TensorDiff, x: np.ndarray, y: np.ndarray, differing: np.ndarray) -> None:
    """`found.gap` as numpy works it out of the numbers x and y and of where they differ."""
    gap = found.gap
    assert gap is not None
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(finite, x, 0), np.where(finite, y, 0)
    assert gap.differing == differing.sum()
    assert gap.undefined == (differing & ~finite).sum()
    assert gap.max_abs == np.abs(x - y).max()
    assert gap.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-9)
    assert gap.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("block", [7, 10**6])
@pytest.mark.parametrize("code", TORCH_DTYPES)
def test_one_dtype(tmp_path: Path, code: str, block: int) -> None:
    a, b = noise(TORCH_DTYPES[code], 500, 1), noise(TORCH_DTYPES[code], 500, 2)
    b[::3] = a[::3]
    if code in ("I64", "U64"):  # small enough for float64 to hold; the large ones have a test of their own
        a, b = (t.view(torch.int64).bitwise_and(2**50 - 1).view(t.dtype) for t in (a, b))
    found = compare(tmp_path, a, b, block=block)
    assert found.state == "differs"
    parts = [torch.view_as_real(t).reshape(-1) if t.is_complex() else t for t in (a, b)]
    x, y = (t.to(torch.float64).numpy() for t in parts)
    expect(found, x, y, (raw(a) != raw(b)).any(axis=1))


@pytest.mark.parametrize("left, right", list(itertools.permutations(FLOATING, 2)))
def test_two_dtypes_are_compared_in_float64(tmp_path: Path, left: torch.dtype, right: torch.dtype) -> None:
    a, b = noise(left, 300, 1), noise(right, 300, 2)
    b[::4] = a[::4].to(torch.float32).to(right)
    found = compare(tmp_path, a, b)
    assert found.state == "dtype"
    x, y = a.to(torch.float64).numpy(), b.to(torch.float64).numpy()
    expect(found, x, y, (x != y) & ~(np.isnan(x) & np.isnan(y)))
    assert not found.within(0.0)


def test_the_same_numbers_in_a_wider_dtype(tmp_path: Path) -> None:
    a = torch.randn(50).to(torch.bfloat16)
    found = compare(tmp_path, a, a.to(torch.float32))
    assert found.gap is not None and found.gap.differing == 0
    assert found.within(1e-300) and not found.within(0.0)


def test_nan_is_nan_of_the_same_bits_only(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00000, 0x3F800000], dtype=torch.int32)
    a = bits.view(torch.float32)
    other = (bits + torch.tensor([1, 0], dtype=torch.int32)).view(torch.float32)
    same = compare(tmp_path / "1", a, a.clone())
    assert same.state == "same" and same.within(0.0)
    differs = compare(tmp_path / "2", a, other)
    assert differs.gap is not None and (differs.gap.differing, differs.gap.undefined) == (1, 1)
    assert differs.gap.max_abs == 0.0 and not differs.within(1e300)


def test_minus_zero_has_other_bits(tmp_path: Path) -> None:
    found = compare(tmp_path, torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert found.gap is not None and (found.gap.differing, found.gap.max_abs) == (1, 0.0)
    assert not found.within(0.0) and found.within(1e-30)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_large_integers_that_are_neighbours(tmp_path: Path, dtype: torch.dtype) -> None:
    top = 2**64 if dtype == torch.uint64 else 2**63
    a = torch.tensor([top - 1, top - 5, 0, 7], dtype=dtype)
    b = torch.tensor([top - 2, 0, top - 1, 7], dtype=dtype)
    found = compare(tmp_path, a, b)
    assert found.gap is not None and found.gap.differing == 3
    assert found.gap.max_abs == float(top - 1)
    near = compare(tmp_path / "near", a[:1], b[:1])
    assert near.gap is not None and near.gap.max_abs == 1.0


def test_shapes_and_names(tmp_path: Path) -> None:
    shared = {"same": torch.ones(3), "turned": torch.ones(2, 3)}
    a = write(tmp_path / "a", {**shared, "old": torch.ones(1)})
    b = write(tmp_path / "b", {**shared, "turned": torch.ones(3, 2), "new": torch.ones(1)})
    found = diff(a, b)
    assert {t.name: t.state for t in found.tensors} == {
        "same": "same", "turned": "shape", "old": "only_a", "new": "only_b",
    }  # fmt: skip
    assert not any(t.within(1e300) for t in found.tensors if t.state != "same")
    assert found.counts == {"same": 1, "shape": 1, "only_a": 1, "only_b": 1} and not found.equal


def test_dtypes_without_numbers_are_compared_as_bytes(tmp_path: Path) -> None:
    a = write_raw(tmp_path / "a", "x", "F4", (4, 6), bytes(12))
    b = write_raw(tmp_path / "b", "x", "F4", (4, 6), bytes(11) + b"\x01")
    assert diff(a, a).equal
    (tensor,) = diff(a, b).tensors
    assert (tensor.state, tensor.gap, tensor.within(1e300)) == ("differs", None, False)


@pytest.mark.parametrize("threads", [1, 3])
def test_sharding_and_order_do_not_matter(tmp_path: Path, threads: int) -> None:
    tensors = {f"t{i}": noise(torch.float16, 100 + i, i) for i in range(7)}
    a = write(tmp_path / "a", tensors)
    b = write(tmp_path / "b", dict(reversed(tensors.items())), shards=3)
    heard: list[int] = []
    found = diff(a, b, threads=threads, advance=heard.append, block=16)
    assert found.equal and found.counts == {"same": 7}
    assert sum(heard) == sum(meta.nbytes for meta in a.tensors.values())


def test_one_flipped_bit_at_the_end_is_found(tmp_path: Path) -> None:
    """Behind many blocks that are the same; the numbers are those of the whole tensor, though."""
    a = torch.randn(1000)
    b = a.clone()
    b.view(torch.int32)[-1] ^= 1
    found = compare(tmp_path, a, b, block=64)
    expect(found, a.double().numpy(), b.double().numpy(), (raw(a) != raw(b)).any(axis=1))
    assert found.gap is not None and found.gap.differing == 1


def test_zeros(tmp_path: Path) -> None:
    zeros, ones = torch.zeros(4), torch.ones(4)
    gone = compare(tmp_path / "1", zeros, ones).gap
    assert gone is not None and gone.relative == math.inf and math.isnan(gone.cosine)
    assert compare(tmp_path / "2", torch.empty(0), torch.empty(0)).state == "same"
    json = compare(tmp_path / "3", zeros, ones).as_json()
    assert (json["relative"], json["cosine"], json["max_abs"]) == (None, None, 1.0)


def test_ranking(tmp_path: Path) -> None:
    a = {"far": torch.full((3,), 100.0), "turned": torch.full((3,), 1e-3), "same": torch.ones(3), "nan": torch.ones(3)}
    b = {**a, "far": a["far"] + 1, "turned": -a["turned"], "nan": torch.tensor([1.0, 1.0, math.nan])}
    found = diff(write(tmp_path / "a", a), write(tmp_path / "b", b))

    def names(by: str, everything: bool = False) -> list[str]:
        return [tensor.name for tensor in found.ranked(by, everything)]

    assert names("max") == ["nan", "far", "turned"]
    assert names("rel") == ["nan", "turned", "far"]
    assert names("name") == ["far", "nan", "turned"]
    assert names("max", everything=True) == ["nan", "far", "turned", "same"]


def test_tolerance_is_an_upper_bound(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"x": torch.tensor([1.0])}), write(tmp_path / "b", {"x": torch.tensor([1.5])})
    assert diff(a, b, tolerance=0.5).equal
    assert not diff(a, b, tolerance=0.4999).equal
    assert not diff(a, b).equal


def test_configuration() -> None:
    a = {"layers": 2, "tie": True, "rope": {"theta": 1e4, "type": "x"}, "transformers_version": "4", "eps": math.nan}
    b = {"layers": 2, "tie": 1, "rope": {"theta": 2e4}, "transformers_version": "5", "eps": math.nan, "new": None}
    found = {entry.key: (entry.a, entry.b) for entry in config_diff(a, b)}
    assert found == {
        "tie": ("true", "1"),
        "rope.theta": ("10000.0", "20000.0"),
        "rope.type": ('"x"', None),
        "new": (None, "null"),
    }


def test_a_changed_configuration_is_a_difference(tmp_path: Path) -> None:
    x = {"x": torch.ones(2)}
    a, b, c = (
        write(tmp_path / "a", x, {"k": 1}),
        write(tmp_path / "b", x, {"k": 2}),
        write(tmp_path / "c", x),
    )
    found: Comparison = diff(a, b)
    assert not found.equal and [entry.key for entry in found.config] == ["k"]
    assert diff(a, c).equal and diff(a, c).lacks_config == (c.location,)
