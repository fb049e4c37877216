"""Dense models held against the mixture of experts that is to be built from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergekit_lite.checkpoint.meta import MERGEABLE
from mergekit_lite.errors import Mark, Problem, RecipeError
from mergekit_lite.family.family import Stack
from mergekit_lite.family.mixtures import DENSE, STYLES, Style, window_lost
from mergekit_lite.plan.steps import Source
from mergekit_lite.recipe.model import Step


def unfit(step: Step, sources: Iterable[Source]) -> list[Problem]:
    """What is wrong with the step's settings and with models that nothing can be made of."""
    given = [*step.params.values(), *(value for item in step.of for value in item.params.values())]
    problems = [
        Problem("this setting is one value for all tensors", value.mark, "give it plainly")
        for value in given
        if not value.constant
    ]
    for source in sources:
        if source.table.space != "weight":
            hint = "add it to its base first: `use: add`"
            problems.append(Problem(f"`{step.use}` takes whole models, `{source.name}` is a delta", source.mark, hint))
        if source.table.quantized:
            hint = "save it in bfloat16 first (transformers: `model.dequantize()`), then merge"
            problems.append(Problem(f"`{source.name}` is quantised: its numbers are codes", source.mark, hint))
    return list(dict.fromkeys(problems))


def style_of(
    step: Step, settings: Mapping[str, Any], sources: Sequence[Source], base: Source, others: Mapping[str, Source]
) -> Style:
    """The style for the base's type, which all inputs must be of."""
    stated = base.table.config.get("model_type")
    auto = settings["style"] == "auto"
    wanted = _fitting(stated, settings) if auto else settings["style"]
    if wanted is None:
        hint = f"mixtures are made of {_words(dict.fromkeys(kind for types in STYLES.values() for kind in types))}"
        raise RecipeError(Problem(f"`{base.name}` is of the model type `{stated}`", base.mark, hint))
    known = STYLES[wanted]
    if stated not in known:
        fitting = [name for name, types in STYLES.items() if stated in types]
        hint = f"`{wanted}` is made of {_words(known)}"
        hint += f"; of `{stated}` can be made {_words(fitting)}" if fitting else ""
        raise RecipeError(Problem(f"`{base.name}` is of the model type `{stated}`", base.mark, hint))
    style = known[str(stated)]
    problems = []
    shared = settings["shared"]
    inputs = [*sources, *([others[shared]] if shared else [])]
    for source in inputs:
        for key, default in (("model_type", None), ("hidden_act", "silu")):
            mine, theirs = (s.table.config.get(key, default) for s in (base, source))
            if mine != theirs:
                message = f"`{source.name}` has the {key} `{theirs}`, `{base.name}` has `{mine}`"
                hint = "experts and base are models of one kind"
                problems.append(Problem(message, source.mark, hint))
                break
    if shared and style.shared is None:
        message = f"a `{style.model_type}` has no shared expert"
        problems.append(Problem(message, mark_of(step, "shared"), "leave out `shared`, or take another `style`"))
    if style.needs_shared and not shared:
        message = f"a `{style.model_type}` needs a shared expert"
        problems.append(Problem(message, mark_of(step, "style"), "name a model as `shared`, such as the base"))
    of_gate = next((name for name in ("shared_hidden", "shared_prompts") if settings[name]), None)
    if of_gate is None and settings["shared_gate"] == "drawn" and not auto:
        of_gate = "shared_gate"
    if of_gate is not None and style.shared_gate is None:
        message = f"the shared expert of a `{style.model_type}` has no gate"
        problems.append(Problem(message, mark_of(step, of_gate), "leave it out"))
    if settings["dense"] and not style.dense:
        message = f"all layers of a `{style.model_type}` have experts"
        problems.append(Problem(message, mark_of(step, "dense"), "leave out `dense`, or take another `style`"))
    if sum(settings["copies"]) < style.least:
        message = f"a `{style.model_type}` has {style.least} experts or more"
        problems.append(Problem(message, mark_of(step, "style"), "name more models in `of`, or ask for `copies`"))
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return style


def _fitting(stated: object, settings: Mapping[str, Any]) -> str | None:
    """The style that a recipe means which leaves it to the models, whose type is `stated`; None where there is none."""
    if stated in ("llama", "mistral"):
        gated = settings["shared_hidden"] or settings["shared_prompts"]
        return "mixtral" if not settings["shared"] else "qwen2_moe" if gated else "deepseek"
    return next((name for name, types in STYLES.items() if stated in types), None)


def window_remark(style: Style, base: Source) -> list[Problem]:
    """A warning where the mixture looks further back than its base."""
    window = window_lost(style, base.table.config)
    if window is None:
        return []
    message = f"`{base.name}` looks back {window} tokens, a `{style.model_type}` made here looks back to the start"
    return [Problem(message, base.mark, "texts longer than that are read otherwise")]


def stack_of(source: Source) -> Stack:
    """The layers of a model. RecipeError where they are not one stack."""
    stacks, form = source.table.family.stacks, source.table.form
    if len(stacks) != 1 or (form is not None and form.pipeline):
        hint = "experts are made of language models with layers such as `model.layers.{i}.`"
        raise RecipeError(Problem(f"`{source.name}` has not one stack of layers", source.mark, hint))
    return stacks[0]


def units_of(source: Source, stack: Stack) -> tuple[int, int]:
    """How many hidden units the dense feed-forward parts of a model have, and its width. RecipeError where a layer has
    no such part."""
    nodes = source.table.nodes
    shapes = set()
    for index in range(stack.count):
        names = [stack.template.format(i=index) + name for name in DENSE]
        lacking = next((name for name in names if name not in nodes), None)
        if lacking is not None:
            hint = "experts are made of dense feed-forward parts with gate, up and down"
            raise RecipeError(Problem(f"`{source.name}` lacks `{lacking}`", source.mark, hint))
        coded = next((name for name in names if source.table.dtypes[name] not in MERGEABLE), None)
        if coded is not None:
            raise RecipeError(Problem(f"`{source.name}` stores no numbers in `{coded}`", source.mark, "is it packed?"))
        gate, up, down = (nodes[name].shape for name in names)
        if len(gate) != 2 or up != gate or down != gate[::-1]:
            hint = "gate and up are (units, width), down is (width, units)"
            raise RecipeError(Problem(f"`{names[0]}` of `{source.name}` does not fit its layer", source.mark, hint))
        shapes.add((gate[0], gate[1]))
    if len(shapes) != 1:
        hint = "a mixture has one number for all"
        raise RecipeError(Problem(f"layers of `{source.name}` have different numbers of units", source.mark, hint))
    return shapes.pop()


def _words(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def mark_of(step: Step, name: str) -> Mark:
    """Where a setting stands, or the step's method where it is not given."""
    value = step.params.get(name)
    return value.mark if value is not None else step.use_mark
