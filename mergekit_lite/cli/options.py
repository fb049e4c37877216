"""Options that several commands share, each with one wording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe in YAML.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result, and errors too, as JSON on stdout.")]
Out = Annotated[
    Optional[Path],  # noqa: UP007, UP045  Typer reads the annotation on Python 3.10 too
    typer.Option("--out", metavar="DIR", help="Write here instead of the folder that the recipe names.", show_default=False),
]
Set = Annotated[
    Optional[list[str]],  # noqa: UP007, UP045
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change a setting of the recipe, such as steps.mixed.with.t=0.4; may be repeated.",
        show_default=False,
    ),
]
Threads = Annotated[
    Optional[int],  # noqa: UP007, UP045
    typer.Option("--threads", metavar="N", min=1, help="Threads to use; all cores if left out.", show_default=False),
]
Block = Annotated[
    Optional[int],  # noqa: UP007, UP045
    typer.Option("--block", metavar="N", min=1, help="Elements worked on at once; 65536 if left out.", show_default=False),
]
Offline = Annotated[bool, typer.Option("--offline", help="Use what is on this machine; never ask the Hub.")]
