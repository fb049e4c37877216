"""A parent's configurations without what is not to reach an output: entries that name code, secrets, and notes of where
files lay. No torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lite import redact
from mergekit_lite.checkpoint.inside import read_object
from mergekit_lite.errors import InputError, Problem

# Entries that have transformers import code that lies beside the configuration, or in another repository.
CODE = frozenset({"auto_map", "custom_pipelines"})
_MAX_BYTES = 64 * 2**20


def cleaned(config: Mapping[str, Any], keep_code: bool) -> tuple[dict[str, Any], list[str], list[str]]:
    """A copy of `config`; the dotted paths of entries that were left out since they name code, and of those that hold a
    secret. Notes of where a file lay on the machine of whoever saved it are left out without a word."""
    made, code = ({**config}, []) if keep_code else _without_code(config)
    made, hidden = redact.cleaned(_without_places(made))
    return made, code, hidden


def read_config(path: Path) -> dict[str, Any] | None:
    """The JSON object in a configuration file; None where it is a plain text without any secret.

    Raises InputError where it cannot be told what a program would read there.
    """
    try:
        return read_object(path, _MAX_BYTES)
    except InputError as error:
        try:
            with open(path, "rb") as file:
                text = file.read(_MAX_BYTES + 1).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError):
            raise error from None
        if len(text) > _MAX_BYTES or text.lstrip().startswith(("{", "[")) or redact.secret(text):
            raise
        return None


def notes_of(location: str, model_type: Any, code: Sequence[str], hidden: Sequence[str]) -> Iterator[Problem]:
    """What to tell of the entries that were left out of the configurations of the model at `location`."""
    if hidden:
        message = f"entries of `{location}` that hold a secret are left out of the output: {_few(hidden)}"
        yield Problem(message, None, "others who have these files know it too: make a new one")
    if code:
        message = f"what has transformers import code of `{location}` is left out of the output: {_few(code)}"
        if isinstance(model_type, str) and not _has_class(model_type):
            message += f"; transformers has no class of its own for `{model_type}`"
            hint = "the output loads only with the code of its parent, which is not copied: read it before you use it"
        else:
            hint = "the output loads with the library's own class for its model type"
        yield Problem(message, None, f"{hint}; `--keep-auto-map` leaves the entries in")


def _without_code(value: Any, path: str = "") -> tuple[Any, list[str]]:
    found: list[str] = []
    if isinstance(value, Mapping):
        made: dict[str, Any] = {}
        for key, entry in value.items():
            here = f"{path}.{key}" if path else str(key)
            if key in CODE:
                found.append(here)
            else:
                made[key], inner = _without_code(entry, here)
                found += inner
        return made, found
    if isinstance(value, list):
        pairs = [_without_code(entry, f"{path}[{place}]") for place, entry in enumerate(value)]
        return [entry for entry, _ in pairs], [name for _, names in pairs for name in names]
    return value, found


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_places(v) for k, v in value.items() if not (_is_note(str(k)) and _is_absolute(v))}
    return [_without_places(entry) for entry in value] if isinstance(value, list) else value


def _is_note(key: str) -> bool:
    """Whether transformers or tokenizers write under such a key from where they have read something."""
    return key.endswith(("name_or_path", "_file", "_path"))


def _is_absolute(value: Any) -> bool:
    return isinstance(value, str) and (value.startswith(("/", "~/")) or value[1:3] in (":\\", ":/"))


def _has_class(model_type: str) -> bool:
    """Whether transformers knows the model type by itself; True where that cannot be told."""
    try:
        known = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    except Exception:  # it may be missing, or broken in its own way
        return True
    return model_type in known


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name[:200]}`" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
