"""`merge methods`: what merges there are, and one of them explained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_lite.cli import options, show
from mergekit_lite.errors import UsageError, suggest

if TYPE_CHECKING:
    from mergekit_lite.methods.spec import Method


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The method to explain.", show_default=False)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of all built-in methods.")] = False,
    json: options.Json = False,
) -> None:
    """List the merge methods, or explain one."""
    from mergekit_lite.cli import manual
    from mergekit_lite.methods.registry import all_methods

    known = {method.name: method for method in all_methods().values() if method.public}
    if name is not None and name not in known:
        raise UsageError(f"there is no method `{name}`", hint=suggest(name, known))
    chosen = list(known.values()) if name is None else [known[name]]
    if json:
        found = [manual.as_json(method) for method in chosen]
        show.json(found if name is None else found[0])
    elif markdown:
        show.text(manual.page(known) if name is None else manual.section(known[name]))
    elif name is None:
        rows = [(m.name, manual.inputs(m), manual.spaces(m), m.summary) for m in chosen]
        show.table(["method", "inputs", "takes → gives", "what it does"], rows)
        show.note("`merge methods NAME` explains one, with its settings and an example")
    else:
        _explain(known[name])


def _explain(method: Method) -> None:
    from mergekit_lite.cli import manual

    show.line(method.signature(), "bold")
    show.line()
    show.text(method.doc + "\n")
    show.line()
    for key, value in manual.facts(method):
        show.line(f"{key:<7} {value}")
    rows = manual.settings(method)
    if rows:
        show.line()
        show.table(list(manual.SETTINGS), rows)
    show.line()
    show.line("example", "bold")
    show.line()
    show.text(manual.example(method))
