"""Other sizes for the spaces of a checkpoint: what config.json then says, and what follows for all other sizes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit_lite.errors import InputError
from mergekit_lite.family.axes import Ruled, ruled_spaces
from mergekit_lite.family.data import FamilyData
from mergekit_lite.family.fit import Fitted, Shapes, fit
from mergekit_lite.family.lengths import Lengths, Meant
from mergekit_lite.family.section import assign, lookup
from mergekit_lite.family.spaces import Space

_KEY = re.compile(r"([A-Za-z_][A-Za-z_0-9.]*)(?:\[([a-z]+)\])?")
_KV = "num_key_value_heads"
# Their classes take the size of a head from width and number of heads, whatever `head_dim` says (transformers 5).
_NO_HEAD_DIM = frozenset({"helium", "olmoe", "stablelm"})
_FACTOR = "let `width` and `heads` fall by the same factor, so that heads keep their size"


Count = int | Callable[[str], int | None]  # units of every space of a kind, or by the name of the space


class CannotResize(Exception):
    """A space cannot have the size that is wanted. `kind` is the space's, `hint` what to do."""

    def __init__(self, kind: str, message: str, hint: str | None = None):
        super().__init__(message)
        self.kind, self.hint = kind, hint


@dataclass(frozen=True, slots=True)
class Resized:
    """`config` states the new sizes; `keep` has them for the spaces that change, by name; `spaces` are all spaces, as
    they are now."""

    config: Mapping[str, Any]
    spaces: tuple[Space, ...]
    keep: Mapping[str, int]


def resized(
    config: Mapping[str, Any], shapes: Shapes, wanted: Mapping[str, Count], data: FamilyData | None = None
) -> Resized:
    """The checkpoint with `wanted` units, by kind, in each space of that kind; none may grow. A kind's number may be a
    function of the name of the space: None is for a space that follows from others, or stays as it is.

    Sizes that config.json would work out from a changed one (`head_dim or hidden_size / num_attention_heads`) are
    stated there as they were. Those that no key of their own states (BERT's heads) change along. What the network
    gives counts as any other space here: a narrower one gives something narrower.

    Raises CannotResize, and InputError as `spaces_of` does.
    """
    fitted = _free(fit(config, shapes, data))
    found = ruled_spaces(fitted, config, shapes)
    made: dict[str, Any] = copy.deepcopy(dict(config))
    told: dict[str, int] = {}
    assigned: set[str] = set()
    for kind, count in wanted.items():
        mine = [ruled for ruled in found if ruled.space.kind == kind]
        sizes = {ruled.space.name: size for ruled in mine if (size := _count(count, ruled.space)) is not None}
        _check(kind, count, sizes, mine, found)
        if all(sizes.get(ruled.space.name, ruled.space.size) == ruled.space.size for ruled in mine):
            continue
        for key, ruled, size in _by_key(kind, sizes, mine, made, fitted.section):
            if key is None:
                told[ruled.space.name] = size
            else:
                for place in (key, *ruled.rule.also):
                    assign(made, fitted.section + place, size)
                    assigned.add(place)
            _regroup(made, fitted.section, ruled, size, assigned)
    _pin(made, config, fitted, found, assigned)
    keep = {**told, **_sizes(made, fitted, found)}
    _check_loads(config, made, fitted.section)
    return Resized(made, tuple(ruled.space for ruled in found), keep)


def _count(count: Count, space: Space) -> int | None:
    return count if isinstance(count, int) else count(space.name)


def _by_key(
    kind: str, sizes: Mapping[str, int], mine: Sequence[Ruled], config: Mapping[str, Any], section: str
) -> list[tuple[str | None, Ruled, int]]:
    """The key of config.json that states a size of `sizes`, one of the spaces that it states it for, and the size; no
    key for spaces whose size is read off the tensors."""
    told: list[tuple[str | None, Ruled, int]] = []
    keys: dict[str, tuple[Ruled, int]] = {}
    for ruled in mine:
        space, text = ruled.space, ruled.rule.size
        size = sizes.get(space.name)
        key = None if text is None else _stated(text, config, section, ruled.numbers)
        if size is None or (key is None and size == space.size):
            continue
        if key is not None:
            first, other = keys.setdefault(key, (ruled, size))
            if other != size:
                _clash(kind, key, first.space, other, space, size)
        elif text is None:
            told.append((None, ruled, size))
        else:
            raise CannotResize(kind, f"config.json cannot state the size of `{space.name}`: it is `{text}`")
    for ruled in mine:
        text, space = ruled.rule.size, ruled.space
        key = None if text is None else _stated(text, config, section, ruled.numbers)
        # Spaces of another word follow; those of one word are a list of which only some were named.
        if key in keys and space.name not in sizes and ruled.rule.word == keys[key][0].rule.word:
            _clash(kind, key, keys[key][0].space, keys[key][1], space, space.size)
    return [*told, *((key, ruled, size) for key, (ruled, size) in keys.items())]


def _clash(kind: str, key: str, one: Space, size: int, other: Space, own: int) -> None:
    if size != own:
        message = f"`{key}` of config.json is the size of `{one.name}`, here {size}, and of `{other.name}`, here {own}"
        raise CannotResize(kind, message, "give both one size")


def check_resized(config: Mapping[str, Any], shapes: Shapes, data: FamilyData | None = None) -> None:
    """Raises InputError where config.json and the shapes of a resized checkpoint do not fit each other."""
    ruled_spaces(_free(fit(config, shapes, data)), config, shapes)


def _free(fitted: Fitted) -> Fitted:
    return replace(fitted, fixed=frozenset())


def _check(kind: str, count: Count, sizes: Mapping[str, int], mine: Sequence[Ruled], found: Sequence[Ruled]) -> None:
    if not mine:
        there = ", ".join(sorted({f"`{ruled.space.kind}`" for ruled in found}))
        raise CannotResize(kind, f"the model has no spaces of the kind `{kind}`", f"it has {there}" if there else None)
    for ruled in sorted(mine, key=lambda ruled: ruled.space.size):
        space = ruled.space
        size, group = sizes.get(space.name, space.size), space.group
        if size > space.size:
            message = f"{size} is more than the {space.size} units of `{space.name}`"
            raise CannotResize(kind, message, "units can only become fewer")
        if size % group:
            below, above = size // group * group, -(-size // group) * group
            choice = f"{below} or {above}" if below else f"{above}"
            message = f"the {space.size} heads of `{space.name}` share keys and values by {group}"
            raise CannotResize(kind, f"{message}, which {size} would divide", f"keep whole groups: {choice}")
    texts = {ruled.rule.size for ruled in mine}
    if isinstance(count, int) and len(texts) > 1 and len({ruled.space.size for ruled in mine}) > 1:
        each = {ruled.rule.word: ruled.space for ruled in mine}.values()
        stated = ", ".join(f"{space.size} in `{space.name}`" for space in each)
        hint = f"one number cannot stand for all of them; name each, `{{{next(iter(each)).name}: {count}}}`"
        raise CannotResize(kind, f"these have several sizes: {stated}", hint)


def _stated(text: str, config: Mapping[str, Any], section: str, numbers: Mapping[str, int]) -> str | None:
    """The key of config.json that states a size: of the alternatives that are a key alone the first that is there, else
    the first. `hidden_sizes[s]` is an entry of a list, by one of the `numbers`."""
    found = [match for part in text.split(" or ") if (match := _KEY.fullmatch(part.strip()))]
    keys = [match[1] if match[2] is None else f"{match[1]}.{numbers[match[2]]}" for match in found]
    there = [key for key in keys if isinstance(lookup(config, section + key), int)]
    return next(iter(there or keys), None)


def _regroup(config: dict[str, Any], section: str, ruled: Ruled, size: int, assigned: set[str]) -> None:
    """As many units in each group as before."""
    if ruled.rule.groups is not None:
        key = _stated(ruled.rule.groups[1], config, section, ruled.numbers)
        if key is not None and key not in assigned:
            assign(config, section + key, size // ruled.space.group)
            assigned.add(key)
    elif ruled.space.kind == "heads" and lookup(config, section + _KV) == ruled.space.size:
        # Each head has keys of its own, and config.json says so with their number.
        assign(config, section + _KV, size)


def _pin(
    made: dict[str, Any], config: Mapping[str, Any], fitted: Fitted, found: tuple[Ruled, ...], assigned: set[str]
) -> None:
    """State the sizes that would change along, where a key can."""
    sizes: list[tuple[str, str | None, Mapping[str, int]]] = [(t, word, {}) for word, t in fitted.layout.sizes.items()]
    each = {(r.rule.size, _stated(r.rule.size, made, fitted.section, r.numbers)): r for r in found if r.rule.size}
    sizes += [(text, None, ruled.numbers) for (text, _), ruled in each.items()]
    for text, word, numbers in sizes:
        key = _stated(text, made, fitted.section, numbers)
        if key is None or key in assigned or (word is None and key in fitted.layout.sizes):
            continue
        before = _value(Lengths(fitted, config, []), text, numbers, word)
        if before is not None and before != _value(Lengths(fitted, made, []), text, numbers, word):
            assign(made, fitted.section + key, before)
            assigned.add(key)


def _value(lengths: Lengths, text: str, numbers: Mapping[str, int], word: str | None) -> int | None:
    try:
        return lengths.value(text, numbers, word)
    except InputError:
        return None


def _check_loads(config: Mapping[str, Any], made: Mapping[str, Any], section: str) -> None:
    """What transformers asks of the numbers beside their fitting the tensors."""
    sizes = [[lookup(one, section + key) for key in ("embedding_size", "hidden_sizes.0")] for one in (config, made)]
    same = [first == second for first, second in sizes]
    strided = lookup(config, section + "downsample_in_first_stage")
    if lookup(config, section + "model_type") == "resnet" and same == [False, True] and not strided:
        message = f"a first stage of {sizes[1][0]} channels, as many as the stem has, is one without a shortcut"
        raise CannotResize("channels", message, "the checkpoint has one: let the two differ")
    sides = [[lookup(one, section + key) for key in ("hidden_size", "num_attention_heads")] for one in (config, made)]
    if sides[0] == sides[1] or not all(isinstance(number, int) and number for side in sides for number in side):
        return
    (width, heads), (new, fewer) = sides
    model_type = lookup(config, section + "model_type")
    if model_type in _NO_HEAD_DIM and width * fewer != new * heads:
        raise CannotResize("residual", f"the heads of `{model_type}` are as large as width / number of heads", _FACTOR)
    # Most configurations take only a width that is a multiple of the number of heads.
    if width % heads == 0 and new % fewer:
        below = new // fewer * fewer
        hint = f"{below} is, and so is {below + fewer}" if below else f"{fewer} is"
        raise CannotResize("residual", f"a width of {new} is no multiple of the {fewer} heads", hint)


def _sizes(made: Mapping[str, Any], fitted: Fitted, found: tuple[Ruled, ...]) -> dict[str, int]:
    """The new sizes of the spaces that change, by name."""
    lengths = Lengths(fitted, made, [])
    keep: dict[str, int] = {}
    for ruled in found:
        space = ruled.space
        if ruled.rule.size is None:
            continue
        try:
            size = lengths.size(Meant(ruled.rule, ruled.numbers, False))
        except InputError as fault:
            raise CannotResize(space.kind, fault.problems[0].message, _FACTOR) from None
        if size > space.size:
            message = f"units of `{space.name}` would have to become {size}, and are {space.size}: `{ruled.rule.size}`"
            raise CannotResize(space.kind, message, _FACTOR)
        if size < 1:
            raise CannotResize(space.kind, f"nothing would be left of `{space.name}`: its size is `{ruled.rule.size}`")
        if size != space.size:
            keep[space.name] = size
    return keep
