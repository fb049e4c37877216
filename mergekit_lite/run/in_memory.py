"""A merge of state dicts, without a disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.checkpoint.memory import MemoryReader, memory_checkpoint
from mergekit_lite.errors import Problem, RecipeError
from mergekit_lite.plan.build import build_plan, used_models
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.run.execute import execute
from mergekit_lite.run.journal import Done
from mergekit_lite.run.progress import Options
from mergekit_lite.run.sink import Memory

if TYPE_CHECKING:
    from torch import Tensor


def in_memory(
    recipe: Recipe,
    models: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
    threads: int,
    block: int,
) -> dict[str, Tensor]:
    """The recipe's only save, as a state dict; merge.py's `merge_in_memory` tells what the arguments mean. Raises
    RecipeError."""
    if len(recipe.saves) != 1:
        raise RecipeError(Problem("in memory a recipe has one `save`", None, "keep one of them"))
    if recipe.saves[0].beside:
        what = "an adapter" if recipe.saves[0].lora is not None else "a mask store"
        raise RecipeError(Problem(f"{what} is not made in memory", recipe.saves[0].mark, "use `run`"))
    with_adapters = [recipe.models[name] for name in used_models(recipe) if recipe.models[name].adapter is not None]
    if with_adapters:
        hint = "fold it in first, with peft's `merge_and_unload()`, and give that model's state dict"
        raise RecipeError([Problem(f"`{m.name}` has an adapter, not in memory", m.mark, hint) for m in with_adapters])
    missing = [name for name in used_models(recipe) if name not in models]
    if missing:
        marks = [recipe.models[name].mark for name in missing]
        raise RecipeError(
            [Problem(f"no state dict is given for `{n}`", m) for n, m in zip(missing, marks, strict=True)]
        )
    checkpoints = {name: memory_checkpoint(name, models[name], config) for name in used_models(recipe)}
    made = build_plan(recipe, checkpoints, threads=threads, check_output=False, out=Path("memory"))
    sink = Memory(made.outputs)
    options = Options(threads, block)
    execute(made, MemoryReader(models), sink, None, Done(), options)
    return sink.tensors[0]
