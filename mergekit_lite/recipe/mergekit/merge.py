"""One merge of mergekit's -> one step: the inputs in their order, the base, every parameter under its native name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mergekit_lite.errors import Problem, did_you_mean, suggest
from mergekit_lite.recipe.mergekit.document import Document, Slice, Source
from mergekit_lite.recipe.mergekit.language import TABLE, Setting, TheirMethod
from mergekit_lite.recipe.mergekit.parameter import Parameters, Span
from mergekit_lite.recipe.mergekit.reference import Reference
from mergekit_lite.recipe.model import Input, Ref, Step
from mergekit_lite.recipe.node import Entry
from mergekit_lite.recipe.value import Curve, Rule, Value

ALL_NAMES = tuple(dict.fromkeys(setting.name for method in TABLE.values() for setting in method.settings))


class MergeReader:
    """Makes the steps of one document, whose method is `method`."""

    def __init__(self, document: Document, method: TheirMethod, problems: list[Problem], notes: list[Problem]):
        self.document = document
        self.method = method
        self.read = Parameters(problems, notes)

    def check_names(self) -> None:
        """Report unknown parameters and faulty values, and remark on those that change nothing."""
        self.level(self.document.parameters)
        for part in self.document.slices:
            self.level(part.parameters)
            base = self.base(part)
            for source in part.sources:
                self.level(source.parameters, beside_input=True)
                if self.method.base == "delta" and base is not None and source.ref.key == base.key:
                    for name, entry in source.parameters.items():
                        hint = "the base is what the others are compared with"
                        self.read.note(f"`{name}` of the base has no effect", entry.mark, hint)

    def level(self, parameters: Mapping[str, Entry], beside_input: bool = False) -> None:
        own = {setting.name: setting for setting in self.method.settings}
        method = self.document.method
        for name, entry in parameters.items():
            setting = own.get(name)
            if name not in ALL_NAMES:
                near = did_you_mean(name, own) or did_you_mean(name, ALL_NAMES)
                hint = f"did you mean `{near}`?" if near else suggest(name, own) or "it takes none"
                self.read.tell(f"`{method}` has no parameter `{name}`", entry.mark, hint)
                continue
            if setting is None:
                takes = f"it takes {', '.join(f'`{key}`' for key in own)}" if own else "it takes no parameters"
                self.read.note(f"`{name}` has no effect on `{method}`", entry.mark, takes)
                continue
            self.read.written(setting, entry)
            if setting.unused is not None:
                self.read.note(f"`{name}` has no effect", entry.mark, setting.unused)
            elif beside_input and not setting.per_input:
                hint = "mergekit reads it beside a slice or at the top only"
                self.read.note(f"`{name}` has no effect beside a model", entry.mark, hint)

    def base(self, part: Slice) -> Reference | None:
        """The base of a slice, which may have its own."""
        return part.base or self.document.base

    def donor(self, part: Slice) -> Reference:
        """The model that stands first in the step of a slice and gives it the configuration."""
        base = self.base(part)
        listed = base is not None and any(source.ref.key == base.key for source in part.sources)
        return base if base is not None and listed else part.sources[0].ref

    def alone(self, part: Slice) -> Source | None:
        """The only source of a slice whose layers are copied as they are: methods that need two models leave one alone,
        and methods on changes from a base leave the base alone."""
        if len(part.sources) != 1:
            return None
        (source,) = part.sources
        if self.method.use == "passthrough":
            scale = self.value(self.method.settings[0], part, source, Span())
            return source if scale is None or _is(scale, 1.0) else None
        base = self.base(part)
        own = base is not None and source.ref.key == base.key
        on_changes = self.method.needed and self.method.base == "delta"
        return source if self.method.lone or (on_changes and own) else None

    def step(self, name: str, part: Slice, span: Span, cut: Callable[[Source], Ref]) -> Step | None:
        """The step that merges a slice, `cut` giving its inputs; None where it is at fault."""
        if not self.document.sound:
            return None
        if self.method.lone and not self.method.needed and len(part.sources) == 1:
            mark = self.document.mark
            self.read.note(f"`{self.document.method}` has one model, which is copied", mark, "list the models meant")
            return Step(name, "passthrough", (Input(cut(part.sources[0]), {}),), None, {}, mark, mark)
        if not self.fits(part):
            return None
        base, others = self.base(part), list(part.sources)
        own = next((source for source in others if base is not None and source.ref.key == base.key), None)
        if own is not None:
            others.remove(own)
        inputs = others if own is None or self.method.base == "delta" else [own, *others]
        params, beside = self.settings(part, inputs, span)
        of = tuple(Input(cut(source), given) for source, given in zip(inputs, beside, strict=True))
        lead = cut(own) if own is not None and self.method.base == "delta" else None
        mark = self.document.mark
        return Step(name, self.method.use, of, lead, params, mark, mark)

    def fits(self, part: Slice) -> bool:
        """Whether the inputs are as many as the method takes and the base is among them; says what is not."""
        method, name, mark = self.method, self.document.method, self.document.mark
        base, count = self.base(part), len(part.sources)
        listed = base is not None and any(source.ref.key == base.key for source in part.sources)
        if method.needed and base is None:
            hint = "add `base_model`: the model that the others were fine-tuned from"
            self.read.tell(f"`{name}` needs a `base_model`", mark, hint)
            return False
        if base is not None and method.base != "input" and not listed:
            hint = f"add it to the slice: `- {{model: {base.path}, layer_range: [..]}}`"
            self.read.tell(f"the base `{base.path}` is not among the sources of this slice", part.mark, hint)
            return False
        low, high = max(method.low, 2 if listed and method.base == "delta" else 1), method.high
        if listed and not method.needed and method.base == "delta":
            low, high = max(low, method.low + 1), None if high is None else high + 1
        if count < low or (high is not None and count > high):
            wanted = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
            added = " with the `base_model`, which is added where it is not listed" if base is not None else ""
            plural = "" if wanted == "1" else "s"
            here = "is" if count == 1 else "are"
            message = f"`{name}` takes {wanted} model{plural}, here {here} {count}{added}"
            self.read.tell(
                message, mark, "the base counts as one of them" if method.needed else "list the models meant"
            )
            return False
        return True

    def settings(
        self, part: Slice, inputs: Sequence[Source], span: Span
    ) -> tuple[dict[str, Value], list[dict[str, Value]]]:
        """The native settings of a step, and those beside each of its inputs."""
        params = {name: Value.plain(value, self.document.mark) for name, value in self.method.fixed.items()}
        beside: list[dict[str, Value]] = [{} for _ in inputs]
        for setting in self.method.settings:
            if setting.to is None:
                continue
            if not setting.per_input:
                value = self.value(setting, part, None, span)
                if value is None and not self.faulty(setting, part, None):
                    hint = f"add `parameters: {{{setting.name}: 0.5}}`"
                    self.read.tell(f"`{self.document.method}` needs `{setting.name}`", self.document.mark, hint)
                elif value is not None and not _is(value, setting.implied):
                    params[setting.to] = value
                continue
            values = [self.value(setting, part, source, span) for source in inputs]
            stated = not setting.of_step and any(setting.name in source.parameters for source in inputs)
            if not stated and values[0] is not None and all(_same(value, values[0]) for value in values):
                if not _is(values[0], setting.implied):
                    params[setting.to] = values[0]
                continue
            for value, source, given in zip(values, inputs, beside, strict=True):
                if value is not None:
                    given[setting.to] = value
                elif setting.default is not None and not self.faulty(setting, part, source):
                    self.lacks(setting, source)
        if self.document.compat and self.method.compat:
            params["compat"] = Value.plain(True, self.document.mark)
        if self.method.joined is not None:
            params |= self.joined(part, *self.method.joined)
        return params, beside

    def faulty(self, setting: Setting, part: Slice, source: Source | None) -> bool:
        """Whether the parameter is there, but nothing could be made of it, which has been said."""
        levels = [part.parameters, self.document.parameters, *([source.parameters] if source else [])]
        return bool(self.read.problems) and any(setting.name in level for level in levels)

    def lacks(self, setting: Setting, source: Source) -> None:
        where = "mergekit adds the base to the inputs of this method" if source.added else "add it beside the model"
        hint = f"{where}: `{{model: {source.ref.path}, parameters: {{{setting.name}: 0.5}}}}`"
        self.read.tell(f"`{source.ref.path}` has no `{setting.name}`", source.mark, hint)

    def value(self, setting: Setting, part: Slice, source: Source | None, span: Span) -> Value | None:
        """One parameter: of the whole step, or of an input. mergekit holds filters of the latter against the names that
        the tensors have in that input, of the former against those in the output."""
        levels = [part.parameters, self.document.parameters]
        if source is not None:
            start = source.layers[0] if source.layers else 0
            levels, span = [source.parameters, *levels], Span(start, span.count, span.gradient)
        found = self.read.value(setting, levels, span, self.document.mark)
        density = next((other for other in self.method.settings if other.name == "density"), None)
        if found is None or density is None or setting.name != "epsilon":
            return found
        return _where_dropped(found, self.read.value(density, levels, span, self.document.mark))

    def joined(self, part: Slice, names: tuple[str, ...], to: str, join: Callable[..., object]) -> dict[str, Value]:
        """The native setting that several of theirs make together, each the same for all tensors."""
        found: list[object] = []
        for setting in self.method.settings:
            if setting.name not in names:
                continue
            value = self.value(setting, part, None, Span())
            if value is None or not value.constant:
                mark = self.document.mark if value is None else value.mark
                self.read.tell(
                    f"`{setting.name}` must be the same for all tensors", mark, "write one value, no filters"
                )
                return {}
            found.append(value.rules[0].value)
        result = join(*found)
        assert isinstance(result, str)
        return {to: Value.plain(result, self.document.mark)}


def _is(value: Value, constant: object) -> bool:
    """Whether the setting is this constant for every tensor. Of `True` and 1 only one is meant."""
    if not value.constant:
        return False
    held = value.rules[0].value
    return held == constant and isinstance(held, bool) == isinstance(constant, bool)


def _where_dropped(epsilon: Value, density: Value | None) -> Value:
    """`epsilon`, and 0 where the density is 1: mergekit drops nothing there, whatever `epsilon` says."""
    if density is None or not epsilon.constant or all(rule.value != 1 for rule in density.rules):
        return epsilon
    held = epsilon.rules[0].value
    assert isinstance(held, int | float)
    rules = []
    for rule in density.rules:
        value = Curve((held, held)) if isinstance(rule.value, Curve) else 0.0 if rule.value == 1 else held
        rules.append(Rule(rule.glob, value, epsilon.mark))
    return Value(tuple(rules), epsilon.mark, epsilon.key_mark)


def _same(one: Value | None, other: Value | None) -> bool:
    def bare(value: Value | None) -> list[tuple[str | None, object]] | None:
        return None if value is None else [(rule.glob, rule.value) for rule in value.rules]

    return bare(one) == bare(other)
