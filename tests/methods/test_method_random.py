"""Random masks: the generator against its definition, any block against the whole, and plain statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.methods.random import Keys, derive_key, keep_mask, uniform_words

WORD = (1 << 64) - 1


def philox(key: int, counter: int) -> list[int]:
    """Philox4x64-10 as its paper defines it (Salmon et al., SC 2011), for a 64-bit key and counter."""
    x, k0, k1 = [counter & WORD, counter >> 64, 0, 0], key, 0
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(second >> 64) ^ x[1] ^ k0, second & WORD, (first >> 64) ^ x[3] ^ k1, first & WORD]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
    return x


@pytest.mark.parametrize("key, start", [(0, 0), (2**64 - 1, 5), (123456789, 8_000_000_001), (42, 2**35 + 3)])
def test_words_are_those_of_philox(key: int, start: int) -> None:
    def word(i: int) -> int:
        # NumPy counts up before it draws: the first four numbers are those of counter 1.
        return philox(key, i // 8 + 1)[i // 2 % 4] >> (32 * (i % 2)) & 0xFFFFFFFF

    assert uniform_words(key, start, 21).tolist() == [word(i) for i in range(start, start + 21)]


@given(start=st.integers(0, 900), n=st.integers(0, 100), key=st.integers(0, 2**64 - 1))
def test_a_block_is_a_slice_of_the_whole(start: int, n: int, key: int) -> None:
    assert np.array_equal(uniform_words(key, start, n), uniform_words(key, 0, 1000)[start : start + n])


def test_words_are_uniform() -> None:
    counts = np.bincount(uniform_words(17, 3, 256_000) >> 24, minlength=256)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert 160 < chi_square < 370  # 255 degrees of freedom: five standard deviations to both sides


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.99])
def test_the_share_kept_is_the_density(density: float) -> None:
    n = 200_000
    kept = int(keep_mask(99, 0, n, density).sum())
    assert abs(kept - n * density) < 5 * (n * density * (1 - density)) ** 0.5


def test_masks_of_different_keys_are_independent() -> None:
    n = 200_000
    one, other = (keep_mask(derive_key(7, "step", model, "w"), 0, n, 0.5) for model in ("a", "b"))
    agree = int((one == other).sum())
    assert abs(agree - n / 2) < 5 * (n / 4) ** 0.5
    assert torch.equal(one, keep_mask(derive_key(7, "step", "a", "w"), 0, n, 0.5))


def test_the_ends_of_the_density() -> None:
    assert keep_mask(1, 0, 1000, 1.0).all() and not keep_mask(1, 0, 1000, 1e-12).any()


def test_keys_tell_their_parts_apart() -> None:
    # sha256 of the text ["ties",7,"a.b"], its first eight bytes in reverse
    assert derive_key("ties", 7, "a.b") == int.from_bytes(bytes.fromhex("af247f688f64da0c"), "little")
    assert len({derive_key("a", "bc"), derive_key("ab", "c"), derive_key("abc"), derive_key(1), derive_key("1")}) == 5


@given(parts=st.lists(st.integers(0, 2**63) | st.text(), min_size=1), last=st.text())
def test_keys_of_a_common_beginning_are_those_of_all_parts(parts: list[str | int], last: str) -> None:
    keys = Keys(*parts)
    for text in (last, "model.layers.0.mlp.weight", last):
        assert keys.of(Keys.ending(text)) == derive_key(*parts, text)
