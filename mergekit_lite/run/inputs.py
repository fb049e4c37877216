"""Where a run reads its inputs: from the disk, or from the Hub by ranges. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.hub import fetch_beside
from mergekit_lite.checkpoint.meta import Checkpoint, ShardFile
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.remote import Inputs, RemoteReader
from mergekit_lite.checkpoint.source import Source
from mergekit_lite.errors import InputError
from mergekit_lite.plan.model import Plan
from mergekit_lite.plan.streaming import spool_bytes, streams
from mergekit_lite.run.sink import partial


def inputs_of(plan: Plan, threads: int) -> Source:
    """What reads the inputs of `plan` for `threads` threads."""
    shards = [shard for checkpoint in plan.checkpoints.values() for shard in checkpoint.shards]
    folder = partial(plan.outputs[0].to)
    return source_of(shards, threads, streams(plan), spool_bytes(plan, threads), folder)


def source_of(shards: Iterable[ShardFile], threads: int, streams: int, spool: int, beside: Path) -> Source:
    """What reads these files for `threads` threads. Of those on the Hub, each reads from `streams` places in turn, and
    `spool` bytes of the folder `beside` hold what does not fit into memory."""
    files = list(shards)
    local = Reader(shard for shard in files if shard.remote is None)
    remote = [shard for shard in files if shard.remote is not None]
    return Inputs(local, RemoteReader(remote, threads, streams, spool, beside)) if remote else local


def beside_fetched(plan: Plan) -> Plan:
    """`plan` with all files that outputs take over beside the weights in the Hub's cache: a plan needs config.json
    alone. Raises InputError."""
    donors = dict.fromkeys(output.donor for output in plan.outputs)
    fetched = {name: with_beside(plan.checkpoints[name]) for name in donors}
    return replace(plan, checkpoints={**plan.checkpoints, **fetched})


def with_beside(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with all that stands beside its weights in the Hub's cache, where only its headers were looked at.
    Raises InputError."""
    if not checkpoint.thin or checkpoint.revision is None:
        return checkpoint
    names = checkpoint.form.beside if checkpoint.form is not None else None
    if names == ():
        return replace(checkpoint, thin=False)
    return replace(checkpoint, folder=fetch_beside(checkpoint.location, checkpoint.revision, names), thin=False)


def stated_digests(plan: Plan) -> dict[str, str]:
    """What the Hub says of the content of the files that are read by ranges, by path."""
    shards = [shard for checkpoint in plan.checkpoints.values() for shard in checkpoint.shards]
    return {shard.path: shard.remote.digest for shard in shards if shard.remote is not None}


def locked_digests(lock: Mapping[str, Any] | None, checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    """The digests of files on this disk for which a recipe's lock has what the Hub said, by path: `sha256:...` or
    `git:...`. Raises InputError where one cannot be read."""
    found: dict[str, str] = {}
    for name, files in ((lock or {}).get("inputs") or {}).items():
        here = {s.name: s for s in checkpoints[name].shards} if name in checkpoints else {}
        for file in files:
            shard = here.get(file["file"])
            kind = next((kind for kind in ("sha256", "git") if kind in file and "blake3" not in file), None)
            if shard is not None and shard.remote is None and kind is not None:
                found[shard.path] = f"{kind}:{_digest(shard.path, kind, shard.nbytes)}"
    return found


def _digest(path: str, kind: str, nbytes: int) -> str:
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except OSError as fault:
        raise InputError(f"cannot read `{path}`: {fault.strerror}", hint="was it moved during the run?") from fault
    return digest.hexdigest()
