"""What a run did, for whoever called it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergekit_lite.errors import Problem

if TYPE_CHECKING:
    from mergekit_lite.plan.model import Plan


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did. `shards` gives the BLAKE3 digest of every shard by output folder and file name; `nonfinite` (in
    the inputs), `output_nonfinite` and `overflow` count numbers by tensor; `changed` names the shards whose bytes
    differ from the recipe's lock; `alignments` gives figures of the orders of units that were found, by step; `notes`
    tell what of the inputs' configurations the outputs lack. `errors` gives, by output folder of an adapter and module,
    the norm of the change and the norm of what the factors leave of it; the same of weights that are stored in FP8 or
    decomposed. `decomposed` tells of the latter what plan/decompose.py does. `plan` is what was carried out, with all
    ranks of adapters known. `bytes_fetched` counts what this process read from the Hub by ranges. `linked` gives by
    output folder the bytes of shards that are files of other outputs under a further name; where such had to be copied,
    `bytes_written` counts the copies."""

    outputs: tuple[str, ...]
    shards: Mapping[str, Mapping[str, str]]
    seconds: float
    bytes_read: int
    bytes_written: int
    resumed: int
    nonfinite: Mapping[str, int]
    overflow: Mapping[str, int]
    changed: tuple[str, ...] = ()
    alignments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[Problem, ...] = ()
    output_nonfinite: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    decomposed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    plan: Plan | None = None
    bytes_fetched: int = 0
    linked: Mapping[str, int] = field(default_factory=dict)
