"""torch's own threads, switched off while this program's are at work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """torch splits long sums over its own threads and then adds up in another order; within, it does not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
