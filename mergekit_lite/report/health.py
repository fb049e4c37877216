"""Whether a checkpoint on disk, or an adapter, is whole and sound: files, configuration, layers, tied tensors, numbers,
lock."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.find import AdapterFound
from mergekit_lite.checkpoint.header import read_header
from mergekit_lite.checkpoint.inside import inside, read_object
from mergekit_lite.checkpoint.meta import DTYPE_CODES, DTYPE_NAMES, Checkpoint, Part, ShardFile, TensorMeta
from mergekit_lite.checkpoint.quantized import refused
from mergekit_lite.errors import InputError, Problem
from mergekit_lite.family.family import Family, family_of
from mergekit_lite.family.section import lookup
from mergekit_lite.report.adapter import adapter_at, look_at, tensors_of
from mergekit_lite.report.check import FEW, Check, count, fail, failures, few, ok, warn
from mergekit_lite.report.diff import same_bytes
from mergekit_lite.report.look import look, open_location, vocabulary
from mergekit_lite.report.promise import check_lock
from mergekit_lite.report.stats import is_floating, nonfinite, over
from mergekit_lite.report.stream import Advance, has_numbers, opened
from mergekit_lite.run.journal import NAME as JOURNAL
from mergekit_lite.run.sink import partial

_LIMIT = 100_000_000  # bytes of a JSON file that are read at most
_AGAIN = "download or merge the checkpoint again"
# Any of these is a whole tokenizer, save for its settings.
_TOKENIZERS = (".tiktoken", ".spm", "tokenizer.json", "tokenizer.model", "tekken.json", "vocab.txt", "vocab.json",
               "sentencepiece.bpe.model", "spiece.model")  # fmt: skip


def health(
    location: str, *, offline: bool = False, threads: int = 1, start: Callable[[int], Advance] = lambda total: _ignore
) -> Iterator[Check]:
    """The checks of one checkpoint, one after the other; the last ones read every weight.

    `start` is called with the bytes of the weights before they are read and gives what hears of the bytes as they are.
    A fault of the checkpoint is a failed check, never an error.
    """
    given = Path(os.path.abspath(os.path.expanduser(location)))
    folder = given if given.is_dir() else given.parent if given.is_file() else None
    unreadable: tuple[Problem, ...] = ()
    if folder is not None:
        unreadable = _unreadable(folder)
        yield from _unfinished(folder)
    try:
        checkpoint = open_location(location, offline)
    except AdapterFound:
        yield from _adapter(location, offline, threads, start)
        return
    except InputError as error:
        told = {problem.message for problem in unreadable}
        rest = [problem for problem in error.problems if problem.message not in told]
        yield from failures("weights", rest or _broken_headers(folder))
        yield from failures("config", unreadable)
        if folder is not None:
            yield from check_lock(folder, threads)
        return
    assert checkpoint.folder is not None
    folder, config = checkpoint.folder, checkpoint.config
    yield _weights(checkpoint)
    yield from (warn("weights", note.message, note.hint) for note in checkpoint.notes)
    yield from _index(checkpoint, folder)
    family = family_of(config, checkpoint.tensors, checkpoint.configs)
    if not config and checkpoint.form is not None:
        count_ = count(len(checkpoint.form.parts), "part")
        yield ok("config", f"layout of {checkpoint.form.kind}, {count_}" if checkpoint.configs else "a file by itself")
    elif not config:
        yield warn("config", "there is no config.json", "without it the family is guessed from the tensors' names")
    else:
        yield ok("config", f"family {family.name}, model type {config.get('model_type', 'not stated')}")
        yield _dtype(checkpoint)
        yield from _layers(checkpoint, family)
    if checkpoint.form is None or checkpoint.form.kind == "sentence-transformers":
        yield _tokenizer(folder, config)
    try:
        yield from _tied(checkpoint, family)
        yield _numbers(checkpoint, threads, start)
    except InputError as error:
        yield from failures("weights", error.problems)
    yield from check_lock(folder, threads)


def _adapter(location: str, offline: bool, threads: int, start: Callable[[int], Advance]) -> Iterator[Check]:
    """The checks of an adapter, which has no layers, no vocabulary and no config.json of its own."""
    try:
        adapter = adapter_at(location, offline)
    except InputError as error:
        yield from failures("adapter", error.problems)
        if (folder := Path(os.path.abspath(os.path.expanduser(location)))).is_dir():
            yield from check_lock(folder, threads)
        return
    seen, metas = look_at(adapter), {meta.name: meta for meta in tensors_of(adapter)}
    checkpoint = Checkpoint(location, adapter.revision, adapter.folder, {}, metas, adapter.files)
    yield ok("weights", f"{count(seen.tensors, 'tensor')}, {count(adapter.files[0].nbytes, 'byte')}, valid header")
    yield ok("adapter", f"{seen.kind}, {count(sum(seen.modules.values()), 'module')}, each with all its parts")
    odd = [name for name, low in adapter.low_rank.items() if low.b.shape[1:2] != low.a.shape[:1]]
    if odd:
        yield fail("ranks", f"the two factors do not have one rank: {few(odd)}", "download or save the adapter again")
    elif seen.ranks:
        yield ok("ranks", ", ".join(map(str, seen.ranks)))
    if seen.base is None:
        hint = "`base_model_name_or_path` of adapter_config.json tells it to whoever loads the adapter"
        yield warn("base", "the adapter does not say which model it was made for", hint)
    else:
        yield ok("base", f"made for `{seen.base}`")
    try:
        yield _numbers(checkpoint, threads, start)
    except InputError as error:
        yield from failures("weights", error.problems)
    yield from check_lock(adapter.folder, threads)


def _ignore(nbytes: int) -> None:
    """Nobody wants to know how far the reading is."""


def _unreadable(folder: Path) -> tuple[Problem, ...]:
    """What is wrong with config.json, in the words of `open_checkpoint`."""
    if os.path.lexists(folder / "config.json"):
        try:
            read_object(inside(folder, "config.json"), _LIMIT)
        except InputError as error:
            return error.problems
    return ()


def _broken_headers(folder: Path | None) -> Iterator[Problem]:
    """The faults of the single weight files, where something else kept the checkpoint from being opened."""
    for path in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        try:
            read_header(inside(path.parent, path.name), str(path))
        except InputError as error:
            yield from error.problems


def _unfinished(folder: Path) -> Iterator[Check]:
    if (folder / JOURNAL).exists():
        hint = "`merge run RECIPE --resume` goes on with it; a finished output has no `.partial` in its name"
        yield fail("run", "this folder is an unfinished output", hint)
    left = partial(str(folder)) if folder.name else None
    if left is not None and left.exists():
        hint = "go on with `merge run RECIPE --resume`, or remove it"
        yield warn("run", f"an unfinished run lies beside it: `{left.name}`", hint)


def _weights(checkpoint: Checkpoint) -> Check:
    nbytes = sum(shard.nbytes for shard in checkpoint.shards)
    size = f"{count(nbytes, 'byte')} in {count(len(checkpoint.shards), 'file')}"
    return ok("weights", f"{count(len(checkpoint.tensors), 'tensor')}, {size}, valid headers")


def _index(checkpoint: Checkpoint, folder: Path) -> Iterator[Check]:
    """The index against the shards. That it promises no tensor they lack is known from opening the checkpoint."""
    for part in checkpoint.form.parts if checkpoint.form is not None else (Part("", ""),):
        shards = [shard for shard in checkpoint.shards if shard.within == part.folder]
        yield from _index_of(checkpoint, folder, part, shards)


def _index_of(checkpoint: Checkpoint, folder: Path, part: Part, shards: Sequence[ShardFile]) -> Iterator[Check]:
    files = {os.path.basename(shard.name) for shard in shards}
    name = f"{part.folder}/{part.stem}.safetensors.index.json".lstrip("/")
    if not os.path.lexists(folder / name):
        if len(files) > 1:
            hint = f"libraries need {name} to load several files; a merge of the checkpoint writes one"
            yield warn("index", f"{len(files)} weight files and no index", hint)
        return
    index = read_object(inside(folder, name), _LIMIT)
    if not files <= set(index["weight_map"].values()):
        return
    metadata = index.get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    paths = {shard.path for shard in shards}
    total = sum(meta.nbytes for meta in checkpoint.tensors.values() if meta.file in paths)
    if claimed is not None and claimed != total:
        hint = "loading does not depend on it; a merge of the checkpoint writes it anew"
        yield warn("index", f"`total_size` is {claimed}, the tensors have {total} bytes", hint)
    else:
        yield ok("index", f"{count(len(index['weight_map']), 'name')}, all in the files it gives")


def _dtype(checkpoint: Checkpoint) -> Check:
    """The configuration's dtype against that of most bytes of floating tensors."""
    packed = {meta.stored for meta in checkpoint.tensors.values() if meta.packed is not None}
    held = look(checkpoint).dtypes
    sizes = {e.dtype: e.bytes for e in held if is_floating(e.dtype) or e.dtype in packed}
    main = max(sizes, key=lambda dtype: sizes[dtype], default=None)
    places = (section + key for section in ("", "text_config.") for key in ("dtype", "torch_dtype"))
    said = next((value for place in places if isinstance(value := lookup(checkpoint.config, place), str)), None)
    if main is None or said is None:
        return ok("dtype", f"config.json states none; most weights are {DTYPE_NAMES.get(main or '', main or 'none')}")
    if DTYPE_CODES.get(said) == main:
        return ok("dtype", f"{said}, as config.json states")
    detail = f"config.json states {said}, most weights are {DTYPE_NAMES.get(main, main)}"
    if packed or refused(checkpoint.config, checkpoint.folder) is not None:
        return ok("dtype", f"{detail}: quantized")
    return warn("dtype", detail, "transformers may convert the weights as it loads them: correct config.json")


def _layers(checkpoint: Checkpoint, family: Family) -> Iterator[Check]:
    found: dict[str, set[int]] = {stack.name: set() for stack in family.stacks}
    for layer in map(family.layer, checkpoint.tensors):
        if layer is not None:
            found[layer.stack].add(layer.index)
    if not family.stacks:
        yield warn("layers", "no layers are found in the tensors' names")
    for stack in look(checkpoint).stacks:
        # A stranger's layer number may have nine digits: the gaps are not all counted out.
        gaps = (i for i in range(stack.layers) if i not in found[stack.name])
        shown = list(itertools.islice(gaps, FEW))
        name = f"{stack.layers} in `{stack.name}`"
        if shown:
            lacking = stack.layers - len(found[stack.name])
            dots = ", ..." if lacking > len(shown) else ""
            detail = f"{name}, but {count(lacking, 'number')} without a tensor: {', '.join(map(str, shown))}{dots}"
            yield fail("layers", detail, _AGAIN)
        elif stack.stated is None:
            yield ok("layers", f"{name}; config.json does not state their number")
        elif stack.layers < stack.stated:
            yield fail("layers", f"{name}, {stack.stated} by `{stack.key}` of config.json", _AGAIN)
        elif stack.layers > stack.stated:
            hint = "transformers loads no more layers than config.json states"
            yield warn("layers", f"{name}, {stack.stated} by `{stack.key}` of config.json", hint)
        else:
            yield ok("layers", f"{name}, as `{stack.key}` of config.json states")


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> Check:
    names = sorted(name for name in os.listdir(folder) if name.endswith(_TOKENIZERS))
    if names:
        return ok("tokenizer", ", ".join(names))
    if vocabulary(config) is None:
        return ok("tokenizer", "none, and config.json states no vocabulary")
    hint = "copy tokenizer.json and tokenizer_config.json from the base model into the folder"
    return warn("tokenizer", "no tokenizer files beside the weights", hint)


def _tied(checkpoint: Checkpoint, family: Family) -> Iterator[Check]:
    """Names that the configuration makes one tensor: where both are stored, their bytes must be the same."""
    for alias, canonical in family.tied:
        pair = f"`{alias}` and `{canonical}`"
        stored = [checkpoint.tensors[name] for name in (alias, canonical) if name in checkpoint.tensors]
        if len(stored) == 2:
            if _equal(checkpoint, *stored):
                yield ok("tied", f"{pair} are stored twice, with the same bytes")
            else:
                hint = (
                    "loading keeps one of them: untie them in config.json (`tie_word_embeddings`), or store them alike"
                )
                yield fail("tied", f"{pair} are one tensor by config.json, but are stored with other bytes", hint)
        elif stored:
            yield ok("tied", f"{pair} are stored once, as `{stored[0].name}`")


def _equal(checkpoint: Checkpoint, a: TensorMeta, b: TensorMeta) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    with opened(checkpoint.shards, 1) as reader:
        return same_bytes(reader, a, b)


def _numbers(checkpoint: Checkpoint, threads: int, start: Callable[[int], Advance]) -> Check:
    advance = start(sum(meta.nbytes for meta in checkpoint.tensors.values()))
    found = {meta.name: bad for meta, bad in over(checkpoint, nonfinite, threads, advance) if bad}
    if found:
        detail = f"{count(sum(found.values()), 'NaN or infinite number')} in {few(found)}"
        return fail("numbers", detail, "`merge inspect --stats` counts them by tensor; a merge passes them on")
    unknown = [m.name for m in checkpoint.tensors.values() if is_floating(m.dtype) and not has_numbers(m.dtype)]
    if unknown:
        return ok("numbers", f"all finite, but torch does not know the dtype of {few(unknown)}")
    return ok("numbers", "all finite")
