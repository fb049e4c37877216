"""What models give as an ensemble and as a cascade, and at what cost: the baseline of their merge, which costs one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.errors import UsageError

Floats = NDArray[np.float64]
Labels = NDArray[Any]
WINDOWS = (0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True)
class Cascade:
    """What a cascade with this window gives: the share of samples that it gets right, and how many models it runs for a
    sample in the mean, from 1 to all of them."""

    window: float
    accuracy: float
    cost: float


def ensemble(probabilities: Sequence[Floats]) -> Floats:
    """The mean of the probabilities (samples, classes) of several models. Raises UsageError where there is none, or
    their shapes differ."""
    if not probabilities or any(one.ndim != 2 or one.shape != probabilities[0].shape for one in probabilities):
        shapes = " and ".join(str(one.shape) for one in probabilities) or "none"
        raise UsageError(f"an ensemble needs probabilities (samples, classes) of one shape, not {shapes}")
    return np.asarray(sum(one.astype(np.float64) for one in probabilities) / len(probabilities))


def accuracy(probabilities: Floats, labels: Labels) -> float:
    """The share of samples whose likeliest class, the first of several alike, is their label (samples)."""
    return float((probabilities.argmax(axis=1) == labels).mean())


def margin(probabilities: Floats) -> Floats:
    """How far each sample lies from where the decision turns: the probability of its likeliest class less that of the
    next, (samples), 0 at the border between two classes. 1 where there is one class alone."""
    if probabilities.shape[1] < 2:
        return np.ones(len(probabilities))
    two = np.partition(probabilities, -2, axis=1)
    return np.asarray(two[:, -1] - two[:, -2])


def cascade(probabilities: Sequence[Floats], labels: Labels, window: float) -> Cascade:
    """A cascade with early exits by a window (Xia and Bouganis, ICCV 2023, arXiv 2303.08010) for classes.

    The models, in the order of `probabilities`, are run one after the other, and their mean so far decides. A sample is
    passed on to the next only while its `margin` lies in the window around the threshold of the decision, which is 0:
    margin < `window`. So a window of 0 is the first model alone, one above 1 the whole ensemble. Raises as `ensemble`.
    """
    whole = ensemble(probabilities)
    total = np.zeros_like(whole)
    decided = np.zeros_like(whole)
    waiting = np.arange(len(whole))
    runs = 0
    for number, one in enumerate(probabilities, 1):
        runs += len(waiting)
        total[waiting] += one[waiting]
        decided[waiting] = total[waiting] / number
        waiting = waiting[margin(decided[waiting]) < window]
    return Cascade(window, accuracy(decided, labels), runs / len(whole))
