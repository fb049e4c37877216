"""Which experts are merged with which, against answers of plain loops (tests/oracles.json) and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mergekit_lite.align.grouping import (
    adaptive_counts,
    dominant_experts,
    frequencies,
    grouped,
    shares,
    similarity,
)

CASES = {
    case["id"]: case
    for case in json.loads((Path(__file__).parents[1] / "oracles.json").read_text(encoding="utf-8"))["cases"]
}


def array(stored: dict[str, list[float]]) -> NDArray[np.float64]:
    return np.array(stored["data"], dtype=np.float64).reshape(stored["shape"])


def test_a_layer_is_grouped_as_the_oracle_says() -> None:
    case = CASES["m_smoe/merge_layer"]
    logits, expected = array(case["inputs"]["router_logits"]), case["expected"]
    used = frequencies(array(expected["usage_count"]))
    np.testing.assert_allclose(used, array(expected["frequency"]), atol=case["atol"])
    alike = similarity(logits.T @ logits)
    np.testing.assert_allclose(alike, array(expected["similarity"]), atol=case["atol"])
    dominant = dominant_experts(used, case["params"]["num_groups"])
    assert dominant == expected["dominant"]
    assert grouped(alike, dominant).tolist() == [dominant[g] for g in expected["group_of_expert"]]


def test_layers_share_places_as_the_oracle_says() -> None:
    case = CASES["m_smoe/adaptive_groups"]
    used = [array(layer) for layer in case["inputs"]["frequency_per_layer"]]
    counts = adaptive_counts(used, case["params"]["average_groups"])
    assert counts == case["expected"]["groups_per_layer"]


def test_places_of_equals_go_by_layer_and_expert_and_protected_layers_have_theirs() -> None:
    even = [np.full(4, 0.25)] * 3
    assert adaptive_counts(even, 2) == [4, 1, 1]
    assert adaptive_counts(even, 2, whole={2}) == [1, 1, 4]
    assert adaptive_counts([np.zeros(4), np.array([0.7, 0.1, 0.1, 0.1])], 2) == [1, 3]


def test_ties_go_to_the_first_expert_and_the_more_used_dominant() -> None:
    assert dominant_experts(np.array([0.1, 0.4, 0.1, 0.4]), 3) == [1, 3, 0]
    alike = np.full((4, 4), 0.5)
    assert grouped(alike, [3, 1]).tolist() == [3, 1, 3, 3]


def test_groups_of_routing_are_kept_apart() -> None:
    used = np.array([0.4, 0.3, 0.2, 0.05, 0.03, 0.02])
    assert dominant_experts(used, 4, groups=2) == [0, 1, 3, 4]
    alike = np.ones((6, 6))
    assert grouped(alike, [0, 1, 3, 4], groups=2).tolist() == [0, 1, 0, 3, 4, 3]


def test_a_router_that_never_fires_is_unlike_all_and_unused_groups_take_the_plain_mean() -> None:
    alike = similarity(np.diag([4.0, 0.0, 1.0]))
    assert alike.tolist() == [[1.0, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 1.0]]
    assert frequencies(np.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert shares(np.array([0.5, 0.0, 0.0]), [1, 2], even=False) == [0.5, 0.5]
    assert shares(np.array([0.6, 0.2, 0.2]), [0, 1], even=False) == pytest.approx([0.75, 0.25])
    assert shares(np.array([0.6, 0.2, 0.2]), [0, 1], even=True) == [0.5, 0.5]
