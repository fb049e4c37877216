"""The parents of an output, as its lock names them, and what their own cards say, without a path of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mergekit_lite.checkpoint.hub import is_hub_id
from mergekit_lite.checkpoint.inside import inside, read_bytes
from mergekit_lite.checkpoint.masks import split_task
from mergekit_lite.errors import InputError, printable
from mergekit_lite.plan.words import few
from mergekit_lite.recipe.links import final_step, mentions, references
from mergekit_lite.recipe.model import Model, Recipe, Save, Step
from mergekit_lite.redact import cleaned, redact
from mergekit_lite.run.finish import CARD

Card = Mapping[str, Any]
Ask = Callable[[str, str | None], Card | None]  # a Hub id and a commit -> the metadata of its card
_MOST = 2**20  # bytes of a card
_MOST_FRONT = 2**15  # characters of its metadata; more of it, or brackets in brackets, takes a parser long
_FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Parent:
    """A model, or an adapter, that a merge was made of. `shown` is its Hub id, or the name of its folder alone;
    `commit` is None for one that is not on the Hub. `digests` are the BLAKE3 digests of its files, by name; `card` is
    the metadata of its card, None where it has none or was not asked."""

    name: str
    shown: str
    hub: bool
    commit: str | None
    digests: Mapping[str, str]
    card: Card | None


@dataclass(frozen=True, slots=True)
class Lineage:
    """What leads to one output: models and steps in the order of the recipe, parents, which are fewer where models
    share one, and the text that stands for each location, which for a local one is its folder's name."""

    step: str
    models: tuple[Model, ...]
    steps: tuple[Step, ...]
    parents: tuple[Parent, ...]
    shown: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """`Merge of org/a, b by ties`: the heading of a card, and a commit's message where none is given."""
        methods = list(dict.fromkeys(step.use for step in self.steps))
        by = f" by {few(methods)}" if methods else ""
        return printable(redact(f"Merge of {few(parent.shown for parent in self.parents)}{by}".replace("`", "")))


def lineage(recipe: Recipe, save: Save, ask: Ask | None) -> Lineage:
    """What leads to `save` of the recipe in a lock. `ask` asks the Hub for the card of a parent there; without it those
    parents have none."""
    last = save.step.name if save.step is not None else final_step(recipe)
    names = _leading(recipe, [last, *(ref.name for ref in save.beside)])
    steps = tuple(step for name, step in recipe.steps.items() if name in names)
    models = tuple(model for name, model in recipe.models.items() if name in names)
    shown: dict[str, str] = {}
    taken = {*recipe.models, *recipe.steps}
    parents: dict[tuple[str, str | None], Parent] = {}
    digests = (recipe.lock or {}).get("inputs") or {}
    for model in models:
        places = [(model.location, model.revision)]
        if model.adapter is not None:
            places.append((model.adapter, model.adapter_revision))
        for location, commit in places:
            if (location, commit) in parents:
                continue
            hub = commit is not None and is_hub_id(split_task(location)[0])
            shown[location] = location if hub else _folder_name(location, model.name, {*taken, *shown.values()})
            listed = digests.get(model.name) or [] if model.adapter is None else []
            place = split_task(location)[0]
            card = _local(place) if not hub else ask(place, commit) if ask is not None else None
            files = {str(file["file"]): _digest(file) for file in listed}
            card = None if card is None else cleaned(card)[0]
            parents[location, commit] = Parent(model.name, shown[location], hub, commit, files, card)
    return Lineage(last, models, steps, tuple(parents.values()), shown)


def _digest(file: Mapping[str, Any]) -> str:
    """The digest of an input in a lock: BLAKE3, or what the Hub said of a file that was read by ranges."""
    kind = next((kind for kind in ("blake3", "sha256", "git") if kind in file), None)
    return "" if kind is None else str(file[kind]) if kind == "blake3" else f"{kind}:{file[kind]}"


def _leading(recipe: Recipe, ends: Sequence[str]) -> set[str]:
    """The steps and models that lead to `ends`, these included."""
    found: set[str] = set()
    left = [*ends]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        step = recipe.steps.get(name)
        if step is not None:
            settings = [step.params, *(item.params for item in step.of)]
            named = {text for params in settings for text in mentions(params)}
            left += [ref.name for ref in references(step)]
            left += [text for text in named if text in recipe.steps or text in recipe.models]
    return found


def _folder_name(location: str, name: str, taken: set[str]) -> str:
    """The last part of a path, which for a model named in place must differ from other names."""
    last = os.path.basename(os.path.abspath(os.path.expanduser(location))) or "model"
    number, made = 1, last
    while made in taken - {name}:
        number += 1
        made = f"{last}-{number}"
    return made


def _local(location: str) -> Card | None:
    """The metadata of the card beside a model on this disk; None where there is none that can be read."""
    path = Path(os.path.abspath(os.path.expanduser(location)))
    folder = path if path.is_dir() else path.parent
    try:
        return front_matter(read_bytes(inside(folder, CARD), _MOST))
    except (InputError, OSError):
        return None


def front_matter(text: bytes) -> Card | None:
    """The metadata at the top of a card, with every scalar as text; None where it has none that can be read."""
    found = _FRONT.match(text.decode("utf-8", "replace").removeprefix("\ufeff"))
    if found is None or len(found[1]) > _MOST_FRONT:
        return None
    try:
        # Makes nothing but text, lists and mappings; `no` is a language here.
        data = yaml.load(found[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def texts(cards: Sequence[Card | None], key: str, pattern: str) -> Iterator[str]:
    """What the cards have at `key`, one text or a list of them, as far as it has the form `pattern`."""
    for card in cards:
        given = (card or {}).get(key)
        for text in given if isinstance(given, list) else [given]:
            if isinstance(text, str) and re.fullmatch(pattern, text):
                yield text
