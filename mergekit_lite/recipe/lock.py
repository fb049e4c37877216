"""The `lock` section of a lock file: what an earlier run noted of its inputs and outputs, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit_lite.errors import Problem
from mergekit_lite.recipe.node import ListNode, MapNode, Node, ScalarNode, describe

_HINT = "`merge run` writes this part; remove it to run the recipe without a comparison"


def read_lock(node: Node, problems: list[Problem]) -> dict[str, Any] | None:
    """The section as plain data; findings go to `problems`, None where it is no lock.

    Every item of `inputs.NAME`, of `outputs[..].shards` and of `outputs[..].files`, which earlier versions did not
    write, is sure to have a `file` and a `blake3` that are text; an input may have a `sha256` or a `git` in its place,
    where it was read from the Hub by ranges. Other parts are kept as they stand.
    """
    if not isinstance(node, MapNode):
        problems.append(Problem(f"`lock` must be a mapping, not {describe(node)}", node.mark, _HINT))
        return None
    before = len(problems)
    inputs, outputs = node.get("inputs"), node.get("outputs")
    if isinstance(inputs, MapNode):
        for entry in inputs.entries.values():
            _check_files(entry.value, problems, ("blake3", "sha256", "git"))
    elif inputs is not None:
        problems.append(Problem(f"`inputs` must be a mapping, not {describe(inputs)}", inputs.mark, _HINT))
    if isinstance(outputs, ListNode):
        for item in outputs.items:
            _check_files(item.get("shards") or item if isinstance(item, MapNode) else item, problems)
            beside = item.get("files") if isinstance(item, MapNode) else None
            if beside is not None:
                _check_files(beside, problems)
    elif outputs is not None:
        problems.append(Problem(f"`outputs` must be a list, not {describe(outputs)}", outputs.mark, _HINT))
    return {key: plain_data(entry.value) for key, entry in node.entries.items()} if len(problems) == before else None


def plain_data(node: Node) -> Any:
    """The node as dicts, lists and scalars."""
    if isinstance(node, ScalarNode):
        return node.value
    if isinstance(node, ListNode):
        return [plain_data(item) for item in node.items]
    return {key: plain_data(entry.value) for key, entry in node.entries.items()}


def _check_files(node: Node, problems: list[Problem], digests: Sequence[str] = ("blake3",)) -> None:
    if not isinstance(node, ListNode):
        problems.append(Problem(f"this must be a list of files, not {describe(node)}", node.mark, _HINT))
        return
    for item in node.items:
        texts = [key for key in ("file", *digests) if isinstance(item, MapNode) and _is_text(item.get(key))]
        if len(texts) < 2 or texts[0] != "file":
            problems.append(Problem("a file of the lock needs a `file` and a `blake3`", item.mark, _HINT))


def _is_text(node: Node | None) -> bool:
    return isinstance(node, ScalarNode) and isinstance(node.value, str)
