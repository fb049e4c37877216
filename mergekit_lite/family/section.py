"""Dotted keys in a nested configuration, such as `text_config.num_hidden_layers`."""

from __future__ import annotations

from collections.abc import Container, Mapping, MutableMapping
from typing import Any


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, or None."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def assign(config: MutableMapping[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key; a section that is missing is made."""
    *sections, last = key.split(".")
    for section in sections:
        inner = config.get(section)
        if not isinstance(inner, MutableMapping):
            inner = config[section] = {}
        config = inner
    config[last] = value


def section_of(config: Mapping[str, Any], known: Container[str]) -> tuple[str | None, str]:
    """The model type that is in `known`, and its section as a dotted prefix: `` (top level) or `text_config.`."""
    for section in ("", "text_config."):
        model_type = lookup(config, section + "model_type")
        if isinstance(model_type, str) and model_type in known:
            return model_type, section
    return None, ""
