"""`merge plan --check`: whether a recipe would still do what a lock says was done. Cheap: of the Hub it is known from
commits, of files on this disk from digests that were formed before, as long as size and times are what they were."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.coded import coded_files
from mergekit_lite.checkpoint.hub import is_hub_id, look
from mergekit_lite.checkpoint.inside import read_bytes
from mergekit_lite.checkpoint.meta import Checkpoint, ShardFile
from mergekit_lite.errors import InputError, Mark, Problem
from mergekit_lite.plan.lock import NAME, is_sealed, made_with
from mergekit_lite.plan.lowrank import needs_ranks
from mergekit_lite.plan.model import Plan
from mergekit_lite.plan.words import few
from mergekit_lite.recipe.model import Model, Recipe
from mergekit_lite.recipe.read import parse, read_file
from mergekit_lite.recipe.source import MAX_BYTES
from mergekit_lite.recipe.write import native
from mergekit_lite.run.digest import file_digests
from mergekit_lite.run.remembered import Remembered

_OWN = ("mergekit_lite", "torch", "safetensors", "python")
_SHOWN = 120  # characters of a value
_HOW = "`--check` takes the folder of a finished run, or its recipe.lock.yaml"


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is not as the lock says. `what` is `lock`, `recipe`, `seed`, `revision`, `input`, `method` or
    `output`, `place` where in it; `locked` and `now` are None where there is no such thing."""

    what: str
    place: str
    locked: str | None
    now: str | None

    def as_json(self) -> dict[str, str | None]:
        return {"what": self.what, "place": self.place, "locked": self.locked, "now": self.now}


def read_lock(text: str) -> tuple[Path, Recipe, list[Change]]:
    """The file, the recipe in it with its `lock`, and whether it is as the run wrote it. `text` names the file or the
    folder of an output. Raises InputError where there is no lock of a finished run."""
    path = Path(os.path.expanduser(text))
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"there is no lock at `{path}`", hint=_HOW)
    sealed = is_sealed(read_bytes(path, MAX_BYTES))
    recipe, problems = parse(read_file(str(path)), str(path))
    if recipe is None or problems:
        raise InputError([replace(p, message=f"`{path}` is no lock: {p.message}") for p in problems])
    if not (recipe.lock or {}).get("outputs"):
        raise InputError(f"`{path}` is a recipe, and does not say what a run wrote", hint=_HOW)
    if sealed is False:
        return path, recipe, [Change("lock", path.name, "its last line, a digest of all others", "another digest")]
    return path, recipe, []


def text_changes(recipe: Recipe, locked: Recipe, moved: bool) -> Iterator[Change]:
    """What the recipe says and the lock's does not, save the commits. `moved`: the output is meant to lie elsewhere."""
    before, now = _plain(locked, moved), _plain(recipe, moved)
    for place, old, new in _differing(before, now, ()):
        yield Change("seed" if place == "seed" else "recipe", place, _shown(old), _shown(new))


def _plain(recipe: Recipe, moved: bool) -> dict[str, Any]:
    """The recipe as data with all its defaults that matter, without what a lock leaves out."""
    saves = tuple(replace(save, push=None, to=None if moved else save.to) for save in recipe.saves)
    bare = {n: replace(m, revision=None, adapter_revision=None) for n, m in recipe.models.items()}
    models = {name: {"path": m.location, "adapter": m.adapter} for name, m in bare.items()}
    return {"seed": 0, "compute": "float32", **native(replace(recipe, models=bare, saves=saves)), "models": models}


def _differing(before: Any, now: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    """The innermost places at which two values differ; None stands for nothing."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from _differing(before.get(key), now.get(key), (*path, str(key)))
        if _is_ordered(path) and before.keys() == now.keys() and list(before) != list(now):
            yield ".".join(path), list(before), list(now)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from _differing(*pair, (*path, str(number)))
    elif before != now or type(before) is not type(now):  # 1 and 1.0 are other text, which the shards' headers hold
        yield ".".join(path), before, now


def _is_ordered(path: tuple[str, ...]) -> bool:
    """Whether the order of a mapping means something: that of a step's inputs does, and that of globs in a setting."""
    match path:
        case ("steps", _, "of"):
            return True
        case ("steps", _, "with", _, *_) | ("steps", _, "of", _, _, *_):
            return True
    return False


def _shown(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def as_locked(recipe: Recipe, locked: Recipe) -> Recipe:
    """The recipe with the commits of the lock for its branches and tags, where the same models are meant: what can be
    compared when the Hub is not asked."""

    def pin(name: str, model: Model) -> Model:
        then = locked.models.get(name)
        if then is None or (then.location, then.adapter) != (model.location, model.adapter):
            return model
        one = model.revision if _is_commit(model.revision) else then.revision
        other = model.adapter_revision if _is_commit(model.adapter_revision) else then.adapter_revision
        return replace(model, revision=one, adapter_revision=other)

    return replace(recipe, models={name: pin(name, model) for name, model in recipe.models.items()})


def at_commits(recipe: Recipe, names: Iterable[str]) -> Recipe:
    """The recipe with the commits that the Hub says its models of these names are at. Raises InputError with all that
    cannot be found or asked; unlike a plan, this does not do with what the cache has."""
    problems: list[Problem] = []

    def commit(place: str | None, revision: str | None, mark: Mark) -> str | None:
        if place is None or not is_hub_id(place) or os.path.exists(place) or _is_commit(revision):
            return revision
        try:
            return look(place, revision).commit
        except InputError as error:
            problems.extend(replace(problem, mark=mark) for problem in error.problems)
            return None

    found = {
        name: replace(
            m := recipe.models[name],
            revision=commit(m.location, m.revision, m.mark),
            adapter_revision=commit(m.adapter, m.adapter_revision, m.mark),
        )
        for name in names
    }
    if problems:
        raise InputError(problems)
    return replace(recipe, models={**recipe.models, **found})


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def revision_changes(recipe: Recipe, locked: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Iterator[Change]:
    """Which models of the Hub are at another commit than the lock's. `place` is the model's name, its id and what the
    recipe asks for."""
    for name, checkpoint in checkpoints.items():
        then, model = locked.models.get(name), recipe.models[name]
        if then is None or (then.location, then.adapter) != (model.location, model.adapter):
            continue  # the recipe says so
        commit = checkpoint.adapter.revision if checkpoint.adapter else None
        for place, asked, was, found in (
            (model.location, model.revision, then.revision, checkpoint.revision),
            (model.adapter, model.adapter_revision, then.adapter_revision, commit),
        ):
            if was != found:
                yield Change("revision", f"{name}: {place}@{asked or 'main'}", was, found)


def input_changes(
    locked: Recipe, checkpoints: Mapping[str, Checkpoint], threads: int, moved: frozenset[str]
) -> Iterator[Change]:
    """Files of inputs with another size or content than the lock says. Those of the models `moved`, whose commit has
    changed, are not looked at; what else a commit names is what it was. Raises InputError where one cannot be read."""
    doubtful: list[tuple[str, Mapping[str, Any], ShardFile]] = []
    for name, files in ((locked.lock or {}).get("inputs") or {}).items():
        if name not in checkpoints or name in moved:
            continue
        checkpoint = checkpoints[name]
        now = {Path(shard.path).name: shard for shard in checkpoint.shards}
        for file in files:
            shard = now.pop(file["file"], None)
            if shard is None:
                yield Change("input", f"{name}: {file['file']}", f"{file.get('bytes')} bytes", None)
            elif file.get("bytes") not in (None, shard.nbytes):
                yield Change("input", f"{name}: {file['file']}", f"{file['bytes']} bytes", f"{shard.nbytes} bytes")
            elif not _by_commit(checkpoint, shard):
                doubtful.append((name, file, shard))
        for left, shard in now.items():
            yield Change("input", f"{name}: {left}", None, f"{shard.nbytes} bytes")
    remembered = Remembered(shard.path for _, _, shard in doubtful)
    unread = [Path(s.path) for _, _, s in doubtful if s.path not in remembered.known]
    digests = {**remembered.known, **(file_digests(unread, threads) if unread else {})}
    remembered.keep(digests)
    for name, file, shard in doubtful:
        found = digests[shard.path]
        if "blake3" in file and file["blake3"] != found:
            yield Change("input", f"{name}: {file['file']}", f"blake3 {file['blake3']}", f"blake3 {found}")


def _by_commit(checkpoint: Checkpoint, shard: ShardFile) -> bool:
    """Whether a file is of a commit on the Hub, which says what is in it."""
    adapter = checkpoint.adapter
    of_adapter = adapter is not None and shard in adapter.files
    return (adapter.revision if adapter is not None and of_adapter else checkpoint.revision) is not None


def output_changes(plan: Plan, locked: Recipe, sizes: bool) -> Iterator[Change]:
    """Output shards of other names and, with `sizes`, of other sizes: where the recipe has changed they have, since it
    stands in their headers. The factors of an adapter with `energy` have no size before the run."""
    for save, output, then in zip(plan.recipe.saves, plan.outputs, (locked.lock or {})["outputs"], strict=False):
        if needs_ranks(save):
            continue
        before = {shard["file"]: shard.get("bytes") for shard in then["shards"]}
        now: dict[str, int | None] = {shard.file: shard.nbytes for shard in output.shards[: output.kept]}
        if output.compress is not None:  # of a size that the run finds
            now |= dict.fromkeys(coded_files(output.store))
        for file in dict.fromkeys([*before, *now]):
            was, will = before.get(file), now.get(file)
            both = sizes and was is not None and will is not None
            if (file in before) != (file in now) or (both and was != will):
                old, new = (None if n is None else f"{n} bytes" for n in (was, will))
                yield Change("output", f"{output.to}: {file}", old, new)


def version_changes(recipe: Recipe, locked: Recipe) -> tuple[list[Change], list[str]]:
    """Packages of methods in other versions, and notes on what may round differently without being another merge."""
    then, now = (locked.lock or {}).get("made_with") or {}, made_with(recipe)
    changes = [
        Change("method", name, None if name not in then else str(then[name]), version)
        for name, version in now.items()
        if name not in _OWN and then.get(name) != version
    ]
    other = [f"{name} {then[name]}, here {now[name]}" for name in _OWN if then.get(name, now[name]) != now[name]]
    notes = [f"the lock was made with {few(other)}: the last bits may differ"] if other else []
    return changes, notes


def plan_change(plan: Plan, locked: Recipe) -> Iterator[Change]:
    """Where recipe, inputs and outputs are the same: whether the same arithmetic is. The ranks of adapters with
    `energy` are part of a plan, and known after a run only."""
    then = (locked.lock or {}).get("plan")
    if isinstance(then, str) and then != plan.digest and not any(map(needs_ranks, plan.recipe.saves)):
        yield Change("method", "how this version computes the tensors", f"plan {then}", f"plan {plan.digest}")
