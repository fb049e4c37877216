"""Dotted keys in a nested configuration, such as `text_config.num_hidden_layers`; `hidden_sizes.0` is the first entry
of a list."""

from __future__ import annotations

from collections.abc import Container, Mapping, MutableMapping
from typing import Any


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, or None."""
    value: Any = config
    for part in key.split("."):
        if isinstance(value, list):
            value = value[int(part)] if _entry(value, part) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


def assign(config: MutableMapping[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key; a section that is missing is made, an entry of a list must be there."""
    *sections, last = key.split(".")
    for section in sections:
        inner = config.get(section)
        if isinstance(inner, list) and section == sections[-1] and _entry(inner, last):
            inner[int(last)] = value
            return
        if not isinstance(inner, MutableMapping):
            inner = config[section] = {}
        config = inner
    config[last] = value


def _entry(values: list[Any], part: str) -> bool:
    return part.isascii() and part.isdigit() and int(part) < len(values)


def section_of(config: Mapping[str, Any], known: Container[str]) -> tuple[str | None, str]:
    """The model type that is in `known`, and its section as a dotted prefix: `` (top level) or `text_config.`."""
    for section in ("", "text_config."):
        model_type = lookup(config, section + "model_type")
        if isinstance(model_type, str) and model_type in known:
            return model_type, section
    return None, ""
