"""What a tensor is counted with: its layer, or its module outside of the layers; and globs for these."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence

from mergekit_lite.family.family import Family


def home_of(family: Family, name: str) -> str:
    """The layer of a tensor, by what stands before the rest of its name, or its module outside of the layers."""
    layer = family.layer(name)
    return f"{layer.prefix}{layer.index}" if layer is not None else name.rpartition(".")[0] or name


def by_home(family: Family, names: Iterable[str]) -> dict[str, list[str]]:
    """The tensors of each layer and of each module outside of the layers, in their order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(home_of(family, name), []).append(name)
    return groups


def globs_of(home: str, members: Sequence[str], names: Iterable[str]) -> list[str]:
    """Globs that match the tensors `members` of a home and no other of all `names`: one where that is enough."""
    own = set(members)
    lead = f"{home}."
    inside = {name for name in names if name.startswith(lead)}
    return [f"{glob.escape(home)}.*"] if inside == own else [glob.escape(name) for name in members]
