"""Numbers for people: sizes, counts, durations, shapes. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def size(nbytes: float) -> str:
    """Bytes in decimal units: `13.5 GB`, `987 bytes`."""
    if nbytes < 1000:
        return f"{nbytes:.0f} byte" + ("" if round(nbytes) == 1 else "s")
    power, unit = next(((p, u) for p, u in enumerate(("kB", "MB", "GB"), 1) if nbytes < 999.95 * 1000**p), (4, "TB"))
    return f"{nbytes / 1000**power:.1f} {unit}"


def count(number: int, noun: str) -> str:
    """`1 shard`, `3 shards`, `1,024 tensors`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def seconds(duration: float) -> str:
    """`0.4 s`, `14.2 s`, `3 min 5 s`, `1 h 20 min`."""
    if duration < 59.95:
        return f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def about(duration: float) -> str:
    """A duration that is known roughly: `about 5 s`, `about 4 min`, `about 1 h 20 min`."""
    if duration < 59.5:
        return f"about {max(1, round(duration))} s"
    hours, minutes = divmod(round(duration / 60), 60)
    return f"about {hours} h {minutes} min" if hours else f"about {minutes} min"


def shape(sizes: Sequence[int]) -> str:
    """The shape of a tensor: `4096×128`, `scalar`."""
    return "×".join(map(str, sizes)) or "scalar"


def few(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are: "`a`, `b` and 3 more"."""
    names = list(names)
    shown = ", ".join(f"`{name[:200]}`" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
