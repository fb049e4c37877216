"""Options that several commands share, each with one wording."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mergekit_lite.cli.confine import confine

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe in YAML.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result, and errors too, as JSON on stdout.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Write here, not where the recipe says.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change a setting of the recipe, such as steps.mixed.with.t=0.4; may be repeated.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, help="Threads to use; all cores if left out.", show_default=False),
]
Block = Annotated[
    int | None,
    typer.Option(
        "--block", metavar="N", min=1, help="Elements worked on at once; 262144 if left out.", show_default=False
    ),
]


def _memory(text: str) -> str:
    from mergekit_lite.plan.budget import memory_bytes

    memory_bytes(text)
    return text


Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        parser=_memory,
        help="Keep the process's own memory below this, such as 300MB, or say what would do.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1 or auto.")]
Family = Annotated[
    str | None,
    typer.Option(
        "--family",
        metavar="FILE",
        help="Take the spaces from this family file, or family of this name.",
        show_default=False,
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read .bin and .pt checkpoints too, as plain data; no code in them is run."),
]
Sandbox = Annotated[
    Path | None,
    typer.Option(
        "--sandbox",
        metavar="DIR",
        callback=confine,
        is_eager=True,
        help="Read and write inside this folder only, and use no network.",
        show_default=False,
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Use what is on this machine; never ask the Hub.")]


Text = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="A text, in blocks of tokens.", show_default=False)
]
Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE", help="Model inputs by name, .safetensors or .npz.", show_default=False),
]
TokenBlock = Annotated[
    int | None,
    typer.Option("--block", metavar="N", min=2, help="Tokens of an example; 512 if left out.", show_default=False),
]
Lines = Annotated[bool, typer.Option("--lines", help="Each line of the text is an example, such as a prompt.")]
Examples = Annotated[
    int | None,
    typer.Option("--examples", metavar="N", min=1, help="Draw this many; all if left out.", show_default=False),
]


class Source(str, Enum):
    """What `--fetch` does with models on the Hub."""

    cache = "cache"
    stream = "stream"


Fetch = Annotated[
    Source,
    typer.Option(
        "--fetch",
        help="Download models on the Hub into its cache, or read them in parts and keep none of their weights.",
    ),
]


class Form(str, Enum):
    """What `--log` makes of what a command says on stderr."""

    text = "text"
    json = "json"


Log = Annotated[
    Form,
    typer.Option("--log", help="What stderr holds: text and a bar for people, or an event in JSON on each line."),
]
