"""Greedy soups: the algorithm against another writing of it, and what it promises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mergekit_lite
from mergekit_lite.evaluate.greedy import Tried, greedy_soup

# Few different scores, so that ties are common.
TABLES = st.dictionaries(st.frozensets(st.integers(0, 4), min_size=1), st.integers(0, 3).map(float))


def by_paper(count: int, scores: dict[frozenset[int], float], larger: bool, accept: str) -> list[int]:
    """Algorithm 1 of arXiv 2203.05482 over a table of scores."""

    def val(members: Sequence[int]) -> float:
        value = scores.get(frozenset(members), 1.5)
        return value if larger else -value

    order = list(range(count))
    order.sort(key=lambda i: val([i]), reverse=True)  # stable, in reverse too
    ingredients: list[int] = []
    for i in order:
        if not ingredients:
            ingredients = [i]
            continue
        new, old = val([*ingredients, i]), val(ingredients)
        if new > old or (new == old and accept == "ge"):
            ingredients = [*ingredients, i]
    return ingredients


@given(TABLES, st.integers(1, 5), st.booleans(), st.sampled_from(["ge", "gt"]))
def test_the_soup_is_the_papers_and_never_below_the_best_single_model(
    table: dict[frozenset[int], float], count: int, larger: bool, accept: str
) -> None:
    asked: list[frozenset[int]] = []

    def score(members: Sequence[int]) -> float:
        asked.append(frozenset(members))
        return table.get(frozenset(members), 1.5)

    tries: list[Tried] = list(greedy_soup(count, score, larger=larger, accept=accept))
    kept = [tried for tried in tries if tried.kept]
    assert list(kept[-1].members) == by_paper(count, table, larger, accept)
    singles = [tried.score for tried in tries if tried.single]
    assert len(singles) == count
    assert (kept[-1].score >= max(singles)) if larger else (kept[-1].score <= min(singles))
    assert len(asked) == len(set(asked)) == 2 * count - 1
    assert all(table.get(frozenset(tried.members), 1.5) == tried.score for tried in tries)


CASES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text(encoding="utf-8"))["cases"]
ORACLES = {case["id"]: case for case in CASES if case["method"] == "greedy_soup"}


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_the_soup_is_the_oracles(name: str, tmp_path: Path) -> None:
    """The table of scores stands for the evaluator: a merge is known by which of the models it is the mean of."""
    case = ORACLES[name]
    expected, table = case["expected"], case["inputs"]["evaluator_table"]
    models = {m: {"w": torch.tensor(t["data"], dtype=torch.float64)} for m, t in case["inputs"]["ingredients"].items()}
    scores = {**case["inputs"]["individual_scores"], **table}
    means = {key: torch.stack([models[m]["w"] for m in key.split("+")]).mean(0) for key in scores}
    tried: list[str] = []

    def score(tensors: dict[str, torch.Tensor]) -> float:
        tried.append(next(key for key, mean in means.items() if torch.allclose(mean, tensors["w"], atol=1e-12)))
        return float(scores[tried[-1]])

    path = tmp_path / "soup.yaml"
    accept = {">=": "ge", ">": "gt"}[case["params"]["accept"]]
    places = ", ".join(f"{m}: ./{m}" for m in models)
    path.write_text(
        f"version: 1\ncompute: float64\nmodels: {{{places}}}\n"
        f"steps: {{soup: {{use: linear, of: {{greedy: [{', '.join(models)}], accept: {accept}}}}}}}\n",
        encoding="utf-8",
    )
    found = mergekit_lite.search(path, score=score, models=models, threads=1)
    (best,) = found.best
    assert best.values["steps.soup.of"] == expected["soup"]
    assert best.scores["score"] == expected["score"]
    grown = found.trials[len(models) + 1 :]
    log = [(set(entry["try"].split("+")), entry["score"], entry["accept"]) for entry in expected["log"]]
    assert [(set(t.values["steps.soup.of"]), t.scores["score"], t.why == "kept") for t in grown] == log
    assert tried[: len(models)] == list(models)
    soup = mergekit_lite.merge_in_memory(found.recipes[0], models)["w"]
    wanted = torch.tensor(expected["theta"]["data"], dtype=torch.float64)
    assert torch.allclose(soup, wanted, rtol=0, atol=case["atol"])
