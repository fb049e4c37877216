"""From ids to an id: `scripts/hub_ids.py` plans, streams, merges, verifies, pushes and loads by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.hub_ids import whole_way


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return whole_way(tmp_path_factory.mktemp("plain"))


def test_what_transformers_loads_is_the_merge(plain: dict[str, Any]) -> None:
    """Logits in float32 against those of the same merge computed whole in float64."""
    assert plain["largest difference of logits"] < 1e-6 < 0.1 < plain["largest logit"]


def test_what_is_needed_is_fetched_once(plain: dict[str, Any]) -> None:
    needed = plain["bytes to fetch by the plan"]
    assert 0.97 * plain["bytes of the parents' weights"] < needed < plain["bytes of the parents' weights"]
    # The adapter is so small that its header brings all of it; the last byte of seven files, before and after.
    assert needed <= plain["bytes of weights fetched by the run"] <= needed + (1 << 16) + 2 * 7
    assert plain["bytes of weights left in the cache"] == 0


def test_faults_and_xet_and_a_pull_request_change_no_byte(plain: dict[str, Any], tmp_path: Path) -> None:
    """A fifth of all requests fails while the merge streams, from a Hub with Xet; the merge is a pull request."""
    found = whole_way(tmp_path, faults=True, xet=True, pr=True)
    assert found["requests that failed"] > 5
    for figure in ("digests", "largest difference of logits", "bytes to fetch by the plan"):
        assert found[figure] == plain[figure]
