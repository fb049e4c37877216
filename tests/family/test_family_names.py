"""Layers found by number alone, and names a stranger may choose."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.family.data import families
from mergekit_lite.family.family import Family, family_of

word = st.from_regex(r"[A-Za-z_{}%\[][A-Za-z0-9_{}%\]]{0,8}", fullmatch=True)
path = st.lists(word, max_size=3).map(lambda words: "".join(f"{w}." for w in words))
RESTS = ["self_attn.q_proj.weight", "mlp.experts.0.up_proj.weight", "mlp.experts.1.up_proj.weight", "norm.weight"]


def places(family: Family, names: list[str]) -> list[tuple[int, str, str, float | None, int | None] | None]:
    """What a family says of names, without the names of its stacks."""
    found = []
    for name in names:
        layer = family.layer(name)
        depth, expert = family.depth(name), family.expert(name)
        found.append(None if layer is None else (layer.index, layer.prefix, layer.rest, depth, expert))
    return found


@given(
    data=st.data(),
    count=st.integers(1, 12),
    family=st.sampled_from(sorted({family.name: family for family in families().values() if family.stacks}.items())),
)
def test_numbers_alone_find_what_the_family_file_states(data: st.DataObject, count: int, family):
    _, rules = family
    prefix = data.draw(st.sampled_from(rules.prefixes))
    names = [prefix.fill(tie.canonical) for tie in rules.tied]
    for stack in rules.stacks:
        lead = prefix.fill(stack.template).removesuffix("{i}.")
        names += [f"{lead}{i}.{rest}" for i in range(count) for rest in RESTS]
    names = data.draw(st.permutations(names))

    known = family_of({"model_type": rules.model_types[0]}, names)
    unknown = family_of({"model_type": "never heard of"}, names)
    assert known.name == rules.name and unknown.name == "unknown"
    assert {s.prefix: s.count for s in known.stacks} == {s.prefix: s.count for s in unknown.stacks}
    assert [p and p[:4] for p in places(known, names)] == [p and p[:4] for p in places(unknown, names)]


@given(lead=path, count=st.integers(1, 30), rest=st.sampled_from(RESTS), outside=word)
def test_any_prefix_will_do(lead: str, count: int, rest: str, outside: str):
    names = [f"{lead}{i}.{rest}" for i in range(count)] + [f"{outside}.weight"]
    family = family_of({}, names)
    assert [(s.prefix, s.count) for s in family.stacks] == [(lead, count)]
    assert family.layer(names[-1]) is None
    for i, name in enumerate(names[:-1]):
        assert family.renumbered(name, count - 1 - i) == names[count - 1 - i]
        assert family.depth(name) == (i / (count - 1) if count > 1 else 0.0)


def test_a_list_with_a_gap_is_no_stack_and_what_it_holds_may_be_one():
    names = [f"net.{k}.blocks.{i}.weight" for k in (0, 2) for i in range(4)]
    assert {s.prefix: s.count for s in family_of({}, names).stacks} == {"net.0.blocks.": 4, "net.2.blocks.": 4}


@pytest.mark.parametrize(
    "name",
    [
        "layers.01.w",
        "layers.1",
        "layers.1.",
        "layers.-1.w",
        "layers.1a.w",
        "layers.\u0661.w",
        "layers.9999999999.w",
        "layers1.w",
        "",
    ],
)
def test_what_only_looks_like_a_layer_is_none(name: str):
    family = family_of({"model_type": "llama"}, ["layers.0.w", "layers.1.w", name])
    assert family.layer(name) is None
    assert family.stacks[0].count == 2
    with pytest.raises(ValueError, match="outside the layers"):
        family.renumbered(name, 0)


def test_a_known_type_with_other_names_falls_back_to_numbers():
    family = family_of({"model_type": "llama", "num_hidden_layers": 2}, ["odd.blocks.0.w", "odd.blocks.1.w"])
    assert family.name == "unknown"
    assert [(s.prefix, s.count_key) for s in family.stacks] == [("odd.blocks.", "num_hidden_layers")]


def test_the_count_key_of_an_unknown_family_is_given_only_where_one_key_fits_one_stack():
    names = [f"encoder.{i}.w" for i in range(3)] + [f"decoder.{i}.w" for i in range(2)]
    twice = family_of({"n_layer": 3, "depth": 3, "text_config": {"num_layers": 2}}, names)
    assert {s.name: s.count_key for s in twice.stacks} == {"encoder": None, "decoder": "text_config.num_layers"}
    alike = family_of({"n_layer": 3}, names + ["decoder.2.w"])
    assert {s.count_key for s in alike.stacks} == {None}


def test_a_layer_beyond_the_stack_has_the_depth_of_the_last():
    family = family_of({"model_type": "llama"}, ["layers.0.w", "layers.1.w", "layers.2.w"])
    assert [family.depth(f"layers.{i}.w") for i in (0, 1, 2, 3, 90)] == [0.0, 0.5, 1.0, 1.0, 1.0]


def test_an_unknown_family_ties_only_what_the_configuration_says_and_the_names_allow():
    names = ["odd.embed_tokens.weight", "odd.layers.0.w"]
    assert family_of({"tie_word_embeddings": True}, names).tied == (("lm_head.weight", "odd.embed_tokens.weight"),)
    assert family_of({}, names).tied == ()
    assert family_of({"tie_word_embeddings": True}, [*names, "two.embed_tokens.weight"]).tied == ()


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [({}, {}, True), ({}, {"tie_word_embeddings": False}, False), ({"tie_word_embeddings": False}, {}, False)],
)
def test_a_nested_text_model_is_recognised(outer: dict, inner: dict, tied: bool):
    config = {"model_type": "gemma3", **outer, "text_config": {"model_type": "gemma3_text", **inner}}
    family = family_of(config, ["language_model.model.layers.0.w", "vision_tower.encoder.layers.0.w"])
    assert (family.name, family.stacks[0].count_key) == ("llama", "text_config.num_hidden_layers")
    pair = ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")
    assert family.tied == ((pair,) if tied else ())


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ["llama"]}, {"text_config": "llama"}])
def test_a_senseless_configuration_is_an_unknown_family(config: dict):
    assert family_of(config, []) == family_of({}, [])
