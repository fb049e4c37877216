"""What others may see of where things lie on this machine: the last part of a path, and no more.

A path that leads out of the folder where the command runs (`/home/me/models/x`, `~/x`, `../x`) tells of the machine and
its user. Locks and recipes on this disk keep it, since a run has to find its inputs again; in a shard's header, in the
seeds of random masks and in what is published it is `./x`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.write import native

_PATH = re.compile(r"(?:/|~|\.\.?(?:/|$)|[\w.-]+/)[^\n{}]*")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]")


def leads_out(text: str) -> bool:
    """Whether a text is a path that does not lie below the folder where the command runs."""
    if _PATH.fullmatch(text) is None:
        return _WINDOWS.match(text) is not None
    return text.startswith(("/", "~")) or os.path.normpath(text).split(os.sep)[0] == os.pardir


def published(recipe: Recipe, *others: Recipe) -> dict[str, str]:
    """By each path of the recipe, and of `others`, that leads out, what stands for it where others see it: `./` and its
    last part, with a number behind it where two paths end alike."""
    texts = [text for one in (recipe, *others) for text in (*_texts(native(one)), *_outputs(one))]
    taken = {*texts}
    names: dict[str, str] = {}  # by where a path leads: `~/x` and `/home/me/x` are one
    made: dict[str, str] = {}
    for text in texts:
        if leads_out(text):
            where = os.path.abspath(os.path.expanduser(text))
            if where not in names:
                last = re.split(r"[/\\]", where)[-1] or "model"
                name, number = f"./{last}", 1
                while name in taken:
                    number += 1
                    name = f"./{last}-{number}"
                taken.add(name)
                names[where] = name
            made[text] = names[where]
    return made


def in_header(recipe: Recipe) -> dict[str, Any]:
    """The recipe as data for the header of a shard: the same wherever the inputs lie. A model on this disk is `./` and
    its name in the recipe."""
    data: dict[str, Any] = renamed(native(recipe), published(recipe))
    for name, model in recipe.models.items():
        if name not in data.get("models", {}) or "/" in name:
            continue
        place = data["models"][name]
        parts = dict(place) if isinstance(place, dict) else {"path": place}
        if "path" in parts and model.revision is None:
            parts["path"] = f"./{name}"
        if "adapter" in parts and model.adapter_revision is None:
            parts["adapter"] = f"./{name}-adapter"
        data["models"][name] = parts if isinstance(place, dict) else parts["path"]
    return data


def renamed(data: Any, names: Mapping[str, str]) -> Any:
    """Plain data in which every text, keys included, that is one of `names` is what stands for it."""
    if isinstance(data, Mapping):
        return {renamed(key, names): renamed(value, names) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [renamed(item, names) for item in data]
    return names.get(data, data) if isinstance(data, str) else data


def _texts(data: Any) -> Iterator[str]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(data, list | tuple):
        for item in data:
            yield from _texts(item)
    elif isinstance(data, str):
        yield data


def _outputs(recipe: Recipe) -> Iterator[str]:
    """The folders that a lock says were written: `--out` may have named them."""
    for output in (recipe.lock or {}).get("outputs") or []:
        if isinstance(output, Mapping) and isinstance(output.get("to"), str):
            yield output["to"]
