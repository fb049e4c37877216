"""Whether this machine and this Python have what merging needs."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from mergekit_lite.checkpoint.meta import DTYPE_NAMES
from mergekit_lite.checkpoint.writer import free_bytes
from mergekit_lite.errors import InputError
from mergekit_lite.report.check import Check, fail, failures, few, ok, warn

OLDEST = (3, 10)
NEEDED = ("torch", "numpy", "safetensors", "PyYAML", "typer", "rich", "huggingface_hub", "accelerate")
USEFUL = ("transformers",)
LITTLE_MEMORY = 10**9
LITTLE_DISK = 10**9


def environment(colours: bool, threads: int, folder: Path) -> Iterator[Check]:
    """The checks, one after the other. `colours` is whether the caller prints in colours, `threads` how many a run
    would use, `folder` where it would write."""
    yield _python()
    yield from map(_package, NEEDED)
    for name in USEFUL:
        found = _version(name)
        yield ok(name, found or "not installed, and not needed: it loads merged models")
    yield _dtypes()
    yield ok("cores", f"{threads} for this process, {os.cpu_count() or 1} in the machine")
    yield _memory()
    yield _disk(folder)
    yield from _plugins()
    yield _hub()
    yield ok("colours", "shown" if colours else "not shown: no terminal, or NO_COLOR is set")


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < OLDEST:
        return fail("python", found, f"install Python {OLDEST[0]}.{OLDEST[1]} or newer")
    return ok("python", found)


def _package(name: str) -> Check:
    found = _version(name)
    if found is None:
        return fail(name, "not installed", f"install it: `{Path(sys.executable).name} -m pip install {name}`")
    return ok(name, found)


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


def _memory() -> Check:
    total, free = _memory_bytes()
    if total is None:
        return ok("memory", "not known on this system")
    detail = f"{total / 1e9:.1f} GB"
    if free is None:
        return ok("memory", detail)
    detail = f"{free / 1e9:.1f} GB free of {detail}"
    if free < LITTLE_MEMORY:
        return warn("memory", detail, "`--threads 1` needs the least")
    return ok("memory", detail)


def _memory_bytes() -> tuple[int | None, int | None]:
    """Bytes of memory in all and available, each None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names:
            return None, None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    fields = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    total, free = (int(fields[key][0]) * 1024 if key in fields else None for key in ("MemTotal", "MemAvailable"))
    return total, free


def _disk(folder: Path) -> Check:
    free = free_bytes(folder)
    detail = f"{free / 1e9:.1f} GB free in `{folder}`"
    if free < LITTLE_DISK:
        return warn("disk", detail, "make room, or write elsewhere with `--out`")
    return ok("disk", detail)


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


def _hub() -> Check:
    if importlib.util.find_spec("huggingface_hub") is None:
        return fail("hub", "huggingface_hub is not installed")
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return warn("hub", "HF_HUB_OFFLINE is set: only models in the cache are found", "unset it to download models")
    return ok("hub", f"HF_HUB_OFFLINE is not set; cache in `{constants.HF_HUB_CACHE}`")
