"""Checkpoints that are laid out otherwise than transformers does it: pipelines of diffusers with a folder for each
component, sentence-transformers with one for each module behind the first, timm, single files. No torch.

What a stranger's model_index.json or modules.json names is taken for names of folders only: no class that it names is
imported, and code that lies beside the weights is neither run nor copied.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite import redact
from mergekit_lite.checkpoint.extras import is_copied
from mergekit_lite.checkpoint.inside import inside, read_list, read_object
from mergekit_lite.checkpoint.listing import Listing, choose, choose_part
from mergekit_lite.checkpoint.meta import Form, Part
from mergekit_lite.errors import InputError, Problem

PIPELINE = "model_index.json"
MODULES = "modules.json"
ROUTER = "router_config.json"
_MAX_BYTES = 2**20
_MOST = 100  # components of a pipeline
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_CLASS = re.compile(r"[A-Za-z_]\w{0,99}(\.[A-Za-z_]\w{0,99}){0,19}", re.ASCII)
_ROOT_FILES = ("config_sentence_transformers.json", "sentence_*_config.json")
# Of the tensors' names in the files that the first programs for latent diffusion wrote.
_LATENT = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
# What a file's header says of the very file, not of the kind of model.
_OWN = ("modelspec.hash_sha256", "modelspec.date", "modelspec.thumbnail")

Files = Callable[[str], Sequence[str] | None]  # the names in a folder of the checkpoint, None where there is no folder


@dataclass(frozen=True, slots=True)
class Chosen:
    """The weight files of every part of a checkpoint, relative to the part's folder, and what form it has."""

    parts: tuple[tuple[Part, Listing], ...]
    form: Form | None = None
    notes: tuple[Problem, ...] = ()

    @property
    def files(self) -> list[str]:
        """All weight files, relative to the checkpoint's folder."""
        return [f"{part.folder}/{file}".lstrip("/") for part, listing in self.parts for file in listing.files]

    @property
    def pickled(self) -> bool:
        return any(listing.pickled for _, listing in self.parts)


def plain(listing: Listing) -> Chosen:
    """A checkpoint of transformers."""
    return Chosen(((Part("", ""), listing),))


def choose_all(folder: Path, files: Files, location: str, pickled: bool) -> Chosen:
    """What makes up the checkpoint in `folder`, in which `files` lists what there is. Raises InputError."""
    names = files("") or ()
    if PIPELINE in names:
        return _pipeline(folder, files, location, pickled)
    if MODULES in names:
        return _modules(folder, files, location, pickled)
    config = read_object(inside(folder, "config.json"), 16 * _MAX_BYTES) if "config.json" in names else {}
    if isinstance(config.get("_class_name"), str) and "_diffusers_version" in config:
        found = choose_part(folder, names, location, pickled)
        if found is not None:
            part = Part("", "", found[0], kind=config["_class_name"])
            return Chosen(((part, found[1]),), Form("diffusers", (part,)))
    listing = choose(folder, names, location, pickled)
    if isinstance(config.get("architecture"), str) and isinstance(config.get("pretrained_cfg"), Mapping):
        part = Part("", "", whole=True, kind=config["architecture"])
        return Chosen(((part, listing),), Form("timm", (part,)))
    return plain(listing)


def single_file(file: str, config: Mapping[str, Any], names: Iterable[str], metadata: Mapping[str, str]) -> Form | None:
    """The form of the only weight file of a checkpoint, by the names of its tensors and its header's metadata: a file
    that no configuration goes with is a whole checkpoint by itself, and stays one file of its name."""
    stem = file.removesuffix(".safetensors")
    spec = any(key.startswith("modelspec.") for key in metadata)
    if not file.endswith(".safetensors") or (config and not spec and not any(n.startswith(_LATENT) for n in names)):
        return None
    if stem == "model" and not spec:
        return None
    kept = {k: v for k, v in metadata.items() if k.startswith("modelspec.") and k not in _OWN}
    return Form("file", (Part("", "", stem, whole=True),), (), redact.cleaned(kept)[0])


def folders_named(folder: Path, names: Iterable[str], location: str) -> list[str]:
    """The folders that the model_index.json or modules.json in `folder` names; none where neither is among `names`.
    Raises InputError."""
    if PIPELINE in names:
        return [name for name, _ in _components(folder, location)]
    if MODULES in names:
        return [path for path, _ in _entries(folder, location) if path]
    return []


def _components(folder: Path, location: str) -> list[tuple[str, str]]:
    """The components of a pipeline that are there, each with its class."""
    shown = os.path.join(location, PIPELINE)
    found = []
    for key, value in read_object(inside(folder, PIPELINE), _MAX_BYTES, unique=True).items():
        # Other entries are settings of the pipeline, lists of numbers among them; `_class_name` of a pipeline with code
        # of its own is a list too.
        if key.startswith("_") or not isinstance(value, list) or len(value) != 2:
            continue
        if not all(word is None or isinstance(word, str) for word in value) or value[1] is None:
            continue
        _check(_NAME, key, "component", shown)
        for word in filter(None, value):
            _check(_CLASS, word, "class", shown)
        found.append((key, value[1]))
    if len(found) > _MOST:
        raise InputError(f"`{shown}` names {len(found)} components", hint=f"no pipeline has more than {_MOST}")
    return found


def _check(pattern: re.Pattern[str], word: str, what: str, shown: str) -> None:
    if not pattern.fullmatch(word):
        hint = "a name there is a folder beside it or a class; do not use a checkpoint that tries otherwise"
        raise InputError(f"`{shown}` names a {what} `{word[:200]}`, which cannot be one", hint=hint)


def _pipeline(folder: Path, files: Files, location: str, pickled: bool) -> Chosen:
    parts: list[tuple[Part, Listing]] = []
    beside = [PIPELINE]
    components = _components(folder, location)
    lacking = [name for name, _ in components if not files(name)]
    if lacking:
        few = ", ".join(f"`{name}`" for name in lacking[:5])
        hint = "download the missing folders; a component that is left out on purpose is `[null, null]` there"
        raise InputError(f"`{location}` lacks folders that its {PIPELINE} names: {few}", hint=hint)
    for name, kind in components:
        names = files(name) or ()
        found = choose_part(inside(folder, name), names, os.path.join(location, name), pickled)
        if found is not None:
            part = Part(name, f"{name}.", found[0], kind=kind, config=_config(folder, name, names))
            parts.append((part, found[1]))
        elif {"_class_name", "architectures"} & _config(folder, name, names).keys():
            hint = "download the missing file again"
            raise InputError(
                f"`{os.path.join(location, name)}` has the configuration of a model, and no weights", hint=hint
            )
        beside += [f"{name}/{n}" for n in names if is_copied(n) or (n == "config.json" and found is None)]
    if not parts:
        raise InputError(f"`{location}` holds no weights in the folders of its components", hint="download it again")
    return _chosen("diffusers", parts, beside, _code(files, ["", *(name for name, _ in components)], location))


def _entries(folder: Path, location: str) -> list[tuple[str, str]]:
    """The modules of a sentence-transformers model: folder (empty for the model's own) and class."""
    shown = os.path.join(location, MODULES)
    found: list[tuple[str, str]] = []
    for entry in read_list(inside(folder, MODULES), _MAX_BYTES):
        path, kind = (entry.get(key) for key in ("path", "type")) if isinstance(entry, dict) else (None, None)
        if not isinstance(path, str) or not isinstance(kind, str):
            hint = "download it again; each module has a `path` and a `type`"
            raise InputError(f"`{shown}` has an entry that is no module", hint=hint)
        _check(_CLASS, kind, "class", shown)
        found += _routed(folder, path.rstrip("/"), kind, shown)
    if len(found) > _MOST or len({path for path, _ in found}) < len(found):
        raise InputError(f"`{shown}` names a folder twice, or too many", hint="download it again")
    return found


def _routed(folder: Path, path: str, kind: str, shown: str) -> Iterator[tuple[str, str]]:
    """A module, and those that it chooses among."""
    if path:
        _check(_NAME, path, "folder", shown)
    yield path, kind
    home = inside(folder, path) if path else folder
    if kind.endswith(".Router") and (home / ROUTER).exists():
        types = read_object(inside(home, ROUTER), _MAX_BYTES, unique=True).get("types")
        for name, inner in types.items() if isinstance(types, dict) else ():
            _check(_NAME, name, "folder", os.path.join(shown, ROUTER))
            _check(_CLASS, str(inner), "class", os.path.join(shown, ROUTER))
            yield f"{path}/{name}".lstrip("/"), str(inner)


def _modules(folder: Path, files: Files, location: str, pickled: bool) -> Chosen:
    parts: list[tuple[Part, Listing]] = []
    entries = _entries(folder, location)
    # Modules without files, such as a normalisation, may have no folder.
    beside = [name for name in files("") or () if name == MODULES or is_copied(name, _ROOT_FILES)]
    for path, kind in entries:
        names = files(path) or ()
        word = kind.rpartition(".")[2]
        home = inside(folder, path) if path else folder
        found = choose_part(home, names, os.path.join(location, path), pickled)
        body = word.endswith("Transformer")
        if found is not None:
            config = _config(folder, path, names) if body and path else {}
            prefix = f"{path.replace('/', '.')}." if path else ""
            parts.append((Part(path, prefix, found[0], not body, word, config), found[1]))
        elif body or word == "Dense":
            hint = "download the missing file again"
            raise InputError(f"`{os.path.join(location, path)}` is a `{word}`, and holds no weights", hint=hint)
        if path:
            beside += [
                f"{path}/{name}"
                for name in names
                if is_copied(name, ("*_config.json",)) or (name == "config.json" and not (body and found))
            ]
    if not parts:
        raise InputError(f"`{location}` holds no weights in the folders of its modules", hint="download it again")
    strange = [kind for _, kind in entries if not kind.startswith("sentence_transformers.")]
    return _chosen("sentence-transformers", parts, beside, _code(files, ["", *dict(entries)], location, strange))


def _chosen(
    kind: str, parts: Sequence[tuple[Part, Listing]], beside: Iterable[str], notes: Iterable[Problem]
) -> Chosen:
    form = Form(kind, tuple(part for part, _ in parts), tuple(dict.fromkeys(beside)))
    return Chosen(tuple(parts), form, tuple(notes))


def _config(folder: Path, name: str, names: Sequence[str]) -> Mapping[str, Any]:
    return read_object(inside(folder, f"{name}/config.json"), 16 * _MAX_BYTES) if "config.json" in names else {}


def _code(files: Files, folders: Iterable[str], location: str, classes: Sequence[str] = ()) -> Iterator[Problem]:
    """What to tell of code that lies in these folders, or of classes that no library brings."""
    found = [f"{home}/{name}".lstrip("/") for home in folders for name in files(home) or () if name.endswith(".py")]
    if found or classes:
        few = ", ".join(f"`{name[:200]}`" for name in (*found, *classes)[:5])
        hint = "the output may load only with the code of its parent: read it before you use it"
        yield Problem(f"code of `{location}` is neither run nor copied: {few}", None, hint)
