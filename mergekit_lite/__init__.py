"""Merge neural-network checkpoints by recipe, streaming.

    recipe text ─▶ Recipe ─▶ Plan (DAG over headers) ─▶ run: stream blocks ─▶ shards on disk
      recipe/       recipe/      plan/  ◀ checkpoint/       run/  ◀ methods/      checkpoint/

The public API is small: `load_recipe`, `plan`, `run`, `merge_in_memory`, `search` for merges that are chosen by a
score, `learn` for weights that are learned, `collect` for the statistics of a network, and the errors they raise
(`MergeError` and its kinds). Start reading at merge.py.
"""

# The folders `plan` and `run` are loaded first: a folder that is loaded later would take the place of the function.
import mergekit_lite.plan
import mergekit_lite.run
from mergekit_lite.calibrate.collect import Statistics, collect
from mergekit_lite.choose import learn, search
from mergekit_lite.errors import (
    InputError,
    InterruptedRun,
    Mark,
    MergeError,
    Problem,
    RecipeError,
    StoppedError,
    UsageError,
)
from mergekit_lite.merge import Result, load_recipe, merge_in_memory, plan, run

del mergekit_lite  # the name that the imports of the folders leave behind

__all__ = [
    "InputError",
    "InterruptedRun",
    "Mark",
    "MergeError",
    "Problem",
    "RecipeError",
    "Result",
    "Statistics",
    "StoppedError",
    "UsageError",
    "collect",
    "learn",
    "load_recipe",
    "merge_in_memory",
    "plan",
    "run",
    "search",
]
