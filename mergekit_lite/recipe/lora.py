"""The keys of a save that make an adapter of it: `as: lora` or `lokr`, `base`, `rank`, `energy`, `svd`, `targets`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mergekit_lite.errors import Problem, suggest
from mergekit_lite.recipe.model import AsLora, Ref
from mergekit_lite.recipe.node import ListNode, MapNode, Node, ScalarNode, describe

KEYS = ("as", "base", "rank", "energy", "svd", "targets")
FORMS = ("lora", "lokr")
SVDS = ("exact", "randomised")
_EXAMPLE = "for example `save: {as: lora, base: org/base-7b, rank: 16, to: out/lora}`"


def read_lora(node: MapNode, read_ref: Callable[[Node, str], Ref | None], problems: list[Problem]) -> AsLora | None:
    """How the save that `node` writes becomes an adapter; None where it does not, or where that is at fault."""
    entries = {key: entry for key, entry in node.entries.items() if key in KEYS}
    before = len(problems)

    def fault(message: str, key: str, hint: str) -> None:
        problems.append(Problem(message, entries[key].value.mark, hint))

    def scalar(key: str) -> Any:
        found = node.get(key)
        return found.value if isinstance(found, ScalarNode) else None

    if "as" not in entries:
        for key in entries:
            hint = f"add `as: lora` for an adapter, or remove `{key}`"
            problems.append(Problem(f"`{key}` belongs to a save with `as`", entries[key].mark, hint))
        return None
    form = scalar("as")
    base = read_ref(entries["base"].value, "`base`") if "base" in entries else None
    if "base" not in entries:
        problems.append(Problem("a save with `as` names its `base`", entries["as"].mark, _EXAMPLE))
    rank, energy, svd = scalar("rank"), scalar("energy"), scalar("svd")
    if "rank" in entries and (type(rank) is not int or rank < 1):
        fault(f"`rank` must be a whole number above 0, not {describe(entries['rank'].value)}", "rank", _EXAMPLE)
    if "energy" in entries and (isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1):
        hint = "for example `energy: 0.99`: the share of the squared norm of every change that is kept"
        fault(f"`energy` must lie in (0, 1], not {describe(entries['energy'].value)}", "energy", hint)
    if not {"rank", "energy"} & set(entries):
        hint = "`rank: 16` gives every matrix this rank, `energy: 0.99` each the one it needs"
        problems.append(Problem("a save with `as` needs `rank` or `energy`", entries["as"].mark, hint))
    if "svd" in entries and svd not in SVDS:
        near = (suggest(svd, SVDS) if isinstance(svd, str) else None) or "`exact` or `randomised`"
        fault(f"`svd` must be exact or randomised, not {describe(entries['svd'].value)}", "svd", near)
    if svd == "randomised" and "rank" not in entries:
        fault(
            "`svd: randomised` needs `rank`", "svd", "it looks for this many directions; with `energy`, at most so many"
        )
    if form == "lokr" and svd == "randomised":
        fault("`as: lokr` has no randomised search", "svd", "leave out `svd`")
    if "shard" in node.entries:
        problems.append(Problem("an adapter is one file", node.entries["shard"].mark, "remove `shard`"))
    targets = _targets(node.get("targets"), problems)
    if len(problems) > before or base is None:
        return None
    return AsLora(
        base, rank, None if energy is None else float(energy), svd or SVDS[0], targets, entries["as"].mark, str(form)
    )


def _targets(node: Node | None, problems: list[Problem]) -> tuple[str, ...]:
    items = () if node is None else node.items if isinstance(node, ListNode) else (node,)
    texts = [
        item.value for item in items if isinstance(item, ScalarNode) and isinstance(item.value, str) and item.value
    ]
    if node is not None and (len(texts) < len(items) or not texts):
        hint = 'for example `targets: ["*.self_attn.*", "*.mlp.*"]`'
        message = f"`targets` must be globs of tensor names, not {describe(node)}"
        problems.append(Problem(message, node.mark, hint))
    return tuple(texts)
