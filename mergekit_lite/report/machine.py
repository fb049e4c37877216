"""What this machine gives a merge: cores, memory, open files, GPUs. What a container is allowed counts, not what the
machine under it has."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mergekit_lite.report.check import Check, fail, ok, warn

LITTLE_MEMORY = 10**9
FEW_FILES = 1024  # open at once: a run holds a file open for every shard that it reads or writes
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
DRIVER = Path("/sys/module/nvidia/version")
_NONE = 1 << 60  # bytes: what a limit of version 1 says where there is none is more


@dataclass(frozen=True, slots=True)
class Limits:
    """What the control groups of this process allow, None where they set no limit: bytes of `memory` in all, and how
    many of them are `free`; `cores` of processor time."""

    memory: int | None = None
    free: int | None = None
    cores: float | None = None


def machine(threads: int) -> Iterator[Check]:
    """The checks; `threads` is how many a run would use."""
    limits = cgroup_limits()
    yield cores(threads, limits)
    yield memory(limits)
    yield open_files()
    yield gpus()


def cores(threads: int, limits: Limits) -> Check:
    detail = f"{threads} for this process, {os.cpu_count() or 1} in the machine"
    if limits.cores is not None and limits.cores < threads:
        hint = f"more threads than that wait for one another: use `--threads {max(1, math.ceil(limits.cores))}`"
        return warn("cores", f"{detail}, and a limit of {limits.cores:g} on the container", hint)
    return ok("cores", detail)


def memory(limits: Limits) -> Check:
    total, free = memory_bytes()
    where = ""
    if limits.memory is not None and (total is None or limits.memory < total):
        total, where = limits.memory, ", the limit of the container"
        free = limits.free if free is None or limits.free is None else min(free, limits.free)
    if total is None:
        return ok("memory", "not known on this system")
    detail = f"{total / 1e9:.1f} GB{where}"
    if free is None:
        return ok("memory", detail)
    detail = f"{free / 1e9:.1f} GB free of {detail}"
    if free < LITTLE_MEMORY:
        return warn("memory", detail, "`--threads 1` needs the least, `--memory` keeps a run within what it says")
    return ok("memory", detail)


def memory_bytes() -> tuple[int | None, int | None]:
    """Bytes of the machine's memory in all and available, each None where the system does not say."""
    try:
        lines = (PROC / "meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names:
            return None, None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    fields = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    total, free = (int(fields[key][0]) * 1024 if key in fields else None for key in ("MemTotal", "MemAvailable"))
    return total, free


def cgroup_limits(proc: Path = PROC, groups: Path = CGROUPS) -> Limits:
    """The tightest limits of this process's control groups and of those above them, of version 2 and of version 1."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):
        return Limits()
    found: list[tuple[int, int]] = []  # bytes of memory: the limit, and how many of them are free
    quotas: list[float] = []
    for line in lines:
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        for name in names.split(","):  # empty in version 2
            for place in _upward(groups / name, path):
                if name in ("", "memory"):
                    most = _number(place, "memory.max" if not name else "memory.limit_in_bytes")
                    if most is not None and most < _NONE:
                        used = _number(place, "memory.current" if not name else "memory.usage_in_bytes") or 0
                        # Pages of files that nobody uses are given up when others need them.
                        idle = _stat(place, "inactive_file" if not name else "total_inactive_file")
                        found.append((most, max(0, most - max(0, used - idle))))
                if name in ("", "cpu"):
                    quotas += _quota(place)
    if not found:
        return Limits(cores=min(quotas, default=None))
    return Limits(min(most for most, _ in found), min(free for _, free in found), min(quotas, default=None))


def _upward(root: Path, path: str) -> Iterator[Path]:
    """The group and all above it. In a container `path` may be the host's, of which only the root is to be seen."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for count in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:count])


def _quota(place: Path) -> list[float]:
    try:
        quota, period = (place / "cpu.max").read_text(encoding="ascii").split()[:2]
    except (OSError, ValueError):
        of, each = _number(place, "cpu.cfs_quota_us"), _number(place, "cpu.cfs_period_us")
        return [of / each] if of is not None and of > 0 and each else []
    return [int(quota) / int(period)] if quota.isdecimal() and period.isdecimal() and int(period) else []


def _number(place: Path, name: str) -> int | None:
    try:
        return int((place / name).read_text(encoding="ascii"))
    except (OSError, ValueError):  # `max` is no number
        return None


def _stat(place: Path, key: str) -> int:
    try:
        lines = (place / "memory.stat").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)
    except (OSError, ValueError, IndexError):
        return 0


def open_files() -> Check:
    try:
        import resource
    except ImportError:  # Windows
        return ok("open files", "not known on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return ok("open files", "no limit")
    most = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    detail = f"{soft:,} at once, {most} if asked for"
    if soft < FEW_FILES:
        return warn("open files", detail, f"models of many shards need more: `ulimit -n {4 * FEW_FILES}` before a run")
    return ok("open files", detail)


def gpus() -> Check:
    """What torch can use beside the CPU. No merge needs a GPU, so only one that should work and does not is told."""
    if importlib.util.find_spec("torch") is None:
        return fail("gpu", "unknown without torch")
    from mergekit_lite.run.device import graphics

    found = graphics()
    try:
        driver = f"driver {DRIVER.read_text(encoding='ascii').strip()}"
    except (OSError, UnicodeError):
        driver = ""
    if found.names:
        return ok("gpu", "; ".join([*found.names, *([driver] if driver else []), f"torch for CUDA {found.built_for}"]))
    if found.built_for is None:
        what = f"; {driver} is there, but this torch was built without CUDA" if driver else ""
        return ok("gpu", f"none that torch can use, and none is needed{what}")
    if not driver:
        return ok("gpu", f"none: torch for CUDA {found.built_for}, but no driver; none is needed")
    can = f", which goes up to CUDA {found.driver_for}," if found.driver_for else ""
    hint = "update the driver, install a torch for an older CUDA, or leave out `--device`: the CPU needs neither"
    return warn("gpu", f"torch for CUDA {found.built_for} finds none with {driver}{can} installed", hint)
