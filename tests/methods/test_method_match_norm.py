"""`match_norm`, and the methods that use it."""

from __future__ import annotations

import pytest
import torch

from mergekit_lite.methods.registry import get
from mergekit_lite.methods.whole import apply


def test_the_l1_norm_is_that_of_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    before = x.clone()
    found = apply(get("match_norm"), [x, y], {}, compute=torch.float64, grain=64)
    torch.testing.assert_close(found, x * (y.abs().sum() / x.abs().sum()), rtol=1e-14, atol=0)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("x", "y"), [([0.0, 0.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0, 2.0], [float("inf"), 1.0])]
)
def test_without_a_norm_nothing_changes(x: list[float], y: list[float]) -> None:
    assert apply(get("match_norm"), [torch.tensor(x), torch.tensor(y)], {}).tolist() == x


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties"])
def test_one_delta_keeps_its_norm(name: str) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share = {"drop_rate": 0.6, "rescale": False} if "dare" in name else {"density": 0.4}
    more = {"scope": "tensor"} if name == "ties" else {}
    found = apply(get(name), [x], {"match_norm": True, "lambda": 1.0, **share, **more}, compute=torch.float64)
    torch.testing.assert_close(found.abs().sum(), x.abs().sum(), rtol=1e-12, atol=0)
    assert 300 < int((found != 0).sum()) < 500


def test_settings_that_contradict_one_another() -> None:
    dare = {"drop_rate": (0.5,), "rescale": True, "match_norm": True}
    assert "both scale" in (get("dare_ties").check(dare, 1) or "")
    scopes = {"match_norm": True, "scope": "global"}
    assert "scope: global" in (get("ties").check(scopes, 1) or "")
    middle = {"gamma": (0.1,), "density": (0.5,), "remove_first": True, **scopes}
    assert "scope: global" in (get("breadcrumbs_ties").check(middle, 1) or "")
    weights = {"weight": (1.0, -1.0), "normalize": True, "compat": False}
    assert "add up to 0" in (get("task_arithmetic").check(weights, 2) or "")


def test_a_negative_weight_votes_for_the_opposite() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(50, generator=generator) for _ in range(2))
    settings = {"density": 1.0, "scope": "tensor", "aggregate": "mean"}
    found = apply(get("ties"), [x, y], {"weight": (0.7, -0.4), **settings})
    assert torch.equal(found, apply(get("ties"), [x, -y], {"weight": (0.7, 0.4), **settings}))
