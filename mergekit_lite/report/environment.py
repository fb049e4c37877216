"""Whether this machine and this Python have what merging needs."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from mergekit_lite.checkpoint.meta import DTYPE_NAMES
from mergekit_lite.errors import InputError
from mergekit_lite.report.check import Check, fail, failures, few, ok, warn
from mergekit_lite.report.disk import disk
from mergekit_lite.report.machine import machine
from mergekit_lite.report.reach import reach

OLDEST = (3, 10)
USEFUL = ("transformers",)


def environment(colours: bool, threads: int, folder: Path, offline: bool = False) -> Iterator[Check]:
    """The checks, one after the other. `colours` is whether the caller prints in colours, `threads` how many a run
    would use, `folder` where it would write; with `offline` the Hub is not asked."""
    yield _python()
    yield from _packages()
    for name in USEFUL:
        found = _version(name)
        yield ok(name, found or "not installed, and not needed: it loads merged models")
    yield _dtypes()
    yield from machine(threads)
    yield from disk(folder)
    yield from _plugins()
    if importlib.util.find_spec("huggingface_hub") is None:
        yield fail("hub", "huggingface_hub is not installed")
    else:
        yield from reach(offline)
    yield ok("colours", "shown" if colours else "not shown: no terminal, or NO_COLOR is set")


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < OLDEST:
        return fail("python", found, f"install Python {OLDEST[0]}.{OLDEST[1]} or newer")
    return ok("python", found)


def _packages() -> Iterator[Check]:
    """The packages that this one needs, by the ranges in its own metadata, which are those of pyproject.toml."""
    try:
        wanted = [Requirement(text) for text in metadata.requires("mergekit_lite") or ()]
    except metadata.PackageNotFoundError:
        hint = f"install it: `{Path(sys.executable).name} -m pip install -e FOLDER`"
        yield warn("packages", "mergekit_lite is not installed, so which versions it needs is not known", hint)
        return
    for needed in wanted:
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        found = _version(needed.name)
        hint = f"install it: `{Path(sys.executable).name} -m pip install '{needed.name}{needed.specifier}'`"
        if found is None:
            yield fail(needed.name, "not installed", hint)
        elif not needed.specifier.contains(found, prereleases=True):
            yield fail(needed.name, f"{found}, but {needed.specifier} is needed", hint)
        else:
            yield ok(needed.name, found)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _dtypes() -> Check:
    if importlib.util.find_spec("torch") is None:
        return fail("dtypes", "unknown without torch")
    from mergekit_lite.checkpoint.dtype import TORCH_DTYPES

    lacking = [code for code in DTYPE_NAMES if code not in TORCH_DTYPES]
    if lacking:
        return warn("dtypes", f"this torch lacks {', '.join(lacking)}", "a newer torch reads them as numbers")
    return ok("dtypes", f"torch has all {len(DTYPE_NAMES)} that a checkpoint may hold")


def _plugins() -> Iterator[Check]:
    from mergekit_lite.methods.registry import GROUP, all_methods

    try:
        methods = all_methods()
    except InputError as error:
        yield from failures("plugins", error.problems)
        return
    names = sorted({entry.dist.name if entry.dist else entry.value for entry in metadata.entry_points(group=GROUP)})
    outside = f"methods of {few(names)} among them" if names else "no package adds any"
    yield ok("plugins", f"{len(methods)} methods, {outside}")
