"""Rows of a vocabulary in the order of another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.registry import method


@method(reach="row", row_axis="first", gathers=True, inputs=(1, None), public=False)
def remapped(xs: Sequence[Tensor], rows: Any, own: int | None) -> Tensor:
    """Bring a tensor with a row for every token to another vocabulary.

    `rows` says for each row of the result from which of `xs` it is taken, and which row of it; `own` is the number of
    the tensor itself among them.
    """
    raise TypeError("`remapped` is carried out by the run, which reads no more than the rows that are needed")
