"""`merge doctor`: whether this machine is ready, or whether checkpoints are whole and sound."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_lite import sandbox as box
from mergekit_lite.cli import bar, options, show
from mergekit_lite.cli.confine import check_inside
from mergekit_lite.errors import UsageError

if TYPE_CHECKING:
    from mergekit_lite.report.check import Check

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
SPACE_WIDTH = 28  # of the column of names, where they are those of spaces


def doctor(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CHECKPOINT]...", help="Folders, files or Hub ids.", show_default=False),
    ] = None,
    spaces: Annotated[
        bool, typer.Option("--spaces", help="Prove what may be permuted, on a tiny random model of the same kind.")
    ] = False,
    family: options.Family = None,
    offline: options.Offline = False,
    threads: options.Threads = None,
    sandbox: options.Sandbox = None,
    json: options.Json = False,
) -> None:
    """Check this machine or, where named, checkpoints. Leaves with 1 where a check fails.

    Of the machine: Python, packages and their versions, cores, memory, GPUs, the disk of the working directory and its
    speed (by 64 MiB that are written and removed), the Hub, its token and its cache. --offline asks the Hub nothing.
    Of a checkpoint all weights are read: headers, index, configuration, layers, tied tensors, tokenizer, NaN and
    infinities; of an output of this program also whether its files are those that its lock names. With --spaces or
    --family only its headers are read: the spaces of its family, or of the family file, are proved with transformers.
    """
    from mergekit_lite import merge

    if (spaces or family) and not checkpoints:
        raise UsageError("a proof of spaces needs a checkpoint", hint="merge doctor --family FILE CHECKPOINT")
    check_inside(checkpoints or (), family)
    count = threads or merge.default_threads()
    found: dict[str, list[Check]] = {}
    if not checkpoints:
        from mergekit_lite.report.environment import environment

        colours = show.console().color_system is not None
        found[""] = []
        for check in environment(colours, count, _outputs(), offline):
            found[""].append(check)
            if not json:
                _show(check)
    for location in dict.fromkeys(checkpoints or ()):
        if spaces or family:
            found[location] = _proof(location, family, offline, quiet=json)
        else:
            found[location] = _checkpoint(location, offline, count, quiet=json)
    failed = sum(check.verdict == "fail" for checks in found.values() for check in checks)
    warned = sum(check.verdict == "warn" for checks in found.values() for check in checks)
    if json:
        places = {place: [check.as_json() for check in checks] for place, checks in found.items()}
        verdict = "fail" if failed else "warn" if warned else "ok"
        what = {"checkpoints": places} if checkpoints else {"environment": places[""]}
        show.json({"verdict": verdict, **what})
    else:
        show.line(f"{show.count(failed, 'failure')}, {show.count(warned, 'warning')}")
    if failed:
        raise typer.Exit(1)


def _outputs() -> Path:
    """Where this command may write, as a run would: the working directory, or the sandbox."""
    held = box.current()
    return Path.cwd() if held is None else Path(held.root)


def _checkpoint(location: str, offline: bool, threads: int, quiet: bool) -> list[Check]:
    """The checks of one checkpoint, each shown as soon as it is done."""
    from mergekit_lite.report.health import health

    found: list[Check] = []
    if not quiet:
        show.line(location, "bold")
    with contextlib.ExitStack() as display:

        def start(total: int) -> Callable[[int], None]:
            return display.enter_context(bar.reading("read", total))

        for check in health(location, offline=offline, threads=threads, start=start):
            # The bar goes before a line is printed over it.
            display.close()
            found.append(check)
            if not quiet:
                _show(check)
    return found


def _proof(location: str, family: str | None, offline: bool, quiet: bool) -> list[Check]:
    """The checks of the spaces of one checkpoint, each shown as soon as it is done."""
    from mergekit_lite.report.proof import proof

    found: list[Check] = []
    if not quiet:
        show.line(location, "bold")
    for check in proof(location, family, offline=offline):
        found.append(check)
        if not quiet:
            _show(check, SPACE_WIDTH)
    return found


def _show(check: Check, width: int = 16) -> None:
    show.line(f"  {check.verdict:<5} {check.name:<{width}} {check.detail}", STYLES[check.verdict])
    if check.hint and check.verdict != "ok":
        show.line(f"{'':<{width + 9}}hint: {check.hint}")
