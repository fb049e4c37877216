"""Singular-vector figures against sums over single triplets, and what a barrier is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from align_nets import Net, Reads, conv_net, mlp
from digits_nets import TEST, losses_on_path, one_thread, train
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.align.apply import Order, moves
from mergekit_lite.align.diagnose import barrier, changes, likeness, summary, used
from mergekit_lite.align.match import match
from mergekit_lite.errors import InputError
from mergekit_lite.family.spaces import Space

CASES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text(encoding="utf-8"))["cases"]
BARRIER = next(case for case in CASES if case["id"] == "barrier/loss")


def by_triplets(a: np.ndarray, b: np.ndarray) -> tuple[float, float, int]:
    """rho, R_k and k, pair of triplets by pair of triplets."""
    (u, s, v), (x, t, y) = (np.linalg.svd(m.reshape(len(m), -1), full_matrices=False) for m in (a, b))
    k = min(sum(value >= 0.3 * s[0] for value in s), sum(value >= 0.3 * t[0] for value in t))
    overlap = [[(u[:, i] @ x[:, j]) * (v[i] @ y[j]) for j in range(len(t))] for i in range(len(s))]
    products = sum(s[i] * t[j] * overlap[i][j] for i in range(len(s)) for j in range(len(t)))
    return products / float(s @ t), sum(overlap[i][j] for i in range(k) for j in range(k)) / k, int(k)


@pytest.mark.parametrize("shape", [(7, 5), (4, 9), (6, 3, 2, 2), (1, 4)])
def test_figures_are_those_of_single_triplets(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    a = random.standard_normal(shape)
    b = a + random.standard_normal(shape)
    found = likeness(torch.tensor(a), torch.tensor(b))
    rho, leading, k = by_triplets(a, b)
    assert found.distance == pytest.approx(float(np.sqrt(((a - b) ** 2).sum())))
    assert (found.rho, found.leading, found.k) == (pytest.approx(rho), pytest.approx(leading), k)
    same = likeness(torch.tensor(a), torch.tensor(a))
    assert (same.distance, same.rho, same.leading) == (0, pytest.approx(1), pytest.approx(1))


def test_vectors_and_zeros_have_a_distance_only() -> None:
    for a in (torch.ones(3), torch.zeros(2, 3)):
        found = likeness(a, a + 1)
        assert found.rho is None and found.leading is None and found.distance == pytest.approx(math.sqrt(a.numel()))


def experts() -> Net:
    names = tuple(f"e{i}.up" for i in range(4))
    return Net([Space("experts", "experts", 4, renames=(names,))], dict.fromkeys(names, (5, 6)))


@pytest.mark.parametrize("net", [mlp((4, 6, 7, 3)), conv_net(), experts()], ids=["mlp", "conv", "experts"])
def test_after_is_the_permuted_tensor_held_against_the_first(net: Net) -> None:
    a, b = net.tensors(0, torch.float64), net.tensors(1, torch.float64)
    member = net.member(2)
    reads = Reads(b)
    found = list(changes(net.spaces, member, a.__getitem__, reads, shapes=net.shapes))
    assert [change.tensor for change in found] == used(net.spaces)
    assert not any("running" in change.tensor for change in found)
    permuted = net.apply(member, b)
    for change in found:
        for got, other in ((change.before, b), (change.after, permuted)):
            wanted = likeness(a[change.tensor], other[change.tensor])
            assert got.distance == pytest.approx(wanted.distance) and got.k == wanted.k
            assert got.rho == pytest.approx(wanted.rho) and got.leading == pytest.approx(wanted.leading)
    renamed = [move.source != name for name, move in moves(net.spaces, member, net.shapes).items()]
    assert sum(reads.count.values()) == len(found) + sum(renamed)
    plain = list(changes(net.spaces, member, a.__getitem__, reads, shapes=net.shapes, directions=False))
    assert [change.after.distance for change in plain] == pytest.approx([change.after.distance for change in found])
    assert all(change.after.rho is None for change in plain)


def test_a_scrambled_copy_is_all_alike_once_unscrambled() -> None:
    net = mlp((5, 8, 8, 3))
    a = net.tensors(0, torch.float64)
    member = net.member(1)
    inverse: dict[str, Order] = {name: np.argsort(p) for name, p in member.items()}
    scrambled = net.apply(inverse, a)
    figures = summary(list(changes(net.spaces, member, a.__getitem__, scrambled.__getitem__, shapes=net.shapes)))
    assert figures["distance_before"] > 1 and figures["distance_after"] == 0
    assert figures["rho_before"] < 0.9 and figures["rho_after"] == pytest.approx(1)
    assert figures["leading_before"] < 0.9 and figures["leading_after"] == pytest.approx(1)


def test_numbers_that_are_not_finite_are_refused() -> None:
    net = mlp((4, 6, 3))
    a = net.tensors(0)
    a["1.weight"][0, 0] = torch.inf
    with pytest.raises(InputError, match=r"`1.weight` holds NaN"):
        list(changes(net.spaces, {}, a.__getitem__, a.__getitem__, shapes=net.shapes))


def test_the_barrier_of_the_oracle() -> None:
    assert barrier(BARRIER["inputs"]["losses"]) == pytest.approx(BARRIER["expected"]["barrier"], abs=1e-12)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=12), st.floats(-5, 5), st.floats(-5, 5))
def test_a_straight_line_adds_nothing_to_a_barrier(losses: list[float], height: float, slope: float) -> None:
    found = barrier(losses)
    assert found >= 0
    tilted = [loss + height + slope * i / (len(losses) - 1) for i, loss in enumerate(losses)]
    assert barrier(tilted) == pytest.approx(found, abs=1e-9)
    assert barrier(losses[::-1]) == pytest.approx(found, abs=1e-9)


def test_paths_without_both_ends_and_nan() -> None:
    assert math.isnan(barrier([0.0, math.nan, 0.0]))
    assert barrier([0, 3, 0], [0, 0.9, 1]) == pytest.approx(3) and barrier([0, 3, 10], [0, 0.1, 1]) == pytest.approx(2)
    for losses, alphas in (([1.0], None), ([1.0, 2.0], [0.0, 0.5]), ([1.0, 2.0], [0.0])):
        with pytest.raises(ValueError, match="both ends"):
            barrier(losses, alphas)


def test_matching_turns_the_leading_directions_and_takes_the_barrier_away() -> None:
    """The distance falls by less than a third while the barrier all but goes: the directions are what counts."""
    widths = (64, 256, 256, 10)
    net = mlp(widths)
    with one_thread():
        a, b = train(widths, 0), train(widths, 1)
        solution = match(net.spaces, a.__getitem__, b.__getitem__, shapes=net.shapes, kinds=["mlp"])
        found = list(changes(net.spaces, solution.permutations, a.__getitem__, b.__getitem__, shapes=net.shapes))
        figures = summary(found)
        naive = barrier(*losses_on_path(a, b, TEST))
        aligned = barrier(*losses_on_path(a, net.apply(solution.permutations, b), TEST))
    assert aligned < 0.25 * naive
    assert 0.67 < figures["distance_after"] / figures["distance_before"] < 1
    assert figures["rho_after"] > figures["rho_before"] + 0.1
    assert figures["leading_after"] > figures["leading_before"] + 0.1
    assert figures["distance_before"] == pytest.approx(solution.distance_before, rel=1e-5)
    assert figures["distance_after"] == pytest.approx(solution.distance_after, rel=1e-5)
