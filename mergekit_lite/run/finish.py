"""From whole shards to a finished folder: digests, configuration, lock, and the rename that makes it real."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lite.checkpoint.adapter import CONFIG as ADAPTER
from mergekit_lite.checkpoint.extras import copy_extras, find_extras, output_config
from mergekit_lite.checkpoint.meta import BIT
from mergekit_lite.errors import InputError, Problem, StoppedError
from mergekit_lite.family.section import assign
from mergekit_lite.limits import hint_for
from mergekit_lite.plan.lock import NAME as LOCK
from mergekit_lite.plan.model import Output, OutTensor, Plan, Unit
from mergekit_lite.plan.order import walk
from mergekit_lite.run.digest import file_digests
from mergekit_lite.run.publish import fsync_folder, fsync_folders, publish
from mergekit_lite.run.ranks import Share
from mergekit_lite.run.sink import first_name, partial, set_writable

if TYPE_CHECKING:
    from mergekit_lite.checkpoint.source import Source
    from mergekit_lite.run.alignment import Solved

RECIPE = "recipe.yaml"
CARD = "README.md"
PERMUTATIONS = "permutations"
EXPERTS = "experts"
EXPERT_MAP = "expert_map"  # the key of config.json that says which stored expert each row of a router means


def input_files(plan: Plan) -> list[Path]:
    """Every file that the plan reads weights from, each once."""
    return [Path(path) for path in dict.fromkeys(f.path for c in plan.checkpoints.values() for f in c.shards)]


def wanted_parts(units: Iterable[Unit], files: Container[str]) -> list[tuple[str, int]]:
    """The parts of `files` in the order in which the units read them: `(path, last byte + 1)`."""
    parts = []
    for unit in units:
        for node in unit.nodes:
            if node.load is not None and node.load.file in files:
                share = min(node.numel, unit.stop) / max(1, node.numel)
                parts.append((node.load.file, node.load.start + int(node.load.nbytes * share)))
    return parts


def shard_digests(plan: Plan, shards: Sequence[tuple[int, int]], threads: int) -> list[str]:
    """The digests of finished shards, still in the partial folders, each given by output and number. A file with
    several names is read once."""
    paths = [first_name(plan.outputs, *place) for place in shards]
    try:
        found = file_digests(dict.fromkeys(paths), threads)
    except InputError as fault:  # no input to the user
        raise StoppedError(fault.problems) from fault.__cause__
    return [found[str(path)] for path in paths]


def check_inputs(reader: Source, digests: Mapping[str, str], threads: int) -> None:
    """Raises InputError where an input is not what it was when the run began: by its size and mtime, and where these
    are as they were and its ctime is not, by `digests`, those formed during the run or known before."""
    reader.check()
    touched = [Path(path) for path in reader.touched if path in digests]
    for path, digest in file_digests(touched, threads).items() if touched else ():
        if digest != digests[path]:
            hint = "let nothing write the inputs during a run; remove the unfinished output and start anew"
            raise InputError(f"`{path}` changed during the run, and its time was set back", hint=hint)


def collect(
    plan: Plan, shares: Sequence[Share], told: Sequence[Sequence[Sequence[str]]]
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """The digests that ranks tell of the inputs and the shards of their shares: by path, and by output folder and file
    name."""
    files = input_files(plan)
    inputs: dict[str, str] = {}
    found: dict[tuple[int, int], str] = {}
    for share, (read, written) in zip(shares, told, strict=True):
        inputs |= {str(files[number]): digest for number, digest in zip(share.inputs, read, strict=True)}
        found |= dict(zip(share.shards, written, strict=True))
    shards = {
        output.to: {shard.file: found[o, s] for s, shard in enumerate(output.shards) if (o, s) in found}
        for o, output in enumerate(plan.outputs)
    }
    return inputs, shards


Beside = dict[str, dict[str, tuple[int, str]]]  # by output folder and file name: bytes and digest


def complete(
    plan: Plan,
    lock: Callable[[Beside], str],
    solved: Mapping[str, Solved],
    keep_auto_map: bool = False,
    card: Callable[[Path, str, int], str] | None = None,
) -> None:
    """Put configuration, tokenizer, index, recipe, permutations and the lock, which `lock` makes of the files beside
    the shards, into the folders, and the model card, which `card` makes of a folder, the lock and the output's number;
    then rename every partial folder to its name; the one that holds the journal comes last. The lock says nothing of
    the card: it is for people, and theirs to change. Raises StoppedError where the disk is full or a name has been
    taken since the plan was made."""
    beside: Beside = {}
    for output in plan.outputs:
        try:
            names = put_beside(plan, output, solved, keep_auto_map)
            paths = {name: partial(output.to) / name for name in names}
            digests = file_digests(paths.values(), 1)
            beside[output.to] = {name: (path.stat().st_size, digests[str(path)]) for name, path in paths.items()}
        except OSError as fault:
            message = f"cannot write into `{partial(output.to)}`: {fault.strerror}"
            raise StoppedError(message, hint=hint_for(fault)) from fault
    text = lock(beside)
    for number, output in enumerate(plan.outputs):
        try:
            _write(partial(output.to) / LOCK, text)
            if card is not None:
                _write(partial(output.to) / CARD, card(partial(output.to), text, number))
            _protect(output)
            fsync_folders(partial(output.to))
        except OSError as fault:
            message = f"cannot write into `{partial(output.to)}`: {fault.strerror}"
            raise StoppedError(message, hint=hint_for(fault)) from fault
    for output in reversed(plan.outputs):
        publish(partial(output.to), Path(output.to), plan.digest, output is plan.outputs[0])


def put_beside(plan: Plan, output: Output, solved: Mapping[str, Solved], keep_auto_map: bool = False) -> list[str]:
    """Put configuration, tokenizer, index, recipe and permutations into the partial folder of an output; their
    names."""
    mapped = _with_map(plan, output, solved)
    return [*_extras(plan, mapped, keep_auto_map), *_permutations(plan, output, solved)]


def _protect(output: Output) -> None:
    """Let nobody write into shards that other outputs have too: what a program did to one would be done to all."""
    for shard in output.shards:
        path = partial(output.to) / shard.file
        if shard.apart and path.lstat().st_nlink > 1:
            set_writable(path, False)


def notes_on(plan: Plan, keep_auto_map: bool) -> tuple[Problem, ...]:
    """What of the inputs' configurations the outputs will lack. Raises InputError where a file that goes beside the
    weights is at fault: the run is to say so before it starts."""
    models = [output for output in plan.outputs if output.adapter is None]
    found = [
        find_extras(plan.checkpoints[output.donor], output.config, keep_auto_map, output.tokenizer).notes
        for output in models
    ]
    return tuple(dict.fromkeys(note for notes in found for note in notes))


def _extras(plan: Plan, output: Output, keep_auto_map: bool) -> list[str]:
    """The names of the files that are put beside the shards of an output."""
    folder = partial(output.to)
    if output.adapter is not None:
        _write(folder / ADAPTER, json.dumps(output.adapter, indent=2) + "\n")
        _write(folder / RECIPE, plan.recipe.text)
        return [ADAPTER, RECIPE]
    config = output_config(output.config, _main_dtype(output.tensors))
    donor, dtypes = plan.checkpoints[output.donor], _dtypes_of_parts(output)
    names = [*copy_extras(donor, folder, config, keep_auto_map, output.tokenizer, dtypes)]
    for name, index in output.indices.items():
        _write(folder / name, json.dumps(index, indent=2) + "\n")
        names.append(name)
    _write(folder / RECIPE, plan.recipe.text)
    return [*names, RECIPE]


def _permutations(plan: Plan, output: Output, solved: Mapping[str, Solved]) -> list[str]:
    """The orders of units that went into an output, a file for each model whose units were moved; their names."""
    if not solved:
        return []
    from mergekit_lite.align.file import to_bytes

    used = _used(output)
    folder = partial(output.to) / PERMUTATIONS
    names = []
    for name, found in solved.items():
        if name not in used or not plan.alignments[name].searched:
            continue
        if plan.alignments[name].layers:
            names.append(_groups(plan, output, name, found))
            continue
        folder.mkdir(exist_ok=True)
        labels = plan.alignments[name].labels
        for number, (label, orders) in enumerate(zip(labels, found.permutations, strict=True), start=1):
            file = f"{name}.safetensors" if len(labels) == 1 else f"{name}.{number}.safetensors"
            _write(folder / file, to_bytes(orders, {"model": label, **found.figures}))
            names.append(f"{PERMUTATIONS}/{file}")
    if folder.is_dir():
        fsync_folder(folder)
    return names


def _dtypes_of_parts(output: Output) -> dict[str, str]:
    """The dtype that most bytes of the tensors in each folder have."""
    found: dict[str, list[OutTensor]] = {}
    for shard in output.shards:
        found.setdefault(shard.file.rpartition("/")[0], []).extend(shard.tensors)
    return {home: _main_dtype(tensors) for home, tensors in found.items()}


def _used(output: Output) -> set[str | None]:
    """The orders of units and the groups of experts that went into an output, by name."""
    return {node.pool for node in walk(tensor.node for tensor in output.tensors)}


def _groups(plan: Plan, output: Output, name: str, found: Solved) -> str:
    """Puts the groups of experts that were merged into a file beside an output; its name."""
    from mergekit_lite.run.experts import groups_text

    folder = partial(output.to) / EXPERTS
    folder.mkdir(exist_ok=True)
    text = groups_text(plan.alignments[name], found.permutations[0], found.figures)
    _write(folder / f"{name}.json", json.dumps(text, indent=1) + "\n")
    fsync_folder(folder)
    return f"{EXPERTS}/{name}.json"


def _with_map(plan: Plan, output: Output, solved: Mapping[str, Solved]) -> Output:
    """The output with the map of its routers in its configuration, where a step has left one."""
    for name in solved.keys() & _used(output) if solved else ():
        alignment = plan.alignments[name]
        if alignment.layers and dict(alignment.params)["router"] == "mapped":
            from mergekit_lite.run.experts import expert_map

            config = copy.deepcopy(dict(output.config))
            assign(config, alignment.section + EXPERT_MAP, expert_map(alignment, solved[name].permutations[0]))
            return replace(output, config=config)
    return output


def _main_dtype(tensors: Sequence[OutTensor]) -> str:
    """The dtype that most of their bytes have; those in FP8 with scales do not count, if there are others."""
    sizes: dict[str, int] = {}
    for tensor in [t for t in tensors if t.scales is None] or tensors:
        if tensor.dtype == BIT:
            continue
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _write(path: Path, content: str | bytes) -> None:
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
