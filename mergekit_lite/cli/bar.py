"""A bar for commands that read weights, counting bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from mergekit_lite.cli import show


@contextlib.contextmanager
def reading(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """What to call, from any thread, with every few bytes read of `total`: a bar on a terminal, nothing elsewhere."""
    console = show.console(stderr=True)
    if not console.is_terminal:
        yield lambda nbytes: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as display:
        task = display.add_task(label, total=total)
        yield lambda nbytes: display.advance(task, nbytes)


@contextlib.contextmanager
def counting(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """As `reading`, for things that are counted."""
    console = show.console(stderr=True)
    if not console.is_terminal:
        yield lambda count: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as display:
        task = display.add_task(label, total=total)
        yield lambda count: display.advance(task, count)
