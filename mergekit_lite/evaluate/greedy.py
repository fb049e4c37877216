"""Greedy soups (Wortsman et al., ICML 2022, arXiv 2203.05482): of several models those whose merge scores best, taken
in one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tried:
    """One merge that was scored: of which ingredients, by number, and whether the last of them was kept. While single
    models are scored nothing is kept yet."""

    members: tuple[int, ...]
    score: float
    kept: bool
    single: bool


def greedy_soup(
    count: int, score: Callable[[Sequence[int]], float], *, larger: bool = True, accept: str = "ge"
) -> Iterator[Tried]:
    """Choose among `count` ingredients. `score` gives that of a merge of some, by number; `larger` tells whether large
    ones are good. All are scored alone and sorted, those alike in their order; then each joins if the merge with it
    scores at least as well (`accept: ge`, the paper's) or better (`gt`, the released script's). So the last soup kept
    never scores below the best single one. At most 2 count - 1 scores. Gives every merge as it is scored; the members
    of the last that was kept are the result. Raises what `score` raises.
    """
    sign = 1.0 if larger else -1.0
    alone = []
    for number in range(count):
        alone.append(score([number]))
        yield Tried((number,), alone[-1], False, True)
    order = sorted(range(count), key=lambda number: -sign * alone[number])
    soup: tuple[int, ...] = (order[0],)
    best = alone[order[0]]
    yield Tried(soup, best, True, False)
    for number in order[1:]:
        found = score([*soup, number])
        kept = sign * found > sign * best or (accept == "ge" and found == best)
        yield Tried((*soup, number), found, kept, False)
        if kept:
            soup, best = (*soup, number), found
