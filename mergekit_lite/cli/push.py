"""`merge push`: publish an output on the Hub, once it has been verified."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_lite.cli import bar, options, show
from mergekit_lite.cli.confine import check_inside
from mergekit_lite.errors import InputError, Mark, MergeError, Problem, StoppedError, UsageError
from mergekit_lite.redact import secret

if TYPE_CHECKING:
    from mergekit_lite.plan.model import Plan
    from mergekit_lite.publish.push import Pushed
    from mergekit_lite.recipe.model import Push
    from mergekit_lite.report.verify import Verdict


def push(
    output: Annotated[str, typer.Argument(metavar="OUT", help="The folder of a finished run.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The repository, owner/name.", show_default=False)],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Who may see a new repository; left out, only you.", show_default=False
        ),
    ] = None,
    branch: Annotated[
        str | None,
        typer.Option("--branch", metavar="B", help="Commit to this branch, made if need be.", show_default=False),
    ] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead of a commit.")] = False,
    message: Annotated[
        str | None, typer.Option("--message", metavar="M", help="The commit's message.", show_default=False)
    ] = None,
    offline: options.Offline = False,
    sandbox: options.Sandbox = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Publish an output on the Hub: weights, configuration, tokenizer, recipe, lock and model card.

    It is verified first, as by `merge verify`, and nothing is sent where a file is not as its lock says. A push that
    was stopped goes on with the same command and sends only what is missing; one that finds nothing new commits
    nothing. A model card that you have changed, here or on the Hub, is never overwritten. With --offline or --sandbox
    nothing is read or sent: both refuse.
    """
    check_inside([output])
    wanted = _wanted(repo, private, branch, pr, message)
    from mergekit_lite import merge

    done, faults = publish(output, wanted, threads or merge.default_threads(), offline)
    if json:
        show.json(as_json(done, faults))
    elif done is not None:
        tell(done)
    if faults:
        raise typer.Exit(1)


def publish(output: str, wanted: Push, threads: int, offline: bool = False) -> tuple[Pushed | None, list[str]]:
    """Verify an output and push it as `wanted`; the faults, told already, where it is not as its lock says."""
    from mergekit_lite.publish.push import check_ready
    from mergekit_lite.publish.push import push as send

    check_ready(wanted.repo, offline)  # before gigabytes are read
    found = _verified(output, threads)
    if found.faults:
        for fault in found.faults:
            place = f"{fault.file}  {fault.tensor}" if fault.tensor is not None else fault.file
            show.note(f"fail  {place}: {fault.message}", "bold red")
        show.note(f"not pushed: {output} is not as its lock says")
        return None, [f"{fault.file}: {fault.message}" for fault in found.faults]
    assert found.recipe is not None
    outputs = (found.recipe.lock or {})["outputs"]
    number = next(n for n, said in enumerate(outputs) if str(said.get("to", "")) == found.to)
    if not found.files:
        hint = "run the recipe again: the new lock says which files belong to the output"
        raise InputError(f"the lock in `{output}` is of an earlier version, and tells of the shards only", hint=hint)
    done = send(found.folder, found.recipe, number, wanted)
    show.warnings([Problem(note) for note in done.notes])
    return done, []


def push_all(plan: Plan, threads: int) -> list[Pushed]:
    """Publish the outputs of a finished run as its recipe says. Raises StoppedError where that fails, with the command
    that does it later; the outputs are whole."""
    done = []
    for save, output in zip(plan.recipe.saves, plan.outputs, strict=True):
        wanted = save.push
        if wanted is None:
            continue
        words = [output.to, wanted.repo, *(["--branch", wanted.branch] if wanted.branch else [])]
        words += ["--pr"] if wanted.pr else []
        words += [] if wanted.private is None else ["--private" if wanted.private else "--public"]
        later = f"the output is whole; `merge push {shlex.join(words)}` publishes it"
        try:
            pushed, faults = publish(output.to, wanted, threads)
        except MergeError as error:
            hints = [f"{problem.hint}; {later}" if problem.hint else later for problem in error.problems]
            found = [replace(p, hint=hint) for p, hint in zip(error.problems, hints, strict=True)]
            raise StoppedError(found) from error
        if faults:
            message = f"not pushed to `{wanted.repo}`: `{output.to}` is not as its lock says"
            raise StoppedError(message, hint=f"`merge verify {shlex.quote(output.to)}` lists the faults")
        assert pushed is not None
        done.append(pushed)
    return done


def _verified(output: str, threads: int) -> Verdict:
    from mergekit_lite.report.verify import verify

    with contextlib.ExitStack() as display:

        def start(total: int) -> Callable[[int], None]:
            return display.enter_context(bar.reading("verify", total))

        return verify(output, threads=threads, start=start)


def _wanted(repo: str, private: bool | None, branch: str | None, pr: bool, message: str | None) -> Push:
    """The options as a recipe's `push` has them. Raises UsageError with what a recipe could not say either."""
    from mergekit_lite.recipe.model import Push
    from mergekit_lite.recipe.push import fits

    problems = []
    if branch is not None and pr:
        hint = "leave one of the two out: a pull request is a branch of its own"
        problems.append(Problem("`--branch` and `--pr` do not go together", None, hint))
    if branch is not None and not fits("branch", branch):
        problems.append(
            Problem(f"`{branch}` cannot be the name of a branch", None, "for example `--branch second-try`")
        )
    if message is not None and not fits("message", message):
        problems.append(Problem("the message of a commit is one line of at most 500 characters"))
    if message is not None and secret(message):
        problems.append(
            Problem("the message holds a token or a password", None, "everyone who sees the commit reads it")
        )
    if problems:
        raise UsageError(problems)
    return Push(repo, Mark("", 0, 0), private, branch, pr, message)


def tell(done: Pushed) -> None:
    """What a push did, in a line."""
    where = done.repo if done.branch == "main" else f"{done.repo}, branch {done.branch}"
    if done.commit is None:
        show.line(f"nothing has changed: {where} has these files already · {done.url}")
        return
    kind = "private" if done.private else "public"
    parts = [
        f"pushed to {where}, {'new and ' if done.made else ''}{kind}",
        f"{show.count(len(done.files), 'file')}, {show.size(done.nbytes)}",
        *([f"{show.count(len(done.removed), 'file')} of an earlier push removed"] if done.removed else []),
        done.url,
    ]
    show.line(" · ".join(parts))


def as_json(done: Pushed | None, faults: list[str]) -> dict[str, Any]:
    """A push as data for JSON. `commit` is null where nothing had changed, and where nothing was pushed."""
    if done is None:
        return {"pushed": False, "faults": faults}
    return {
        "pushed": done.commit is not None,
        "repo": done.repo,
        "url": done.url,
        "commit": done.commit,
        "branch": done.branch,
        "private": done.private,
        "new": done.made,
        "files": list(done.files),
        "removed": list(done.removed),
        "bytes": done.nbytes,
        "notes": list(done.notes),
        "faults": [],
    }
