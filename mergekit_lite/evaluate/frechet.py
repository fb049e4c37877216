"""Predictions as Fréchet means (Loki, NeurIPS 2023, arXiv 2307.12226): with a metric between labels a classifier may
answer with labels that it has never seen, and classifiers with different labels may answer together."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mergekit_lite.errors import UsageError


def frechet_risk(probabilities: ArrayLike, distances: ArrayLike) -> NDArray[np.float64]:
    """sum_k d(y, k)^2 p_k for every sample and every answer y, (samples, answers) in float64.

    `probabilities` (samples, labels) are those of one classifier over its own labels; `distances` (answers, labels)
    hold d(y, k) from every possible answer to each of these labels. Risks of several classifiers over the same answers
    may be added. Raises UsageError where the shapes do not fit, or a distance is negative or no number.
    """
    p, d = np.asarray(probabilities, dtype=np.float64), np.asarray(distances, dtype=np.float64)
    if p.ndim != 2 or d.ndim != 2 or p.shape[1] != d.shape[1]:
        raise UsageError(
            f"probabilities {p.shape} and distances {d.shape} do not fit",
            hint="(samples, labels) and (answers, labels), with the labels in one order",
        )
    if not np.isfinite(d).all() or (d < 0).any():
        raise UsageError("a distance is negative or no number", hint="d(y, k) is 0 or more, and 0 where y is k")
    return np.asarray(p @ (d**2).T)


def frechet_mean(probabilities: ArrayLike, distances: ArrayLike) -> NDArray[np.intp]:
    """argmin_y sum_k d(y, k)^2 p_k, (samples): for each sample the number of an answer, the first of several alike.

    Shapes and errors are those of `frechet_risk`. With d(y, k) = 0 where y is k and 1 elsewhere it is the likeliest
    label; with labels on a line it is the one next to their mean.
    """
    return np.asarray(frechet_risk(probabilities, distances).argmin(axis=1))
