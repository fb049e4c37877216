"""`merge convert`: a recipe in tidy native YAML, as JSON, or the language's schema."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from mergekit_lite.cli import options, show
from mergekit_lite.cli.confine import check_inside
from mergekit_lite.errors import UsageError


def convert(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A recipe in YAML.", show_default=False)
    ] = None,
    set_: options.Set = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write to a new file, not to stdout.", show_default=False),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipes, for an editor; needs no recipe.")
    ] = False,
    sandbox: options.Sandbox = None,
    json: options.Json = False,
) -> None:
    """Print a recipe in tidy form, checked and with --set applied.

    A recipe of mergekit's is printed in the native language. Defaults are left out and short parts stand on one line;
    comments are not kept. --json prints the resolved recipe with every default in it.
    """
    if schema:
        from mergekit_lite.methods.registry import all_methods
        from mergekit_lite.plan.schema import schema as recipe_schema

        _give(recipe_schema(all_methods()), out)
        return
    if recipe is None:
        raise UsageError("missing argument `RECIPE`", hint="name a recipe, or ask for the `--schema`")
    from mergekit_lite import merge
    from mergekit_lite.recipe.write import resolved, to_yaml

    read = merge.load_recipe(recipe, set_ or ())
    show.warnings(read.notes)
    _give(resolved(read) if json else to_yaml(read), out)


def _give(result: object, out: Path | None) -> None:
    """Text or data for JSON to stdout, or to a file that does not exist yet."""
    check_inside((), None, out)
    if out is None:
        if isinstance(result, str):
            show.text(result)
        else:
            show.json(result)
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(result if isinstance(result, str) else jsonlib.dumps(result, indent=2) + "\n")
    except FileExistsError:
        raise UsageError(f"`{out}` exists", hint="name a new file: nothing is ever overwritten") from None
    except OSError as fault:
        raise UsageError(f"cannot write `{out}`: {fault.strerror}", hint="choose another place for it") from fault
    show.note(f"wrote {out}")
