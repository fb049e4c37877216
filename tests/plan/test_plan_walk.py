"""The order of a plan's nodes: inputs before users, as a plain recursion finds it, however deep the graph is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.plan.model import Node
from mergekit_lite.plan.order import walk


@st.composite
def graphs(draw: st.DrawFn) -> list[Node]:
    nodes: list[Node] = []
    for number in range(draw(st.integers(1, 14))):
        inputs = draw(st.lists(st.sampled_from(nodes), max_size=4)) if nodes else []
        nodes.append(Node(number, (1,), "step", inputs=tuple(inputs)))
    return nodes


@given(nodes=graphs(), data=st.data())
def test_order_is_that_of_a_recursion(nodes: list[Node], data: st.DataObject) -> None:
    roots = data.draw(st.lists(st.sampled_from(nodes), max_size=4))
    found: list[Node] = []

    def visit(node: Node) -> None:
        if node not in found:
            for below in node.inputs:
                visit(below)
            found.append(node)

    for root in roots:
        visit(root)
    assert walk(roots) == found


def test_a_deep_graph_is_no_matter() -> None:
    node = Node(0, (1,), "step")
    for number in range(1, 20_000):
        node = Node(number, (1,), "step", inputs=(node, node))
    assert [n.id for n in walk([node])] == list(range(20_000))
