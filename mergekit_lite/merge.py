"""START HERE: a recipe is read, planned and run.

load_recipe   text -> Recipe                         recipe/
plan          Recipe + checkpoint headers -> Plan    plan/
run           Plan -> shards on disk                 run/
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lite import sandbox
from mergekit_lite.checkpoint.adapter import open_adapter, with_adapter
from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import MergeError, Problem, RecipeError
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.read import parse, read_file

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lite.plan.model import Plan
    from mergekit_lite.run.execute import Progress
    from mergekit_lite.run.ranks import Ranks


Fetch = Literal["cache", "stream"]


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did. `shards` gives the BLAKE3 digest of every shard by output folder and file name; `nonfinite` (in
    the inputs), `output_nonfinite` and `overflow` count numbers by tensor; `changed` names the shards whose bytes
    differ from the recipe's lock; `alignments` gives figures of the orders of units that were found, by step; `notes`
    tell what of the inputs' configurations the outputs lack. `errors` gives, by output folder of an adapter and module,
    the norm of the change and the norm of what the factors leave of it. `plan` is what was carried out, with all ranks
    of adapters known. `bytes_fetched` counts what this process read from the Hub by ranges."""

    outputs: tuple[str, ...]
    shards: Mapping[str, Mapping[str, str]]
    seconds: float
    bytes_read: int
    bytes_written: int
    resumed: int
    nonfinite: Mapping[str, int]
    overflow: Mapping[str, int]
    changed: tuple[str, ...] = ()
    alignments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[Problem, ...] = ()
    output_nonfinite: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    plan: Plan | None = None
    bytes_fetched: int = 0


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


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_models(
    recipe: Recipe, names: Sequence[str], offline: bool, allow_pickle: bool = False, stream: bool = False
) -> dict[str, Checkpoint]:
    """The checkpoints of the models of these names; with `stream` those on the Hub by their headers alone. Raises
    InputError with the faults of all of them."""
    found: dict[str, Checkpoint] = {}
    problems: list[Problem] = []
    fault: MergeError | None = None
    for name in names:
        model = recipe.models[name]
        try:
            opened = Checkpoint("", None, None, {}, {}, ())
            if model.location:
                opened = open_checkpoint(
                    model.location,
                    model.revision,
                    mark=model.mark,
                    offline=offline,
                    pickled=allow_pickle,
                    stream=stream,
                )
            if model.adapter is not None:
                adapter = open_adapter(
                    model.adapter, model.adapter_revision, mark=model.mark, offline=offline, pickled=allow_pickle
                )
                opened = with_adapter(opened, adapter, model.mark)
            found[name] = opened
        except MergeError as error:
            fault = error
            problems += error.problems
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
    from mergekit_lite.plan.lock import changed_inputs, changed_outputs, errors_of, lock_text, unchecked_inputs
    from mergekit_lite.plan.order import BLOCK
    from mergekit_lite.run.digest import Digests, file_digests
    from mergekit_lite.run.execute import Findings, Options, execute
    from mergekit_lite.run.finish import (
        check_inputs,
        collect,
        complete,
        input_files,
        notes_on,
        shard_digests,
        wanted_parts,
    )
    from mergekit_lite.run.found import recall, remember
    from mergekit_lite.run.inputs import beside_fetched, inputs_of, locked_digests, stated_digests
    from mergekit_lite.run.peers import LAST, Peers
    from mergekit_lite.run.ranks import ALONE, divide
    from mergekit_lite.run.remembered import Remembered
    from mergekit_lite.run.spectra import with_ranks
    from mergekit_lite.run.start import check_tied, interruptible, open_together

    began = time.perf_counter()
    ranks = ranks or ALONE
    count = threads or max(1, default_threads() // len(ranks.here))
    if plan.memory is not None:
        check_budget(plan, threads, block, device)
        count, block = min(count, plan.threads), block or plan.block
    plan = with_ranks(plan, Options(count, block or BLOCK, strict, device, progress))
    if not ranks.number:
        plan = beside_fetched(plan)
    files = input_files(plan)
    shares = divide(plan, files, ranks.count)
    share = shares[ranks.number]
    mine = [str(files[number]) for number in share.inputs]
    stated = stated_digests(plan)
    remembered = Remembered(path for path in mine if path not in stated)
    # Digests that need not be formed beside the merge. What a lock says is held against the bytes themselves.
    known = {**(remembered.known if plan.recipe.lock is None else {}), **stated}

    notes: list[Problem] = []
    orders: dict[str, Any] = {}  # of units, as earlier runs have found them

    def check() -> None:
        if device != "cpu":
            from mergekit_lite.run.device import find_device

            find_device(device)
        reader.check()
        if ranks.number:
            return
        notes.extend(notes_on(plan, keep_auto_map))
        if plan.recipe.lock is not None:
            known.update(file_digests((file for file in files if str(file) not in stated), count))
            locked = locked_digests(plan.recipe.lock, plan.checkpoints)
            problems = changed_inputs(plan.recipe.lock, plan.checkpoints, {**known, **locked})
            if problems:
                raise RecipeError(problems)
            notes.extend(unchecked_inputs(plan.recipe.lock, plan.checkpoints, known))
        check_tied(plan, reader)
        if ranks.count == 1 and plan.alignments:
            orders.update(recall(plan, known, lambda paths: file_digests(map(Path, paths), count)))

    with (
        interruptible(plan),
        inputs_of(plan, count) as reader,
        open_together(plan, resume, ranks, check) as (sink, journal, done, name),
        Digests(wanted_parts(share.units, wanted := set(mine) - set(known)), wanted) as digests,
        Peers(plan, ranks, journal, done.units.keys() - {unit.id for unit in share.units}, name) as peers,
    ):

        def tell(now: Progress) -> None:
            digests.advance(now.read)
            progress(peers.widen(now))

        ours = done.among(unit.id for unit in share.units)
        ours = replace(ours, pools={**orders, **ours.pools})
        options = Options(count, block or BLOCK, strict, device, tell, peers.check, reader.abort)
        findings = execute(replace(plan, units=share.units), reader, sink, journal, ours, options)
        sink.sync()
        solved = findings.alignments
        merged = peers.exchange("merged", findings.as_json(), lambda: peers.again(progress))
        written = shard_digests(plan, share.shards, count)
        read = {**known, **digests.result(count)}
        check_inputs(reader, read, count)  # so that the lock speaks of the files that were merged
        remembered.keep(read)
        if ranks.count == 1:
            remember(plan, solved, read)
        digested = [[read[path] for path in mine], written]
        if ranks.number:
            peers.leave(digested)
            inputs, shards = collect(plan, [share], [digested])
        else:
            inputs, shards = collect(plan, shares, peers.exchange(LAST, digested))
            findings = Findings.sum(merged)
            journal.absorb()
            errors = errors_of(plan, findings.figures)
            lock = partial(lock_text, plan, inputs, shards, errors=errors)
            complete(plan, lock, solved, keep_auto_map, _card)
    return Result(
        outputs=tuple(output.to for output in plan.outputs),
        shards=shards,
        seconds=time.perf_counter() - began,
        bytes_read=findings.bytes_read,
        bytes_written=plan.bytes_written,
        resumed=findings.resumed,
        nonfinite=findings.nonfinite,
        overflow=findings.overflow,
        changed=tuple(changed_outputs(plan.recipe, shards)),
        alignments={name: found.figures for name, found in solved.items()},
        notes=tuple(notes),
        output_nonfinite=findings.output_nonfinite,
        errors=errors_of(plan, findings.figures),
        plan=plan,
        bytes_fetched=reader.fetched,
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
    from mergekit_lite.checkpoint.memory import MemoryReader, memory_checkpoint
    from mergekit_lite.plan.build import build_plan, used_models
    from mergekit_lite.plan.order import BLOCK
    from mergekit_lite.run.execute import Options, execute
    from mergekit_lite.run.journal import Done
    from mergekit_lite.run.sink import Memory

    if len(recipe.saves) != 1:
        raise RecipeError(Problem("in memory a recipe has one `save`", None, "keep one of them"))
    if recipe.saves[0].lora is not None:
        raise RecipeError(Problem("an adapter is not made in memory", recipe.saves[0].mark, "use `run`"))
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
    checkpoints = {name: memory_checkpoint(name, models[name], config or {}) for name in used_models(recipe)}
    made = build_plan(recipe, checkpoints, threads=threads or 1, check_output=False, out=Path("memory"))
    sink = Memory(made.outputs)
    options = Options(threads or default_threads(), block or BLOCK)
    execute(made, MemoryReader(models), sink, None, Done(), options)
    return sink.tensors[0]
