"""A file of router statistics held against a model's layers of experts, and what it tells before the run: how many
experts each layer keeps where that goes by their use."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.errors import Mark, Problem, RecipeError
from mergekit_lite.family.family import Family
from mergekit_lite.family.moe import ExpertLayer
from mergekit_lite.plan.steps import Source

GRAM, USAGE = "logits_gram", "usage"
_MADE = "statistics are made of a forward pass with the very model whose experts are merged"


def statistics_of(
    statistics: Source, layers: Sequence[ExpertLayer], family: Family, logits: bool
) -> list[dict[str, str]]:
    """The names of each layer's statistics by kind: its use and, with `logits`, its Gram matrix. RecipeError with all
    layers that lack one, or whose statistics have another number of experts."""
    nodes = statistics.table.nodes
    kinds = {USAGE: 1, **({GRAM: 2} if logits else {})}
    found: list[dict[str, str]] = []
    problems: list[Problem] = []
    for layer in layers:
        mine: dict[str, str] = {}
        for kind, axes in kinds.items():
            name = _named(layer, kind, nodes, family)
            if name is None:
                message = f"`{statistics.name}` has no `{kind}` of the router `{layer.router}`"
                problems.append(Problem(message, statistics.mark, _MADE))
            elif nodes[name].shape != (layer.count,) * axes:
                shape = "×".join(map(str, nodes[name].shape))
                message = f"`{name}` of `{statistics.name}` is {shape}, `{layer.router}` has {layer.count} experts"
                problems.append(Problem(message, statistics.mark, _MADE))
            elif nodes[name].load is None:
                message = f"`{statistics.name}` is a step, and statistics are a file"
                raise RecipeError(Problem(message, statistics.mark, "name a model that is a file of statistics"))
            else:
                mine[kind] = name
        found.append(mine)
    if problems:
        more = len(problems) - 3
        if more > 0:
            problems = [*problems[:3], Problem(f"and {more} more of `{statistics.name}`", statistics.mark, _MADE)]
        raise RecipeError(problems)
    return found


def _named(layer: ExpertLayer, kind: str, names: Iterable[str], family: Family) -> str | None:
    """The name of a layer's statistic. The module that routes may be called otherwise in memory than on disk; then its
    layer tells which it is."""
    exact = f"{layer.router}.{kind}"
    fitting = [
        name
        for name in names
        if name == exact
        or (name.endswith(f".{kind}") and (at := family.layer(name)) is not None and at.index == layer.layer)
    ]
    return exact if exact in fitting else fitting[0] if len(fitting) == 1 else None


def adaptive_into(
    statistics: Source,
    layers: Sequence[ExpertLayer],
    family: Family,
    average: int,
    protected: Container[int],
    mark: Mark,
) -> list[int]:
    """How many experts each layer keeps, by how they are used. RecipeError where the protected layers (by their number
    among `layers`) leave another one nothing, and where the file cannot be read now."""
    import numpy as np

    from mergekit_lite.align.grouping import adaptive_counts, frequencies

    named = statistics_of(statistics, layers, family, logits=False)
    used = []
    for names in named:
        meta = statistics.table.nodes[names[USAGE]].load
        assert meta is not None
        used.append(frequencies(np.asarray(_whole_numbers(meta, statistics), dtype=np.float64)))
    counts = adaptive_counts(used, average, {n for n in range(len(layers)) if n in protected})
    if min(counts) < 1:
        message = f"`into: {average}` on average leaves a layer no expert: those under `protect` take too many"
        raise RecipeError(Problem(message, mark, "raise `into`, or protect fewer layers"))
    return counts


def _whole_numbers(meta: TensorMeta, statistics: Source) -> list[int]:
    import struct

    if meta.dtype != "I64":
        message = f"`{meta.name}` of `{statistics.name}` is stored as {meta.dtype}, not as whole numbers (I64)"
        raise RecipeError(Problem(message, statistics.mark, _MADE))
    try:
        with open(meta.file, "rb") as file:
            file.seek(meta.start)
            data = file.read(meta.nbytes)
        return list(struct.unpack(f"<{meta.numel}q", data))
    except (OSError, struct.error) as fault:
        message = f"`adaptive` reads `{statistics.name}` when the plan is made, and it cannot be read: {fault}"
        hint = "keep the file of statistics on this machine"
        raise RecipeError(Problem(message, statistics.mark, hint)) from None
