"""How mergekit names a checkpoint: `path[@revision][+adapter]`, or the same as a mapping."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mergekit_lite.errors import Mark, Problem, suggest
from mergekit_lite.recipe.location import split_location
from mergekit_lite.recipe.node import MapNode, Node, ScalarNode, describe

_EXAMPLE = "for example `org/name`, `org/name@revision` or `./folder`"

Key = tuple[str, "str | None", "str | None", "str | None"]


@dataclass(frozen=True, slots=True)
class Reference:
    """A mention of a checkpoint, with or without an adapter, or of another document by its name. `mark` takes no part
    in comparisons by `key`."""

    path: str
    revision: str | None
    mark: Mark
    lora: str | None = None
    lora_revision: str | None = None

    @property
    def key(self) -> Key:
        return self.path, self.revision, self.lora, self.lora_revision


def read_reference(node: Node, what: str, problems: list[Problem]) -> Reference | None:
    """The checkpoint that `node` names; findings go to `problems`, where `what` stands for it, and give None."""
    if isinstance(node, MapNode):
        return _mapping(node, what, problems)
    value = node.value if isinstance(node, ScalarNode) else None
    if not isinstance(value, str) or not value.strip():
        problems.append(Problem(f"{what} must name a model, not {describe(node)}", node.mark, _EXAMPLE))
        return None
    path, plus, lora = value.partition("+")
    if plus and (not path.strip() or not lora.strip() or "+" in lora):
        message = f"`{value}` is not a model and an adapter"
        problems.append(Problem(message, node.mark, "write `MODEL+ADAPTER`, with one `+` and nothing around it"))
        return None
    found = _reference(*split_location(path), node.mark, problems)
    if not plus or found is None:
        return found
    return _with(found, _reference(*split_location(lora), node.mark, problems))


def _with(found: Reference | None, lora: Reference | None) -> Reference | None:
    """The checkpoint with an adapter."""
    if found is None or lora is None:
        return None
    return replace(found, lora=lora.path, lora_revision=lora.revision)


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
        found = _path(inner, what, problems) if isinstance(inner, MapNode) else read_reference(inner, what, problems)
        lora = node.get("lora")
        if lora is not None and not (isinstance(lora, ScalarNode) and lora.value is None):
            if found is not None and found.lora is not None:
                message = "the model has an adapter already"
                problems.append(Problem(message, node.entries["lora"].mark, "name one adapter"))
                return None
            inside = _path(lora, "`lora`", problems) if isinstance(lora, MapNode) else _plain(lora, "`lora`", problems)
            return _with(found, inside)
    return found


def _plain(node: Node, what: str, problems: list[Problem]) -> Reference | None:
    """`path[@revision]` in a place where no adapter can be named."""
    found = read_reference(node, what, problems)
    if found is not None and found.lora is not None:
        problems.append(Problem(f"{what} names two adapters", node.mark, "merge them as two models instead"))
        return None
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
