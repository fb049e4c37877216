"""Layers in tensor names: `model.layers.12.mlp.up_proj.weight` stands in layer 12 under `model.layers.`"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Nine digits are plenty for a layer, and eight numbers for a name; a stranger's name may hold more.
_NUMBER = re.compile(r"(?:^|(?<=\.))(0|[1-9][0-9]{0,8})\.(?=.)", re.DOTALL)
_MOST_NUMBERS = 8
_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth")


@dataclass(frozen=True, slots=True)
class Stack:
    """A list of layers: `template` is what stands before the rest of a name, `{i}` being the layer's number; `count`
    the number of layers found in the names; `count_key` the dotted configuration key that states it, where known."""

    name: str
    template: str
    count: int
    count_key: str | None

    @property
    def prefix(self) -> str:
        """What stands before the number."""
        return self.template.removesuffix("{i}.")


@dataclass(frozen=True, slots=True)
class Layer:
    """Where a tensor stands: its name is `{prefix}{index}.{rest}`; `stack` is the stack's name."""

    stack: str
    index: int
    prefix: str
    rest: str


def numbers(name: str) -> Iterator[tuple[str, int, str]]:
    """Every whole-number component of a dotted name, outermost first, as (before, number, after)."""
    for match in itertools.islice(_NUMBER.finditer(name), _MOST_NUMBERS):
        yield name[: match.start()], int(match[1]), name[match.end() :]


def counts(names: Iterable[str], prefixes: Iterable[str]) -> dict[str, int]:
    """The number of layers under each prefix: one more than the highest number; left out where there is none."""
    wanted = set(prefixes)
    found: dict[str, int] = {}
    for name in names:
        for before, number, _ in numbers(name):
            if before in wanted:
                found[before] = max(found.get(before, 0), number + 1)
    return found


def stacks_in(names: Iterable[str], config: Mapping[str, Any]) -> tuple[Stack, ...]:
    """The stacks of a model of unknown family: numbers 0..n-1 under one prefix, the outermost such list of each name.

    A list inside a layer (experts, sub-layers) is no stack. A stack is named after its prefix. Its `count_key` is
    the one usual configuration key that states its count, where neither another key nor another stack fits as well.
    """
    found: dict[str, int] = {}
    pending = [[(before, number) for before, number, _ in numbers(name)] for name in names]
    for depth in range(_MOST_NUMBERS):
        pending = [hits for hits in pending if len(hits) > depth]
        groups: dict[str, set[int]] = {}
        for hits in pending:
            before, number = hits[depth]
            groups.setdefault(before, set()).add(number)
        lists = {before: len(group) for before, group in groups.items() if max(group) == len(group) - 1}
        pending = [hits for hits in pending if hits[depth][0] not in lists]
        found |= lists
    alike = Counter(found.values())
    return tuple(
        Stack(
            prefix.removesuffix(".") or "layers", prefix + "{i}.", n, _count_key(config, n) if alike[n] == 1 else None
        )
        for prefix, n in found.items()
    )


def _count_key(config: Mapping[str, Any], count: int) -> str | None:
    fitting = [key for key in _COUNT_KEYS if config.get(key) == count]
    for section, inner in config.items():
        if isinstance(inner, Mapping):
            fitting += [f"{section}.{key}" for key in _COUNT_KEYS if inner.get(key) == count]
    return fitting[0] if len(fitting) == 1 else None
