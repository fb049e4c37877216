"""`merge run`: carry out a recipe."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_lite.cli import log as log_of
from mergekit_lite.cli import options, show
from mergekit_lite.cli.push import as_json as push_json
from mergekit_lite.cli.push import push_all, tell
from mergekit_lite.errors import InterruptedRun, MergeError, Problem, printable

if TYPE_CHECKING:
    from mergekit_lite.merge import Result
    from mergekit_lite.plan.model import Output, Plan
    from mergekit_lite.run.progress import Progress
    from mergekit_lite.run.ranks import Ranks

SHOWN = 5  # tensors that a warning names before it only counts


def run(
    recipe: options.Recipe,
    out: options.Out = None,
    set_: options.Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first NaN or infinity, read or made.")] = False,
    fetch: options.Fetch = options.Source.cache,
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    threads: options.Threads = None,
    block: options.Block = None,
    memory: options.Memory = None,
    device: options.Device = "cpu",
    keep_auto_map: Annotated[
        bool,
        typer.Option("--keep-auto-map", help="Keep the entries of configurations that name code of an input."),
    ] = False,
    sandbox: options.Sandbox = None,
    log: options.Log = options.Form.text,
    json: options.Json = False,
) -> None:
    """Merge checkpoints as a recipe says.

    The output folder appears when it is whole. A run that stops keeps what it has finished, and the same command with
    --resume goes on to the same bytes. A lock file is a recipe too: running it tells whether the bytes are the same.
    What the recipe says under `push` is published last; if that fails, the output is whole and `merge push` does it.
    --log json is for machines that keep logs: docs/ci.md has its fields. Exit codes are the same.
    """
    from mergekit_lite import merge
    from mergekit_lite.run.ranks import launched, launched_alone

    if launched_alone():
        hint = "for several processes on CPUs: `accelerate launch --multi_gpu`, which needs no GPU, or `torchrun`"
        show.warnings([Problem("accelerate has started one process", None, hint)])
    ranks = launched(show.note)
    with _terminate_as_interrupt(ranks), _one_voice(ranks):

        def make() -> Plan:
            read = merge.load_recipe(recipe, set_ or ())
            return merge.plan(
                read,
                out=out,
                threads=threads,
                block=block,
                memory=memory,
                offline=offline,
                allow_pickle=allow_pickle,
                check_output=not resume,
                fetch=fetch.value,
            )

        made = ranks.agree(make, resume=resume, strict=strict)
        before = made.warnings
        if not ranks.number:
            show.warnings(before)
            log_of.planned(made)
        with _resumable(), _display(ranks.number == 0) as progress:
            result = merge.run(
                made,
                threads=threads,
                block=block,
                resume=resume,
                strict=strict,
                device=device,
                keep_auto_map=keep_auto_map,
                progress=progress,
                ranks=ranks,
            )
    if ranks.number:
        return
    made = result.plan or made
    found = findings(result)
    show.warnings(found)
    if not json:
        for name, figures in result.alignments.items():
            for text in matched(made.alignments[name].labels, figures):
                show.line(f"{name}  {text}")
        for output in made.outputs:
            parts = [
                f"wrote {output.to}",
                show.count(len(output.shards), "shard"),
                f"{show.size(output.nbytes)} in {show.seconds(result.seconds)}",
                *_shared(made, output, result.linked.get(output.to, 0)),
                f"lock {Path(output.to) / 'recipe.lock.yaml'}",
            ]
            show.line(" · ".join(parts))
            for text in fidelity(result.errors.get(output.to, {}), output.adapter is not None):
                show.line(text)
            if output.to in result.decomposed:
                show.line(savings(result.decomposed[output.to], output.nbytes))
    log_of.wrote(made)
    pushed = push_all(made, threads or merge.default_threads())
    log_of.pushed(pushed)
    if json:
        data = as_json(made, result, [*before, *found])
        show.json(data | ({"pushes": [push_json(done, []) for done in pushed]} if pushed else {}))
    for done in pushed if not json else ():
        tell(done)
    if result.changed:
        raise typer.Exit(1)


def _shared(plan: Plan, output: Output, linked: int) -> list[str]:
    """How many bytes of an output are files of earlier ones, and of which; nothing where none are."""
    first = dict.fromkeys(plan.outputs[shard.same[0]].to for shard in output.shards if shard.same is not None)
    return [f"{show.size(linked)} of it shared with {', '.join(first)}"] if linked else []


def findings(result: Result) -> list[Problem]:
    """What a finished run has to tell: non-finite numbers, numbers out of range, bytes that a lock does not expect."""
    found: list[Problem] = [*result.notes]
    if result.nonfinite:
        hint = "`--strict` stops there instead"
        message = f"the inputs hold {show.count(sum(result.nonfinite.values()), 'NaN or infinite number')}"
        found.append(Problem(f"{message}: {_counted(result.nonfinite)}", None, hint))
    passed, made = _causes(result)
    if passed:
        hint = "take sound copies of the inputs named above; `merge inspect --stats FOLDER` counts them by tensor"
        message = f"the output has {show.count(sum(passed.values()), 'NaN or infinite number')} from the inputs"
        found.append(Problem(f"{message}: {_counted(passed)}", None, hint))
    if made:
        hint = (
            "a division by nothing, such as a delta of zeros, or a sum beyond the range: try `compute: float64`, lower "
        )
        hint += "the weights, or copy these tensors from one input; `--strict` stops there instead"
        message = f"the merge made {show.count(sum(made.values()), 'NaN or infinite number')} of finite ones"
        found.append(Problem(f"{message}: {_counted(made)}", None, hint))
    if result.overflow:
        hint = "they are infinite now, in float8_e4m3fn the largest number: save in bfloat16 or float32, or lower the "
        hint += "weights"
        message = f"{show.count(sum(result.overflow.values()), 'number')} out of the range of the dtype saved in"
        found.append(Problem(f"{message}: {_counted(result.overflow)}", None, hint))
    found += _whole(result)
    if result.changed:
        hint = "look at `made_with` in the lock: other versions of this program or of torch may round differently"
        names = ", ".join(f"`{name}`" for name in result.changed)
        found.append(Problem(f"the bytes differ from what the lock says: {names}", None, hint))
    return found


def _whole(result: Result) -> list[Problem]:
    """Saves of `decompose` in which every tensor was left as it is."""
    found = []
    for output in result.plan.outputs if result.plan is not None else ():
        step = result.plan.recipe.steps.get(output.step) if result.plan is not None else None
        plain = output.adapter is None and not any(tensor.scales for tensor in output.tensors)
        if step is not None and step.use == "decompose" and plain and output.to not in result.decomposed:
            message = (
                f"nothing of `{output.step}` is decomposed: no tensor's parts would have fewer numbers than it has"
            )
            found.append(Problem(message, step.use_mark, "lower `rank` or `share`"))
    return found


def _causes(result: Result) -> tuple[dict[str, int], dict[str, int]]:
    """Non-finite numbers of the outputs, by tensor: those that inputs of the same name may have passed on, and those
    that arose. What left the range of the dtype saved in is told by itself and is in neither."""
    left = {name: count - result.overflow.get(name, 0) for name, count in result.output_nonfinite.items()}
    spoilt = tuple(result.nonfinite)
    passed: dict[str, int] = {}
    made: dict[str, int] = {}
    for name, count in left.items():
        if count > 0:
            (passed if any(key.endswith(f":{name}") for key in spoilt) else made)[name] = count
    return passed, made


def fidelity(errors: Mapping[str, tuple[float, float]], adapter: bool) -> list[str]:
    """How near an adapter comes to the change that it stands for, or FP8 to the weights, in lines; nothing where there
    is none."""
    if not errors:
        return []
    from mergekit_lite.plan.lock import relative

    found = relative(errors)
    modules = [(name, error) for name, error in found["modules"].items() if error is not None]
    worst = sorted(modules, key=lambda pair: -pair[1])[:SHOWN]
    shown = ", ".join(f"{error:.3g} {name}" for name, error in worst)
    more = f" and {len(modules) - SHOWN} more in the lock" if len(modules) > SHOWN else ""
    whole = "not a number" if found["all"] is None else f"{found['all']:.3g}"
    what = "change" if adapter else "weights"
    lines = [f"error {whole} of the norm of the {what}, in {show.count(len(errors), 'module')}"]
    return [*lines, f"largest: {shown}{more}"] if shown else lines


def savings(told: Mapping[str, Any], nbytes: int) -> str:
    """What the parts of decomposed tensors would save, and what became of their stable ranks, in a line. `nbytes` are
    those of the output."""
    ranks = [module["stable_rank"] for module in told["modules"].values()]
    parts = [
        f"as low rank and rows {show.size(told['bytes'])} in place of {show.size(told['of'])}",
        f"the model {show.size(nbytes - told['of'] + told['bytes'])} in place of {show.size(nbytes)}",
    ]
    if all(rank is not None for pair in ranks for rank in pair):
        before, after = (sum(pair[i] for pair in ranks) / len(ranks) for i in (0, 1))
        parts.append(f"stable rank {before:.3g} -> {after:.3g} on average")
    return " · ".join(parts)


def matched(labels: Sequence[str], figures: Mapping[str, Any]) -> list[str]:
    """What was found for each model whose units were put in order, in a line; nothing where a file told the order."""
    found = figures.get("models", [figures])
    lines = []
    for label, one in zip(labels, found, strict=True):
        if one.get("kept"):
            share = sum(one["kept"].values()) / len(one["kept"])
            spaces = show.count(len(one["kept"]), "space")
            lines.append(f"{label}: the kept units of {spaces} hold {share:.0%} of their L1 norm")
        if not one.get("moved"):
            continue
        share = sum(one["moved"].values()) / len(one["moved"])
        parts = [f"{label}: {share:.0%} of the units of {show.count(len(one['moved']), 'space')} moved"]
        if one.get("distance_before") is not None:
            parts.append(f"distance {one['distance_before']:.4g} -> {one['distance_after']:.4g}")
        lines.append(" · ".join(parts))
    return lines


def as_json(plan: Plan, result: Result, warnings: list[Problem]) -> dict[str, Any]:
    """The result of a run as data for JSON. Sizes are bytes, times are seconds."""
    from mergekit_lite.plan.lock import relative

    return {
        "outputs": [
            {
                "to": output.to,
                "bytes": output.nbytes,
                "bytes_linked": result.linked.get(output.to, 0),
                "lock": str(Path(output.to) / "recipe.lock.yaml"),
                "shards": [
                    {"file": s.file, "bytes": s.nbytes, "blake3": result.shards[output.to][s.file]}
                    for s in output.shards
                ],
                **({"error": relative(result.errors[output.to])} if result.errors.get(output.to) else {}),
                **({"decomposed": result.decomposed[output.to]} if output.to in result.decomposed else {}),
            }
            for output in plan.outputs
        ],
        "plan": plan.digest,
        "seconds": round(result.seconds, 3),
        "bytes_read": result.bytes_read,
        "bytes_fetched": result.bytes_fetched,
        "bytes_written": result.bytes_written,
        "resumed": result.resumed,
        "nonfinite": dict(result.nonfinite),
        "output_nonfinite": dict(result.output_nonfinite),
        "overflow": dict(result.overflow),
        "changed": list(result.changed),
        "alignments": {name: dict(figures) for name, figures in result.alignments.items()},
        "warnings": [problem.as_json() for problem in warnings],
    }


def _counted(found: Any) -> str:
    """`a (3), b (1) and 7 more`."""
    names = [f"`{name}` ({number:,})" for name, number in list(found.items())[:SHOWN]]
    return ", ".join(names) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


@contextlib.contextmanager
def _terminate_as_interrupt(ranks: Ranks) -> Iterator[None]:
    """SIGTERM, and SIGHUP unless `nohup` has it ignored, stop a run the way Ctrl-C does: what is finished is kept. A
    launcher sends it to every rank once one of them has ended; the last words of this one are not cut short by it."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {}
    try:
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and (name == "SIGTERM" or signal.getsignal(number) is signal.SIG_DFL):
                before[number] = signal.signal(number, interrupt)
    except ValueError:  # not in the main thread, where no signal arrives
        yield
        return
    try:
        yield
    except BaseException:
        if ranks.count > 1:
            before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _one_voice(ranks: Ranks) -> Iterator[None]:
    """Of several ranks, rank 0 tells the user and prints JSON; the others tell only what it cannot know."""
    try:
        yield
    except MergeError as fault:
        if not ranks.number:
            raise
        if ranks.speaks(fault):
            show.problems(fault.problems)
        raise typer.Exit(fault.exit_code) from None


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    """Ctrl-C before or after the loop, while files are opened or closed, says what Ctrl-C in the loop says."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRun("stopped by Ctrl-C", hint="the same command with `--resume` goes on") from None


@contextlib.contextmanager
def _display(wanted: bool) -> Iterator[Callable[[Progress], None]]:
    """What to call with the run's progress: a display on a terminal, nothing elsewhere."""
    events = log_of.current()
    if events is not None and wanted:
        yield events.progress
        return
    console = show.console(stderr=True)
    if not (wanted and console.is_terminal):
        yield lambda progress: None
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Display

    text = TextColumn("{task.description}", markup=False)
    behind = TextColumn("{task.fields[detail]}", markup=False)
    display = Display(text, BarColumn(), behind, TimeRemainingColumn(), console=console, transient=True)
    tasks: dict[str, Any] = {}
    began: dict[str, tuple[float, int]] = {}

    def update(progress: Progress) -> None:
        now = time.monotonic()
        if progress.phase not in tasks:
            tasks[progress.phase] = display.add_task(label(progress), total=progress.total, detail="")
            began[progress.phase] = (now, progress.read)
        since, read = began[progress.phase]
        rate = (progress.read - read) / (now - since) if now > since else 0.0
        detail = detail_of(progress, rate)
        done = passes(progress)[1] if progress.phase == "measure" else progress.done
        display.update(tasks[progress.phase], description=label(progress), completed=done, detail=detail)

    with display:
        yield update


def label(progress: Progress) -> str:
    """What stands before the bar: the step at work, or that its units or statistics are looked at first."""
    return printable(progress.step if progress.phase == "merge" else f"{progress.phase} {progress.step}")


def passes(progress: Progress) -> tuple[int, int]:
    """Statistics may need several looks at all tensors: which one this is, and how many tensors it has seen."""
    before, done = divmod(max(0, progress.done - 1), max(1, progress.total))
    return before + 1, done + 1


def detail_of(progress: Progress, rate: float) -> str:
    """What stands behind the bar: `201/291  shard 2/3  1.9 GB/s`. `rate` is bytes per second."""
    if progress.phase == "measure":
        number, done = passes(progress)
        return f"{done}/{progress.total}  pass {number}  {show.size(rate)}/s"
    if progress.phase == "align":
        return printable(f"{progress.done}/{progress.total}  {progress.label}")
    place = f"{progress.tensors}/{progress.all_tensors}  shard {progress.shard}/{progress.shards}"
    if progress.within is not None:
        return f"{place}  iteration {progress.within[0]}/{progress.within[1]}"
    return f"{place}  {show.size(rate)}/s"
