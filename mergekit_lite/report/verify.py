"""Whether an output of ours is, to the byte, what its lock says, and whether the lock is what the run wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_lite.checkpoint.extras import is_read_with_a_model
from mergekit_lite.checkpoint.header import Header
from mergekit_lite.checkpoint.inside import inside, read_object
from mergekit_lite.errors import InputError, MergeError
from mergekit_lite.plan.layout import IN_HEADER
from mergekit_lite.plan.lock import NAME, is_sealed
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.read import parse, read_file
from mergekit_lite.recipe.write import to_yaml
from mergekit_lite.report.check import count, few
from mergekit_lite.report.folder import LIMIT, Fault, Look, read_folder, tied_pairs
from mergekit_lite.report.promise import AGAIN, Promise, is_below, read_promises
from mergekit_lite.report.reread import Advance
from mergekit_lite.run.finish import CARD, PERMUTATIONS, RECIPE
from mergekit_lite.run.journal import NAME as JOURNAL
from mergekit_lite.run.sink import partial

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
_INDEX = ".safetensors.index.json"
_HOW = "`merge verify` takes the folder of a finished run"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was verified, and what was found. `sealed` is None, and `files` 0, for a lock of an earlier version, which
    covers the shards only. `recipe` is None where the lock could not be read."""

    folder: Path
    to: str
    shards: int
    files: int
    tensors: int
    nbytes: int
    sealed: bool | None
    recipe: Recipe | None
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()


def verify(
    location: str, *, threads: int = 1, start: Callable[[int], Advance] = lambda total: lambda nbytes: None
) -> Verdict:
    """Read the output in the folder `location` once and hold it against its lock.

    `start` is called with the bytes to read and gives what hears of them. Faults are in the verdict; raises InputError
    where there is no finished output, or no lock, to hold anything against.
    """
    folder = Path(os.path.abspath(os.path.expanduser(location)))
    data = _lock(folder, location)
    sealed = is_sealed(data)
    faults: list[Fault] = []
    try:
        recipe, promises = read_promises(folder)
    except MergeError as error:
        faults = [Fault(NAME, f"is no lock: {problem.message}", None, AGAIN) for problem in error.problems]
        return Verdict(folder, "", 0, 0, 0, 0, sealed, None, tuple(faults))
    if not promises and sealed is None:
        raise InputError(f"`{folder / NAME}` is a recipe, and does not say what a run wrote", hint=_HOW)
    if sealed is False:
        faults.append(Fault(NAME, "is not as the run wrote it: its last line, its own digest, differs", None, AGAIN))
    elif sealed is None and any(promise.files is not None for promise in promises):
        faults.append(Fault(NAME, "lacks its last line, its own digest, or has lines behind it", None, AGAIN))
    if not promises:
        return Verdict(folder, "", 0, 0, 0, 0, sealed, recipe, tuple(faults))
    outside = [name for promise in promises for name in promise.names if not is_below(name)]
    if outside:
        faults += [Fault(NAME, f"names a file outside the folder: `{name[:200]}`") for name in outside]
        return Verdict(folder, "", 0, 0, 0, 0, sealed, recipe, tuple(faults))

    named = list(dict.fromkeys(name for promise in promises for name in promise.names))
    look = read_folder(folder, named, any(promise.files is None for promise in promises), threads, start)
    # Outputs of one recipe have one lock, and a folder may have been renamed: the output that fits best is meant.
    compared = [(list(_against(promise, look)), promise) for promise in promises]
    wrong, promise = min(compared, key=lambda pair: len(pair[0]))
    shards = {name: look.headers[name] for name in promise.shards if name in look.headers}
    faults += wrong
    faults += [
        fault
        for name, found in look.faults.items()
        if name in promise.names or promise.files is None
        for fault in found
    ]
    faults += _recipe(look, recipe)
    faults += _index(look, promise, shards)
    faults += _metadata(shards, recipe)
    faults += _tied(look, shards)
    faults += [
        Fault(file, f"{count(number, 'number')} NaN or infinite", tensor, "`merge inspect --stats` counts them")
        for file in shards if file in look.seen for tensor, number in look.seen[file].nonfinite.items()
    ]  # fmt: skip
    return Verdict(
        folder=folder,
        to=promise.to,
        shards=len(promise.shards),
        files=len(promise.files or ()),
        tensors=sum(len(header.tensors) for header in shards.values()),
        nbytes=sum(seen.nbytes for name, seen in look.seen.items() if name in promise.names),
        sealed=sealed,
        recipe=recipe,
        faults=tuple(faults),
        notes=tuple(_notes(look, promise)),
    )


def _lock(folder: Path, location: str) -> bytes:
    """The bytes of the folder's lock. Raises InputError where there is none, and says what there is instead."""
    left = partial(str(folder)) if folder.name else folder
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f"`{location}` is a file", hint=_HOW)
        if left.is_dir():
            hint = f"`merge run RECIPE --resume` goes on with it; it becomes `{location}` once it is whole"
            raise InputError(f"there is no `{location}`, but an unfinished run in `{left.name}`", hint=hint)
        raise InputError(f"there is no folder `{location}`", hint=f"{_HOW}; download one from the Hub first")
    try:
        return inside(folder, NAME).read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"cannot read `{folder / NAME}`: {error.strerror}") from error
    if (folder / JOURNAL).exists() or folder.name.endswith(".partial"):
        hint = "`merge run RECIPE --resume` goes on with it; a finished output has no `.partial` in its name"
        raise InputError(f"`{location}` is an unfinished output", hint=hint)
    hint = "an output of `merge run` has one; `merge doctor` looks at checkpoints that have none"
    raise InputError(f"`{location}` has no {NAME}, so nothing says what should be there", hint=hint)


def _against(promise: Promise, look: Look) -> Iterator[Fault]:
    """What differs from a promise: files missing, too many, of another size or content."""
    for name, (nbytes, blake3) in {**promise.shards, **(promise.files or {})}.items():
        seen = look.seen.get(name)
        if name not in look.present:
            yield Fault(name, "is missing", None, AGAIN)
        elif seen is None:
            yield Fault(name, "cannot be read to its end", None, AGAIN)
        elif isinstance(nbytes, int) and nbytes != seen.nbytes:
            yield Fault(name, f"has {count(seen.nbytes, 'byte')}, the lock says {nbytes:,}", None, AGAIN)
        elif seen.blake3 != blake3:
            yield Fault(name, "has another BLAKE3 digest than the lock says", None, AGAIN)
    # Permutations are of this program, and nothing loads them.
    homes = {name.rpartition("/")[0] for name in promise.names} - {PERMUTATIONS}
    for name in sorted(look.present - set(promise.names) - {NAME}):
        if name.rpartition("/")[0] not in homes:
            continue
        if name.endswith(_WEIGHTS):
            yield Fault(name, "are weights that the run did not write", None, "move them out of the folder")
        elif promise.files is not None and is_read_with_a_model(name):
            yield Fault(name, "was not written by the run, and changes what is loaded", None, "move it away")


def _recipe(look: Look, recipe: Recipe) -> Iterator[Fault]:
    """recipe.yaml beside the lock must make the lock's recipe, up to the revisions that a run has pinned and where the
    output is pushed to."""
    try:
        ours, problems = parse(read_file(look.folder / RECIPE), RECIPE, _overrides(recipe))
    except MergeError as error:
        if RECIPE in look.present:  # else it is told as missing
            yield from (Fault(RECIPE, problem.message) for problem in error.problems)
        return
    if ours is None or problems:
        yield from (Fault(RECIPE, problem.message) for problem in problems)
    elif _unpinned(ours) != _unpinned(recipe):
        yield Fault(RECIPE, f"is not the recipe in {NAME}", None, AGAIN)


def _overrides(recipe: Recipe) -> list[str]:
    given = (recipe.lock or {}).get("set")
    return [item for item in given if isinstance(item, str)] if isinstance(given, list) else []


def _unpinned(recipe: Recipe) -> str:
    models = {n: replace(m, revision=None, adapter_revision=None) for n, m in recipe.models.items()}
    saves = tuple(replace(save, push=None) for save in recipe.saves)
    return to_yaml(replace(recipe, models=models, saves=saves, scores=()))


def _index(look: Look, promise: Promise, shards: Mapping[str, Header]) -> Iterator[Fault]:
    """The index of each folder that has several shards names all of its tensors with their files, and all bytes."""
    homes = dict.fromkeys(name.rpartition("/")[0] for name in promise.shards)
    for home in homes:
        yield from _index_of(look, promise, {n: h for n, h in shards.items() if n.rpartition("/")[0] == home}, home)


def _index_of(look: Look, promise: Promise, shards: Mapping[str, Header], home: str) -> Iterator[Fault]:
    tensors = [(meta, file) for file, header in shards.items() for meta in header.tensors]
    homes = {meta.name: file for meta, file in tensors}
    for meta, file in tensors:
        if homes[meta.name] != file:
            yield Fault(file, f"the same tensor stands in {homes[meta.name]}", meta.name)
    promised = [name for name in promise.shards if name.rpartition("/")[0] == home]
    ours = [name for name in look.present if name.rpartition("/")[0] == home and name.endswith(_INDEX)]
    if not ours:
        if len(promised) > 1 and promise.files is None:
            yield Fault(f"{home}/model{_INDEX}".lstrip("/"), "is missing", None, AGAIN)
        return
    name = ours[0]
    if len(shards) < len(promised) or name in look.faults:
        return  # told already
    index = read_object(inside(look.folder, name), LIMIT)
    named, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(named, dict):
        yield Fault(name, "has no `weight_map`", None, AGAIN)
        return
    files = {tensor: file.rpartition("/")[2] for tensor, file in homes.items()}
    for tensor in [tensor for tensor in homes if named.get(tensor) != files[tensor]]:
        yield Fault(name, f"does not say that the tensor is in {files[tensor]}", tensor, AGAIN)
    for tensor in [tensor for tensor in named if tensor not in homes]:
        yield Fault(name, "names a tensor that no shard holds", str(tensor), AGAIN)
    total = sum(meta.nbytes for meta, _ in tensors)
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if said != total:
        yield Fault(name, f"`total_size` is {said}, the tensors have {total} bytes", None, AGAIN)


def _metadata(shards: Mapping[str, Header], recipe: Recipe) -> Iterator[Fault]:
    first = next(iter(shards), None)
    # Files that outputs share tell how what they share was made: the same recipe, with another step saved.
    shares = any(step.use == "share" for step in recipe.steps.values())
    for file, header in shards.items():
        if first is None or header.metadata == shards[first].metadata:
            continue
        if not shares or _unsaved(header.metadata) != _unsaved(shards[first].metadata):
            yield Fault(file, f"has other metadata in its header than {first}", None, AGAIN)


def _unsaved(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a shard, with the recipe in it without the step that it saves; as it is where it has none."""
    recipe, problems = parse(metadata.get(IN_HEADER, ""), IN_HEADER)
    if recipe is None or problems:
        return dict(metadata)
    saves = tuple(replace(save, step=None) for save in recipe.saves)
    return {**metadata, IN_HEADER: to_yaml(replace(recipe, saves=saves))}


def _tied(look: Look, shards: Mapping[str, Header]) -> Iterator[Fault]:
    """Tensors that the configuration ties are stored once or alike."""
    place = {meta.name: (file, meta) for file, header in shards.items() for meta in header.tensors}
    for alias, canonical in tied_pairs(look, shards):
        (file, one), (other_file, other) = place[alias], place[canonical]
        if file not in look.seen or other_file not in look.seen:
            continue
        digests = look.seen[file].tensors[alias], look.seen[other_file].tensors[canonical]
        if (one.shape, one.dtype) != (other.shape, other.dtype) or digests[0] != digests[1]:
            hint = "untie them in config.json (`tie_word_embeddings`), or store them alike"
            yield Fault(file, f"differs from `{canonical}`, to which config.json ties it", alias, hint)


def _notes(look: Look, promise: Promise) -> Iterator[str]:
    if promise.files is None:
        yield "an earlier version wrote the lock: it covers the shards, and not configuration, tokenizer or itself"
    if JOURNAL in look.present:
        yield f"{JOURNAL} was left by a crash at the very end of the run; it may be removed"
    rest = look.present - set(promise.names) - {NAME, JOURNAL, RECIPE, CARD, ".gitattributes"}
    rest = {n for n in rest if not n.endswith(_WEIGHTS) and not is_read_with_a_model(n)}
    if rest:
        yield f"not of the run, and not looked at: {few(sorted(rest))}"
