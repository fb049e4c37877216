"""Whether the spaces that a family states are true: tried on a tiny random model of the checkpoint's architecture."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mergekit_lite.align.prove import Evaluate, Finding, State, coordinates, prove_state
from mergekit_lite.errors import InputError
from mergekit_lite.family.axes import spaces_of
from mergekit_lite.family.data import FamilyData, load_family
from mergekit_lite.family.spaces import Space
from mergekit_lite.lazy import Tensor
from mergekit_lite.report.check import Check, count, fail, failures, few, ok, warn
from mergekit_lite.report.look import open_location
from mergekit_lite.report.quiet import quiet
from mergekit_lite.report.tiny import Tiny, tiny_model, transformers

# Norms of many models compute in float32, whatever the dtype of the weights.
TOLERANCE = 3e-5


def proof(location: str, family: str | None = None, *, offline: bool = False, seed: int = 0) -> Iterator[Check]:
    """The checks of the spaces of one checkpoint: by `family`, a family file or the name of a family, or by the
    family that its config.json tells.

    A fault of the checkpoint or of what the family says of it is a failed check. InputError where the family file is
    wrong, transformers is missing or cannot build a model of this type.
    """
    data = load_family(os.path.expanduser(family)) if family is not None else None
    try:
        checkpoint = open_location(location, offline, stream=True)
    except InputError as error:
        yield from failures("weights", error.problems)
        return
    try:
        shapes = {name: meta.shape for name, meta in checkpoint.tensors.items()}
        spaces = spaces_of(checkpoint.config, shapes, data)
    except InputError as error:
        yield from failures("family", error.problems)
        return
    yield ok("family", f"{_kinds(spaces)}; every one of {count(len(shapes), 'tensor')} is described")
    if not spaces:
        yield warn("spaces", "nothing may be permuted in this checkpoint")
        return
    with quiet(transformers()), tempfile.TemporaryDirectory() as folder:
        tiny = tiny_model(checkpoint.config, sum(meta.numel for meta in checkpoint.tensors.values()))
        yield ok("model", f"{type(tiny.model).__name__} with {count(tiny.model.num_parameters(), 'random weight')}")
        yield from _tried(tiny, Path(folder), data, {space.kind for space in spaces}, seed)


def _tried(tiny: Tiny, folder: Path, data: FamilyData | None, kinds: set[str], seed: int) -> Iterator[Check]:
    """The proof on the model as it is written to `folder`, under the names that are on disk."""
    from safetensors.torch import load_file

    tiny.model.save_pretrained(folder)
    state = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    try:
        spaces = spaces_of(tiny.config, {name: tuple(tensor.shape) for name, tensor in state.items()}, data)
        found = prove_state(spaces, state, _evaluation(tiny, folder, state), seed, TOLERANCE, coordinates(spaces))
    except InputError as error:
        yield from failures("model", error.problems)
        return
    yield from map(_check, found)
    unproved = sorted(kinds - {space.kind for space in spaces})
    if unproved:
        yield warn("not proved", f"the small model has no space of kind {few(unproved)}")


def _evaluation(tiny: Tiny, folder: Path, state: State) -> Evaluate:
    """What the model gives with other weights, loaded by transformers where its names differ from those on disk."""
    own = tiny.model.state_dict()
    if all(name in own and own[name].shape == tensor.shape for name, tensor in state.items()):
        return lambda weights: tiny.outputs(weights)
    from safetensors.torch import save_file

    def reload(weights: State) -> list[Tensor]:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})
        loaded = type(tiny.model).from_pretrained(folder, config=tiny.model.config, local_files_only=True)
        return tiny.outputs(model=loaded.double().eval())

    return reload


def _check(finding: Finding) -> Check:
    if finding.verdict == "fail":
        hint = "the family leaves out a tensor of this space, or says too much of one: see docs/families.md"
        return fail(finding.space, finding.detail, hint)
    if finding.verdict == "warn":
        return warn(finding.space, finding.detail)
    idle = f"; alone without effect: {few(finding.idle)}" if finding.idle else ""
    return ok(finding.space, finding.detail + idle)


def _kinds(spaces: Sequence[Space]) -> str:
    counted = Counter(space.kind for space in spaces)
    return f"{count(len(spaces), 'space')} ({', '.join(f'{n:,} {kind}' for kind, n in counted.items())})"
