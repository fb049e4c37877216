"""How weights and permutations are learned from data: `of: {learned: [a, b, c], by: layer}` and `from: {learned: ste}`,
two more holes that `merge search` fills."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mergekit_lite.errors import Problem
from mergekit_lite.recipe.node import ListNode, MapNode, Node, ScalarNode, describe

KEYS = ("learned", "by", "loss", "epochs", "rate")
BY = ("model", "layer", "tensor")
LOSSES = ("labels", "entropy")
EXAMPLE = "for example `of: {learned: [a, b, c], by: layer}`"
ORDER_KEYS = ("learned", "steps", "rate", "loss")
ORDER_EXAMPLE = "for example `from: {learned: ste, steps: 100, rate: 0.1}`"
_HINTS = {
    "by": "`model` learns one weight for each input, `layer` and `tensor` one for each of its layers or tensors",
    "loss": "`labels` is the cross-entropy of the data's labels, `entropy` that of the predictions, without labels",
    "epochs": "how often learning goes through the data, for example `epochs: 5`",
    "rate": "the step of the optimiser, for example `rate: 0.05`",
    "steps": "how often the order is found anew, for example `steps: 100`",
}


@dataclass(frozen=True, slots=True)
class Learning:
    """What stands beside the inputs. `by` is what has weights of its own, `loss` what they are learned by. None: the
    number of `epochs`, and the `rate`, that go with the method."""

    by: str = BY[0]
    loss: str = LOSSES[0]
    epochs: int | None = None
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class LearningOrder:
    """What stands beside `learned: ste`: the number of steps, each by another part of the data, the rate of SGD, and
    what permutations are learned by."""

    steps: int = 100
    rate: float = 0.1
    loss: str = LOSSES[0]


def read_order(node: MapNode, problems: list[Problem]) -> LearningOrder:
    """What the hole `node` of a permute step says; findings go to `problems`."""
    way = node.entries["learned"].value
    if not (isinstance(way, ScalarNode) and way.value == "ste"):
        problems.append(Problem(f"permutations are learned by `ste`, not {describe(way)}", way.mark, ORDER_EXAMPLE))
    standard = LearningOrder()
    return LearningOrder(
        _whole(node, "steps", problems) or standard.steps,
        _rate(node.get("rate"), problems) or standard.rate,
        _word(node, "loss", LOSSES, problems),
    )


def read_learning(node: MapNode, items: ListNode, problems: list[Problem]) -> tuple[Learning, tuple[str, ...]]:
    """What the hole `node` says, and the names of the inputs; findings go to `problems`."""
    names = [
        item.value if isinstance(item, ScalarNode) and isinstance(item.value, str) else None for item in items.items
    ]
    if len(names) < 2:
        problems.append(Problem("weights are learned of at least two inputs", items.mark, EXAMPLE))
    for item, name in zip(items.items, names, strict=True):
        if name is None:
            problems.append(Problem(f"an input of `learned` is a name, not {describe(item)}", item.mark, EXAMPLE))
    return (
        Learning(
            _word(node, "by", BY, problems),
            _word(node, "loss", LOSSES, problems),
            _whole(node, "epochs", problems),
            _rate(node.get("rate"), problems),
        ),
        tuple(name for name in names if name is not None),
    )


def _word(node: MapNode, key: str, among: tuple[str, ...], problems: list[Problem]) -> str:
    given = node.get(key)
    value = given.value if isinstance(given, ScalarNode) else None
    if given is None or value in among:
        return str(value or among[0])
    message = f"`{key}` is {', '.join(among[:-1])} or {among[-1]}, not {describe(given)}"
    problems.append(Problem(message, given.mark, _HINTS[key]))
    return among[0]


def _whole(node: MapNode, key: str, problems: list[Problem]) -> int | None:
    given = node.get(key)
    value = given.value if isinstance(given, ScalarNode) else None
    if given is None or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**6):
        return value  # type: ignore[return-value]
    message = f"`{key}` must be a whole number above 0, not {describe(given)}"
    problems.append(Problem(message, given.mark, _HINTS[key]))
    return None


def _rate(node: Node | None, problems: list[Problem]) -> float | None:
    if node is None:
        return None
    value = node.value if isinstance(node, ScalarNode) else None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
        return float(value)
    problems.append(Problem(f"`rate` must be a number above 0, not {describe(node)}", node.mark, _HINTS["rate"]))
    return None
