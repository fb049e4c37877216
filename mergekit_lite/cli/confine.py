"""`--sandbox DIR`: what the commands do about it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mergekit_lite import sandbox
from mergekit_lite.errors import UsageError


def confine(folder: Path | None) -> Path | None:
    """Called with the option's value before the command's work; app.py leaves the sandbox after it. Raises UsageError
    where there is no such folder, and where several processes share a merge: they need a network to speak."""
    if folder is not None:
        from mergekit_lite.run.ranks import launched

        if launched().count > 1:
            hint = "run it as one process: a sandbox has no network, and ranks speak over one"
            raise UsageError("`--sandbox` does not go together with several processes", hint=hint)
        sandbox.enter(folder)
    return folder


def check_inside(locations: Iterable[str] = (), family: str | None = None, *files: Path | None) -> None:
    """Raises UsageError with all of what a command line names outside of the sandbox, if there is one: checkpoints,
    which may be on the Hub, the `--family`, files to read or to write."""
    box = sandbox.current()
    if box is None:
        return
    from mergekit_lite.checkpoint.hub import is_hub_id
    from mergekit_lite.checkpoint.masks import split_task
    from mergekit_lite.family.data import families
    from mergekit_lite.recipe.location import split_location

    places = [split_task(split_location(text)[0])[0] for text in locations]
    found = [box.refusal(place, hub=is_hub_id(place)) for place in places]
    if family is not None and family not in {known.name for known in families().values()}:
        found.append(box.refusal(family))
    found += [box.refusal(file) for file in files if file is not None]
    problems = [problem for problem in found if problem is not None]
    if problems:
        raise UsageError(problems)
