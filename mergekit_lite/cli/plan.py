"""`merge plan`: what a run would do, without reading a weight."""

from __future__ import annotations

import os
from enum import Enum
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mergekit_lite.cli import options, show


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
    """
    from mergekit_lite import merge
    from mergekit_lite.plan import explain

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
