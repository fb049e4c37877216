"""Before the first byte: the partial folders, room on the disk, the journal of an earlier run."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.extras import find_extras
from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.checkpoint.reader import MAX_OPEN_FILES
from mergekit_lite.checkpoint.writer import free_bytes
from mergekit_lite.errors import InputError, InterruptedRun, Problem, StoppedError
from mergekit_lite.limits import hint_for, refusal
from mergekit_lite.plan.model import Plan
from mergekit_lite.run.copy import ByteSource
from mergekit_lite.run.journal import NAME, Done, Journal, read_beside
from mergekit_lite.run.publish import fsync_folders, take_back
from mergekit_lite.run.ranks import Ranks
from mergekit_lite.run.sink import Files, make_safe, partial

OTHER_FILES = 64  # standard streams, journals, libraries, digests


@contextlib.contextmanager
def open_together(
    plan: Plan, resume: bool, ranks: Ranks, check: Callable[[], None]
) -> Iterator[tuple[Files, Journal, Done, str]]:
    """The files of a run and the journal of this rank, ready to write, and the name of this run of all ranks. Rank 0
    calls `check` and makes the files, then the others open them. Raises what `open_run` and `check` raise, and what
    `Ranks.together` raises."""
    with contextlib.ExitStack() as stack:

        def lead() -> tuple[Files, Journal, Done, str] | None:
            if ranks.number:
                return None
            check()
            run = secrets.token_hex(8)
            return *stack.enter_context(open_run(plan, resume, run)), run

        led, told = ranks.together(lead, lambda opened: opened and opened[-1])
        run = told[0]

        def follow() -> tuple[Files, Journal, Done, str]:
            return led or (*stack.enter_context(_join_run(plan, ranks, run)), run)

        opened, _ = ranks.together(follow, lambda opened: None)
        yield opened


@contextlib.contextmanager
def _join_run(plan: Plan, ranks: Ranks, run: str) -> Iterator[tuple[Files, Journal, Done]]:
    """The files that rank 0 has made or opened, and a journal of this rank's own."""
    folder = partial(plan.outputs[0].to)
    found = read_beside(folder, run)
    if found is None:
        hint = "all machines must see the output folder under one name, on a file system that they share"
        raise StoppedError(f"`{folder}` on {ranks.places[ranks.number].host} is not where rank 0 writes", hint=hint)
    head, done = found
    journal = Journal(folder, ranks.number, run)
    files = Files(plan.outputs)
    try:
        journal.begin(head)
        files.reopen(done.coded)
        yield files, journal, done
    finally:
        files.close()
        journal.close()


@contextlib.contextmanager
def open_run(plan: Plan, resume: bool, run: str = "") -> Iterator[tuple[Files, Journal, Done]]:
    """The files and the journal of a run, ready to write; `run` is its name among ranks.

    Raises StoppedError where an unfinished run lies there and `resume` is not asked for, where there is nothing to
    resume, where the plan has changed, or the disk is too small.
    """
    if resume and (partial(plan.outputs[0].to) / NAME).exists():
        Journal(partial(plan.outputs[0].to)).close()  # says so where that run is still at work
        take_back(plan)
    for output in plan.outputs:
        to = Path(output.to)
        if _occupied(to):
            hint = "choose another folder, or move that one away: nothing is ever overwritten"
            raise StoppedError(f"`{to}` has been taken since the plan was made", hint=hint)
    folder = partial(plan.outputs[0].to)
    started = (folder / NAME).exists()
    if resume and not started:
        raise StoppedError(f"there is no unfinished run in `{folder}` to resume", hint="start it without `--resume`")
    for output in plan.outputs:
        taken = partial(output.to)
        if not resume and taken.exists() and any(taken.iterdir()):
            if started:
                Journal(folder).close()  # says so where that run is still at work
            hint = f"`--resume` goes on with it; to start anew, remove `{taken}` first"
            raise StoppedError(f"`{taken}` holds an unfinished run", hint=hint)
    if not resume:
        _check_room(plan)
    _allow_open_files(sum(len(output.shards) for output in plan.outputs))
    made: list[list[Path]] = []
    try:
        for output in plan.outputs:
            _make_folder(partial(output.to), made)
        journal = Journal(folder, run=run)
    except Exception:
        _remove_folders(made)
        raise
    files = Files(plan.outputs)
    try:
        head = _head(plan)
        if resume and journal.started:
            done = journal.read(head)
            if done is None:
                hint = f"undo the change, or remove `{folder}` and start anew"
                raise StoppedError(
                    f"the recipe or an input has changed since the run in `{folder}` was stopped", hint=hint
                )
            files.reopen(done.coded)
            make_safe(files, journal)
        else:
            done = Done()
            try:
                files.create()
                files.sync()
                for output in plan.outputs:
                    fsync_folders(partial(output.to))
                journal.begin(head)
            except Exception as fault:  # On Ctrl-C they stay: `--resume` makes them again.
                if not resume:
                    with contextlib.suppress(StoppedError):
                        files.close()
                    _remove(plan, made)
                if isinstance(fault, OSError):
                    message = f"cannot write into `{folder}`: {fault.strerror}"
                    raise StoppedError(message, hint=hint_for(fault)) from fault
                raise
        yield files, journal, done
    finally:
        files.close()
        journal.close()


@contextlib.contextmanager
def interruptible(plan: Plan) -> Iterator[None]:
    """Turns Ctrl-C before and after the loop into an InterruptedRun, and what the system refuses into a StoppedError,
    both of which say how to go on. Where a file was refused, the error that is on its way is told how to go on too."""
    try:
        yield
    except KeyboardInterrupt as fault:
        raise InterruptedRun("stopped by Ctrl-C", hint=_way_on(plan)) from fault
    except (StoppedError, InputError) as fault:
        cause = fault.__cause__
        if not isinstance(cause, OSError) or isinstance(cause, BlockingIOError):  # the latter: another run's lock
            raise
        raise type(fault)([_with_way_on(plan, problem) for problem in fault.problems]) from cause
    except (OSError, MemoryError, RuntimeError, ImportError) as fault:
        refused = refusal(fault)
        if refused is None or isinstance(fault, BrokenPipeError):
            raise
        message, hint = refused
        if isinstance(fault, OSError) and fault.filename is None:
            message = f"cannot go on in `{partial(plan.outputs[0].to)}`: {fault.strerror}"
        raise StoppedError(_with_way_on(plan, Problem(message, None, hint))) from fault


def _with_way_on(plan: Plan, problem: Problem) -> Problem:
    if problem.hint is not None and ("--resume" in problem.hint or "is whole" in problem.hint):
        return problem
    way = _way_on(plan)
    return replace(problem, hint=way if problem.hint is None else f"{problem.hint}; {way}")


def _way_on(plan: Plan) -> str:
    first = plan.outputs[0].to  # the last one to be renamed
    if (partial(first) / NAME).exists():
        return "the same command with `--resume` goes on"
    if _occupied(Path(first)):
        return f"it had ended already: `{first}` is whole"
    return "nothing was written: start it again"


def check_tied(plan: Plan, reader: ByteSource) -> None:
    """Refuse checkpoints that store two tensors with different numbers where their configuration says that the two are
    one: merging either would change the model in silence. Raises InputError with all of them."""
    problems = []
    for alias, canonical in plan.tied:
        pairs = list(zip(alias.parts, canonical.parts, strict=False))
        alike = alias.stored == canonical.stored and len(alias.parts) == len(canonical.parts)
        if not alike or not all(a.nbytes == b.nbytes and _same_bytes(a, b, reader) for a, b in pairs):
            message = f"`{alias.name}` and `{canonical.name}` differ, but the configuration ties them ({alias.file})"
            hint = "set `tie_word_embeddings` to false in config.json if they are two tensors, or remove the first one"
            problems.append(Problem(message, None, hint))
    if problems:
        raise InputError(problems)


def _same_bytes(one: TensorMeta, other: TensorMeta, reader: ByteSource) -> bool:
    size = 1 << 20
    ours, theirs = bytearray(size), bytearray(size)
    for start in range(0, one.nbytes, size):
        stop = min(one.nbytes, start + size)
        for meta, buffer in ((one, ours), (other, theirs)):
            reader.read_bytes(meta, start, stop, memoryview(buffer)[: stop - start])
        if ours != theirs:
            return False
    return True


def _head(plan: Plan) -> dict[str, Any]:
    """The identity of a run: the plan, and the inputs as they lay there when it began."""
    inputs = [[f.path, f.nbytes, f.mtime_ns] for c in plan.checkpoints.values() for f in c.shards]
    return {"plan": plan.digest, "inputs": inputs, "to": [output.to for output in plan.outputs]}


def _occupied(to: Path) -> bool:
    return to.exists() and (not to.is_dir() or any(to.iterdir()))


def _make_folder(folder: Path, made: list[list[Path]]) -> None:
    """Make a folder and those above it; adds the ones that were missing to `made`, the innermost first."""
    made.append([place for place in (folder, *folder.parents) if not place.exists()])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise StoppedError(f"cannot make `{folder}`: {fault.strerror}", hint=hint_for(fault)) from fault


def _allow_open_files(count: int) -> None:
    """Raise this process's own limit of open files, as far as it may, where `count` outputs would not fit into it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + MAX_OPEN_FILES + OTHER_FILES
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        with contextlib.suppress(OSError, ValueError):
            limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


def _check_room(plan: Plan) -> None:
    """Refuse where the outputs do not fit on their disks."""
    needed: dict[int, int] = {}
    place: dict[int, Path] = {}
    devices: list[int] = []
    for output in plan.outputs:
        parent = next(p for p in Path(output.to).resolve().parents if p.exists())
        device = os.stat(parent).st_dev
        needed[device] = needed.get(device, 0) + output.nbytes
        needed[device] += sum(shard.nbytes for shard in output.shards[output.kept :])  # coded beside the plain ones
        for shard in output.shards:  # one file with several names, where it can have them
            if shard.same is not None and devices[shard.same[0]] == device:
                needed[device] -= shard.nbytes
        devices.append(device)
        if output.adapter is None:  # a tokenizer's file may be large
            donor = plan.checkpoints[output.donor]
            needed[device] += find_extras(donor, output.config, tokenizer=output.tokenizer).nbytes
        place[device] = parent
    for device, nbytes in needed.items():
        free = free_bytes(place[device])
        if nbytes > free:
            hint = "free some space, choose another disk with `--out`, or save in a smaller dtype"
            message = f"the disk of `{place[device]}` has {free:,} bytes free, the output needs {nbytes:,}"
            raise StoppedError(message, hint=hint)


def _remove(plan: Plan, made: Sequence[Sequence[Path]]) -> None:
    """Take away files that were just made and hold nothing, and the folders made for them. The journal goes last: as
    long as it is there, `--resume` goes on with whatever is left."""
    with contextlib.suppress(OSError):
        for output in plan.outputs:
            for shard in output.shards:
                (partial(output.to) / shard.file).unlink(missing_ok=True)
        (partial(plan.outputs[0].to) / NAME).unlink(missing_ok=True)
        for output in plan.outputs:
            folder = partial(output.to)
            homes = {home for shard in output.shards for home in (folder / shard.file).parents}
            for home in sorted((home for home in homes if home.is_relative_to(folder)), reverse=True):
                with contextlib.suppress(OSError):
                    home.rmdir()
    _remove_folders(made)


def _remove_folders(made: Sequence[Sequence[Path]]) -> None:
    """Take away the folders that were made, as far as they are empty."""
    for folders in reversed(made):
        with contextlib.suppress(OSError):
            for folder in folders:
                if folder.exists():
                    folder.rmdir()
