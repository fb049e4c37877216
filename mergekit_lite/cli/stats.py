"""`merge stats`: what methods ask for of a model, gathered from data."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_lite.cli import bar, options, show
from mergekit_lite.cli.confine import check_inside
from mergekit_lite.errors import Problem, UsageError

if TYPE_CHECKING:
    from mergekit_lite.calibrate.measure import Measurement, Report

SEEDS = 2**31 - 1


class Labels(str, Enum):
    """Whose log-likelihood is squared."""

    auto = "auto"
    expected = "expected"
    sampled = "sampled"


def stats(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder or a Hub id, or a recipe of mergekit-moe's.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="A new folder; each kind is a file in it.", show_default=False),
    ],
    text: options.Text = None,
    data: options.Data = None,
    collect: Annotated[
        str,
        typer.Option(
            "--collect",
            metavar="KINDS",
            help="What to gather: gram, fisher, gradient, router, activations, hidden, confidence.",
        ),
    ] = "gram",
    block: options.TokenBlock = None,
    lines: options.Lines = False,
    examples: options.Examples = None,
    labels: Annotated[
        Labels, typer.Option("--labels", help="Fisher over all classes, or over labels drawn from the model.")
    ] = Labels.auto,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, max=SEEDS, help="Seed of what is drawn.")] = 0,
    device: options.Device = "cpu",
    device_map: Annotated[
        str | None,
        typer.Option(
            "--device-map",
            metavar="NAME",
            help="Spread a large model over devices: auto, balanced.",
            show_default=False,
        ),
    ] = None,
    memory: options.Memory = None,
    threads: options.Threads = None,
    offline: options.Offline = False,
    sandbox: options.Sandbox = None,
    json: options.Json = False,
) -> None:
    """Gather what methods ask for of a model while data pass through it.

    Files in DIR: gram for `regmean`, fisher for `fisher`, gradient (of the loss) for `merge diff --gradients`, router
    for merged experts, activations (means and variances) for REPAIR, hidden (mean states of prompts) for gates of
    `moe`, confidence (with a temperature) for BANG. Loads the model with transformers, whose code alone is run: pip
    install 'mergekit_lite[calibrate]'.

    A recipe of mergekit-moe's brings its prompts: `merge stats THEIR.yml --out THEIR.states` writes what its base makes
    of them, where `merge run THEIR.yml` looks for it.
    """
    from mergekit_lite import merge
    from mergekit_lite import sandbox as confined
    from mergekit_lite.calibrate.collect import check_kinds
    from mergekit_lite.calibrate.measure import Measurement, Settings
    from mergekit_lite.plan.budget import memory_bytes

    check_inside([model], None, text, data, out)
    offline = offline or sandbox is not None
    if model.endswith((".yml", ".yaml")) and Path(model).is_file():
        given = {"--text": text, "--data": data, "--block": block, "--examples": examples, "--lines": lines or None}
        with confined.scratch():
            _of_recipe(Path(model), out, given, json, device, device_map, memory, threads, offline)
        return
    settings = Settings(
        kinds=check_kinds(collect),
        text=text,
        data=data,
        block=block,
        lines=lines,
        examples=examples,
        labels=labels.value,
        seed=seed,
        device=device,
        device_map=device_map,
        memory=None if memory is None else memory_bytes(memory),
        threads=threads or merge.default_threads(),
        offline=offline,
    )
    with confined.scratch():  # torch makes a folder for its compiler as transformers is imported
        measurement = Measurement(model, settings, out)
        show.note(_announced(measurement))
        with bar.counting("examples", measurement.steps) as advance:
            report = measurement.run(advance)
    if json:
        show.json(_as_json(measurement, report))
    else:
        for kind, (name, count) in report.files.items():
            show.line(
                f"wrote {out / name} · {show.count(count, 'tensor')}{_numbers(report) if kind == 'confidence' else ''}"
            )
    show.warnings(_warnings(report))


def _of_recipe(
    path: Path,
    out: Path,
    given: Mapping[str, object],
    json: bool,
    device: str,
    device_map: str | None,
    memory: str | None,
    threads: int | None,
    offline: bool,
) -> None:
    """The hidden states that a recipe needs."""
    from mergekit_lite import merge
    from mergekit_lite.calibrate.prompts import Means, PromptStates
    from mergekit_lite.plan.budget import memory_bytes

    option = next((name for name, value in given.items() if value is not None), None)
    if option is not None:
        raise UsageError(f"`{option}` is for a model: a recipe brings its prompts", hint="leave it out")
    budget = None if memory is None else memory_bytes(memory)
    means = Means(device, device_map, budget, threads or merge.default_threads(), offline)
    states = PromptStates(path, means, out)
    show.note(f"{show.count(states.steps, 'prompt')} · {show.count(states.tokens, 'token')}")
    with bar.counting("prompts", states.steps) as advance:
        files = states.run(advance)
    if json:
        show.json({"out": str(out), "files": files, "examples": states.steps, "tokens": states.tokens})
        return
    for name, count in files.items():
        show.line(f"wrote {out / name} · {show.count(count, 'prompt')}")


def _announced(measurement: Measurement) -> str:
    from mergekit_lite.calibrate.memory import said

    data, need = measurement.data, measurement.need
    parts = [show.count(data.examples, "example")]
    if data.tokens:
        parts.append(show.count(data.tokens, "token"))
    if len(need.passes) > 1:
        parts.append(f"{len(need.passes)} passes, since the Gram matrices take {show.size(need.grams)}")
    detail = said(need)
    parts.append(f"about {show.size(need.nbytes)} beside the model" + (f": {detail}" if detail else ""))
    return " · ".join(parts)


def _numbers(report: Report) -> str:
    shown = [f"{name} {report.confidence[name]:.4g}" for name in ("confidence", "accuracy", "loss", "temperature")
             if name in report.confidence]  # fmt: skip
    return " · " + " · ".join(shown)


def _warnings(report: Report) -> list[Problem]:
    from mergekit_lite.plan.words import few

    found = []
    for kind, names in report.unused.items():
        if not names:
            continue
        said, hint = {
            "gram": ("no example reached", "their Gram matrices are zeros, which leaves them to the other models"),
            "fisher": ("no likelihood depends on", "their information is 0; more examples may reach them"),
            "gradient": ("the loss does not depend on", "their gradient is 0; more examples may reach them"),
            "router": ("no token was given to", "their usage is 0; a longer text may reach them"),
            "activations": ("no example reached", "they have no mean and no variance in the file"),
        }[kind]
        found.append(Problem(f"{kind}: {said} {len(names)} of the model's parts: {few(names)}", None, hint))
    for kind, why in report.skipped.items():
        if why:
            reasons = "; ".join(sorted(set(why.values())))
            message = f"{kind}: nothing for {few(why)}: {reasons}"
            found.append(Problem(message, None, "a merge takes the plain mean there" if kind == "gram" else None))
    return found


def _as_json(measurement: Measurement, report: Report) -> dict[str, Any]:
    data, need = measurement.data, measurement.need
    return {
        "out": str(report.out),
        "files": {kind: {"file": name, "tensors": count} for kind, (name, count) in report.files.items()},
        "examples": data.examples,
        "tokens": data.tokens,
        "block": data.block,
        "tokens_left_over": data.left_over,
        "passes": len(need.passes),
        "memory": {
            "fisher": need.fisher,
            "gradient": need.gradient,
            "work": need.work,
            "grams": need.grams,
            "at_once": need.nbytes,
        },
        "unused": {kind: names for kind, names in report.unused.items() if names},
        "skipped": {kind: names for kind, names in report.skipped.items() if names},
        "confidence": report.confidence or None,
    }
