"""Scores of tokens that a Unigram tokenizer gets from others: as good as the pieces that it splits their texts into."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

JOINED = 1e-6  # by which a token is better than its pieces, for each piece that it saves
UNKNOWN = 10.0  # by which a character that is no token is worse than the worst token, as in SentencePiece
ASIDE = 1.0  # by which a token that is matched before the model is worse than its pieces


def scored(vocab: Sequence[Sequence[Any]], ids: Mapping[str, int], added: Collection[str]) -> list[list[Any]]:
    """The `vocab` of a Unigram model, pairs of token and score, with all tokens of `ids` in the order of their ids.

    A token that it lacks gets the score of the best split of its text into tokens of `vocab`, and a trifle more for
    each piece that it saves. So a text is split as before, and then pieces that make up such a token are joined.
    Those of `added` are matched before the model, which is not to take them: they get less than their pieces.
    """
    scores = {str(token): float(score) for token, score in vocab}
    splits = _Splits(scores)

    def score(token: str) -> float:
        if token in scores:
            return scores[token]
        total, pieces = splits.best(token)
        return total - ASIDE if token in added else total + JOINED * (pieces - 1)

    return [[token, score(token)] for token in sorted(ids, key=lambda one: ids[one])]


class _Splits:
    """The best splits of texts into tokens with these scores."""

    def __init__(self, scores: Mapping[str, float]):
        self._scores = scores
        self._longest = max(map(len, scores), default=1)
        self._unknown = min(scores.values(), default=0.0) - UNKNOWN

    def best(self, text: str) -> tuple[float, int]:
        """The sum of the scores of the best split, and its pieces."""
        found = [(0.0, 0)]
        for end in range(1, len(text) + 1):
            ways = [(found[end - 1][0] + self._unknown, found[end - 1][1] + 1)]
            for start in range(max(0, end - self._longest), end):
                score = self._scores.get(text[start:end])
                if score is not None:
                    ways.append((found[start][0] + score, found[start][1] + 1))
            found.append(max(ways, key=lambda way: (way[0], -way[1])))
        return found[-1]
