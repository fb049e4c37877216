"""An output's files as others get them: with the names of folders alone in place of paths of this machine.

Weights are sent as they are: their headers name no path. The recipe, the lock and configurations are small texts; where
one of them holds a path that leads out of the folder where the command runs, another text takes its place, and the lock
says what is in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from mergekit_lite.plan.lock import NAME as LOCK
from mergekit_lite.plan.lock import NOTE, sealed
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.places import leads_out, published, renamed
from mergekit_lite.recipe.read import parse
from mergekit_lite.recipe.write import dump, native
from mergekit_lite.run.finish import RECIPE

_ABSOLUTE = re.compile(r"(?<![\w.:/~-])~?/[\w.+@-]+(?:/[\w.+@-]+)*")


@dataclass(frozen=True, slots=True)
class Shared:
    """`texts` are the files that are sent with another content than they have here, by name; `places` are the paths
    that they no longer name, with what stands there."""

    texts: Mapping[str, bytes]
    places: Mapping[str, str]


def shared(folder: Path, recipe: Recipe, number: int) -> Shared:
    """What of the output in `folder`, number `number` of those that the lock `recipe` tells of, is sent with another
    content. Raises OSError where a file cannot be read."""
    lock = recipe.lock or {}
    names = [file["file"] for file in lock["outputs"][number]["files"]]
    text = (folder / RECIPE).read_bytes().decode("utf-8", "replace") if RECIPE in names else ""
    written, _ = parse(text, RECIPE)  # before `--set` put something else in its place
    places = published(recipe, *([] if written is None else [written]))
    sets = [_without(item, places) for item in lock.get("set") or () if isinstance(item, str)]
    texts: dict[str, bytes] = {}
    if RECIPE in names:
        texts[RECIPE] = _recipe(text, recipe, places, sets).encode()
    for name in names:
        if name.endswith("config.json"):
            texts[name] = _config((folder / name).read_bytes(), places)
    texts = {name: data for name, data in texts.items() if data != (folder / name).read_bytes()}
    if places or texts or sets != list(lock.get("set") or ()):
        texts[LOCK] = _lock(recipe, number, texts, places, sets)
    return Shared(texts, places)


def told(places: Mapping[str, str], most: int = 3) -> str:
    """`/home/me/x as ./x and 2 more`."""
    shown = [f"{place} as {name}" for place, name in list(places.items())[:most]]
    return ", ".join(shown) + (f" and {len(places) - most} more" if len(places) > most else "")


def _recipe(text: str, recipe: Recipe, places: Mapping[str, str], sets: Sequence[str]) -> str:
    """The user's text with other paths in it, comments and all; where that is not the same recipe, or still names a
    place of theirs, the recipe in tidy form."""
    made = _without(text, places)
    wanted = renamed(_bare(recipe), places)
    found, problems = parse(made, RECIPE, sets)
    same = found is not None and not problems and _bare(found) == wanted
    return made if same and not _names_a_place(made) else dump(wanted)


def _bare(recipe: Recipe) -> dict[str, Any]:
    """The recipe as data, without commits and without where its outputs are pushed to: of these a lock says more, or
    less, than the recipe that it was made from."""
    models = {n: replace(m, revision=None, adapter_revision=None) for n, m in recipe.models.items()}
    return native(replace(recipe, models=models, saves=tuple(replace(save, push=None) for save in recipe.saves)))


def _names_a_place(text: str) -> bool:
    """Whether a text holds a path that is there on this machine."""
    return any(os.path.lexists(os.path.expanduser(found)) for found in _ABSOLUTE.findall(text))


def _config(data: bytes, places: Mapping[str, str]) -> bytes:
    """A configuration in which a text that is such a path is what stands for it; the same bytes where none is."""
    try:
        found = json.loads(data)
    except ValueError:
        return data
    made = renamed(found, places)
    return data if made == found else (json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode()


def _lock(
    recipe: Recipe, number: int, texts: Mapping[str, bytes], places: Mapping[str, str], sets: Sequence[str]
) -> bytes:
    lock = {**(recipe.lock or {}), "set": list(sets)}
    lock["inputs"] = {places.get(name, name): files for name, files in (lock.get("inputs") or {}).items()}
    outputs = [{**output, "to": places.get(output["to"], output["to"])} for output in lock["outputs"]]
    for place, output in enumerate(outputs):
        # The recipe is the same beside all outputs; what else is sent is of this one.
        known = texts if place == number else {RECIPE: texts[RECIPE]} if RECIPE in texts else {}
        output["files"] = [_entry(file, known) for file in output["files"]]
    lock["outputs"] = outputs
    return sealed(f"{dump(renamed(native(recipe), places))}\n{NOTE}\n{dump({'lock': lock})}").encode()


def _entry(file: Mapping[str, Any], texts: Mapping[str, bytes]) -> dict[str, Any]:
    data = texts.get(file["file"])
    return dict(file) if data is None else {**file, "bytes": len(data), "blake3": blake3(data).hexdigest()}


def _without(text: str, places: Mapping[str, str]) -> str:
    """A text without these paths, wherever they stand in it, and without one that `--set` has set and set again."""
    for place in sorted(places, key=len, reverse=True):
        text = re.sub(rf"(?<![\w./~-]){re.escape(place)}(?![\w-]|[./][\w.])", places[place], text)
    name, equals, value = text.partition("=")
    return f"{name}={os.path.basename(value.rstrip('/'))}" if equals and "\n" not in text and leads_out(value) else text
