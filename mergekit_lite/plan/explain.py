"""A plan for people and for programs: as text, as a drawing of its steps, as data for JSON. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mergekit_lite.checkpoint.coded import coded_files
from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.plan.estimate import seconds
from mergekit_lite.plan.model import Node, Output, OutShard, OutTensor, Plan, StepView
from mergekit_lite.plan.streaming import bytes_fetched
from mergekit_lite.plan.transplant import transplanted
from mergekit_lite.plan.vocabulary import vocabulary
from mergekit_lite.plan.words import about, count, shape, size
from mergekit_lite.recipe.write import located

LONGEST = 400  # characters of an expression


def summary(plan: Plan, threads: int) -> list[str]:
    """The plan in lines: one for each step, one for what it costs, then every output with its files."""
    calls = [(step.name, call(step), step.space, count(step.tensors, "tensor")) for step in plan.steps]
    lines = []
    for step, line in zip(plan.steps, _aligned(calls), strict=True):
        lines += [line, *([f"  {transplanted(step)}"] if step.rows else [])]
    shards = count(sum(len(output.shards) for output in plan.outputs), "shard")
    costs = [
        f"read {size(plan.bytes_read)}{_passes(plan)}",
        *([f"fetch {size(far)}"] if (far := bytes_fetched(plan)) else []),
        f"write {_most(plan)}{size(plan.bytes_written)} in {shards}{_linked(plan)}",
        f"peak {_peak(plan)}",
        f"cpu, {count(threads, 'thread')}, {_blocks(plan)}{about(seconds(plan, threads))}",
    ]
    lines.append("  " + " · ".join(costs))
    if plan.vocabulary is not None:
        lines += vocabulary(plan.vocabulary)
    for output in plan.outputs:
        lines.append(f"{output.to}  from {output.step}")
        files = [(s.file, size(s.nbytes), count(len(s.tensors), "tensor"), _same(s, plan)) for s in output.shards]
        lines += [f"  {text}" for text in _aligned(files)]
        if output.compress is not None:
            plain = sum(shard.nbytes for shard in output.shards[output.kept :])
            masks = count(len(output.store), "mask")
            lines.append(f"  {masks}, {size(plain)} at most, coded at the end: {', '.join(coded_files(output.store))}")
    return lines


def _most(plan: Plan) -> str:
    """`at most ` where masks are coded, which takes fewer bytes unless there is no order in them."""
    return "at most " if any(output.compress is not None for output in plan.outputs) else ""


def _linked(plan: Plan) -> str:
    """`, 8.0 MB more are further names of these` where outputs share files."""
    shared = sum(output.linked for output in plan.outputs)
    return f", {size(shared)} more are further names of these" if shared else ""


def _same(shard: OutShard, plan: Plan) -> str:
    """`= out/a/model-00001-of-00002.safetensors` of a shard that is a further name of another."""
    return "" if shard.same is None else f"= {first_file(shard, plan)}"


def first_file(shard: OutShard, plan: Plan) -> str | None:
    """The path of the shard of which this one is a further name; None where it is none."""
    if shard.same is None:
        return None
    output = plan.outputs[shard.same[0]]
    return f"{output.to}/{output.shards[shard.same[1]].file}"


def _peak(plan: Plan) -> str:
    """`44.6 MB`, or `251.3 MB of 300.0 MB` with Python and torch where there is a budget."""
    memory = plan.memory
    return size(plan.peak_bytes) if memory is None else f"{size(memory.peak)} of {size(memory.budget)}, all included"


def _blocks(plan: Plan) -> str:
    """`blocks of 131,072, ` where the plan has chosen them."""
    return "" if plan.memory is None else f"blocks of {plan.block:,}, "


def _passes(plan: Plan) -> str:
    """` (4.0×)` where the inputs are read more than once."""
    passes = plan.bytes_read / plan.bytes_input if plan.bytes_input else 1.0
    return f" ({passes:.1f}×)" if passes > 1.05 else ""


def call(step: StepView) -> str:
    """`ties(math, code, chat) - base`."""
    base = f" - {step.base}" if step.base else ""
    return f"{step.use}({', '.join(step.inputs)}){base}"


def tensors(plan: Plan) -> list[tuple[str, ...]]:
    """A row for each output tensor, in the order of the files: output folder, tensor, shape, dtype, shard, offset of
    its first byte in the shard, expression."""
    models = _models(plan)
    return [
        (
            output.to,
            tensor.name,
            shape(tensor.shape),
            tensor.dtype,
            output.shards[tensor.shard].file,
            str(tensor.start),
            expression(tensor, models),
        )
        for output in plan.outputs
        for tensor in output.tensors
    ]


def expression(tensor: OutTensor, models: Mapping[str, str]) -> str:
    """How a tensor is computed, in words: `add(sparsify(delta(math, base), density=0.2), base)`.

    `models` gives the model's name by the path of a file. A tensor of another name is shown with it: `math:NAME`.
    Settings with their default are left out; the text ends with `…` after 400 characters.
    """
    if tensor.copied:
        return f"copy of {_load(tensor.node, tensor.name, models)}"
    text = ""
    for part in _parts(tensor.node, tensor.name, models):
        text += part
        if len(text) > LONGEST:
            return text[: LONGEST - 1] + "…"
    return text


def plain(value: Any) -> str:
    """A setting's value as a recipe writes it; equal ones for all inputs as one."""
    if isinstance(value, tuple):
        same = len(set(value)) == 1
        return plain(value[0]) if same else "[" + ", ".join(plain(one) for one in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def tree(plan: Plan) -> list[str]:
    """The steps as a tree that hangs from every output folder. A step that comes again refers to its first place."""
    steps = {step.name: step for step in plan.steps}
    seen: set[str] = set()
    lines: list[str] = []

    def grow(name: str, role: str, lead: str, stem: str) -> None:
        step = steps.get(name)
        if step is None:
            lines.append(f"{lead}{name}{role}  {located(plan.recipe.models[name])}".rstrip())
            return
        settings = "".join(f" {key}={value}" for key, value in step.params.items())
        if name in seen:
            lines.append(f"{lead}{name}{role}  (above)")
            return
        seen.add(name)
        lines.append(f"{lead}{name}{role}  {step.use}{settings}  {step.space}, {count(step.tensors, 'tensor')}")
        for place, below in enumerate(step.reads):
            last = place == len(step.reads) - 1
            grow(below, _role(step, place), stem + ("└─ " if last else "├─ "), stem + ("   " if last else "│  "))

    for output in plan.outputs:
        lines.append(output.to)
        grow(output.step, "", "└─ ", "   ")
    return lines


def mermaid(plan: Plan) -> str:
    """The steps as a Mermaid flowchart: models, steps, output folders. A dotted arrow leads from a base."""
    models = []
    for name in plan.checkpoints:
        location = located(plan.recipe.models[name])
        models.append((name, name, "" if location == name else location))
    return flowchart(models, plan.steps, [(output.step, output.to, size(output.nbytes)) for output in plan.outputs])


def flowchart(
    models: Sequence[tuple[str, str, str]], steps: Sequence[StepView], outputs: Sequence[tuple[str, str, str]]
) -> str:
    """The flowchart of `steps`. `models` are names with two lines of label, `outputs` likewise by the name of what they
    save."""
    lines = ["flowchart LR"]
    ids: dict[str, str] = {}
    for number, (name, *label) in enumerate(models):
        ids[name] = f"model{number}"
        lines.append(f'  {ids[name]}[("{_quoted(*label)}")]')
    for number, step in enumerate(steps):
        ids[step.name] = f"step{number}"
        lines.append(f'  {ids[step.name]}["{_quoted(step.name, step.use)}"]')
    for step in steps:
        for place, name in enumerate(step.reads):
            role = _role(step, place)
            arrow = f"-. {role.strip(' ()')} .->" if role else "-->"
            lines.append(f"  {ids[name]} {arrow} {ids[step.name]}")
    for number, (step_name, *label) in enumerate(outputs):
        lines.append(f'  out{number}[/"{_quoted(*label)}"/]')
        lines.append(f"  {ids[step_name]} --> out{number}")
    return "\n".join(lines)


def as_json(plan: Plan, threads: int) -> dict[str, Any]:
    """Everything about the plan as plain data. Sizes and offsets are bytes; `seconds` is an estimate."""
    models = _models(plan)
    return {
        "digest": plan.digest,
        "seed": plan.recipe.seed,
        "compute": plan.recipe.compute,
        "models": {
            name: {
                "location": checkpoint.location,
                "revision": checkpoint.revision,
                "adapter": _adapter(checkpoint),
                "tensors": len(checkpoint.tensors),
                "bytes": sum(meta.nbytes for meta in checkpoint.tensors.values()),
                "files": [file.path for file in checkpoint.shards],
            }
            for name, checkpoint in plan.checkpoints.items()
        },
        "steps": [
            {
                "name": step.name,
                "use": step.use,
                "of": list(step.inputs),
                "base": step.base,
                "with": dict(step.params),
                "space": step.space,
                "tensors": step.tensors,
                **({"rows": dict(step.rows)} if step.rows else {}),
            }
            for step in plan.steps
        ],
        "bytes_read": plan.bytes_read,
        "bytes_fetched": bytes_fetched(plan),
        "bytes_written": plan.bytes_written,
        "bytes_linked": sum(output.linked for output in plan.outputs),
        "peak_bytes": plan.peak_bytes,
        "memory": None if plan.memory is None else {"budget": plan.memory.budget, "peak": plan.memory.peak},
        "threads": threads,
        "block": plan.block,
        "seconds": round(seconds(plan, threads), 1),
        "units": len(plan.units),
        "vocabulary": None if plan.vocabulary is None else asdict(plan.vocabulary),
        "outputs": [_output(output, models, plan) for output in plan.outputs],
        "warnings": [problem.as_json() for problem in plan.warnings],
    }


def _adapter(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What is folded into a checkpoint: where it comes from, and how many of the base's modules and tensors change."""
    adapter = checkpoint.adapter
    if adapter is None:
        return None
    counts = {"low_rank": len(adapter.low_rank) + len(adapter.products), "whole": len(adapter.whole)}
    return {"location": adapter.location, "revision": adapter.revision, **counts}


def _output(output: Output, models: Mapping[str, str], plan: Plan) -> dict[str, Any]:
    return {
        "to": output.to,
        "step": output.step,
        "bytes": output.nbytes,
        "bytes_linked": output.linked,
        "config_from": output.donor,
        **({"compress": output.compress, "coded": coded_files(output.store)} if output.compress is not None else {}),
        "shards": [
            {
                "file": shard.file,
                "bytes": shard.nbytes,
                "same_as": first_file(shard, plan),
                "tensors": [
                    {
                        "name": tensor.name,
                        "shape": list(tensor.shape),
                        "dtype": tensor.dtype,
                        "start": tensor.start,
                        "bytes": tensor.nbytes,
                        "copied": tensor.copied,
                        "expression": expression(tensor, models),
                    }
                    for tensor in shard.tensors
                ],
            }
            for shard in output.shards
        ],
    }


def _role(step: StepView, place: int) -> str:
    """What the entry number `place` of a step's `reads` is to the step, where it is no plain input."""
    if place < len(step.inputs):
        return ""
    return " (base)" if step.base and place == len(step.inputs) else " (rest)"


def _models(plan: Plan) -> dict[str, str]:
    """The model that a file belongs to; where two models are one checkpoint, the first of them. An adapter's file
    belongs to its location."""
    found: dict[str, str] = {}
    for name, checkpoint in plan.checkpoints.items():
        if checkpoint.adapter is not None:
            found.update(dict.fromkeys((file.path for file in checkpoint.adapter.files), checkpoint.adapter.location))
        for file in checkpoint.shards:
            found.setdefault(file.path, name)
    return found


def _parts(node: Node, name: str, models: Mapping[str, str]) -> Iterator[str]:
    """The pieces of an expression, made as they are asked for: a graph of shared nodes may be endless as a text."""
    if node.method is None:
        yield _load(node, name, models)
        return
    yield f"{node.method.name}("
    for place, below in enumerate(node.inputs):
        if place and node.method.beside is not None:
            # The factors of an adapter have names of their own, which say nothing new.
            yield f", {models.get(below.load.file, below.load.file)}" if place == 1 and below.load else ""
            continue
        yield ", " if place else ""
        yield from _parts(below, name, models)
    for key, value in node.params:
        param = node.method.param(key)
        if param is None or not _is_default(value, param.default):
            yield f", {key}={plain(value)}"
    yield ")"


def _load(node: Node, name: str, models: Mapping[str, str]) -> str:
    assert node.load is not None
    model = models.get(node.load.file, node.load.file)
    return model if node.load.name == name else f"{model}:{node.load.name}"


def _is_default(value: Any, default: Any) -> bool:
    return all(one == default for one in value) if isinstance(value, tuple) else value == default


def _quoted(*texts: str) -> str:
    """Text for a quoted Mermaid label, one part below the other."""
    marks = str.maketrans({"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;", "\n": " "})
    return "<br>".join(text.translate(marks) for text in texts if text)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines with columns of equal width, two blanks between them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
