"""START HERE: a recipe is read, planned and run.

load_recipe   text -> Recipe                         recipe/
plan          Recipe + checkpoint headers -> Plan    plan/
run           Plan -> shards on disk                 run/
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lite import sandbox
from mergekit_lite.checkpoint.adapter import open_adapter, with_adapter
from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import InputError, MergeError, Problem, RecipeError
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.read import parse, read_file
from mergekit_lite.run.result import Result as Result

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lite.plan.model import Plan
    from mergekit_lite.run.progress import Progress
    from mergekit_lite.run.ranks import Ranks


Fetch = Literal["cache", "stream"]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe. `overrides` are `--set` texts such as `steps.mixed.with.t=0.4`.

    Raises InputError where there is no such file and RecipeError with all faults at once: those of the language and
    those of the methods' settings; within `sandbox.confined` also where the file lies outside.
    """
    box = sandbox.current()
    refused = None if box is None else box.refusal(path)
    if refused is not None:
        raise RecipeError(refused)
    recipe, problems = parse(read_file(str(path)), str(path), overrides)
    if recipe is not None:
        from mergekit_lite.methods.registry import all_methods
        from mergekit_lite.plan.settings import check_steps

        problems = [*problems, *check_steps(recipe, all_methods())]
    if problems or recipe is None:
        raise RecipeError(sorted(problems, key=lambda p: (p.mark.line, p.mark.column) if p.mark else (0, 0)))
    return recipe


def plan(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    threads: int | None = None,
    block: int | None = None,
    memory: int | str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    check_output: bool = True,
    fetch: Fetch = "cache",
) -> Plan:
    """Plan `recipe` from the headers of its checkpoints. Nothing is written.

    `out` replaces the output folder of the recipe's only save. `threads` (default: the cores of this process) and
    `block` (elements) change memory and speed, never a byte of the result. `memory` (bytes, or a text such as `300MB`)
    is what this process may take of anonymous memory, Python and torch included: the plan chooses what of the two was
    not given so that it is kept, and raises RecipeError with the smallest figure that would do where it cannot be.
    `allow_pickle` reads checkpoints of `torch.save` too, as plain data, never as code. `check_output` False leaves out
    whether the output folders are free, for looking at a plan whose result exists. `fetch` says what becomes of models
    on the Hub: `cache` downloads them whole into the Hub's cache; `stream` reads their headers alone, and `run` then
    reads their tensors by ranges. Raises RecipeError and InputError,
    each with all faults that were found, within `sandbox.confined` first of all those places that lie outside, and
    UsageError where `memory` is no size.
    """
    from mergekit_lite.plan.budget import memory_bytes, with_buffers, within
    from mergekit_lite.plan.build import build_plan, no_collection, used_models
    from mergekit_lite.plan.confine import no_pushes, outside
    from mergekit_lite.plan.order import BLOCK

    if out is not None and len(recipe.saves) > 1:
        hint = "remove `--out`, or change one with `--set save.0.to=DIR`"
        raise RecipeError(Problem(f"`--out` names one folder, the recipe saves {len(recipe.saves)}", None, hint))
    if (box := sandbox.current()) is not None:
        from mergekit_lite.methods.registry import all_methods

        problems = outside(recipe, all_methods(), Path(out) if out is not None else None, box)
        if problems:
            raise RecipeError(problems)
    if offline and (problems := no_pushes(recipe, "the run is offline")):
        raise RecipeError(problems)
    budget = None if memory is None else memory_bytes(memory)
    with no_collection():
        checkpoints = open_models(
            recipe, used_models(recipe), offline or box is not None, allow_pickle, fetch == "stream"
        )
        if _reads_tokenizers(recipe):
            from mergekit_lite.run.inputs import with_beside

            checkpoints = {name: with_beside(checkpoint) for name, checkpoint in checkpoints.items()}
        made = build_plan(
            recipe,
            checkpoints,
            out=Path(out) if out is not None else None,
            threads=threads or default_threads(),
            block=block or BLOCK,
            check_output=check_output,
        )
        made = with_buffers(made)
        if budget is None:
            return made
        from mergekit_lite.run.standing import standing

        return within(made, budget, standing(made), threads, block, default_threads())


def _reads_tokenizers(recipe: Recipe) -> bool:
    """Whether the plan needs more of a model than its headers and config.json."""
    steps = recipe.steps.values()
    texts = any("prompts" in given for step in steps for given in (step.params, *(item.params for item in step.of)))
    return texts or any(s.use == "transplant" for s in steps) or any(s.tokenizer is not None for s in recipe.saves)


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_models(
    recipe: Recipe, names: Sequence[str], offline: bool, allow_pickle: bool = False, stream: bool = False
) -> dict[str, Checkpoint]:
    """The checkpoints of the models of these names; with `stream` those on the Hub by their headers alone. Raises
    InputError with the faults of all of them."""
    found: dict[str, Checkpoint] = {}
    known: dict[tuple[str, str | None], Checkpoint] = {}  # a base of several adapters is looked at once
    problems: list[Problem] = []
    fault: MergeError | None = None
    for name in names:
        model = recipe.models[name]
        try:
            if model.absent is not None and not os.path.lexists(model.location):
                raise InputError(model.absent)
            opened = Checkpoint("", None, None, {}, {}, ())
            if (model.location, model.revision) in known:
                opened = known[model.location, model.revision]
            elif model.location:
                opened = known[model.location, model.revision] = open_checkpoint(
                    model.location,
                    model.revision,
                    mark=model.mark,
                    offline=offline,
                    pickled=allow_pickle,
                    stream=stream,
                )
            if model.adapter is not None:
                adapter = open_adapter(
                    model.adapter,
                    model.adapter_revision,
                    mark=model.mark,
                    offline=offline,
                    pickled=allow_pickle,
                    stream=stream,
                )
                opened = with_adapter(opened, adapter, model.mark)
            found[name] = opened
        except MergeError as error:
            fault = error
            problems += [problem for problem in error.problems if problem not in problems]
    if fault is not None:
        raise type(fault)(problems)
    return found


def run(
    plan: Plan,
    *,
    threads: int | None = None,
    block: int | None = None,
    resume: bool = False,
    strict: bool = False,
    device: str = "cpu",
    keep_auto_map: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
    ranks: Ranks | None = None,
) -> Result:
    """Carry out `plan`: write every output folder whole, or leave what is finished in `OUT.partial` for `resume`.

    `keep_auto_map` leaves entries that have transformers import an input's code in the outputs' configurations.
    `strict` stops at the first non-finite number of an input or of what is made of them. `device` is where kernels run:
    `cpu`, `cuda`, `cuda:1`, or with `auto` the first GPU if there is one. `ranks` are the processes that share the
    merge, each of which calls this with the plan that they agreed on (`Ranks.agree`); rank 0 gives the result of all,
    the others that of their share. A plan with a budget of memory says itself how many threads and how large blocks.
    Raises UsageError where there is no such device or the plan's budget is not for it, or for these threads and blocks;
    StoppedError where the run cannot go on (the disk is full, another run writes there, another rank failed, `strict`
    found a number that the merge made), InputError where an input has changed or cannot be read, InterruptedRun on
    Ctrl-C.
    """
    from mergekit_lite.plan.budget import check_budget
    from mergekit_lite.plan.order import BLOCK
    from mergekit_lite.run.perform import perform
    from mergekit_lite.run.ranks import ALONE

    ranks = ranks or ALONE
    count = threads or max(1, default_threads() // len(ranks.here))
    if plan.memory is not None:
        check_budget(plan, threads, block, device)
        count, block = min(count, plan.threads), block or plan.block
    return perform(
        plan,
        ranks,
        threads=count,
        block=block or BLOCK,
        resume=resume,
        strict=strict,
        device=device,
        keep_auto_map=keep_auto_map,
        progress=progress,
        card=_card,
    )


def _card(folder: Path, lock: str, number: int) -> str:
    """The model card of the output in `folder`, number `number` of those that the text of its lock tells of."""
    from mergekit_lite.publish.card import render

    recipe, _ = parse(lock, "recipe.lock.yaml")
    assert recipe is not None
    return render(folder, recipe, number)


def merge_in_memory(
    recipe: Recipe,
    models: Mapping[str, Mapping[str, Tensor]],
    *,
    config: Mapping[str, Any] | None = None,
    threads: int | None = None,
    block: int | None = None,
) -> dict[str, Tensor]:
    """Merge state dicts without touching a disk: the recipe's only save, as a state dict on the CPU.

    `models` gives a state dict for every model that the recipe uses, whatever location it names; `config` is a
    config.json that tells the family, where layer depth or tied tensors matter. Same arithmetic, same bytes as `run`.
    """
    from mergekit_lite.plan.order import BLOCK
    from mergekit_lite.run.in_memory import in_memory

    return in_memory(recipe, models, config or {}, threads or default_threads(), block or BLOCK)
