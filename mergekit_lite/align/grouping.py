"""Which experts of a layer are merged with which: the most used stay, every other one joins the one most like it.

M-SMoE (Li et al., Merge, Then Compress, ICLR 2024, arXiv 2310.01334). Experts are numbered as on disk.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]  # by expert: the expert that its group is named after


def similarity(gram: Floats) -> Floats:
    """(cos + 1) / 2 of every two of some vectors, from their inner products (n, n). A vector of zeros is at a right
    angle to all others."""
    norms = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
    lengths = np.outer(norms, norms)
    return np.asarray((np.divide(gram, lengths, out=np.zeros_like(gram), where=lengths > 0) + 1) / 2)


def frequencies(usage: Floats) -> Floats:
    """How often each expert is used, as shares of 1; zeros where none is used at all."""
    total = usage.sum()
    return usage / total if total > 0 else np.zeros_like(usage)


def adaptive_counts(used: Sequence[Floats], average: int, whole: Collection[int] = ()) -> list[int]:
    """How many experts each layer keeps where all layers together keep `average` times their number.

    The most used expert of each layer counts as always used, and so do all of the layers numbered in `whole`; the most
    used of all layers are kept, equals in the order of layers and experts.
    """
    places: list[tuple[float, int, int]] = []
    for layer, found in enumerate(used):
        raised = np.ones_like(found) if layer in whole else found.copy()
        raised[int(np.argmax(raised))] = 1.0
        places += [(-float(value), layer, expert) for expert, value in enumerate(raised)]
    kept = sorted(places)[: average * len(used)]
    return [sum(layer == one for _, one, _ in kept) for layer in range(len(used))]


def dominant_experts(used: Floats, count: int, groups: int = 1) -> list[int]:
    """The `count` most used experts, the most used first, equals by their number; as many from each of `groups` groups
    of neighbours."""
    size = len(used) // groups
    order = [int(e) for e in np.argsort(-used, kind="stable")]
    each = [[e for e in order if e // size == group][: count // groups] for group in range(groups)]
    chosen = {e for found in each for e in found}
    return [e for e in order if e in chosen]


def grouped(similar: Floats, dominant: Sequence[int], groups: int = 1) -> Labels:
    """For each expert the dominant one whose group it joins: the most similar one in its group of neighbours, of equals
    the one that stands first in `dominant`."""
    size = len(similar) // groups
    labels = np.zeros(len(similar), dtype=np.int64)
    for expert in range(len(similar)):
        near = [d for d in dominant if d // size == expert // size]
        labels[expert] = expert if expert in near else near[int(np.argmax(similar[expert, near]))]
    return labels


def shares(used: Floats, members: Sequence[int], even: bool) -> list[float]:
    """What each member of a group counts in their mean: by use, or alike where `even` or where none is used."""
    weights = np.ones(len(members)) if even else used[list(members)]
    if not weights.sum() > 0:
        weights = np.ones(len(members))
    return [float(weight) for weight in weights / weights.sum()]
