"""The family files beside this module, read and checked. A key that is not known here is an error.

One file describes one family:

    name          the family's name
    model_types   the values of `model_type` in config.json that it covers
    prefixes      optional; what stands before the names of the body and of the head: `{body}` and `{head}` below. The
                  first prefix under which layers are found holds; a checkpoint saved from a base model has none
    stacks        lists of layers: name, template (`{body}layers.{i}.`), count (dotted configuration key, or several of
                  them in order of preference), count_like (the stack whose count holds where the key is missing)
    tied          pairs of tensors that are one: alias, canonical, and optionally when (a configuration key) with the
                  default of a missing key, one for all or one per model type with `else`
    experts       optional; where experts stand inside a layer (`mlp.experts.{e}.`)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from mergekit_lite.errors import MergeError, suggest


@dataclass(frozen=True, slots=True)
class Prefix:
    body: str
    head: str = ""

    def fill(self, text: str) -> str:
        return text.replace("{body}", self.body).replace("{head}", self.head)


@dataclass(frozen=True, slots=True)
class StackRule:
    name: str
    template: str
    count: tuple[str, ...]
    count_like: str | None = None


@dataclass(frozen=True, slots=True)
class TieRule:
    alias: str
    canonical: str
    when: str | None = None
    default: Mapping[str, bool] | None = None


@dataclass(frozen=True, slots=True)
class FamilyData:
    """One family file."""

    name: str
    model_types: tuple[str, ...]
    prefixes: tuple[Prefix, ...]
    stacks: tuple[StackRule, ...]
    tied: tuple[TieRule, ...]
    experts: tuple[str, ...]


@functools.cache
def families() -> Mapping[str, FamilyData]:
    """Every family file, by model type. MergeError where a file is wrong or two files claim one model type."""
    found: dict[str, FamilyData] = {}
    folder = resources.files("mergekit_lite.family")
    for file in sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name):
        family = parse(yaml.safe_load(file.read_text(encoding="utf-8")), file.name)
        for model_type in family.model_types:
            if model_type in found:
                raise MergeError(
                    f"{file.name}: `{model_type}` belongs to the family `{found[model_type].name}` already"
                )
            found[model_type] = family
    return found


def parse(raw: Any, file: str) -> FamilyData:
    """The content of a family file as data. MergeError names the file and what is wrong in it."""
    top = _keys(raw, file, "the family", {"name", "model_types", "stacks"}, {"prefixes", "tied", "experts"})
    stacks = tuple(_stack(entry, file) for entry in top["stacks"])
    for stack in stacks:
        if stack.count_like is not None and stack.count_like not in {s.name for s in stacks}:
            raise MergeError(f"{file}: `count_like` of `{stack.name}` names no stack: `{stack.count_like}`")
    experts = tuple(top.get("experts", ()))
    for template in experts:
        _check_template(template, "{e}", file)
    prefixes = [Prefix(**_keys(p, file, "a prefix", {"body"}, {"head"})) for p in top.get("prefixes", [{"body": ""}])]
    return FamilyData(
        name=top["name"],
        model_types=tuple(top["model_types"]),
        prefixes=tuple(prefixes),
        stacks=stacks,
        tied=tuple(_tie(entry, file) for entry in top.get("tied", ())),
        experts=experts,
    )


def _stack(raw: Any, file: str) -> StackRule:
    entry = _keys(raw, file, "a stack", {"name", "template", "count"}, {"count_like"})
    _check_template(entry["template"], "{i}", file)
    count = entry["count"]
    keys = (count,) if isinstance(count, str) else tuple(count)
    return StackRule(entry["name"], entry["template"], keys, entry.get("count_like"))


def _tie(raw: Any, file: str) -> TieRule:
    entry = _keys(raw, file, "a tied pair", {"alias", "canonical"}, {"when", "default"})
    default = entry.get("default")
    if ("when" in entry) != (default is not None):
        raise MergeError(f"{file}: `when` and `default` of a tied pair go together")
    if isinstance(default, bool):
        default = {"else": default}
    return TieRule(entry["alias"], entry["canonical"], entry.get("when"), default)


def _check_template(template: str, placeholder: str, file: str) -> None:
    # Layers are found by what stands before the number, so the number ends the template.
    lead = template.removesuffix(placeholder + ".")
    if lead == template or placeholder in lead or not lead.endswith((".", "}")):
        raise MergeError(f"{file}: `{template}` must end in a component `{placeholder}.`")


def _keys(raw: Any, file: str, what: str, needed: set[str], optional: set[str]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise MergeError(f"{file}: {what} is a mapping, not {raw!r}")
    for key in raw:
        if key not in needed | optional:
            raise MergeError(f"{file}: {what} has no key `{key}`", hint=suggest(str(key), sorted(needed | optional)))
    if missing := needed - set(raw):
        raise MergeError(f"{file}: {what} lacks {', '.join(f'`{k}`' for k in sorted(missing))}")
    return raw
