"""The patterns in an adapter's configuration, by which numbers differ between modules; a stranger wrote them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


def is_simple(pattern: str) -> bool:
    """Whether a regular expression is sure to be matched in little time: at most one group, which is not repeated, and
    few repetitions. peft's own patterns are names of modules."""
    repeats = sum(pattern.count(sign) for sign in "*+?{")
    if len(pattern) > 1000 or pattern.count("(") > 1 or repeats > 2 or re.search(r"\)[*+?{]|\(\?|\\\d", pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def steps(modules: Iterable[str], config: Mapping[str, Any]) -> int:
    """How many steps it takes at most to match all patterns with all modules: each from all starts in a name, and once
    more along the name for each repetition."""
    by_repeats = [0, 0, 0]
    for name in modules:
        for repeats in range(3):
            by_repeats[repeats] += (1 + name.count(".")) * len(name) ** repeats
    used = ("alpha_pattern", "rank_pattern") if config["peft_type"] == "LOKR" else ("alpha_pattern",)
    patterns = [pattern for name in used for pattern in config.get(name) or {}]
    return sum(by_repeats[sum(map(pattern.count, "*+?{"))] for pattern in patterns)


class Numbers:
    """The numbers of a configuration that patterns change for some modules."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self._patterns: dict[str, list[tuple[re.Pattern[str], float]]] = {}

    def __call__(self, module: str, patterns: str, otherwise: str) -> float:
        """That of the first pattern that is the module's name or the end of it, as peft finds it, or the one that holds
        for all modules."""
        if patterns not in self._patterns:
            given = (self._config.get(patterns) or {}).items()
            self._patterns[patterns] = [(re.compile(key), float(value)) for key, value in given]
        starts = [0, *(match.end() for match in re.finditer(r"\.", module))]
        for pattern, value in self._patterns[patterns]:
            if any(pattern.fullmatch(module, start) for start in starts):
                return value
        return float(self._config[otherwise])
