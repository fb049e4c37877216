"""What must hold before anything is written: where outputs may lie, and where they are pushed to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mergekit_lite.checkpoint.hub import is_hub_id
from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import Mark, Problem
from mergekit_lite.recipe.model import Save


def check_places(saves: Sequence[tuple[Save, Path]], checkpoints: Mapping[str, Checkpoint]) -> list[Problem]:
    """Faults of the output folders: inside an input, or over something that the user has."""
    problems: list[Problem] = []
    for save, to in saves:
        target = to.resolve()
        for location, home in _homes(checkpoints):
            folder = home.resolve()
            if target == folder or folder in target.parents:
                message = f"the output `{to}` lies inside the input `{location}`"
                problems.append(Problem(message, save.mark, "choose a folder outside the inputs"))
                break
        else:
            problems += _occupied(to, save.mark)
    return problems


def check_pushes(saves: Sequence[Save]) -> list[Problem]:
    """Faults of the repositories to push to: one that is no id of the Hub, or one place for two outputs."""
    problems: list[Problem] = []
    taken: dict[tuple[str, str | None], int] = {}
    for push in [save.push for save in saves if save.push is not None]:
        if not is_hub_id(push.repo):
            hint = "`owner/name`: letters, digits, `-`, `_` and `.`, at most 96 characters, no `--` and no `..`"
            problems.append(Problem(f"`{push.repo}` cannot be a repository of the Hub", push.mark, hint))
        line = taken.setdefault((push.repo, push.branch), push.mark.line)
        if line != push.mark.line and not push.pr:
            hint = f"the save on line {line} goes there; give each a repository or a branch of its own"
            problems.append(Problem(f"two outputs are pushed to `{push.repo}`", push.mark, hint))
    return problems


def _homes(checkpoints: Mapping[str, Checkpoint]) -> Iterator[tuple[str, Path]]:
    """The inputs' folders, each with the input's location."""
    for checkpoint in checkpoints.values():
        # A single file's folder belongs to nobody: an output may lie beside it.
        if checkpoint.folder is not None and not os.path.isfile(os.path.expanduser(checkpoint.location)):
            yield checkpoint.location, checkpoint.folder
        if checkpoint.adapter is not None:
            yield checkpoint.adapter.location, checkpoint.adapter.folder


def _occupied(to: Path, mark: Mark) -> list[Problem]:
    if to.name in ("", ".."):
        hint = "write the folder's own name, such as `out/merged`"
        return [Problem(f"the output `{to}` does not end in the name of a folder", mark, hint)]
    for parent in to.parents:
        if parent.exists() and not parent.is_dir():
            return [Problem(f"the output `{to}` lies below a file: `{parent}`", mark, "choose another folder")]
    if to.is_symlink() or (to.exists() and not to.is_dir()):
        return [Problem(f"the output `{to}` exists and is not a folder", mark, "choose another folder")]
    if to.is_dir() and any(to.iterdir()):
        hint = "choose another folder, or move that one away: nothing is ever overwritten"
        return [Problem(f"the output folder `{to}` exists and is not empty", mark, hint)]
    return []
