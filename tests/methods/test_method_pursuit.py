"""Orthogonal matching pursuit, held against scikit-learn's and against sums that are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp
from torch import Tensor

from mergekit_lite.methods.pursuit import batch_size, pursue


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(taken: Tensor, parts: Tensor, atoms: int) -> Tensor:
    """The coefficients of all atoms."""
    return torch.zeros(len(taken), atoms, dtype=torch.float64).scatter_add_(1, taken, parts)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 24), st.integers(2, 60), st.integers(1, 20), st.integers(0, 10**6))
def test_the_atoms_and_coefficients_are_those_of_scikit_learn(width: int, count: int, terms: int, seed: int) -> None:
    atoms, wanted = random(count, width, seed=seed), random(3, width, seed=seed + 1)
    terms = min(terms, count, width - 1)  # with as many as the width nothing is left, and rounding decides
    expected = orthogonal_mp(atoms.T.numpy(), wanted.T.numpy(), n_nonzero_coefs=terms, precompute=False)
    found = dense(*pursue(wanted, atoms, terms), count)
    expected = torch.from_numpy(expected.reshape(count, 3).T.copy())
    assert ((found != 0) == (expected != 0)).all()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_a_sum_of_a_few_atoms_is_found_exactly_and_no_more_are_taken() -> None:
    atoms = random(200, 64, seed=1)
    atoms /= atoms.norm(dim=1, keepdim=True)
    true = torch.zeros(20, 200, dtype=torch.float64)
    factors = torch.tensor([3.0, -2, 1.5, 1], dtype=torch.float64)
    for row in range(20):
        true[row, torch.randperm(200, generator=torch.Generator().manual_seed(row))[:4]] = factors
    taken, parts = pursue(true @ atoms, atoms, 16)
    assert ((parts != 0).sum(dim=1) == 4).all()
    torch.testing.assert_close(dense(taken, parts, 200), true, rtol=1e-12, atol=1e-13)


def test_equal_and_dependent_atoms_are_taken_once_and_zeros_need_none() -> None:
    atoms = random(3, 8, seed=2)
    atoms = torch.cat([atoms, atoms, 2 * atoms[:1] - atoms[1:2]])
    longest = atoms[atoms.norm(dim=1).argmax()].unsqueeze(0)
    taken, parts = pursue(torch.cat([random(1, 8, seed=3), longest, torch.zeros(1, 8).double()]), atoms, 7)
    assert (parts != 0).sum(dim=1).tolist() == [3, 1, 0] and torch.isfinite(parts).all()
    rank = torch.linalg.lstsq(atoms.T, random(1, 8, seed=3).T, driver="gelsd").solution
    torch.testing.assert_close(parts[:1] @ atoms[taken[0]], (atoms.T @ rank).T)


def test_numbers_in_single_precision_cost_a_choice_and_not_the_least_squares() -> None:
    """Atoms may be others where two fit equally well; the coefficients are least squares in float64 all the same."""
    atoms, wanted = random(300, 32, seed=4).float(), random(10, 32, seed=5).float()
    taken, parts = pursue(wanted, atoms, 12)
    for row in range(10):
        chosen = atoms[taken[row]].double().T
        expected = torch.linalg.lstsq(chosen, wanted[row].double().unsqueeze(1), driver="gelsd").solution
        torch.testing.assert_close(parts[row], expected.squeeze(1), rtol=1e-10, atol=1e-11)
        left = wanted[row].double() - chosen @ parts[row]
        assert float((chosen.T @ left).abs().max()) < 1e-12


@pytest.mark.parametrize("terms, width, atoms", [(64, 4096, 50_000), (1, 1, 1), (9_000, 8192, 10**6), (8, 16, 100)])
def test_a_batch_keeps_its_limits(terms: int, width: int, atoms: int) -> None:
    rows = batch_size(terms, width, atoms)
    assert rows >= 1 and (rows == 1 or (rows * terms * width <= 1 << 23 and rows * atoms <= 1 << 24))
