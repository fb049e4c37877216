"""`merge verify`: whether an output still is, to the byte, what its lock says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_lite.cli import bar, options, show
from mergekit_lite.cli.confine import check_inside
from mergekit_lite.errors import MergeError

if TYPE_CHECKING:
    from mergekit_lite.recipe.model import Recipe
    from mergekit_lite.report.folder import Fault
    from mergekit_lite.report.verify import Verdict


def verify(
    output: Annotated[str, typer.Argument(metavar="OUT", help="The folder of a finished run.", show_default=False)],
    inputs: Annotated[
        bool, typer.Option("--inputs", help="Hold the inputs against the lock too; the Hub is not asked.")
    ] = False,
    allow_pickle: options.AllowPickle = False,
    sandbox: options.Sandbox = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Hold an output against its lock, recipe.lock.yaml. Leaves with 1 where something is not as the lock says.

    All files are read once: digests, headers, index, configuration, the recipe, tied tensors, NaN and infinities, and
    the lock's own digest. No input is needed. For checkpoints that have no lock there is `merge doctor`, which looks at
    their health.
    """
    from mergekit_lite import merge
    from mergekit_lite.report.verify import verify as check

    check_inside([output])
    count = threads or merge.default_threads()
    with contextlib.ExitStack() as display:

        def start(total: int) -> Callable[[int], None]:
            return display.enter_context(bar.reading("verify", total))

        found = check(output, threads=count, start=start)
        display.close()
        faults = list(found.faults)
        if inputs and found.recipe is not None:
            faults += _inputs(found.recipe, allow_pickle, count, start)
    if json:
        show.json(_as_json(found, faults, inputs))
    else:
        for fault in faults:
            show.line(_line(fault), "bold red")
        for note in found.notes:
            show.note(f"note: {note}")
        show.line(_summary(output, found, faults, inputs))
    if faults:
        raise typer.Exit(1)


def _inputs(
    recipe: Recipe, allow_pickle: bool, threads: int, start: Callable[[int], Callable[[int], None]]
) -> Iterator[Fault]:
    """What differs between the inputs as they lie there now and what the lock says of them."""
    from mergekit_lite import merge
    from mergekit_lite.plan.lock import changed_inputs
    from mergekit_lite.report.folder import Fault
    from mergekit_lite.report.reread import reread
    from mergekit_lite.run.inputs import locked_digests

    checkpoints = {}
    wanted = (recipe.lock or {}).get("inputs") or {}
    for name in wanted:
        try:
            known = [name] if name in recipe.models else []
            checkpoints.update(merge.open_models(recipe, known, True, allow_pickle))
        except MergeError as error:
            yield from (Fault(f"input {name}", p.message, None, p.hint) for p in error.problems)
    digests = locked_digests(recipe.lock, checkpoints)  # of what a run has read from the Hub by ranges
    shards = (file for checkpoint in checkpoints.values() for file in checkpoint.shards)
    files = {file.path: file.nbytes for file in shards if file.path not in digests}
    advance = start(sum(files.values()))
    digests.update({path: reread(Path(path), (), (), threads, advance).blake3 for path in files})
    here = {**(recipe.lock or {}), "inputs": {name: wanted[name] for name in checkpoints}}
    for problem in changed_inputs(here, checkpoints, digests):
        yield Fault("input", problem.message, None, problem.hint)


def _line(fault: Fault) -> str:
    """`fail  model.safetensors  lm_head.weight: 3 numbers NaN or infinite`."""
    place = f"{fault.file}  {fault.tensor}" if fault.tensor is not None else fault.file
    return f"fail  {place}: {fault.message}"


def _summary(output: str, found: Verdict, faults: list[Fault], inputs: bool) -> str:
    if faults:
        return f"not as the lock says: {show.count(len(faults), 'fault')} in {output}"
    parts = [
        f"as the lock says: {output}",
        show.count(found.shards, "shard"),
        show.count(found.tensors, "tensor"),
        *([show.count(found.files, "other file")] if found.files else []),
        *(["the inputs"] if inputs else []),
        show.size(found.nbytes),
    ]
    return " · ".join(parts)


def _as_json(found: Verdict, faults: list[Fault], inputs: bool) -> dict[str, Any]:
    """The verdict as data for JSON. `covered` tells what the digests of the lock speak of."""
    return {
        "whole": not faults,
        "folder": str(found.folder),
        "output": found.to,
        "shards": found.shards,
        "tensors": found.tensors,
        "bytes": found.nbytes,
        "covered": {"shards": True, "files": found.files > 0, "lock": found.sealed is True, "inputs": inputs},
        "faults": [fault.as_json() for fault in faults],
        "notes": list(found.notes),
    }
