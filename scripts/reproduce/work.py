"""What the scripts of `make reproduce` share: processes that work under progress bars, and pages in Markdown."""

from __future__ import annotations

import contextlib
import multiprocessing
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Wait = Callable[[str, Sequence["Future[Any]"]], None]


@contextlib.contextmanager
def processes(workers: int, console: Console) -> Iterator[tuple[ProcessPoolExecutor, Wait]]:
    """Processes to submit work to, and what waits for some of it under a bar of its own, raising what the work does."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool, Progress(*columns, console=console) as progress:

        def wait(what: str, futures: Sequence[Future[Any]]) -> None:
            bar = progress.add_task(what, total=len(futures))
            for future in as_completed(futures):
                future.result()
                progress.advance(bar)

        yield pool, wait


def page(text: str) -> str:
    """Markdown in lines of 120: paragraphs and the items of lists are wrapped, tables and headings stay as they are."""
    return "\n\n".join(_wrapped(block) for block in text.strip().split("\n\n")) + "\n"


def _wrapped(block: str) -> str:
    if block.startswith(("|", "#")):
        return block
    indent = "  " if block.startswith("- ") else ""
    items = block.split("\n- ")
    items[1:] = [f"- {item}" for item in items[1:]]
    return "\n".join(
        textwrap.fill(" ".join(item.split()), 120, subsequent_indent=indent, break_on_hyphens=False) for item in items
    )
