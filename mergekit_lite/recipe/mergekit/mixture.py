"""mergekit-moe's document -> a step `moe`, and which hidden states it needs.

What a base makes of prompts is known only after a pass through it. `merge stats THEIR.yml` writes it, a file for each
list of prompts, into a folder beside the recipe; the files' names hold a digest of base and prompts, so that none is
taken for that of others.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mergekit_lite.errors import Problem
from mergekit_lite.recipe.mergekit.experts import HIDDEN, Expert, Mixture, Prompts, is_mixture, read_experts
from mergekit_lite.recipe.mergekit.reference import Reference
from mergekit_lite.recipe.model import Input, Model, Ref, Step
from mergekit_lite.recipe.node import MapNode, Node
from mergekit_lite.recipe.value import Scalar, Value

_NAME = "mixture"
_GATES = {"cheap_embed": "embedding", "random": "random", "uniform_random": "uniform"} | dict.fromkeys(HIDDEN, "hidden")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The hidden states that a document needs of its `base`: the texts by file. `last` asks for those of each text's
    last token, else for the mean over its tokens. `folder` is where the recipe looks for them."""

    base: Reference
    last: bool
    files: dict[str, tuple[str, ...]]
    folder: str


def wanted_states(nodes: Sequence[Node], file: str, problems: list[Problem]) -> Wanted | None:
    """What the documents of `file` need; findings go to `problems`. None where they are no mixture or need nothing."""
    root = next((node for node in nodes if is_mixture(node)), None)
    found = read_experts(root, problems, []) if isinstance(root, MapNode) else None
    if found is None or found.gate_mode not in HIDDEN:
        return None
    files = {_file(found, prompts): prompts.texts for prompts in _prompts(found)}
    return Wanted(found.base, _last(found), files, _folder(found, file))


def mixture_step(
    found: Mixture,
    file: str,
    refer: Callable[[Reference], Ref],
    unique: Callable[[str], str],
    models: dict[str, Model],
) -> Step:
    """The step that makes the mixture. Models that it names in addition to `refer` go to `models`, under names that
    `unique` gives."""
    base = refer(found.base)
    states = _States(found, file, unique, models) if found.gate_mode in HIDDEN else None
    inputs = []
    for expert in found.experts:
        ref = refer(expert.ref)
        params = _settings(expert, found, states, ref.name, "")
        params |= _numbers(expert, "")
        inputs.append(Input(ref, params))
    params = {
        "style": Value.plain(found.style, found.style_mark),
        "gates": Value.plain(_GATES[found.gate_mode], found.mode_mark),
        "per_token": Value.plain(found.per_token, found.mark),
    }
    if found.gate_mode == "random":
        params["gate_std"] = Value.plain(1.0, found.mode_mark)
    if found.shared is not None:
        ref = refer(found.shared.ref)
        params["shared"] = Value.plain(ref.name, ref.mark)
        params |= _numbers(found.shared, "shared_")
        params |= _settings(found.shared, found, states, "shared", "shared_")
        if _GATES[found.gate_mode] in ("random", "uniform") and found.style in ("auto", "qwen2_moe"):
            params["shared_gate"] = Value.plain("drawn", found.mode_mark)
    return Step(unique(_NAME), "moe", tuple(inputs), base, params, found.mark, found.mode_mark)


class _States:
    """The files of hidden states as models of the recipe."""

    def __init__(self, found: Mixture, file: str, unique: Callable[[str], str], models: dict[str, Model]):
        self._found, self._unique, self._models = found, unique, models
        self._folder = _folder(found, file)
        place, recipe = shlex.quote(self._folder), shlex.quote(file)
        message = f"the gates need what `{found.base.path}` makes of the prompts, and `{self._folder}` has it not"
        hint = (
            f"`merge stats {recipe} --out {place}` puts them through (pip install 'mergekit_lite[calibrate]'); then"
            " run this again. Where prompts or base have changed since, remove that folder first"
        )
        self._absent = Problem(message, found.mode_mark, hint)
        self._names: dict[str, str] = {}

    def model(self, prompts: Prompts, name: str) -> str:
        """The name of the model that the states of these prompts are."""
        file = _file(self._found, prompts)
        if file not in self._names:
            self._names[file] = self._unique(name)
            path = os.path.join(self._folder, file)
            location = path if os.path.isabs(path) or path.startswith(("./", "../")) else f"./{path}"
            made = Model(self._names[file], location, None, prompts.mark, absent=self._absent)
            self._models[made.name] = made
        return self._names[file]


def _settings(expert: Expert, found: Mixture, states: _States | None, name: str, lead: str) -> dict[str, Value]:
    """What an expert's gate is made of; `lead` stands before the names of settings."""
    gates = _GATES[found.gate_mode]
    pairs = [(expert.positive, "hidden", "prompts"), (expert.negative, "negative", "against")]
    made: dict[str, Value] = {}
    for prompts, of_states, of_texts in pairs:
        if prompts is None:
            continue
        if states is not None:
            called = states.model(prompts, f"{name}_{'prompts' if of_states == 'hidden' else 'against'}")
            made[lead + of_states] = Value.plain(called, prompts.mark)
        elif gates == "embedding":
            texts: Scalar = prompts.texts
            made[lead + of_texts] = Value.plain(texts, prompts.mark)
    return made


def _numbers(expert: Expert, lead: str) -> dict[str, Value]:
    given = {"noise": (expert.noise, 0.0), "scale": (expert.scale, 1.0)}
    return {
        lead + name: Value.plain(*number)
        for name, (number, default) in given.items()
        if number is not None and number[0] != default
    }


def _prompts(found: Mixture) -> Iterable[Prompts]:
    experts = [*found.experts, *([found.shared] if found.shared is not None else [])]
    return (prompts for one in experts for prompts in (one.positive, one.negative) if prompts is not None)


def _last(found: Mixture) -> bool:
    return found.gate_mode != "hidden_avg"


def _file(found: Mixture, prompts: Prompts) -> str:
    """The name of the file with the hidden states of these prompts."""
    said = json.dumps([*found.base.key, _last(found), *prompts.texts])
    start = re.sub(r"[^a-z0-9]+", "_", prompts.texts[0].lower())[:24].strip("_")
    return f"{start or 'prompts'}-{hashlib.sha256(said.encode()).hexdigest()[:12]}.safetensors"


def _folder(found: Mixture, file: str) -> str:
    return found.states or f"{os.path.splitext(file)[0]}.states"
