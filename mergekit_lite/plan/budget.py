"""A merge within a given amount of memory: how many threads, how large blocks, or why it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mergekit_lite.checkpoint.remote import held
from mergekit_lite.errors import Problem, RecipeError, UsageError
from mergekit_lite.plan.model import Memory, Plan
from mergekit_lite.plan.order import BLOCK, GRAIN
from mergekit_lite.plan.peak import THREAD, Need, Peak, peak_bytes, peak_of
from mergekit_lite.plan.streaming import far_files, streams
from mergekit_lite.plan.words import count, size
from mergekit_lite.recipe.save import read_size

# Two runs of one program do not hold the same to the byte: the figure that is named leaves room for it.
APART = 6_000_000
FIGURE = 1_000_000  # the figure that is named is a multiple of this
RESERVE = 12_000_000  # bytes for digests, the journal, the display and what libraries set up when first used
UNIT = 1500  # bytes kept of a unit that is done, until the end of the run


@dataclass(frozen=True, slots=True)
class _Way:
    """One way of going about a plan: its costliest work for one thread, and bytes of the whole process."""

    threads: int
    block: int
    peak: Peak
    standing: int
    buffers: int  # bytes for each thread, of what is read from the Hub

    @property
    def fixed(self) -> int:
        return self.standing + self.peak.shared + (THREAD + self.buffers) * self.threads

    @property
    def nbytes(self) -> int:
        """The least that will do: every thread at blocks or statistics, or one thread at the largest matrix."""
        peak = self.peak
        shared = max(need.nbytes for need in (peak.blocks, peak.pools, peak.alignments))
        return self.fixed + max(shared * self.threads, peak.whole.nbytes)

    @property
    def worst(self) -> Need:
        return self.peak.worst


def memory_bytes(value: int | str) -> int:
    """A budget as a recipe would write a size: `300MB`, `1.5GiB`, or a number of bytes. Raises UsageError."""
    text = value.strip() if isinstance(value, str) else value
    found = read_size(int(text) if isinstance(text, str) and text.isascii() and text.isdecimal() else text)
    if found is None:
        message = f"`--memory` must be a size above 0, not `{value}`"
        raise UsageError(message, hint="for example `300MB`, `1.5GiB` or a number of bytes")
    return found


def within(plan: Plan, budget: int, standing: int, threads: int | None, block: int | None, most: int = 1) -> Plan:
    """`plan` with the threads and the block size that keep its whole process within `budget` bytes, of which
    `standing` are taken before the first block is computed.

    `threads` and `block` are those asked for, None where the planner is free: it takes `most` threads and the largest
    block that fit, and gives up block size before threads. Raises RecipeError, with the smallest figure that would do,
    where nothing fits.
    """
    number = 8 if plan.recipe.compute == "float64" else 4
    buffers = _buffers(plan)
    standing += RESERVE + UNIT * len(plan.units) + _kept(plan)
    blocks = [block] if block is not None else [BLOCK >> shift for shift in range((BLOCK // GRAIN).bit_length())]
    peaks = {b: peak_of(plan.units, plan.pools, plan.alignments, b, number) for b in blocks}

    def ways() -> Iterator[_Way]:
        for t in [threads] if threads is not None else range(most, 0, -1):
            for b in blocks:
                yield _Way(t, b, peaks[b], standing, buffers)

    way = next((way for way in ways() if way.nbytes <= budget), None)
    if way is None:
        raise RecipeError(_refusal(min(ways(), key=lambda way: way.nbytes), budget, threads, block))
    room = budget - way.fixed
    largest = min(room, way.worst.nbytes * way.threads)
    return replace(
        plan,
        threads=way.threads,
        block=way.block,
        peak_bytes=min(peak_bytes(way.peak, way.threads), largest + THREAD * way.threads + way.peak.shared)
        + buffers * way.threads,
        memory=Memory(budget, way.fixed + largest, room, number),
    )


def with_buffers(plan: Plan) -> Plan:
    """`plan`, its peak with what is held of inputs that are read from the Hub."""
    return replace(plan, peak_bytes=plan.peak_bytes + _buffers(plan) * plan.threads)


def _buffers(plan: Plan) -> int:
    """Bytes that each thread holds of inputs that are read from the Hub."""
    return held(streams(plan)) if far_files(plan) else 0


def check_budget(plan: Plan, threads: int | None, block: int | None, device: str) -> None:
    """Raise UsageError where a run with these settings would not keep the budget of `plan`."""
    if device != "cpu":
        message = f"`--memory` is for `--device cpu`, not for `{device}`"
        raise UsageError(message, hint="how much a GPU's driver takes cannot be known before: leave out one of the two")
    if (threads or plan.threads) > plan.threads or (block or plan.block) > plan.block:
        what = f"{count(plan.threads, 'thread')} and blocks of {plan.block:,}"
        raise UsageError(f"the plan keeps within its memory with {what}", hint="give `plan` the same settings as `run`")


def _kept(plan: Plan) -> int:
    """Bytes of the orders of units, which are kept as arrays and once more as lists for the journal."""
    total = 0
    for alignment in plan.alignments.values():
        chosen = [space for space in alignment.spaces if space.kind in alignment.kinds]
        total += 100 * len(alignment.labels) * sum(space.size for space in chosen)
        total += 100 * sum(layer.count * (layer.units + 1) for layer in alignment.layers)
    return total


def _refusal(least: _Way, budget: int, threads: int | None, block: int | None) -> Problem:
    figure = -(-(least.nbytes + APART) // FIGURE) * FIGURE
    parts = [f"Python, its libraries and the plan take {size(least.standing)}"]
    worst = least.worst
    times = "" if worst is least.peak.whole or least.threads == 1 else f" in each of {least.threads} threads"
    if worst.text:
        parts.append(f"{worst.text}: {size(worst.nbytes)}{times}")
    parts.append(f"{count(least.threads, 'thread')}: {size(THREAD * least.threads)}")
    if least.peak.shared:
        parts.append(f"the rows that sums are found in: {size(least.peak.shared)}")
    if least.buffers:
        parts.append(f"what they read from the Hub: {size(least.buffers * least.threads)}")
    given = [f"`--{name} {value}`" for name, value in (("threads", threads), ("block", block)) if value is not None]
    hint = f"`--memory {figure // FIGURE}MB` is the least that does" + (f" with {' and '.join(given)}" if given else "")
    return Problem(f"this merge does not fit into {size(budget)}: {'; '.join(parts)}", None, hint)
