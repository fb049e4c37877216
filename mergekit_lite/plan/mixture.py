"""`moe`: the tensors of a mixture of experts that is built from dense models, their names and config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import Problem, RecipeError
from mergekit_lite.family.family import Stack, family_of
from mergekit_lite.family.mixtures import COMPUTED, DENSE, Numbers, mixture_config
from mergekit_lite.methods.moe import random_gates, state_gates, upcycled, zeros
from mergekit_lite.methods.spec import Method, Slot
from mergekit_lite.plan.dense import mark_of, stack_of, style_of, unfit, units_of, window_remark
from mergekit_lite.plan.graph import Builder, Table
from mergekit_lite.plan.model import Node
from mergekit_lite.plan.prompts import Prompts, read_prompts
from mergekit_lite.plan.settings import constant
from mergekit_lite.plan.steps import Source, listed
from mergekit_lite.recipe.model import Step

_STATES = "make it with `merge stats --collect hidden` and the step's `base`"


@dataclass(frozen=True, slots=True)
class _Expert:
    """An expert: the model it comes from, the standard deviation of the noise on it, and its factor."""

    source: Source
    stack: Stack
    noise: float
    scale: float


@dataclass(frozen=True, slots=True)
class _States:
    """The hidden states that a gate comes from: what speaks for its expert, and what against it."""

    hidden: Source
    negative: Source | None


def build_mixture(
    builder: Builder,
    step: Step,
    method: Method,
    sources: Sequence[Source],
    named: Mapping[str, Source],
    checkpoints: Mapping[str, Checkpoint] | None,
) -> tuple[Table, list[Problem]]:
    """The result of `step` and what is wrong with it. `named` are the base and what settings name, by name;
    `checkpoints` is None where the recipe gives all models another vocabulary. Raises InputError for a tokenizer that
    cannot be read."""
    assert step.base is not None  # the check of the recipe has seen to it
    base = named[step.base.name]
    empty = replace(base.table, nodes={})
    problems = unfit(step, [*sources, base])
    settings = constant(step, method)
    if problems or settings is None:
        return empty, problems
    try:
        prompts = read_prompts(builder, step, base, settings, checkpoints)
        making = _Making(builder, step, settings, sources, base, named, prompts)
        builder.remarks += making.remarks
        return making.table(), []
    except RecipeError as fault:
        return empty, list(fault.problems)


class _Making:
    """One mixture in the making. RecipeError with all that is wrong with its inputs."""

    def __init__(
        self,
        builder: Builder,
        step: Step,
        settings: Mapping[str, Any],
        sources: Sequence[Source],
        base: Source,
        others: Mapping[str, Source],
        prompts: Prompts | None,
    ):
        self._builder, self._step, self._settings, self._base = builder, step, settings, base
        self._style = style_of(step, settings, sources, base, others)
        self.remarks = window_remark(self._style, base)
        self._stack, self._prompts = stack_of(base), prompts
        self._width = self._checked_base()
        self._experts = [
            _Expert(source, stack_of(source), noise, scale)
            for source, count, noise, scale in zip(
                sources, settings["copies"], settings["noise"], settings["scale"], strict=True
            )
            for _ in range(count)
        ]
        shared = settings["shared"] and others[settings["shared"]]
        noise, scale = settings["shared_noise"], settings["shared_scale"]
        self._shared = _Expert(shared, stack_of(shared), noise, scale) if shared else None
        self._numbers = self._checked_experts()
        self._states = [
            _States(others[hidden], others[negative] if negative else None)
            for hidden, negative, count in zip(
                settings["hidden"], settings["negative"], settings["copies"], strict=True
            )
            if hidden
            for _ in range(count)
        ]
        shared_hidden, shared_negative = settings["shared_hidden"], settings["shared_negative"]
        self._shared_states = (
            _States(others[shared_hidden], others[shared_negative] if shared_negative else None)
            if shared_hidden
            else None
        )
        self._checked_states()

    def table(self) -> Table:
        """The tensors of the mixture in the order of the base's; what an expert layer has stands where the layer's
        feed-forward part stood."""
        table, numbers = self._base.table, self._numbers
        nodes: dict[str, Node] = {}
        dtypes: dict[str, str] = {}
        done: set[int] = set()
        for name, node in table.nodes.items():
            layer = table.family.layer(name)
            if layer is not None and layer.rest == COMPUTED:
                continue
            if layer is None or layer.index < numbers.dense or layer.rest not in DENSE:
                nodes[name], dtypes[name] = node, table.dtypes[name]
                continue
            if layer.index not in done:
                done.add(layer.index)
                for new, made, dtype in self._layer(layer.index, self._stack.template.format(i=layer.index)):
                    nodes[new], dtypes[new] = made, dtype
        config = mixture_config(self._style, table.config, numbers, self._names())
        parts = table.form.configs if table.form is not None else None
        return replace(table, nodes=nodes, dtypes=dtypes, config=config, family=family_of(config, nodes, parts))

    def _layer(self, index: int, lead: str) -> Iterable[tuple[str, Node, str]]:
        """The tensors that take the place of the feed-forward part of a layer: name, node, stored dtype."""
        style, count, table = self._style, self._numbers.experts, self._base.table
        stored = table.dtypes[lead + DENSE[0]]
        gate = f"{lead}{style.part}gate.weight"
        yield gate, self._gates(gate, index), stored
        if style.balance is not None:
            balance = f"{lead}{style.part}{style.balance}"
            made = self._builder.call(zeros(count)(), [], [], self._step.name, balance)
            yield balance, made, "F32"
        for number, expert in enumerate(self._experts):
            yield from self._expert(expert, index, [lead + name for name in style.expert(number)])
        if self._shared is not None:
            yield from self._expert(self._shared, index, [lead + name for name in style.shared_expert()])
            if style.shared_gate is not None:
                name = f"{lead}{style.part}{style.shared_gate}"
                yield name, self._shared_gate(name, index), stored

    def _expert(self, expert: _Expert, index: int, names: Sequence[str]) -> Iterable[tuple[str, Node, str]]:
        table, lead = expert.source.table, expert.stack.template.format(i=index)
        label = self._builder.called.get(expert.source.name, expert.source.name)
        for old, new in zip(DENSE, names, strict=True):
            node = table.nodes[lead + old]
            # A factor of what an expert gives is one of the matrix out of its units.
            scale = expert.scale if old == DENSE[-1] else 1.0
            if expert.noise or scale != 1:
                call = upcycled(Slot(0), noise=expert.noise, scale=scale)
                node = self._builder.call(call, [node], [label], self._step.name, new)
            yield new, node, table.dtypes[lead + old]

    def _gates(self, name: str, index: int) -> Node:
        if self._states:
            return self._of_states(self._states, name, index)
        if self._prompts is not None:
            copies = zip(self._prompts.inputs, self._settings["copies"], strict=True)
            said = [one for one, count in copies for _ in range(count)]
            return self._prompts.gates(self._builder, said, self._step.name, name)
        return self._drawn(self._numbers.experts, name)

    def _shared_gate(self, name: str, index: int) -> Node:
        if self._shared_states is not None:
            return self._of_states([self._shared_states], name, index)
        if self._prompts is not None and self._prompts.shared is not None:
            return self._prompts.gates(self._builder, [self._prompts.shared], self._step.name, name)
        if self._settings["shared_gate"] == "drawn":
            return self._drawn(1, name)
        return self._builder.call(zeros(1, self._width)(), [], [], self._step.name, name)

    def _drawn(self, rows: int, name: str) -> Node:
        law = "uniform" if self._settings["gates"] == "uniform" else "normal"
        call = random_gates(rows, self._width)(std=self._settings["gate_std"], law=law)
        return self._builder.call(call, [], [], self._step.name, name)

    def _of_states(self, states: Sequence[_States], name: str, index: int) -> Node:
        apart = self._settings["gates"] == "embedding"
        means = [one.hidden.table.nodes["mean"] for one in states]
        against = [one.negative.table.nodes["mean"] for one in states if one.negative is not None]
        places = iter(range(len(means), len(means) + len(against)))
        negative = tuple(next(places) if one.negative is not None else -1 for one in states)
        slots = map(Slot, range(len(means) + len(against)))
        call = state_gates(len(states), self._width)(
            *slots, layer=0 if apart else index, negative=negative, apart=apart
        )
        return self._builder.call(call, [*means, *against], [""] * (len(means) + len(against)), self._step.name, name)

    def _checked_base(self) -> int:
        """The width of the residual stream. Every layer of the base must have a dense feed-forward part, and nothing
        that the mixture has no place for."""
        base, family = self._base, self._base.table.family
        odd = []
        for name in base.table.nodes:
            layer = family.layer(name)
            if layer is None or layer.rest in (*DENSE, COMPUTED):
                continue
            kept = self._style.kept
            if layer.rest.startswith("mlp.") or (kept is not None and layer.rest not in kept):
                odd.append(name)
        if odd:
            message = f"`{base.name}` has tensors that a `{self._style.model_type}` has no place for: {listed(odd)}"
            raise RecipeError(Problem(message, base.mark, "take another `style`, or a model without them"))
        depth = self._stack.count
        if self._settings["dense"] >= depth:
            message = f"`dense: {self._settings['dense']}` leaves none of the {depth} layers to have experts"
            raise RecipeError(Problem(message, mark_of(self._step, "dense"), "the last layer must have experts"))
        return units_of(base, self._stack)[1]

    def _checked_experts(self) -> Numbers:
        """The numbers of the mixture. All experts have as many units, and the base's width and depth."""
        found = {}
        problems = []
        experts = [*self._experts, *([self._shared] if self._shared else [])]
        for expert in experts:
            source = expert.source
            if source.name in found:
                continue
            units, width = found[source.name] = units_of(source, expert.stack)
            if expert.stack.count != self._stack.count:
                message = (
                    f"`{source.name}` has {expert.stack.count} layers, `{self._base.name}` has {self._stack.count}"
                )
                problems.append(Problem(message, source.mark, "experts have the base's layers"))
            elif width != self._width:
                message = f"`{source.name}` is {width} wide, `{self._base.name}` is {self._width}"
                problems.append(Problem(message, source.mark, "experts read and write the base's residual stream"))
        first = self._experts[0].source.name
        units = found[first][0]
        for expert in self._experts:
            other = expert.source
            if found[other.name][0] != units:
                message = f"experts of `{other.name}` have {found[other.name][0]} hidden units, of `{first}` {units}"
                problems.append(Problem(message, other.mark, "experts of a layer must be alike"))
        shared = found[self._shared.source.name][0] if self._shared else 0
        if self._shared and "shared" not in self._style.counts and shared % units:
            message = f"the shared expert has {shared} hidden units, which is no multiple of the experts' {units}"
            problems.append(
                Problem(message, self._shared.source.mark, f"a `{self._style.model_type}` counts it in those")
            )
        if problems:
            raise RecipeError(list(dict.fromkeys(problems)))
        return Numbers(len(self._experts), self._settings["per_token"], units, shared, self._settings["dense"])

    def _checked_states(self) -> None:
        wanted = (self._stack.count, self._width)
        problems = []
        for states in [*self._states, *([self._shared_states] if self._shared_states else [])]:
            for source in (states.hidden, states.negative):
                if source is None:
                    continue
                mean = source.table.nodes.get("mean")
                if mean is None or "hidden_states" not in source.table.nodes:
                    message = f"`{source.name}` has no means of hidden states"
                    problems.append(Problem(message, source.mark, _STATES))
                elif mean.shape != wanted:
                    shape, needed = ("×".join(map(str, found)) for found in (mean.shape, wanted))
                    message = f"`mean` of `{source.name}` is {shape}, `{self._base.name}` needs {needed}"
                    problems.append(Problem(message, source.mark, _STATES))
            if states.negative is not None and states.negative.name == states.hidden.name:
                message = f"`{states.hidden.name}` speaks for and against an expert, which leaves no gate"
                problems.append(Problem(message, states.negative.mark, "name other states as `negative`"))
        if problems:
            raise RecipeError(list(dict.fromkeys(problems)))

    def _names(self) -> frozenset[str]:
        """The names of the tensors of the base's layers, without what stands before them."""
        family = self._base.table.family
        return frozenset(layer.rest for name in self._base.table.nodes if (layer := family.layer(name)) is not None)
