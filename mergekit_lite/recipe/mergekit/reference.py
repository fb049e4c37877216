"""How mergekit names a checkpoint: `path[@revision][+adapter]`, or the same as a mapping."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lite.errors import Mark, Problem, suggest
from mergekit_lite.recipe.location import split_location
from mergekit_lite.recipe.node import MapNode, Node, ScalarNode, describe

_EXAMPLE = "for example `org/name`, `org/name@revision` or `./folder`"
_NO_ADAPTERS = "merge the adapter into its base first and save that: peft's `merge_and_unload()`, `save_pretrained()`"


@dataclass(frozen=True, slots=True)
class Reference:
    """A mention of a checkpoint, or of another document by its name. `mark` takes no part in comparisons by `key`."""

    path: str
    revision: str | None
    mark: Mark

    @property
    def key(self) -> tuple[str, str | None]:
        return self.path, self.revision


def read_reference(node: Node, what: str, problems: list[Problem]) -> Reference | None:
    """The checkpoint that `node` names; findings go to `problems`, where `what` stands for it, and give None."""
    if isinstance(node, MapNode):
        return _mapping(node, what, problems)
    value = node.value if isinstance(node, ScalarNode) else None
    if not isinstance(value, str) or not value.strip():
        problems.append(Problem(f"{what} must name a model, not {describe(node)}", node.mark, _EXAMPLE))
        return None
    path, plus, _ = value.partition("+")
    if plus:
        problems.append(Problem(f"adapters are not supported yet: `{value}`", node.mark, _NO_ADAPTERS))
        return None
    return _reference(*split_location(path), node.mark, problems)


def _mapping(node: MapNode, what: str, problems: list[Problem]) -> Reference | None:
    """`{model: {path, revision}, lora, override_architecture}`, or the inner mapping alone."""
    inner = node.get("model")
    if inner is None:
        found = _path(node, what, problems)
    else:
        for key, entry in node.entries.items():
            if key not in ("model", "lora", "override_architecture"):
                hint = suggest(key, ("model", "lora", "override_architecture"))
                problems.append(Problem(f"a model reference has no key `{key}`", entry.mark, hint))
        lora = node.get("lora")
        if lora is not None and not (isinstance(lora, ScalarNode) and lora.value is None):
            problems.append(Problem("adapters are not supported yet", node.entries["lora"].mark, _NO_ADAPTERS))
            return None
        found = _path(inner, what, problems) if isinstance(inner, MapNode) else read_reference(inner, what, problems)
    return found


def _path(node: MapNode, what: str, problems: list[Problem]) -> Reference | None:
    for key, entry in node.entries.items():
        if key not in ("path", "revision"):
            hint = suggest(key, ("path", "revision"))
            problems.append(Problem(f"a model path has no key `{key}`", entry.mark, hint))
    path, revision = node.get("path"), node.get("revision")
    if not isinstance(path, ScalarNode) or not isinstance(path.value, str) or not path.value.strip():
        problems.append(Problem(f"{what} does not name its `path`", node.mark, "for example `{path: org/name}`"))
        return None
    if revision is None or (isinstance(revision, ScalarNode) and revision.value is None):
        return _reference(*split_location(path.value), path.mark, problems)
    if not isinstance(revision, ScalarNode) or not isinstance(revision.value, str):
        hint = "quotes make a text of a number"
        problems.append(Problem(f"`revision` must be text, not {describe(revision)}", revision.mark, hint))
        return None
    return _reference(path.value, revision.value, revision.mark, problems)


def _reference(path: str, revision: str | None, mark: Mark, problems: list[Problem]) -> Reference | None:
    if "\0" in path:
        problems.append(Problem("a path cannot hold the character U+0000", mark, "check the escapes in this text"))
    elif revision == "":
        hint = f"write `{path}`, or name a commit, tag or branch"
        problems.append(Problem(f"`{path}@` has no revision after `@`", mark, hint))
    elif revision is not None and split_location(f"{path}@{revision}") != (path, revision):
        message = f"`{path}` is not the id of a model on the Hub and has no revision `{revision}`"
        problems.append(Problem(message, mark, "only `org/name` has revisions"))
    else:
        return Reference(path, revision, mark)
    return None
