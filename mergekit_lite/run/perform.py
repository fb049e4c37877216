"""A run from its plan to finished folders: what is checked, done, digested and published, in this order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_lite.errors import Problem, RecipeError
from mergekit_lite.plan.decompose import decomposed
from mergekit_lite.plan.lock import changed_inputs, changed_outputs, errors_of, lock_text, unchecked_inputs
from mergekit_lite.plan.model import Plan
from mergekit_lite.plan.share import spread
from mergekit_lite.run.compress import coded
from mergekit_lite.run.digest import Digests, file_digests
from mergekit_lite.run.execute import execute
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
from mergekit_lite.run.progress import Findings, Options, Progress
from mergekit_lite.run.ranks import Ranks, divide
from mergekit_lite.run.remembered import Remembered
from mergekit_lite.run.result import Result
from mergekit_lite.run.spectra import with_ranks
from mergekit_lite.run.start import check_tied, interruptible, open_together


def perform(
    plan: Plan,
    ranks: Ranks,
    *,
    threads: int,
    block: int,
    resume: bool,
    strict: bool,
    device: str,
    keep_auto_map: bool,
    progress: Callable[[Progress], None],
    card: Callable[[Path, str, int], str],
) -> Result:
    """Carry out `plan` as one of `ranks`; merge.py's `run` tells what the rest means and what is raised. `card` writes
    the model card of an output, of its folder, the text of its lock and its number in it."""
    began = time.perf_counter()
    plan = with_ranks(plan, Options(threads, block, strict, device, progress))
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
            known.update(file_digests((file for file in files if str(file) not in stated), threads))
            locked = locked_digests(plan.recipe.lock, plan.checkpoints)
            problems = changed_inputs(plan.recipe.lock, plan.checkpoints, {**known, **locked})
            if problems:
                raise RecipeError(problems)
            notes.extend(unchecked_inputs(plan.recipe.lock, plan.checkpoints, known))
        check_tied(plan, reader)
        if ranks.count == 1 and plan.alignments:
            orders.update(recall(plan, known, lambda paths: file_digests(map(Path, paths), threads)))

    with (
        interruptible(plan),
        inputs_of(plan, threads) as reader,
        open_together(plan, resume, ranks, check) as (sink, journal, done, name),
        Digests(wanted_parts(share.units, wanted := set(mine) - set(known)), wanted) as digests,
        Peers(plan, ranks, journal, done.units.keys() - {unit.id for unit in share.units}, name) as peers,
    ):

        def tell(now: Progress) -> None:
            digests.advance(now.read)
            progress(peers.widen(now))

        ours = done.among(unit.id for unit in share.units)
        ours = replace(ours, pools={**orders, **ours.pools})
        options = Options(threads, block, strict, device, tell, peers.check, reader.abort)
        findings = execute(replace(plan, units=share.units), reader, sink, journal, ours, options)
        findings.bytes_fetched = before = reader.fetched
        sink.sync()
        solved = findings.alignments
        merged = peers.exchange("merged", findings.as_json(), lambda: peers.again(progress))
        written = shard_digests(plan, share.shards, threads)
        notes.extend(sink.notes())
        read = {**known, **digests.result(threads)}
        check_inputs(reader, read, threads)  # so that the lock speaks of the files that were merged
        remembered.keep(read)
        if ranks.count == 1:
            remember(plan, solved, read)
        digested = [[read[path] for path in mine], written]
        if ranks.number:
            peers.leave(digested)
            finished = plan
            inputs, shards = collect(plan, [share], [digested])
        else:
            inputs, shards = collect(plan, shares, peers.exchange(LAST, digested))
            findings = Findings.sum(merged)
            journal.absorb()
            findings.figures, findings.squares = (spread(plan, one) for one in (findings.figures, findings.squares))
            errors = errors_of(plan, findings.figures, findings.squares)
            told = decomposed(plan, findings.figures)
            finished, shards = coded(plan, shards, sink, journal, done.coded, threads)
            lock = partial(lock_text, finished, inputs, shards, errors=errors, decomposed=told)
            complete(plan, lock, solved, keep_auto_map, card)
    return Result(
        outputs=tuple(output.to for output in plan.outputs),
        shards=shards,
        seconds=time.perf_counter() - began,
        bytes_read=findings.bytes_read,
        bytes_written=finished.bytes_written + sum(plan.outputs[o].shards[s].nbytes for o, s in sink.copied),
        resumed=findings.resumed,
        nonfinite=findings.nonfinite,
        overflow=findings.overflow,
        changed=tuple(changed_outputs(plan.recipe, shards)),
        alignments={name: found.figures for name, found in solved.items()},
        notes=tuple(notes),
        output_nonfinite=findings.output_nonfinite,
        errors=errors_of(plan, findings.figures, findings.squares),
        decomposed=decomposed(plan, findings.figures),
        plan=finished,
        bytes_fetched=findings.bytes_fetched + reader.fetched - before,
        linked=sink.linked(),
    )
