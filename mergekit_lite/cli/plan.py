"""`merge plan`: what a run would do, without reading a weight."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from mergekit_lite import sandbox as box
from mergekit_lite.cli import options, show
from mergekit_lite.cli.confine import check_inside
from mergekit_lite.errors import InputError, UsageError

if TYPE_CHECKING:
    from mergekit_lite.recipe.model import Recipe


class Drawing(str, Enum):
    """How `--dag` draws the steps."""

    text = "text"
    mermaid = "mermaid"


class PlanCommand(TyperCommand):
    """Reads `--dag` without a word after it as `--dag text`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        for place, arg in enumerate(args):
            given.append(arg)
            if arg == "--dag" and not _names_drawing(args[place + 1 : place + 2]):
                given.append(Drawing.text.value)
        return super().parse_args(ctx, given)


def _names_drawing(rest: list[str]) -> bool:
    """Whether the word after `--dag` is meant for it, rightly spelt or not, and is no recipe or option."""
    return bool(rest) and (rest[0] in list(Drawing) or (rest[0].isalpha() and not os.path.exists(rest[0])))


def plan(
    recipe: options.Recipe,
    out: options.Out = None,
    set_: options.Set = None,
    dag: Annotated[
        Drawing | None, typer.Option("--dag", help="Draw the steps instead, for a terminal or as a Mermaid flowchart.")
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every output tensor and how it is made.")] = False,
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="LOCK",
            help="Say instead whether this lock, or the one in this folder, is stale; leave with 1 if it is.",
            show_default=False,
        ),
    ] = None,
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    threads: options.Threads = None,
    block: options.Block = None,
    memory: options.Memory = None,
    sandbox: options.Sandbox = None,
    json: options.Json = False,
) -> None:
    """Show what a run would do: steps, bytes, memory, time, files.

    Reads the recipe and the headers of its checkpoints, never a weight, and finds every fault that a run would find
    before it starts. Of models on the Hub it fetches headers and configurations alone. The time is what the machine of
    benchmarks/RESULTS.md would take; --json has it as `seconds`.
    --dag without a word draws as text. --memory chooses the block size and the threads that keep within it.
    --check compares with the lock of an earlier run: recipe, seed, commits of models on the Hub, inputs, methods,
    output files. Each change is a line. With --offline the commits are taken from the lock.
    """
    from mergekit_lite import merge
    from mergekit_lite.plan import explain

    if check is not None:
        if dag is not None or tensors or memory is not None:
            raise UsageError("`--check` shows what is stale, and goes with neither `--dag`, `--tensors` nor `--memory`")
        _check(check, recipe, set_ or (), out, offline, allow_pickle, threads or merge.default_threads(), json)
        return
    read = merge.load_recipe(recipe, set_ or ())
    made = merge.plan(
        read,
        out=out,
        threads=threads,
        block=block,
        memory=memory,
        offline=offline,
        allow_pickle=allow_pickle,
        fetch="stream",
    )
    if json:
        show.json(explain.as_json(made, made.threads))
    elif dag is Drawing.mermaid:
        show.text(explain.mermaid(made))
    elif dag is Drawing.text:
        for text in explain.tree(made):
            show.line(text)
    elif tensors:
        columns = ["tensor", "shape", "dtype", "shard", "offset", "made by"]
        for output in made.outputs:
            show.line(output.to, "bold")
            rows = [row[1:] for row in explain.tensors(made) if row[0] == output.to]
            show.table(columns, rows, right=["offset"])
    else:
        for text in explain.summary(made, made.threads):
            show.line(text)
    show.warnings(made.warnings)


def _check(
    lock: str,
    file: str,
    overrides: Sequence[str],
    out: Path | None,
    offline: bool,
    allow_pickle: bool,
    threads: int,
    json: bool,
) -> None:
    """Hold a recipe against a lock. Leaves with 1 where the lock is stale."""
    from mergekit_lite import merge
    from mergekit_lite.checkpoint.hub import is_offline
    from mergekit_lite.plan.build import used_models
    from mergekit_lite.plan.words import few
    from mergekit_lite.report import stale

    check_inside((), None, Path(lock))
    path, locked, changes = stale.read_lock(lock)
    recipe = merge.load_recipe(file, overrides)
    recipe = replace(recipe, saves=tuple(replace(save, push=None) for save in recipe.saves))
    changes += stale.text_changes(recipe, locked, out is not None)
    if out is None and len(recipe.saves) == 1 and recipe.saves[0].to is None:  # `--out` has said it then
        out = Path(str((locked.lock or {})["outputs"][0].get("to", "")))
    methods, notes = stale.version_changes(recipe, locked)
    changes += methods
    asked, confined = recipe, box.current() is not None
    offline = offline or is_offline(False) or confined
    recipe = stale.as_locked(asked, locked) if offline else stale.at_commits(asked, used_models(asked))
    absent = _absent(recipe, allow_pickle) if offline and not confined else []
    if offline and any(model.revision for model in recipe.models.values()):
        notes.append("the Hub is not asked: branches and tags are taken to be where the lock says")
    if absent:
        notes.append(f"{few(absent)} not in the Hub's cache: inputs and output files are not compared")
    else:
        made = merge.plan(
            recipe, out=out, offline=offline, allow_pickle=allow_pickle, check_output=False, fetch="stream"
        )
        revisions = list(stale.revision_changes(asked, locked, made.checkpoints))
        moved = frozenset(change.place.partition(": ")[0] for change in revisions)
        changes += revisions
        changes += stale.input_changes(locked, made.checkpoints, threads, moved)
        same = not any(change.what in ("recipe", "seed", "revision") for change in changes)
        changes += stale.output_changes(made, locked, sizes=same)
        changes += stale.plan_change(made, locked) if not changes else ()
        show.warnings(made.warnings)
    if json:
        found = [change.as_json() for change in changes]
        show.json({"lock": str(path), "stale": bool(changes), "changes": found, "notes": notes})
    else:
        show.line(f"{'stale' if changes else 'up to date'}: {path}", "bold red" if changes else "")
        for change in changes:
            show.line(f"  {change.what:<9} {change.place}  {change.locked or 'nothing'} -> {change.now or 'nothing'}")
        for note in notes:
            show.note(f"note: {note}")
    if changes:
        raise typer.Exit(1)


def _absent(recipe: Recipe, allow_pickle: bool) -> list[str]:
    """Models of the Hub, by name, that the cache does not have. Raises InputError where a folder is missing."""
    from mergekit_lite import merge
    from mergekit_lite.checkpoint.hub import is_hub_id
    from mergekit_lite.plan.build import used_models

    absent = []
    for name in used_models(recipe):
        model = recipe.models[name]
        try:
            merge.open_models(recipe, [name], True, allow_pickle)
        except InputError:
            places = (model.location, model.adapter or "")
            if not any(is_hub_id(place) and not os.path.exists(place) for place in places):
                raise
            absent.append(name)
    return absent
