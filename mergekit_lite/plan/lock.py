"""`recipe.lock.yaml`: the recipe as it ran, with what went in and what came out. A lock is a recipe again.

Its last line is a comment with the BLAKE3 digest of all lines before it: the seal. It shows damage and careless edits,
not a forger, who can write another one.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from blake3 import blake3

from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import Problem
from mergekit_lite.plan.model import Plan
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.write import dump, to_yaml

NAME = "recipe.lock.yaml"
_SEAL = re.compile(rb"# blake3: ([0-9a-f]{64})\n")


def lock_text(
    plan: Plan,
    inputs: Mapping[str, str],
    shards: Mapping[str, Mapping[str, str]],
    files: Mapping[str, Mapping[str, tuple[int, str]]],
) -> str:
    """The lock of a finished run. `inputs` gives the BLAKE3 digest of every input file by path, `shards` that of every
    output shard by output folder and file name, `files` size and digest of the files beside the shards likewise."""
    recipe = plan.recipe
    pinned = {
        name: replace(
            recipe.models[name],
            revision=checkpoint.revision,
            adapter_revision=checkpoint.adapter.revision if checkpoint.adapter else None,
        )
        for name, checkpoint in plan.checkpoints.items()
    }
    # Without `push`: whoever runs a lock to see whether the bytes are the same wants to publish nothing.
    saves = tuple(replace(save, push=None) for save in recipe.saves)
    head = to_yaml(replace(recipe, models={**recipe.models, **pinned}, saves=saves))
    lock: dict[str, Any] = {
        "made_with": {
            **{name: version(name) for name in ("mergekit_lite", "torch", "safetensors")},
            "python": platform.python_version(),
        },
        "plan": plan.digest,
        "set": list(recipe.overrides),
        "inputs": {
            name: [
                {"file": Path(file.path).name, "bytes": file.nbytes, "blake3": inputs[file.path]}
                for file in checkpoint.shards
            ]
            for name, checkpoint in plan.checkpoints.items()
        },
        "outputs": [
            {
                "to": output.to,
                "shards": [
                    {"file": s.file, "bytes": s.nbytes, "blake3": shards[output.to][s.file]} for s in output.shards
                ],
                "files": [
                    {"file": file, "bytes": nbytes, "blake3": digest}
                    for file, (nbytes, digest) in sorted(files[output.to].items())
                ],
            }
            for output in plan.outputs
        ],
    }
    note = "# What this run read and wrote. `merge run` on this file makes the same bytes or says what changed."
    return sealed(f"{head}\n{note}\n{dump({'lock': lock})}")


def sealed(text: str) -> str:
    """The text of a lock with its last line."""
    return f"{text}# blake3: {blake3(text.encode()).hexdigest()}\n"


def is_sealed(data: bytes) -> bool | None:
    """Whether a lock is as it was written; None where it has no seal, as those of earlier versions."""
    start = data.rfind(b"\n", 0, -1) + 1
    seal = _SEAL.fullmatch(data, start)
    return None if seal is None else seal[1].decode() == blake3(data[:start]).hexdigest()


def version(distribution: str) -> str:
    """The installed version of a distribution, or `unknown` where it runs uninstalled."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def changed_inputs(
    lock: Mapping[str, Any] | None, checkpoints: Mapping[str, Checkpoint], inputs: Mapping[str, str]
) -> list[Problem]:
    """What differs between the inputs, given with the digests of their files by path, and what the lock of a recipe
    says of them; nothing where there is no lock."""
    problems: list[Problem] = []
    for name, files in ((lock or {}).get("inputs") or {}).items():
        checkpoint = checkpoints.get(name)
        now = {Path(f.path).name: inputs[f.path] for f in checkpoint.shards} if checkpoint else {}
        for file in files:
            if now.get(file["file"]) != file["blake3"]:
                what = "has other content than" if file["file"] in now else "is missing, unlike"
                hint = "restore it, or remove the `lock` part to merge what is there now"
                problems.append(Problem(f"`{file['file']}` of `{name}` {what} when the lock was made", None, hint))
    return problems


def changed_outputs(recipe: Recipe, shards: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Output files whose bytes differ from what the recipe's lock says."""
    then = [(s["file"], s["blake3"]) for output in (recipe.lock or {}).get("outputs", []) for s in output["shards"]]
    now = [(file, blake3) for files in shards.values() for file, blake3 in files.items()]
    if not then:
        return []
    return [file for file, blake3 in now if (file, blake3) not in then]
