"""Permutations on disk: a safetensors file with one vector of 32-bit integers for each space that changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergekit_lite.align.apply import Order, Permutations, fault, is_identity
from mergekit_lite.checkpoint.inside import read_bytes
from mergekit_lite.errors import InputError, suggest
from mergekit_lite.family.spaces import Space

FORMAT = "mergekit_lite permutations"
MAX_BYTES = 1 << 30


def to_bytes(permutations: Permutations, figures: Mapping[str, Any]) -> bytes:
    """The file's content: p[i] is the old unit in slot i. `figures` go into its metadata as JSON."""
    from safetensors.numpy import save

    kept = {name: p.astype(np.int32) for name, p in sorted(permutations.items()) if not is_identity(p)}
    # One entry, since their order in the file is not the same in every run.
    return save(kept, {FORMAT: json.dumps(figures, sort_keys=True)})


def check_file(path: str, spaces: Sequence[Space]) -> str:
    """The SHA-256 of the file. Raises InputError where it is no such file or does not fit the spaces."""
    data = _read(path)
    _parse(path, data, spaces)
    return hashlib.sha256(data).hexdigest()


def read_file(path: str, spaces: Sequence[Space], digest: str | None = None) -> list[dict[str, Order]]:
    """The permutations in the file, for one model. Raises InputError as `check_file`, and where the file has another
    `digest`."""
    data = _read(path)
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise InputError(f"`{path}` has changed since the plan was made", hint="leave it alone and start again")
    return [_parse(path, data, spaces)]


def _read(path: str) -> bytes:
    hint = "`from` names a permute step, or a file that a run left under `permutations/`"
    try:
        return read_bytes(path, MAX_BYTES)
    except InputError as error:
        message = f"cannot read the permutations: {error.problems[0].message}"
        raise InputError(message, hint=hint) from None


def _parse(path: str, data: bytes, spaces: Sequence[Space]) -> dict[str, Order]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        found = load(data)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        hint = "take a file that a run left under `permutations/`"
        raise InputError(f"`{path}` is no file of permutations: {error}", hint=hint) from None
    named = {space.name: space for space in spaces}
    orders: dict[str, Order] = {}
    for name, values in found.items():
        if name not in named:
            hint = suggest(name, list(named)) or "was it made for another model?"
            raise InputError(f"`{path}` permutes `{name}`, a space that the model does not have", hint=hint)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise InputError(f"`{path}`: `{name}` is no vector of whole numbers", hint="was the file damaged?")
        orders[name] = values.astype(np.int64)
        wrong = fault(named[name], orders[name])
        if wrong:
            raise InputError(f"`{path}`: {wrong}", hint="was it made for another model?")
    return orders
