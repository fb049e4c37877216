"""What a process holds before it computes the first block: Python, torch and other libraries, the plan."""

from __future__ import annotations

from mergekit_lite.plan.model import Plan

# Where the system does not say: Python with NumPy, and torch on top of it.
PYTHON, TORCH = 48_000_000, 200_000_000
RANKS = 16_000_000  # bytes of accelerate's process group and its threads


def standing(plan: Plan) -> int:
    """Bytes of anonymous memory that this process will hold when it begins with the blocks of `plan`. Measured: what
    the run would import is imported here, since torch takes from 130 to several hundred MB, as it was built."""
    computes = bool(plan.alignments) or not all(unit.targets[0][1].copied for unit in plan.units)
    more = 0
    if computes:
        import mergekit_lite.run.compute
    if plan.alignments:
        import mergekit_lite.run.alignment  # noqa: F401
    from mergekit_lite.run.ranks import launched, load

    if launched().count > 1:
        load()
        more = RANKS
    found = anonymous()
    return (found if found is not None else PYTHON + TORCH * computes) + more


def anonymous() -> int | None:
    """Bytes of anonymous memory of this process, None where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:")), None)
    except (OSError, ValueError):
        return None
