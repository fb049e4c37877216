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
    vocabulary    optional; the tensors with a row for every token
    experts       optional; where experts stand inside a layer (`mlp.experts.{e}.`)
    moe           optional; how routers and experts are stored, for merging experts: see moe.py

What lies along the axes of its tensors follows under `sizes`, `spaces`, `axes`, `statistics` and `cases`, all optional:
see layout.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mergekit_lite.errors import InputError, Mark, MergeError, suggest
from mergekit_lite.family.layout import FileFault, Layout, parse_layout
from mergekit_lite.family.moe import MoeRule, parse_moe

# The parser in C where PyYAML was built with it: a tenth of the time.
_MAX_BYTES = 1 << 20  # of a file that a person wrote
_MOST_DEPTH = 64
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OPTIONAL = {
    "stacks", "prefixes", "tied", "vocabulary", "experts", "moe", "sizes", "spaces", "axes", "statistics", "cases",
}  # fmt: skip


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
    layout: Layout | None = None
    vocabulary: tuple[str, ...] = ()
    moe: MoeRule | None = None


@functools.cache
def families() -> Mapping[str, FamilyData]:
    """Every family file, by model type. MergeError where a file is wrong or two files claim one model type."""
    found: dict[str, FamilyData] = {}
    folder = resources.files("mergekit_lite.family")
    for file in sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name):
        family = parse(yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER), file.name)
        for model_type in family.model_types:
            if model_type in found:
                raise MergeError(
                    f"{file.name}: `{model_type}` belongs to the family `{found[model_type].name}` already"
                )
            found[model_type] = family
    return found


def load_family(path: Path | str) -> FamilyData:
    """The family in a file that a person wrote, or the one of this name in the package where there is no such file.

    InputError names the file and the line at fault.
    """
    named = next((family for family in families().values() if family.name == str(path)), None)
    if named is not None and not Path(path).is_file():
        return named
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe or a device may have no end
            raise InputError(f"the family file {path} is not a regular file", hint="name a YAML file")
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as fault:
        hint = suggest(str(path), sorted({family.name for family in families().values()}))
        raise InputError(f"cannot read the family file {path}: {fault.strerror}", hint=hint) from None
    except UnicodeDecodeError:
        raise InputError(f"the family file {path} is no text in UTF-8") from None
    if len(data) > _MAX_BYTES:
        raise InputError(f"the family file {path} is larger than 1 MiB", hint="is it another file?")
    root: yaml.Node | None = None
    try:
        _check_events(text, path)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_doubles(root, Path(path).name)
        return parse(yaml.safe_load(text), Path(path).name)
    except yaml.YAMLError as fault:
        at = getattr(fault, "problem_mark", None)
        mark = None if at is None else _mark(path, text, at.line, at.column, 1)
        raise InputError(f"the family file is no YAML: {getattr(fault, 'problem', fault)}", mark=mark) from None
    except FileFault as fault:
        node = fault.at if isinstance(fault.at, yaml.Node) else _scalar(root, fault.at)
        mark = None
        if node is not None:
            length = len(node.value) if isinstance(node, yaml.ScalarNode) else 1
            mark = _mark(path, text, node.start_mark.line, node.start_mark.column, length)
        raise InputError(fault.problems[0].message, hint=fault.problems[0].hint, mark=mark) from None


def _check_events(text: str, path: Path | str) -> None:
    """Refuses what a few lines can make endless: aliases stand for billions of values or for one without end, and
    yaml takes a time for each bracket that grows with the number of those it stands in."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            message = f"YAML aliases are not read in a family file: `*{event.anchor}` in {path}"
            raise InputError(message, hint="write the value out")
        if depth > _MOST_DEPTH:
            raise InputError(f"the family file {path} is nested too deeply", hint="is it another file?")


def _check_doubles(node: yaml.Node | None, file: str) -> None:
    """A key that stands twice in one mapping would lose its first rule."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise FileFault(f"{file}: `{key.value}` stands here a second time", key)
                seen.add(key.value)
            _check_doubles(value, file)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_doubles(item, file)


def _mark(path: Path | str, text: str, line: int, column: int, length: int) -> Mark:
    lines = text.splitlines()
    return Mark(str(path), line + 1, column + 1, lines[line] if line < len(lines) else "", length)


def _scalar(node: yaml.Node | None, text: object) -> yaml.Node | None:
    """The first scalar of the document that reads `text`."""
    if node is None or text is None:
        return None
    if isinstance(node, yaml.ScalarNode):
        return node if node.value == str(text) else None
    inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    return next((found for part in inner if (found := _scalar(part, text)) is not None), None)


def parse(raw: Any, file: str) -> FamilyData:
    """The content of a family file as data. MergeError names the file and what is wrong in it."""
    top = _keys(raw, file, "the family", {"name", "model_types"}, _OPTIONAL)
    stacks = tuple(_stack(entry, file) for entry in top.get("stacks", ()))
    for stack in stacks:
        if stack.count_like is not None and stack.count_like not in {s.name for s in stacks}:
            raise FileFault(
                f"{file}: `count_like` of `{stack.name}` names no stack: `{stack.count_like}`", stack.count_like
            )
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
        layout=parse_layout(top, file),
        vocabulary=tuple(top.get("vocabulary", ())),
        moe=parse_moe(top["moe"], file) if "moe" in top else None,
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
        raise FileFault(f"{file}: `when` and `default` of a tied pair go together")
    if isinstance(default, bool):
        default = {"else": default}
    return TieRule(entry["alias"], entry["canonical"], entry.get("when"), default)


def _check_template(template: str, placeholder: str, file: str) -> None:
    # Layers are found by what stands before the number, so the number ends the template.
    lead = template.removesuffix(placeholder + ".")
    if lead == template or placeholder in lead or not lead.endswith((".", "}")):
        raise FileFault(f"{file}: `{template}` must end in a component `{placeholder}.`", template)


def _keys(raw: Any, file: str, what: str, needed: set[str], optional: set[str]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise FileFault(f"{file}: {what} is a mapping, not {raw!r}")
    for key in raw:
        if key not in needed | optional:
            raise FileFault(
                f"{file}: {what} has no key `{key}`", key, hint=suggest(str(key), sorted(needed | optional))
            )
    if missing := needed - set(raw):
        raise FileFault(f"{file}: {what} lacks {', '.join(f'`{k}`' for k in sorted(missing))}")
    return raw
