"""Orthogonal matching pursuit: vectors as sums of a few out of many, for a batch of them at once."""

from __future__ import annotations

from mergekit_lite.lazy import Tensor, torch

BATCH = 128  # vectors that are worked on together, at most; with the two limits below part of what defines the result
BASIS = 1 << 23  # numbers of all their bases
PRODUCTS = 1 << 24  # inner products with all atoms
EXACT = 1e-12  # of the vector's norm: what is left is rounding
DEPENDENT = 1e-8  # of an atom's norm: what the atoms before it leave of it


def batch_size(terms: int, width: int, atoms: int) -> int:
    """How many vectors of `width` numbers are worked on together. The same in every run: a product of matrices is
    rounded by its shape."""
    return max(1, min(BATCH, BASIS // max(1, terms * width), PRODUCTS // max(1, atoms)))


def pursuit_bytes(terms: int, width: int, atoms: int, size: int) -> int:
    """Bytes that one batch takes at most, `size` being those of a number of an atom."""
    rows = batch_size(terms, width, atoms)
    return rows * (8 * terms * (width + 2 * terms) + 64 * width + 2 * size * atoms)


def pursue(wanted: Tensor, atoms: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Which rows of `atoms` (atoms, width) make up each row of `wanted` (rows, width), and with which coefficients.

    Gives the numbers of the atoms, int64, and the coefficients, float64, both (rows, terms); where fewer terms are
    enough the rest have the coefficient 0. In each step the atom with the largest inner product with what is left of
    a vector is taken, and all coefficients are those of least squares over the atoms taken so far. A vector is done
    early where nothing but rounding is left of it, or where the next atom is a sum of those before. Inner products
    with all atoms are formed in the dtype of `atoms`, all else in float64. The numbers must be finite.
    """
    rows, width = wanted.shape
    most = min(terms, width, len(atoms))
    left = wanted.double()
    enough = EXACT * left.norm(dim=1)
    basis = left.new_zeros(rows, most, width)
    factor = torch.eye(most, dtype=torch.float64, device=left.device).repeat(rows, 1, 1)
    along = left.new_zeros(rows, most)
    taken = torch.zeros(rows, terms, dtype=torch.int64, device=left.device)
    going = torch.ones(rows, dtype=torch.bool, device=left.device)
    for step in range(most):
        going &= left.norm(dim=1) > enough
        if not bool(going.any()):
            break
        near = (left.to(atoms.dtype) @ atoms.T).abs_()
        near.scatter_(1, taken[:, :step], -1.0)
        best = near.argmax(dim=1)
        del near
        atom = atoms[best].double()
        size = atom.norm(dim=1)
        parts = left.new_zeros(rows, step, 1)
        for _ in range(2):  # once is not enough where an atom is nearly a sum of others
            part = torch.bmm(basis[:, :step], atom.unsqueeze(2))
            atom = atom - torch.bmm(basis[:, :step].transpose(1, 2), part).squeeze(2)
            parts += part
        length = atom.norm(dim=1)
        going &= length > DEPENDENT * size
        direction = torch.where(going.unsqueeze(1), atom / length.unsqueeze(1), 0.0)
        basis[:, step] = direction
        factor[:, :step, step] = torch.where(going.unsqueeze(1), parts.squeeze(2), 0.0)
        factor[:, step, step] = torch.where(going, length, 1.0)
        taken[:, step] = best
        along[:, step] = (direction * left).sum(dim=1)
        left = left - along[:, step].unsqueeze(1) * direction
    found = left.new_zeros(rows, terms)
    found[:, :most] = torch.linalg.solve_triangular(factor, along.unsqueeze(2), upper=True).squeeze(2)
    return taken, found
