"""Ensembles and cascades against a loop over samples; predictions as Fréchet means; flips counted one by one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mergekit_lite.errors import UsageError
from mergekit_lite.evaluate.ensemble import accuracy, cascade, ensemble
from mergekit_lite.evaluate.frechet import frechet_mean, frechet_risk
from mergekit_lite.evaluate.samples import flips

CASES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text(encoding="utf-8"))["cases"]
ORACLES = {case["id"]: case for case in CASES}


def shares(seed: int, models: int, samples: int, classes: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Probabilities whose sums are exact in floating point (multiples of 1/64), and labels."""
    draw = np.random.default_rng(seed)
    found = [draw.multinomial(64, np.ones(classes) / classes, samples) / 64 for _ in range(models)]
    return found, draw.integers(classes, size=samples)


def by_sample(models: list[np.ndarray], labels: np.ndarray, window: float) -> tuple[float, float]:
    """A cascade carried out sample by sample."""
    right = runs = 0
    for i, label in enumerate(labels):
        so_far: list[list[float]] = []
        for model in models:
            so_far.append(list(model[i]))
            runs += 1
            mean = [sum(column) / len(so_far) for column in zip(*so_far, strict=True)]
            first, second = sorted(mean, reverse=True)[:2]
            if first - second >= window:
                break
        right += mean.index(max(mean)) == label
    return right / len(labels), runs / len(labels)


@pytest.mark.parametrize("window", [0.0, 0.05, 0.125, 0.5, 1.0, 1.5])
@pytest.mark.parametrize(("models", "classes"), [(1, 3), (2, 2), (3, 4), (5, 10)])
def test_a_cascade_is_that_of_a_loop_over_samples(window: float, models: int, classes: int) -> None:
    given_, labels = shares(models, models, 60, classes)
    found = cascade(given_, labels, window)
    assert (found.accuracy, found.cost) == pytest.approx(by_sample(given_, labels, window), abs=1e-12)


def test_a_cascade_goes_from_the_first_model_to_the_ensemble() -> None:
    given_, labels = shares(9, 4, 200, 5)
    costs = [cascade(given_, labels, w).cost for w in (0.0, 0.02, 0.1, 0.3, 0.8, 1.01)]
    assert costs == sorted(costs) and costs[0] == 1 and costs[-1] == 4
    assert cascade(given_, labels, 0.0).accuracy == accuracy(given_[0], labels)
    whole = np.stack(given_).mean(axis=0)
    np.testing.assert_allclose(ensemble(given_), whole, rtol=1e-15)
    assert cascade(given_, labels, 1.01).accuracy == (whole.argmax(1) == labels).mean()
    for wrong in ([], [np.ones((2, 3)), np.ones((3, 3))], [np.ones(3)]):
        with pytest.raises(UsageError, match="one shape"):
            ensemble(wrong)


@given(arrays(np.float64, (7, 4), elements=st.floats(0, 1)))
def test_with_the_discrete_metric_the_frechet_mean_is_a_likeliest_label(p: np.ndarray) -> None:
    found = frechet_mean(p, 1 - np.eye(4))
    np.testing.assert_allclose(p[np.arange(7), found], p.max(axis=1), atol=1e-12)


def test_labels_on_a_line_give_the_one_next_to_the_mean_seen_or_not() -> None:
    draw = np.random.default_rng(1)
    answers, labels = np.arange(10), np.array([0, 2, 3, 7, 9])  # 1, 4, 5, 6 and 8 were never seen
    p = draw.dirichlet(np.ones(5), 300)
    found = frechet_mean(p, abs(answers[:, None] - labels))
    np.testing.assert_array_equal(found, np.rint(p @ labels))
    assert set(found) - set(labels)


def test_the_frechet_mean_is_the_least_of_all_sums_on_any_metric() -> None:
    """A graph's distances; two classifiers over other labels each, whose risks add up."""
    draw = np.random.default_rng(2)
    edges = draw.integers(1, 9, (8, 8))
    d = np.where(np.eye(8, dtype=bool), 0, np.minimum(edges, edges.T)).astype(float)
    for k, i, j in itertools.product(range(8), repeat=3):
        d[i, j] = min(d[i, j], d[i, k] + d[k, j])
    first, second = [0, 1, 2, 5], [2, 3, 7]
    p, q = draw.dirichlet(np.ones(4), 40), draw.dirichlet(np.ones(3), 40)

    def risk(y: int, i: int) -> float:
        return sum(p[i][n] * d[y][k] ** 2 for n, k in enumerate(first)) + sum(
            q[i][n] * d[y][k] ** 2 for n, k in enumerate(second)
        )

    risks = frechet_risk(p, d[:, first]) + frechet_risk(q, d[:, second])
    wanted = [min(range(8), key=lambda y: risk(y, i)) for i in range(40)]
    assert risks.argmin(axis=1).tolist() == wanted
    alone = [min(range(8), key=lambda y: sum(p[i][n] * d[y][k] ** 2 for n, k in enumerate(first))) for i in range(40)]
    assert frechet_mean(p, d[:, first]).tolist() == alone


def test_distances_that_are_none_and_shapes_that_do_not_fit_are_refused() -> None:
    for p, d in ((np.ones((2, 3)), np.ones((4, 2))), (np.ones(3), np.ones((3, 3)))):
        with pytest.raises(UsageError, match="do not fit"):
            frechet_mean(p, d)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="negative or no number"):
            frechet_mean([[1.0]], [[wrong]])


def test_flips_are_counted_against_both_ends() -> None:
    rows = [*itertools.product((False, True), repeat=3)] * 2 + [(False, False, True), (True, True, False)] * 3
    first, last, merged = (np.array(column) for column in zip(*rows, strict=True))
    assert flips(first, last, merged) == (5 / 22, 5 / 22)
    assert flips(first, last, first) == (0, 0)
    assert flips(first[:1], last[:1], np.array([True])) == (1, 0)


def test_the_frechet_mean_is_the_oracles() -> None:
    case = ORACLES["frechet/three_labels"]
    given, expected = case["inputs"], case["expected"]
    p, d = (np.array(given[name]["data"]).reshape(given[name]["shape"]) for name in ("probs", "distance"))
    assert np.allclose(frechet_risk(p[None], d)[0], expected["scores"]["data"], rtol=0, atol=case["atol"])
    assert frechet_mean(p[None], d)[0] == expected["argmin"] != p.argmax() == expected["argmax_of_probs"]
