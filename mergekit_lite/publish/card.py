"""The model card of an output, README.md: metadata for the Hub, the recipe, the steps as a drawing, the parents.

The text depends on the output, its lock and the parents' own cards alone. Its last line is a comment with the digest of
all lines before it. A card that still has that digest is ours and may be written anew; any other is the user's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from blake3 import blake3

from mergekit_lite.checkpoint.header import read_header
from mergekit_lite.checkpoint.inside import inside, read_object
from mergekit_lite.checkpoint.masks import is_of_masks
from mergekit_lite.checkpoint.meta import DTYPE_NAMES, TensorMeta
from mergekit_lite.errors import printable
from mergekit_lite.plan.explain import flowchart
from mergekit_lite.plan.lock import NAME as LOCK
from mergekit_lite.plan.model import StepView
from mergekit_lite.plan.words import count, size
from mergekit_lite.publish import licence
from mergekit_lite.publish.markdown import fenced, plain, table
from mergekit_lite.publish.parents import Ask, Lineage, Parent, lineage, texts
from mergekit_lite.recipe.model import AsMasks, Recipe
from mergekit_lite.recipe.write import dump, native
from mergekit_lite.redact import redact
from mergekit_lite.run.finish import CARD

__all__ = ["CARD", "is_ours", "render"]

_SEAL = re.compile(rb"<!-- written by mergekit_lite, blake3: ([0-9a-f]{64}) -->\n?")
_LANGUAGE = r"[A-Za-z]{2,12}(?:-[A-Za-z0-9]{1,8}){0,3}"
_TASK = r"[a-z0-9][a-z0-9-]{0,60}"
_CONFIG = 16 * 2**20  # bytes
_HUB = "https://huggingface.co"


def render(folder: Path, recipe: Recipe, number: int, *, ask: Ask | None = None, repo: str | None = None) -> str:
    """The card of the output in `folder`, which is number `number` of those that the lock `recipe` tells of.

    `ask` gives the metadata of the cards of parents on the Hub; without it their licences are said to be looked up when
    the card is pushed. `repo` is where it is pushed to; without it nothing in the card tells where the output lies.
    Raises InputError where a shard's header or config.json cannot be read.
    """
    lock = recipe.lock or {}
    said = lock["outputs"][number]
    line = lineage(recipe, recipe.saves[number], ask)
    title = line.title if repo is None else repo.partition("/")[2]
    files = [str(file["file"]) for file in said["shards"]]
    store = recipe.saves[number].masks
    if store is not None:  # bits are no parameters
        files = [file for file in files if not is_of_masks(file)]
    tensors = [meta for file in files for meta in read_header(inside(folder, file), file).tensors]
    nbytes = sum(int(file.get("bytes") or 0) for file in said["shards"])
    outcome = licence.combine({plain(p.shown): licence.read(p.card or {}) for p in line.parents})
    methods = list(dict.fromkeys(step.use for step in line.steps))
    body = [
        f"# {plain(title)}",
        _about(line, methods),
        "## Recipe",
        fenced("yaml", redact(_recipe(recipe, number, line))),
        fenced("mermaid", _drawing(line, "output" if repo is None else title, nbytes)),
        "## Parents",
        table(["parent", "version", "licence"], [_row(parent, ask is not None) for parent in line.parents]),
        "## Licence",
        "\n".join(f"- {words}" for words in _words(outcome, line.parents, ask is not None)),
        "## Figures",
        table(["what", ""], [*_figures(tensors, nbytes, len(said["shards"])), *_masks(store, said["shards"])]),
        "## How to make it again",
        *_again(recipe, line, repo),
    ]
    text = _metadata(folder, line, methods, outcome) + "\n\n".join(body) + "\n\n"
    return sealed(text)


def sealed(text: str) -> str:
    """The text of a card with its last line."""
    return f"{text}<!-- written by mergekit_lite, blake3: {blake3(text.encode()).hexdigest()} -->\n"


def is_ours(card: bytes) -> bool:
    """Whether a card has exactly a text that `render` has made: the user has changed nothing in it."""
    start = card.rfind(b"\n", 0, len(card.rstrip(b"\n"))) + 1
    seal = _SEAL.fullmatch(card, start)
    return seal is not None and seal[1].decode() == blake3(card[:start]).hexdigest()


def _metadata(folder: Path, line: Lineage, methods: Sequence[str], outcome: licence.Outcome) -> str:
    """The block of YAML at the top. All in it that a stranger has written has been held against a pattern."""
    cards = [parent.card for parent in line.parents]
    data: dict[str, Any] = {}
    languages = sorted(set(texts(cards, "language", _LANGUAGE)))
    if languages:
        data["language"] = languages
    found = outcome.licence
    if found is not None:
        data["license"] = found.id
        data |= {"license_name": found.name} if found.name else {}
        data |= {"license_link": found.link} if found.link else {}
    library = _library(folder)
    if library is not None:
        data["library_name"] = library
    tasks = set(texts(cards, "pipeline_tag", _TASK))
    if len(tasks) == 1:
        data["pipeline_tag"] = tasks.pop()
    data["tags"] = ["merge", "mergekit_lite", *(name for name in methods if name not in ("merge", "mergekit_lite"))]
    hub = list(dict.fromkeys(parent.shown for parent in line.parents if parent.hub))
    if hub:
        data["base_model"] = hub
        data["base_model_relation"] = "merge"
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n\n"


def _library(folder: Path) -> str | None:
    """The library that loads the output, by the name that the Hub has for it."""
    for file, library in (("model_index.json", "diffusers"), ("modules.json", "sentence-transformers")):
        if (folder / file).exists():
            return library
    if not (folder / "config.json").exists():
        return None
    config = read_object(inside(folder, "config.json"), _CONFIG)
    keys = (("model_type", "transformers"), ("_class_name", "diffusers"), ("architecture", "timm"))
    return next((library for key, library in keys if isinstance(config.get(key), str)), None)


def _about(line: Lineage, methods: Sequence[str]) -> str:
    by = ", ".join(f"`{name}`" for name in methods)
    made = f"A merge of {count(len(line.parents), 'model')}{f' by {by}' if by else ''}, made with `mergekit_lite`."
    return f"{made} The recipe, the versions of the parents and the digest of every file are in [{LOCK}]({LOCK})."


def _recipe(recipe: Recipe, number: int, line: Lineage) -> str:
    """What leads to the output as a recipe, without places on the author's machine."""
    save = replace(recipe.saves[number], to=None, push=None)
    steps = {step.name: step for step in line.steps}
    data = native(replace(recipe, models={}, steps=steps, saves=(save,)))
    models: dict[str, Any] = {}
    for model in line.models:
        place: Any = _place(line, model.location, model.revision)
        if model.adapter is not None:
            place = {"path": place, "adapter": _place(line, model.adapter, model.adapter_revision)}
        models[_shown(model.name, line)] = place
    head = {key: data[key] for key in data if key not in ("steps", "save")}
    rest = {key: _without_places(data[key], line) for key in ("steps", "save") if key in data}
    return dump({**head, **({"models": models} if models else {}), **rest})


def _place(line: Lineage, location: str, revision: str | None) -> str:
    shown = line.shown[location]
    return shown if revision is None else f"{shown}@{revision}"


def _shown(name: str, line: Lineage) -> str:
    """The name of a model: where it is a location in place, without the path."""
    if "/" not in name or any(model.name == name and model.revision is not None for model in line.models):
        return name
    return line.shown.get(name) or name.rstrip("/").rpartition("/")[2]


def _without_places(value: Any, line: Lineage, key: bool = False) -> Any:
    """Data of a recipe with names of models and of files as the card shows them."""
    if isinstance(value, Mapping):
        return {_without_places(k, line, True): _without_places(v, line) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(item, line) for item in value]
    if isinstance(value, str) and (value in line.shown or (not key and "/" in value)):
        return _shown(value, line)
    return value


def _drawing(line: Lineage, title: str, nbytes: int) -> str:
    """The steps as a flowchart, as `merge plan --dag mermaid` draws them."""
    models = []
    for model in line.models:
        shown = _shown(model.name, line)
        where = " + ".join(line.shown[place] for place in (model.location, model.adapter) if place is not None)
        models.append((model.name, _plain(shown), "" if shown == where else _plain(where)))
    views = []
    for step in line.steps:
        inputs = tuple(item.ref.name for item in step.of)
        extra = tuple(ref.name for ref in (step.base, step.rest, step.below, step.above) if ref)
        base = step.base.name if step.base else None
        views.append(StepView(step.name, step.use, inputs, base, "", 0, {}, (*inputs, *extra)))
    return flowchart(models, views, [(line.step, _plain(title), size(nbytes))])


def _plain(text: str) -> str:
    return printable(redact(text))


def _row(parent: Parent, asked: bool) -> list[str]:
    found = licence.read(parent.card or {})
    told = plain(str(found)) if found else "not known" if asked or not parent.hub else "not asked yet"
    if parent.hub:
        link = f"[{plain(parent.shown)}]({_HUB}/{parent.shown})"
        return [link, f"commit `{parent.commit}`", told]
    if len(parent.digests) == 1:
        version = f"BLAKE3 `{next(iter(parent.digests.values()))}`"
    else:
        version = f"{count(len(parent.digests), 'file')}, digests in {LOCK}" if parent.digests else f"see {LOCK}"
    return [plain(parent.shown), version, told]


def _words(outcome: licence.Outcome, parents: Sequence[Parent], asked: bool) -> list[str]:
    words = list(outcome.words)
    if not asked and any(parent.hub for parent in parents):
        words.append("What the Hub says of its models is looked up when this card is pushed.")
    return [*words, "These are the words of the parents' cards, not legal advice."]


def _figures(tensors: Sequence[TensorMeta], nbytes: int, shards: int) -> list[list[str]]:
    dtypes: dict[str, int] = {}
    for meta in tensors:
        dtypes[meta.dtype] = dtypes.get(meta.dtype, 0) + meta.numel
    total = sum(dtypes.values())
    shares = [
        f"{DTYPE_NAMES.get(dtype, dtype)}{f' ({number:,})' if len(dtypes) > 1 else ''}"
        for dtype, number in sorted(dtypes.items(), key=lambda pair: (-pair[1], pair[0]))
    ]
    return [
        ["parameters", f"{total:,}"],
        ["tensors", f"{len(tensors):,}"],
        ["dtype", ", ".join(shares)],
        ["size", f"{size(nbytes)} in {count(shards, 'file')}"],
    ]


def _masks(store: AsMasks | None, shards: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What the masks of a mask store take."""
    if store is None:
        return []
    nbytes = sum(int(file.get("bytes") or 0) for file in shards if is_of_masks(str(file["file"])))
    how = "" if store.compress is None else f" coded with {store.compress}"
    return [["masks", plain(f"{size(nbytes)}{how} for {', '.join(store.tasks)}")]]


def _again(recipe: Recipe, line: Lineage, repo: str | None) -> list[str]:
    outs = ["--out merged"] if len(recipe.saves) == 1 else [
        f"--set save.{number}.to=merged-{number}" for number in range(len(recipe.saves))
    ]  # fmt: skip
    fetch = [f"hf download {repo} {LOCK} --local-dir ."] if repo else []
    made = (recipe.lock or {}).get("made_with")
    versions = ", ".join(f"{plain(str(k))} {plain(str(v))}" for k, v in made.items()) if isinstance(made, dict) else ""
    parts = [
        fenced("sh", "\n".join([*fetch, f"merge run {LOCK} {' '.join(outs)}"])),
        "The command refuses parents that have changed, and leaves with 1 where the bytes differ from these."
        + (f" They were made with {versions}." if versions else ""),
    ]
    local = [model.name for model in line.models if model.revision is None and "/" not in model.name]
    if any(not parent.hub for parent in line.parents):
        example = f", or are named by `--set models.{local[0]}=FOLDER`" if local else ""
        parts.append(f"Parents that are not on the Hub must lie where the lock names them{example}.")
    return parts
