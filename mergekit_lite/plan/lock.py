"""`recipe.lock.yaml`: the recipe as it ran, with what went in and what came out. A lock is a recipe again.

Its last line is a comment with the BLAKE3 digest of all lines before it: the seal. It shows damage and careless edits,
not a forger, who can write another one.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

from blake3 import blake3

from mergekit_lite.checkpoint.adapter import PREFIX
from mergekit_lite.checkpoint.meta import Checkpoint, ShardFile
from mergekit_lite.errors import Problem
from mergekit_lite.methods.registry import package_of
from mergekit_lite.plan.model import Plan
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.write import dump, to_yaml

NAME = "recipe.lock.yaml"
NOTE = "# What this run read and wrote. `merge run` on this file makes the same bytes or says what changed."
Errors = Mapping[str, Mapping[str, tuple[float, float]]]
_SEAL = re.compile(rb"# blake3: ([0-9a-f]{64})\n")


def lock_text(
    plan: Plan,
    inputs: Mapping[str, str],
    shards: Mapping[str, Mapping[str, str]],
    files: Mapping[str, Mapping[str, tuple[int, str]]],
    errors: Errors | None = None,
    decomposed: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The lock of a finished run. `inputs` gives the BLAKE3 digest of every input file by path, or what the Hub says of
    it, `sha256:...` or `git:...`; `shards` that of every output shard by output folder and file name, `files` size and
    digest of the files beside the shards likewise, `errors` those of adapters as `errors_of` does, `decomposed`
    what plan/decompose.py tells."""
    recipe = plan.recipe
    # Without `push`: whoever runs a lock to see whether the bytes are the same wants to publish nothing.
    saves = tuple(replace(save, push=None) for save in recipe.saves)
    head = to_yaml(replace(pinned(recipe, plan.checkpoints), saves=saves, scores=()))
    lock: dict[str, Any] = {
        "made_with": made_with(recipe),
        "plan": plan.digest,
        "set": list(recipe.overrides),
        "inputs": {
            name: [
                {"file": file.name, "bytes": file.nbytes, **_digest(inputs[file.path])} for file in checkpoint.shards
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
                **({"error": relative(errors[output.to])} if errors and output.to in errors else {}),
                **({"decomposed": decomposed[output.to]} if decomposed and output.to in decomposed else {}),
            }
            for output in plan.outputs
        ],
    }
    return sealed(f"{head}\n{NOTE}\n{dump({'lock': lock})}")


def made_with(recipe: Recipe) -> dict[str, str]:
    """The versions of what a run of the recipe is made with, by name: this program and its libraries, the packages of
    further methods that the recipe uses, that which codes masks, Python."""
    outside = sorted({package_of(step.use) for step in recipe.steps.values()} - {"mergekit_lite"})
    coding = ["zstandard"] if any(save.masks is not None and save.masks.compress for save in recipe.saves) else []
    names = ("mergekit_lite", "torch", "safetensors", *coding, *outside)
    return {**{name: version(name) for name in names}, "python": platform.python_version()}


def errors_of(
    plan: Plan,
    figures: Mapping[str, Mapping[str, Sequence[float]]],
    squares: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
) -> Errors:
    """What a run tells of its outputs' tensors, by number, as the errors of adapters, of `decompose` and of FP8: by
    output folder and module the norm of the change, or of the weight, and of what the factors, or the codes, leave of
    it. `squares` are squared norms of parts of weights."""
    rounded = {
        plan.outputs[int(number)].to: {
            name.removesuffix(".weight"): (_norm([part[0] for part in told]), _norm([part[1] for part in told]))
            for name, told in tensors.items()
        }
        for number, tensors in squares.items()
    }
    for number, output in enumerate(plan.outputs):
        told = figures.get(str(number), {})
        if told or output.adapter is not None:
            ending = ".weight" if output.adapter is None else ".lora"
            rounded[output.to] = rounded.get(output.to, {}) | {
                tensor.name.removeprefix(PREFIX).removesuffix(ending): (told[tensor.name][0], told[tensor.name][1])
                for tensor in output.tensors
                if tensor.name in told
            }
    return rounded


def _norm(squares: Sequence[float]) -> float:
    """Of the parts in any order: their sum is exact."""
    return math.sqrt(math.fsum(squares))


def relative(errors: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """The error of an adapter, of FP8 or of what is decomposed, in all and by module: the norm of what is left divided
    by that of the change, or of the weight, to six digits; None where that is no number."""

    def quotient(whole: float, left: float) -> float | None:
        found = left / whole if whole else 0.0
        return float(f"{found:.6g}") if math.isfinite(found) else None

    whole, left = (math.sqrt(math.fsum(e[i] ** 2 for e in errors.values())) for i in (0, 1))
    return {"all": quotient(whole, left), "modules": {name: quotient(*error) for name, error in errors.items()}}


def pinned(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Recipe:
    """The recipe with the commits that its Hub models were resolved to."""
    models = {
        name: replace(
            recipe.models[name],
            revision=checkpoint.revision,
            adapter_revision=checkpoint.adapter.revision if checkpoint.adapter else None,
        )
        for name, checkpoint in checkpoints.items()
    }
    return replace(recipe, models={**recipe.models, **models})


def _digest(told: str) -> dict[str, str]:
    """A digest with the name of its function."""
    kind, colon, digest = told.partition(":")
    return {kind: digest} if colon else {"blake3": told}


def _is(file: Mapping[str, Any], told: str) -> bool:
    """Whether an entry of a lock has a digest."""
    return all(file.get(kind) == digest for kind, digest in _digest(told).items())


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
    says of them; nothing where there is no lock. A file that is read from the Hub has the content that its commit says:
    where the lock has a digest of another kind, size and commit are compared."""
    problems: list[Problem] = []
    for name, files in ((lock or {}).get("inputs") or {}).items():
        checkpoint = checkpoints.get(name)
        now = {shard.name: shard for shard in checkpoint.shards} if checkpoint else {}
        for file in files:
            shard = now.get(file["file"])
            if shard is None or not (_is(file, inputs[shard.path]) or _is_unchecked(file, shard)):
                what = "has other content than" if shard is not None else "is missing, unlike"
                hint = "restore it, or remove the `lock` part to merge what is there now"
                problems.append(Problem(f"`{file['file']}` of `{name}` {what} when the lock was made", None, hint))
    return problems


def unchecked_inputs(
    lock: Mapping[str, Any] | None, checkpoints: Mapping[str, Checkpoint], inputs: Mapping[str, str]
) -> list[Problem]:
    """A note on inputs for which the lock has a digest that nobody can form without all of their bytes."""
    names = []
    for name, files in ((lock or {}).get("inputs") or {}).items():
        now = {shard.name: shard for shard in checkpoints[name].shards} if name in checkpoints else {}
        shards = [(file, now[file["file"]]) for file in files if file["file"] in now]
        if any(not _is(file, inputs[shard.path]) and _is_unchecked(file, shard) for file, shard in shards):
            names.append(name)
    if not names:
        return []
    message = f"the lock's BLAKE3 digests of {', '.join(f'`{name}`' for name in names)} are not held against the inputs"
    hint = "they are read in parts, at the commit that the lock names; `--fetch cache` downloads them and compares"
    return [Problem(message, None, hint)]


def _is_unchecked(file: Mapping[str, Any], shard: ShardFile) -> bool:
    """Whether an entry of a lock can be held against a file on the Hub by its size alone: the lock was made of the
    bytes, and names the commit."""
    remote = shard.remote
    return remote is not None and "blake3" in file and file.get("bytes") in (None, shard.nbytes)


def changed_outputs(recipe: Recipe, shards: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Output files whose bytes differ from what the recipe's lock says."""
    then = [(s["file"], s["blake3"]) for output in (recipe.lock or {}).get("outputs", []) for s in output["shards"]]
    now = [(file, blake3) for files in shards.values() for file, blake3 in files.items()]
    if not then:
        return []
    return [file for file, blake3 in now if (file, blake3) not in then]
