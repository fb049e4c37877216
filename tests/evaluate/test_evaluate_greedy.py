"""Greedy soups: the algorithm against another writing of it, and what it promises."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

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
