"""`merge`: the command line. One file per command beside this one.

A command is a function of its options. It prints through `show`, raises the errors of errors.py, and `typer.Exit(1)`
where its answer is no (`diff` differs, `doctor` fails, `verify` and `push` find a fault, `plan --check` a stale lock).
Exit codes: 0 done, 1 the answer is no, 2 bad command line, 3 recipe rejected, 4 bad input, 5 stopped, 70 a bug of this
program, 130 interrupted, 141 whoever read stdout is gone.

Nothing here or in a command's module level may import torch, transformers or huggingface_hub: `merge --help` is quick.
"""

from __future__ import annotations

import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mergekit_lite import redact, sandbox
from mergekit_lite.cli import log, show
from mergekit_lite.cli.convert import convert
from mergekit_lite.cli.diff import diff
from mergekit_lite.cli.doctor import doctor
from mergekit_lite.cli.inspect import inspect
from mergekit_lite.cli.methods import methods
from mergekit_lite.cli.path import path
from mergekit_lite.cli.plan import PlanCommand, plan
from mergekit_lite.cli.processor import choose_sorts, spare_threads
from mergekit_lite.cli.push import push
from mergekit_lite.cli.run import run
from mergekit_lite.cli.search import search
from mergekit_lite.cli.stats import stats
from mergekit_lite.cli.verify import verify
from mergekit_lite.errors import InterruptedRun, MergeError, Problem, StoppedError, UsageError, did_you_mean
from mergekit_lite.limits import refusal

COMMANDS = (run, plan, convert, methods, inspect, diff, path, search, stats, doctor, verify, push)
# The root of what a bad command line raises. Typer brings its own copy of Click since 0.26, and no public name for it.
BAD_COMMAND_LINE: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class Commands(TyperGroup):
    """The commands in the order of this file; a wrong name gets the nearest right one."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [command.__name__ for command in COMMANDS]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            near = did_you_mean(args[0], self.commands)
            hint = f"did you mean `merge {near}`?" if near else "`merge --help` lists them all"
            raise UsageError(Problem(f"there is no command `{args[0]}`", None, hint))
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="merge",
    cls=Commands,
    add_completion=False,
    no_args_is_help=False,
    invoke_without_command=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        show.line(f"mergekit_lite {_release()}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and leave.")
    ] = False,
) -> None:
    """Merge neural-network checkpoints from YAML recipes, streaming, in little memory."""
    if ctx.invoked_subcommand is None:
        show.text(ctx.get_help().rstrip())


for _command in COMMANDS:
    app.command(_command.__name__, cls=PlanCommand if _command is plan else None)(_command)


def main() -> None:
    """Run the program on the words of its command line and leave with its exit code."""
    # A terminal that cannot show a character gets its number instead of a crash.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = redact.stream(sys.stderr)  # what libraries and threads of Python's say goes there by itself
    choose_sorts()
    spare_threads()
    sys.exit(execute(sys.argv[1:]))


def execute(arguments: Sequence[str]) -> int:
    """Run one command and give its exit code. Errors go to stderr, with `--json` also to stdout."""
    redact.refresh()
    with log.as_events(arguments, _release) as events:
        code = _execute(arguments)
        if events is not None:
            events.end(code)
    return code


def _execute(arguments: Sequence[str]) -> int:
    as_json = "--json" in arguments[: arguments.index("--")] if "--" in arguments else "--json" in arguments
    try:
        try:
            code = _invoke(list(arguments))
        except MergeError as error:
            code = _report(error.problems, error.exit_code, as_json)
        except BAD_COMMAND_LINE as error:
            code = _report([_usage_problem(error, arguments)], UsageError.exit_code, as_json)
        except (KeyboardInterrupt, typer.Abort):
            code = _report([Problem("stopped by Ctrl-C")], InterruptedRun.exit_code, as_json)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more on its way out, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as fault:
        refused = refusal(fault)
        if refused is None:
            return _bug(fault, as_json)
        return _report([Problem(refused[0], None, refused[1])], StoppedError.exit_code, as_json)
    return code


def _invoke(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        with command.make_context("merge", arguments) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return leave.exit_code
    finally:
        sandbox.leave()
    return 0


def _report(problems: Sequence[Problem], code: int, as_json: bool) -> int:
    show.problems(problems)
    if as_json:
        show.json({"error": {"exit_code": code, "problems": [problem.as_json() for problem in problems]}})
    return code


def _usage_problem(error: Any, arguments: Sequence[str]) -> Problem:
    """What is wrong with the command line, in this program's words."""
    context = getattr(error, "ctx", None)
    known_command = bool(arguments) and arguments[0] in [command.__name__ for command in COMMANDS]
    path = f"merge {arguments[0]}" if known_command else "merge"
    hint = f"`{path} --help` explains it"
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):
        known = [name for param in context.command.params for name in param.opts] if context is not None else []
        near = did_you_mean(option, known)
        return Problem(f"`{path}` has no option `{option}`", None, f"did you mean `{near}`?" if near else hint)
    message = re.sub(r"'([^'\n]*)'", r"`\1`", error.format_message().strip().rstrip(".").replace("Value error, ", ""))
    return Problem(message[:1].lower() + message[1:], None, hint)


def _bug(fault: Exception, as_json: bool) -> int:
    message = f"this is a bug of mergekit_lite {_release()}: {type(fault).__name__}: {fault}"
    for text in traceback.format_exc().splitlines():
        show.note(text, "dim")
    hint = "please report it with the lines above, the recipe and the command, where you got mergekit_lite from"
    return _report([Problem(message, None, hint)], MergeError.exit_code, as_json)


def _release() -> str:
    from mergekit_lite.plan.lock import version

    return version("mergekit_lite")


if __name__ == "__main__":
    main()
