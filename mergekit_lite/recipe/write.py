"""Recipe → native YAML, tidy and the same for the same recipe. Reading it gives the recipe back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mergekit_lite.recipe.links import final_step
from mergekit_lite.recipe.lora import SVDS
from mergekit_lite.recipe.masks import THRESHOLD
from mergekit_lite.recipe.model import AsLora, AsMasks, Input, Model, Recipe, Ref, Save, Step, Tokenizer, TokenRow
from mergekit_lite.recipe.node import FLOAT, INTEGER, WORD
from mergekit_lite.recipe.read import split_location
from mergekit_lite.recipe.save import DEFAULT_SHARD, UNITS
from mergekit_lite.recipe.score import written
from mergekit_lite.recipe.step import MISSING
from mergekit_lite.recipe.value import Curve, Rule, Scalar, Value

_FLOW_COLUMNS = 96
_SECTIONS = ("models", "steps", "lock")


def to_yaml(recipe: Recipe) -> str:
    """The recipe as native YAML: defaults left out, short parts on one line. Comments and a `lock` section are lost.

    `parse` gives the recipe back, up to marks, text and `--set` notes (what was set is in the recipe).
    """
    data = native(recipe)
    if recipe.scores:
        scores = [written(score) for score in recipe.scores]
        data["score"] = scores if len(scores) > 1 else scores[0]
    return dump(data)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data for JSON, in the shape of the native language with every default written out.

    Sizes are bytes and every model is listed with its location. Raises RecipeError where `final_step` does.
    """
    models = {name: _model(model) for name, model in recipe.models.items()}
    steps = {name: _step(step) | {"missing": step.missing} for name, step in recipe.steps.items()}
    saves = []
    for save in recipe.saves:
        step = save.step.name if save.step else final_step(recipe)
        saves.append({"step": step, **_save(save), "shard": save.shard})
    head = {"version": recipe.version, "seed": recipe.seed, "compute": recipe.compute}
    return {**head, "models": models, "steps": steps, "save": saves}


def native(recipe: Recipe) -> dict[str, Any]:
    """The recipe as the data that its YAML text writes, defaults left out, and without scores: they say nothing of what
    is merged."""
    data: dict[str, Any] = {"version": recipe.version}
    if recipe.seed:
        data["seed"] = recipe.seed
    if recipe.compute != "float32":
        data["compute"] = recipe.compute
    # A model named in place comes back by itself, unless its location has been pinned to something else since.
    models = {name: _model(m) for name, m in recipe.models.items() if "/" not in name or _model(m) != name}
    if models:
        data["models"] = models
    if recipe.steps:
        data["steps"] = {name: _step(step) for name, step in recipe.steps.items()}
    saves = [_save(save) for save in recipe.saves]
    if len(saves) > 1:
        data["save"] = saves
    elif saves and saves[0]:
        data["save"] = saves[0]
    return data


def dump(data: Any) -> str:
    """Plain data as YAML that `source.load` reads back. Text that is a number under YAML 1.1 or 1.2 is quoted."""
    text = yaml.serialize(_node(data, _SECTIONS), Dumper=_Dumper, width=math.inf, allow_unicode=True)
    assert isinstance(text, str)
    return text


def located(model: Model) -> str:
    """The model's location as a person reads it: `org/name@revision`, with an adapter `org/name@revision + ./lora`.
    ValueError as in `_model`."""
    written = _model(model)
    return written if isinstance(written, str) else " + ".join(written.values())


def _model(model: Model) -> str | dict[str, str]:
    """The model as a recipe writes it. ValueError where something else than a Hub id has a revision."""
    if model.adapter is not None and not model.location:
        return {"adapter": _place(model.adapter, model.adapter_revision)}
    path = _place(model.location, model.revision)
    if model.adapter is None:
        return path
    return {"path": path, "adapter": _place(model.adapter, model.adapter_revision)}


def _place(location: str, revision: str | None) -> str:
    text = location if revision is None else f"{location}@{revision}"
    if split_location(text) != (location, revision):
        raise ValueError(f"{location!r} is not a Hub id and cannot have the revision {revision!r}")
    return text


def size_text(nbytes: int) -> str | int:
    """A size as a person writes it (`5GB`, `2GiB`), or the number of bytes where no unit divides it."""
    for unit in ("TB", "GB", "MB", "TiB", "GiB", "MiB", "KB", "KiB"):
        if nbytes % UNITS[unit] == 0:
            return f"{nbytes // UNITS[unit]}{unit}"
    return nbytes


def _step(step: Step) -> dict[str, Any]:
    data: dict[str, Any] = {"use": step.use, "of": _inputs(step.of)}
    if step.base is not None:
        data["base"] = step.base.name
    params = {key: _value(value) for key, value in step.params.items()}
    if "like" in params:
        data["like"] = params.pop("like")
    if params:
        data["with"] = params
    if step.missing != MISSING[0]:
        data["missing"] = step.missing
    for key, ref in (("rest", step.rest), ("below", step.below), ("above", step.above)):
        if ref is not None:
            data[key] = ref.name
    return data


def _inputs(inputs: Sequence[Input]) -> Any:
    names = [item.ref.name for item in inputs]
    params = [{key: _value(value) for key, value in item.params.items()} for item in inputs]
    if not any(params):
        return names[0] if len(names) == 1 else names
    # Layers are read in sequence, which a list shows.
    if len(set(names)) < len(names) or any("layers" in settings for settings in params):
        return [{"model": name, **settings} for name, settings in zip(names, params, strict=True)]
    return dict(zip(names, params, strict=True))


def _save(save: Save) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if save.step is not None:
        data["step"] = save.step.name
    if save.to is not None:
        data["to"] = save.to
    if save.dtype is not None:
        data["dtype"] = save.dtype
    if save.quantize is not None:
        data["quantize"] = save.quantize
    if save.shard != DEFAULT_SHARD:
        data["shard"] = size_text(save.shard)
    if save.lora is not None:
        data |= _lora(save.lora)
    if save.masks is not None:
        data |= _masks(save.masks)
    if save.push is not None:
        keys = {"private": save.push.private, "branch": save.push.branch, "message": save.push.message}
        given = {key: value for key, value in keys.items() if value is not None}
        data["push"] = {"repo": save.push.repo, **given, **({"pr": True} if save.push.pr else {})}
    return data | ({} if save.tokenizer is None else _tokenizer(save.tokenizer))


def _lora(lora: AsLora) -> dict[str, Any]:
    data: dict[str, Any] = {"as": lora.form, "base": lora.base.name}
    if lora.rank is not None:
        data["rank"] = lora.rank
    if lora.energy is not None:
        data["energy"] = lora.energy
    if lora.svd != SVDS[0]:
        data["svd"] = lora.svd
    if lora.targets:
        data["targets"] = list(lora.targets)
    return data


def _masks(masks: AsMasks) -> dict[str, Any]:
    tasks = {name: ref.name for name, ref in masks.tasks.items()}
    itself = all(name == ref for name, ref in tasks.items())
    data: dict[str, Any] = {"as": "masks", "base": masks.base.name, "tasks": list(tasks) if itself else tasks}
    values = set(masks.thresholds.values())
    if values != {THRESHOLD}:
        data["threshold"] = values.pop() if len(values) == 1 else dict(masks.thresholds)
    if masks.compress is not None:
        data["compress"] = masks.compress
    return data


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys `tokenizer` and `chat_template` of a save."""
    data: dict[str, Any] = {}
    if tokenizer.source is not None:
        block: dict[str, Any] = {"source": _named(tokenizer.source)}
        if tokenizer.tokens:
            block["tokens"] = {token: _token(row) for token, row in tokenizer.tokens.items()}
        if tokenizer.pad_to_multiple_of is not None:
            block["pad_to_multiple_of"] = tokenizer.pad_to_multiple_of
        if tokenizer.base is not None:
            block["base"] = tokenizer.base.name
        data["tokenizer"] = block if len(block) > 1 else block["source"]
    if tokenizer.chat_template is not None:
        data["chat_template"] = _named(tokenizer.chat_template)
    return data


def _token(row: TokenRow) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if row.kind == "zero":
        data["source"] = {"kind": "zero"}
    elif row.kind == "model_token":
        which = {"token_id": row.token_id} if row.token is None else {"token": row.token}
        data["source"] = {"kind": "model_token", "model": row.model.name if row.model else None, **which}
    elif row.model is not None:
        data["source"] = row.model.name
    return data | ({"force": True} if row.force else {})


def _named(value: str | Ref) -> str:
    return value.name if isinstance(value, Ref) else value


def _value(value: Value) -> Any:
    """The setting as data. Neighbouring rules of one glob become one entry: a curve and what holds outside the layers.

    Rules that can never apply are left out. Raises ValueError where rules of one glob stand apart: no text says that.
    """
    groups: list[tuple[str | None, list[Rule]]] = []
    settled: set[str | None] = set()
    for rule in value.rules:
        if rule.glob in settled or None in settled:
            continue
        if not groups or groups[-1][0] != rule.glob:
            groups.append((rule.glob, []))
        elif isinstance(rule.value, Curve):
            continue
        groups[-1][1].append(rule)
        if not isinstance(rule.value, Curve):
            settled.add(rule.glob)
    if len(groups) == 1 and groups[0][0] is None:
        return _group(groups[0][1])
    data: dict[str, Any] = {}
    for place, (glob, rules) in enumerate(groups, start=1):
        # A curve for every tensor that stands before other rules is one for the glob that matches every name.
        key = glob if glob is not None else "else" if place == len(groups) else "*"
        if key in data:
            raise ValueError(f"the glob `{key}` comes twice among the rules of one setting")
        data[key] = _group(rules)
    return data


def _group(rules: Sequence[Rule]) -> Any:
    first = rules[0].value
    if not isinstance(first, Curve):
        return _scalar(first)
    curve = {"across": list(first.points)}
    return curve if len(rules) == 1 else {**curve, "else": _scalar(rules[1].value)}


def _scalar(value: Scalar | Curve) -> Any:
    return [_scalar(item) for item in value] if isinstance(value, tuple) else value


class _Dumper(yaml.SafeDumper):
    """Writes double quotes, and lists indented below their key."""

    def choose_scalar_style(self) -> str:
        style = super().choose_scalar_style()
        return '"' if style == "'" else str(style)

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


for _tag, _regexp in (("int", INTEGER), ("float", FLOAT), ("null", WORD)):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_regexp.pattern})\Z"), None)


def _node(data: Any, block: Sequence[str] = ()) -> yaml.Node:
    """The YAML node of plain data. What is short and not deep goes on one line, except a mapping with the keys `block`
    and what these keys hold."""
    if isinstance(data, Mapping):
        pairs = []
        for key, item in data.items():
            inner = _node(item)
            if key in block and isinstance(inner, yaml.MappingNode) and item:
                inner.flow_style = False
            pairs.append((_node(key), inner))
        return yaml.MappingNode("tag:yaml.org,2002:map", pairs, flow_style=not block and _flows(data))
    if isinstance(data, list | tuple):
        return yaml.SequenceNode("tag:yaml.org,2002:seq", [_node(item) for item in data], flow_style=_flows(data))
    if isinstance(data, str):
        return yaml.ScalarNode("tag:yaml.org,2002:str", data)
    if data is None or isinstance(data, bool):
        words = {None: ("null", "null"), True: ("bool", "true"), False: ("bool", "false")}
        return yaml.ScalarNode(f"tag:yaml.org,2002:{words[data][0]}", words[data][1])
    if isinstance(data, int):
        return yaml.ScalarNode("tag:yaml.org,2002:int", str(data))
    text = repr(float(data)) if math.isfinite(data) else {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}[str(data)]
    return yaml.ScalarNode("tag:yaml.org,2002:float", text)


def _flows(data: Any) -> bool:
    """Whether a collection stands on one line: it fits, nests at most once and holds at most one mapping."""
    items = list(data.values() if isinstance(data, Mapping) else data)
    mappings = sum(1 for item in items if isinstance(item, Mapping) and item)
    return not items or (_height(data) <= 2 and mappings <= 1 and _columns(data) <= _FLOW_COLUMNS)


def _height(data: Any) -> int:
    if not isinstance(data, Mapping | list | tuple):
        return 0
    items = data.values() if isinstance(data, Mapping) else data
    return 1 + max((_height(item) for item in items), default=0)


def _columns(data: Any) -> int:
    """About how many columns the data takes on one line."""
    if isinstance(data, Mapping):
        return 2 + sum(len(str(key)) + 4 + _columns(item) for key, item in data.items())
    if isinstance(data, list | tuple):
        return 2 + sum(2 + _columns(item) for item in data)
    return len(str(data))
