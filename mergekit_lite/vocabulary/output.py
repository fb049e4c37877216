"""The files of the output that speak of tokens: the tokenizer's own, and ids in configurations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.extras import tokenizer_files
from mergekit_lite.checkpoint.inside import inside, read_object
from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.vocabulary.tokens import SETTINGS, TOKENIZER, Tokens
from mergekit_lite.vocabulary.union import text_of

GENERATION = "generation_config.json"
# What else than the tokenizer itself goes along where the tokenizer is written anew: its other forms say other things.
_KEPT = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/")
_MAX_BYTES = 1 << 26


def files_of(lead: Checkpoint, tokens: Tokens | None) -> dict[str, Path | bytes]:
    """The tokenizer files of the model `lead`, as they are, or where `tokens` is no tokenizer that it stores, those
    that hold `tokens`."""
    files: dict[str, Path | bytes] = dict(tokenizer_files(lead))
    if tokens is None or tokens.stored:
        return files
    kept = {name: path for name, path in files.items() if name.startswith(_KEPT)}
    settings = (json.dumps(tokens.settings, indent=2, ensure_ascii=False) + "\n").encode()
    return {**kept, TOKENIZER: text_of(tokens), **({SETTINGS: settings} if tokens.settings else {})}


def vocabulary_keys(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of vocabularies that a configuration states, by dotted key."""
    sections = [("", config), ("text_config.", config.get("text_config"))]
    return {
        section + key: value
        for section, part in sections
        if isinstance(part, Mapping)
        for key, value in part.items()
        if key.startswith("vocab_size") and type(value) is int and value > 0
    }


def renumbered(
    config: Mapping[str, Any], given: Mapping[str, Any], old: Mapping[int, str], ids: Mapping[str, int]
) -> Any:
    """`config` with the ids of special tokens (`eos_token_id` and the like, at whatever depth) as the output has them:
    those that `given`, the configuration of the vocabulary's own model, states; others by the token, `old` by its
    former id. An id whose token the output lacks becomes null, or is left out of a list."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        inner = given.get(key)
        if isinstance(value, Mapping) and key.endswith("_config"):
            made[key] = renumbered(value, inner if isinstance(inner, Mapping) else {}, old, ids)
        elif key.endswith(("_token_id", "_token_ids", "_token_index")):
            made[key] = inner if key in given else _by_token(value, old, ids)
        else:
            made[key] = value
    return made


def _by_token(value: Any, old: Mapping[int, str], ids: Mapping[str, int]) -> Any:
    if isinstance(value, list):
        found = [_by_token(one, old, ids) for one in value]
        return [one for one in found if one is not None]
    if type(value) is int:
        return ids.get(old.get(value, "")) if value >= 0 else value
    return value


def generation_config(
    donor: Checkpoint, lead: Checkpoint, old: Mapping[int, str], ids: Mapping[str, int]
) -> bytes | None:
    """The donor's generation_config.json with the output's ids; None where it has none."""
    found = _object(donor)
    if found is None:
        return None
    given = _object(lead) or {}
    stated = {k: v for k, v in lead.config.items() if k.endswith("_token_id")}
    return (json.dumps(renumbered(found, {**stated, **given}, old, ids), indent=2) + "\n").encode()


def _object(checkpoint: Checkpoint) -> dict[str, Any] | None:
    if checkpoint.folder is None or not (checkpoint.folder / GENERATION).is_file():
        return None
    return read_object(inside(checkpoint.folder, GENERATION), _MAX_BYTES)
