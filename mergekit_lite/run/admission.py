"""A budget of memory: a unit that needs whole matrices waits until there is room for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mergekit_lite.plan.model import Plan, Unit
from mergekit_lite.plan.peak import block_bytes, is_whole
from mergekit_lite.run.threads import return_freed_memory

WAIT = 0.2  # seconds between two looks at whether the run is to stop
SMALL = 1 << 24  # bytes of a unit that may stay with the allocator


class Admission:
    """Lets units of a plan with a budget in as long as they fit in its room together. No unit holds room while it waits
    and the plan has made sure that each fits by itself, so every one gets its turn. Without a budget all go in."""

    def __init__(self, plan: Plan, stopped: Callable[[], None]):
        """`stopped` is asked while a unit waits; it raises where the run is to stop."""
        self._memory = plan.memory
        self._block = plan.block
        self._stopped = stopped
        self._taken = 0
        self._change = threading.Condition()
        # Blocks fit in every thread at once.
        self._open = plan.memory is None or not any(is_whole(unit.nodes) for unit in plan.units)

    @contextmanager
    def of(self, unit: Unit) -> Iterator[None]:
        """Room for `unit` as long as the context lasts."""
        if self._open or self._memory is None:
            yield
            return
        needed = block_bytes(unit.nodes, self._block, self._memory.number)
        with self._change:
            while self._taken + needed > max(needed, self._memory.room):
                self._change.wait(WAIT)
                self._stopped()
            self._taken += needed
        try:
            yield
        finally:
            if needed > SMALL:
                return_freed_memory()
            with self._change:
                self._taken -= needed
                self._change.notify_all()
