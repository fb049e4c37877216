"""The ranks that adapters saved with `energy` need: found by a pass of its own, before the output has a layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mergekit_lite.plan.build import build_plan
from mergekit_lite.plan.lowrank import needs_ranks
from mergekit_lite.plan.model import Plan
from mergekit_lite.run.execute import execute
from mergekit_lite.run.inputs import inputs_of
from mergekit_lite.run.journal import Done
from mergekit_lite.run.progress import Options, Progress
from mergekit_lite.run.sink import Memory


def with_ranks(plan: Plan, options: Options) -> Plan:
    """The plan with every rank known; `plan` itself where they all are. Raises what a run raises."""
    saves = plan.recipe.saves
    wanted = [number for number, save in enumerate(saves) if needs_ranks(save)]
    if not wanted or plan.ranks:
        return plan
    # What is counted is tensors looked at: no byte is written.
    options = replace(options, progress=functools.partial(_measured, options.progress))
    out = Path(plan.outputs[0].to) if len(saves) == 1 else None
    ranks = {}
    for number in wanted:
        seen = build_plan(plan.recipe, plan.checkpoints, out=out, check_output=False, measure=number)
        sink = Memory(seen.outputs)
        with inputs_of(seen, options.threads) as reader:
            execute(seen, reader, sink, None, Done(), replace(options, abort=reader.abort))
        ranks[number] = {name: int(found) for name, found in sink.tensors[0].items()}
    made = build_plan(
        plan.recipe, plan.checkpoints, out=out, threads=plan.threads, block=plan.block, check_output=False, ranks=ranks
    )
    return replace(made, memory=plan.memory)


def _measured(progress: Callable[[Progress], None], now: Progress) -> None:
    progress(replace(now, phase="measure", done=now.tensors, total=now.all_tensors))
