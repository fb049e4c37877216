"""The configuration of a model whose layers were chosen from other models."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lite.errors import RecipeError
from mergekit_lite.family.data import StackRule, families
from mergekit_lite.family.section import assign, lookup, section_of
from mergekit_lite.family.stack import Stack

Source = tuple[Mapping[str, Any], int]

# Lists of layer numbers, not of one entry per layer.
_INDEX_LISTS = frozenset({"mlp_only_layers", "full_attn_idxs", "cross_attention_layers", "moe_layers", "ple_layer_ids"})
# Lists that have nothing to do with layers, whatever their length.
_OTHER_LISTS = frozenset({
    "architectures", "bad_words_ids", "image_mean", "image_size", "image_std", "mlp_multipliers", "out_features",
    "out_indices", "patch_size", "ssm_multipliers", "stage_names", "suppress_tokens", "begin_suppress_tokens",
    "time_step_limit",
})  # fmt: skip


def restacked_config(config: Mapping[str, Any], stack: Stack, sources: Sequence[Source]) -> dict[str, Any]:
    """A copy of `config` for a model whose `stack` consists of the layers `(source config, layer index)` in this order.

    Sets the number of layers. Rebuilds every list that has one entry per layer (`layer_types`, `no_rope_layers`) by
    taking each entry from its own source, and renumbers lists of layer numbers (`mlp_only_layers`). Settings that are
    a period or a bound on the layer number (`sliding_window_pattern`, `decoder_sparse_step`, `max_window_layers`) apply
    to the new numbers and stay as they are.

    RecipeError where it is unknown which key states the number of layers and that number changes, or where a source
    does not say what its layer's entry of a list is.
    """
    result: dict[str, Any] = copy.deepcopy(dict(config))
    if not result:
        return result
    if stack.count_key is None:
        if len(sources) != stack.count:
            raise RecipeError(
                f"cannot tell which key of the base's config.json states the {stack.count} layers of `{stack.name}`",
                hint="keep the number of layers as it is, or give the base a config.json with `num_hidden_layers`",
            )
        section = ""
    else:
        section = stack.count_key.rpartition(".")[0]
        _set_count(result, config, stack, len(sources))

    base = lookup(config, section) if section else config
    homes = [_home(source, section, stack) for source, _ in sources]
    # (section, number of layers where stated): the base first, then the source of each new layer.
    stated = [
        (base if isinstance(base, Mapping) else {}, stack.count),
        *((home, _count(home, stack)) for home in homes),
    ]
    for key in dict.fromkeys(key for home, _ in stated for key in home):
        place = f"{section}.{key}" if section else key
        if key in _INDEX_LISTS:
            chosen = [new for new, home in enumerate(homes) if sources[new][1] in _list(home, key)]
            if chosen or isinstance(stated[0][0].get(key), list):
                assign(result, place, chosen)
            continue
        known = [entry for home, count in stated if _per_layer(home, key, count) for entry in home[key]]
        if known:
            layers = zip(sources, stated[1:], strict=True)
            assign(result, place, [_entry(home, old, key, count, known) for (_, old), (home, count) in layers])
    return result


def _set_count(result: dict[str, Any], config: Mapping[str, Any], stack: Stack, count: int) -> None:
    assert stack.count_key is not None
    model_type, section = section_of(config, families())
    rules: tuple[StackRule, ...] = families()[model_type].stacks if model_type else ()
    for rule in rules:
        if rule.count_like == stack.name and all(lookup(config, section + key) is None for key in rule.count):
            # This stack took its number of layers from the one that now changes.
            assign(result, section + rule.count[0], stack.count)
        if rule.name == stack.name:
            for key in rule.count:
                if lookup(config, section + key) is not None:
                    assign(result, section + key, count)
    assign(result, stack.count_key, count)


def _home(source: Mapping[str, Any], section: str, stack: Stack) -> Mapping[str, Any]:
    """The section of a source's configuration that describes its layers; it may be nested otherwise than the base's."""
    places = [lookup(source, section) if section else source, source, source.get("text_config")]
    sections = [place for place in places if isinstance(place, Mapping)]
    return next((place for place in sections if _count(place, stack) is not None), sections[0])


def _count(home: Mapping[str, Any], stack: Stack) -> int | None:
    count = home.get(stack.count_key.rpartition(".")[2]) if stack.count_key is not None else None
    return count if isinstance(count, int) else None


def _list(home: Mapping[str, Any], key: str) -> list[Any]:
    value = home.get(key)
    return value if isinstance(value, list) else []


def _per_layer(home: Mapping[str, Any], key: str, count: int | None) -> bool:
    value = home.get(key)
    other = key in _OTHER_LISTS or key.endswith(("token_id", "token_ids"))
    return isinstance(value, list) and not other and len(value) == count


def _entry(home: Mapping[str, Any], old: int, key: str, count: int | None, known: Sequence[Any]) -> Any:
    """Layer `old`'s entry. A source that lacks the list takes the one value that all others share."""
    value = _list(home, key)
    if old < len(value) and count in (None, len(value)):
        return copy.deepcopy(value[old])
    if all(entry == known[0] for entry in known):
        return copy.deepcopy(known[0])
    raise RecipeError(
        f"a source of the stack does not state `{key}` of its layer {old}, and other sources differ in it",
        hint=f"add `{key}`, one entry per layer, to that source's config.json",
    )
