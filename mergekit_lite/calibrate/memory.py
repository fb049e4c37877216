"""What gathering takes of memory, and into how many passes Gram matrices are divided so that they fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.calibrate.layers import Key
from mergekit_lite.errors import StoppedError
from mergekit_lite.plan.words import size

_SUMS, _GRADIENTS = 4, 4  # bytes for each parameter: squares in float32, and gradients as they come
_SCORES = 24  # bytes for each entry of the logits: themselves, their logarithms, their shares
_KEPT = 40  # numbers for each hidden unit of a layer and token that the way back needs, roughly


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes: `weights` of the model, `fisher` of its squared gradients, `gradient` of its gradients, `work` of one
    batch with what comes out of it, `grams` of all Gram matrices; `passes` are those that go through the data
    together."""

    weights: int
    fisher: int
    gradient: int
    work: int
    grams: int
    passes: tuple[frozenset[Key], ...]
    most: int

    @property
    def nbytes(self) -> int:
        return self.weights + self.fisher + self.gradient + self.work + self.most


def need(
    network: Any,
    inner: Mapping[Key, int],
    kinds: Collection[str],
    *,
    weights: int,
    tokens: int,
    examples: int,
    free: int | None,
) -> Need:
    """The memory for a network of these weights (bytes) and batches of `tokens` tokens. `inner`: the Gram matrices that
    are wanted, with the length of their inputs.

    Raises StoppedError where even the largest Gram matrix by itself does not fit beside the rest into `free` bytes.
    """
    config = getattr(network, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    width, layers = getattr(text, "hidden_size", 0) or 0, getattr(text, "num_hidden_layers", 0) or 0
    parameters = sum(parameter.numel() for parameter in network.parameters())
    fisher = (_SUMS + _GRADIENTS) * parameters if "fisher" in kinds else 0
    # Both kinds share the gradients as they come.
    gradient = (_SUMS + (0 if fisher else _GRADIENTS)) * parameters if "gradient" in kinds else 0
    work = _SCORES * tokens * (getattr(text, "vocab_size", 0) or 0)
    work += 4 * tokens * width * (_KEPT * layers if fisher or gradient else _KEPT)
    work += 8 * examples * width * layers if "hidden" in kinds else 0
    sizes = {key: 8 * length**2 for key, length in inner.items()} if "gram" in kinds else {}
    # Beside the sums there is the product that is added, in float32 and in float64.
    beside = 2 * max(sizes.values(), default=0)
    room = None if free is None else free - weights - fisher - gradient - work - beside
    passes = parts(sizes, room)
    most = beside + max((sum(sizes[key] for key in one) for one in passes), default=0)
    made = Need(weights, fisher, gradient, work, sum(sizes.values()), passes, most)
    if free is not None and made.nbytes > free:
        raise StoppedError(
            f"the statistics need about {size(made.nbytes)} of memory, {size(free)} are free: {said(made)}",
            hint="collect fewer kinds at once, take a smaller `--block`, or a machine with more memory",
        )
    return made


def positions(network: Any, batch: Mapping[str, Any]) -> int:
    """How many positions a batch takes in a network's layers: its tokens, or the patches of its images."""
    ids, pixels = batch.get("input_ids"), batch.get("pixel_values")
    if ids is not None:
        return int(ids.numel())
    examples = len(next(iter(batch.values())))
    patch = getattr(getattr(network, "config", None), "patch_size", None)
    if pixels is None or pixels.dim() != 4 or not isinstance(patch, int) or patch < 1:
        return examples
    return examples * (1 + int(pixels.shape[2] // patch) * int(pixels.shape[3] // patch))


def said(made: Need) -> str:
    """What takes the memory, in words."""
    named = {"weights": made.weights, "squared gradients": made.fisher, "gradients": made.gradient}
    named |= {"Gram matrices": made.most, "work": made.work}
    return ", ".join(f"{name} {size(nbytes)}" for name, nbytes in named.items() if nbytes)


def parts(sizes: Mapping[Key, int], room: int | None) -> tuple[frozenset[Key], ...]:
    """The keys in as few groups as their order allows, each of at most `room` bytes, or of one key."""
    groups: list[list[Key]] = []
    filled = 0
    for key, nbytes in sizes.items():
        if not groups or (room is not None and filled + nbytes > room):
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += nbytes
    return tuple(frozenset(group) for group in groups) or (frozenset(),)


def free_memory(budget: int | None) -> int | None:
    """Bytes that this process may still take: of the machine, of its control group, and of `budget`, which counts what
    it holds already. None where the system does not tell."""
    from mergekit_lite.run.standing import anonymous

    found: list[int] = []
    if budget is not None:
        found.append(budget - (anonymous() or 0))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    found += _control_group()
    return max(min(found), 0) if found else None


def _control_group() -> Sequence[int]:
    """What the control group of this process may still take, where one sets a limit."""
    try:
        place = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().split("::", 1)[1].lstrip("/")
        folder = Path("/sys/fs/cgroup") / place
        most = int((folder / "memory.max").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        # Pages of files are given up when they are needed.
        return [most - int(stat["anon"])]
    except (OSError, IndexError, ValueError, KeyError):
        return []
