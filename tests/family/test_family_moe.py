"""Where experts lie, as family files say it: what they may not say, and checkpoints that do not fit."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_lite.errors import InputError
from mergekit_lite.family.data import families
from mergekit_lite.family.layout import FileFault
from mergekit_lite.family.moe import expert_layers, parse_moe, routing_groups

LAYOUT = {"router": "gate.weight", "rows": "experts.{e}.up.weight", "columns": "experts.{e}.down.weight"}
GOOD: dict[str, Any] = {"count": "num_experts", "chosen": ["top"], "layouts": [LAYOUT]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": "x"}, "no key `counts`"),
        ({"layouts": []}, "a list of ways"),
        ({"layouts": [{**LAYOUT, "columns": "down"}]}, "all have `{e}`"),
        ({"layouts": [{"router": "gate"}]}, "lacks `columns`, `rows`"),
        ({"count": 8}, "`count` of `moe` is one text"),
        ({"limited": {"groups": "n"}}, "lacks `chosen`"),
    ],
)
def test_a_family_file_that_is_wrong_says_where(change: dict[str, Any], message: str) -> None:
    parse_moe(GOOD, "mine.yaml")
    with pytest.raises(FileFault, match=r"mine\.yaml") as fault:
        parse_moe({**GOOD, **change}, "mine.yaml")
    assert message in str(fault.value)


def shapes(count: int = 3, units: int = 5, width: int = 4) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"l.0.gate.weight": (count, width)}
    for e in range(count):
        found |= {f"l.0.experts.{e}.up.weight": (units, width), f"l.0.experts.{e}.down.weight": (width, units)}
    return found


def test_experts_and_units_are_counted() -> None:
    rule = parse_moe(GOOD, "mine.yaml")
    (layer,) = expert_layers(rule, {0: "l.0.", 1: "l.1."}, shapes(), 1, "`m`")
    assert (layer.router, layer.count, layer.units, layer.numel) == ("l.0.gate", 3, 5, 40)
    for wrong, message in (
        ({"l.0.experts.3.up.weight": (5, 4)}, "more experts than the 3 rows"),
        ({"l.0.experts.1.up.weight": (6, 4)}, "another shape"),
        ({"l.1.experts.0.up.weight": (5, 4)}, "a layer without a router"),
        ({"l.0.gate.weight": (4, 4)}, "lacks `l.0.experts.3.up.weight`"),
    ):
        with pytest.raises(InputError, match=message):
            expert_layers(rule, {0: "l.0.", 1: "l.1."}, {**shapes(), **wrong}, 1, "`m`")
    with pytest.raises(InputError, match="do not lie in 2 groups"):
        expert_layers(rule, {0: "l.0."}, shapes(), 2, "`m`")
    with pytest.raises(InputError, match="has no experts"):
        expert_layers(rule, {0: "l.0."}, {}, 1, "`m`")


def test_routing_in_groups_is_read_from_the_configuration() -> None:
    rule = families()["deepseek_v3"].moe
    assert rule is not None
    assert routing_groups(rule, {"n_group": 8, "topk_group": 4}, "") == (8, 4)
    assert routing_groups(rule, {"text_config": {"n_group": 4}}, "text_config.") == (4, 1)
    assert routing_groups(rule, {"n_group": None}, "") == (1, 1)
