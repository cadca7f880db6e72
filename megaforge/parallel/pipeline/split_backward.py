"""The backward pass in two halves: gradients of a stage's inputs now, of its weights later.

Zero-bubble schedules (Qi et al., arXiv 2401.10241) need it. The first half runs autograd down to the inputs only and
keeps the gradients that arrive at the graph nodes from which weights hang (a linear layer's matmul, a norm); the second
half starts at those nodes. The idea is that of ``torch.distributed.pipelining._backward``. It is written anew because
that module sets ``weight.grad`` without running post-accumulate hooks, from which gradient reduction lives; counts a
weight twice that shares graph nodes with two others; and forgets weights that no differentiable input reaches, such as
the embedding's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

_NEEDED_AGAIN = "megaforge: the second half runs it"  # key in a node's metadata


def is_needed_again(node: Node | None) -> bool:
    """Whether the second half of a split backward pass runs ``node``, which the first half may be running now: what the
    node has kept must stay."""
    return node is not None and _NEEDED_AGAIN in _metadata(node)


def _metadata(node: Node) -> dict[Any, Any]:
    return cast(dict[Any, Any], node.metadata)  # torch declares this property as a method


@dataclass
class _WeightGroup:
    """Weights that hang from common nodes, and what the second half starts from."""

    weights: list[Tensor]
    nodes: list[Node]
    edges: list[GradientEdge] = field(default_factory=list)
    edge_gradients: list[Tensor] = field(default_factory=list)


class DeferredWeightGradients:
    """The second half, ready to run. Keeps the stage's graph and its saved activations alive until then."""

    def __init__(
        self,
        groups: list[_WeightGroup],
        arrived: dict[Node, Sequence[Tensor | None]],
        roots: Sequence[GradientEdge],
    ) -> None:
        self._groups = groups
        self._arrived = arrived
        # Python objects of nodes written in Python need not keep them alive; edges do (their ownership token).
        self._roots = list(roots)

    def run(self) -> None:
        """Accumulates the gradients into the weights' ``.grad``; their post-accumulate hooks run as usual."""
        for number, group in enumerate(self._groups, 1):
            # Where one weight hangs from several nodes, gradient also flows from one of them to the next through the
            # graph; every node's gradient was complete in the first half, so it is put in place of what flows.
            handles = [
                node.register_prehook(_replace_by(self._arrived[node])) for node in group.nodes if node in self._arrived
            ]
            edges, gradients = list(group.edges), list(group.edge_gradients)
            for node in group.nodes:
                for index, gradient in enumerate(self._arrived.get(node, ())):
                    if gradient is not None:
                        edges.append(GradientEdge(node, index))
                        gradients.append(gradient)
            try:
                if edges:
                    # The last one frees tensors as it goes, which is all of them where there is no first half.
                    shared = number < len(self._groups)
                    torch.autograd.backward(edges, gradients, retain_graph=shared, inputs=group.weights)
            finally:
                for handle in handles:
                    handle.remove()
        self._groups, self._arrived, self._roots = [], {}, []


def _replace_by(gradients: Sequence[Tensor | None]) -> Callable[..., tuple[Tensor | None, ...]]:
    return lambda _: tuple(gradients)


def backward_input(
    roots: Sequence[GradientEdge], gradients: Sequence[Tensor], inputs: Sequence[Tensor], weights: Iterable[Tensor]
) -> tuple[list[Tensor | None], DeferredWeightGradients]:
    """The first half.

    Args:
        roots: gradient edges of the stage's outputs and loss.
        gradients: of the roots.
        inputs: the stage's differentiable inputs, leaves of the graph.
        weights: the stage's parameters; those that need no gradient or are not in the graph are skipped.

    Returns:
        Gradients of ``inputs`` (None where nothing depends on one), and the second half.
    """
    above = _edges_upwards([root.node for root in roots])
    input_side = _ancestors([get_gradient_edge(tensor).node for tensor in inputs], above)
    groups = _group_weights([w for w in weights if w.requires_grad], above, input_side, roots, gradients)
    arrived: dict[Node, Sequence[Tensor | None]] = {}

    def remember(node: Node) -> Callable[[Sequence[Tensor | None]], None]:
        return lambda gradients: arrived.__setitem__(node, tuple(gradients))

    reached = [(root, gradient) for root, gradient in zip(roots, gradients, strict=True) if root.node in input_side]
    input_gradients: list[Tensor | None] = [None] * len(inputs)
    handles = [node.register_prehook(remember(node)) for group in groups for node in group.nodes]
    try:
        if reached:
            edges, starts = zip(*reached, strict=True)
            found = torch.autograd.grad(edges, list(inputs), list(starts), retain_graph=bool(groups), allow_unused=True)
            input_gradients = list(found)
    finally:
        for handle in handles:
            handle.remove()
    return input_gradients, DeferredWeightGradients(groups, arrived, roots)


def _edges_upwards(roots: Sequence[Node]) -> dict[Node, list[Node]]:
    """For every node of the graph below ``roots``, the nodes that pass gradient to it."""
    above: dict[Node, list[Node]] = {root: [] for root in roots}
    stack = list(above)
    while stack:
        node = stack.pop()
        for below, _ in node.next_functions:
            if below is None:
                continue
            if below not in above:
                above[below] = []
                stack.append(below)
            above[below].append(node)
    return above


def _ancestors(nodes: Sequence[Node], above: dict[Node, list[Node]]) -> set[Node]:
    """``nodes`` and everything through which gradient reaches them, as far as it is in the graph."""
    found = {node for node in nodes if node in above}
    stack = list(found)
    while stack:
        for node in above[stack.pop()]:
            if node not in found:
                found.add(node)
                stack.append(node)
    return found


def _group_weights(
    weights: Sequence[Tensor],
    above: dict[Node, list[Node]],
    input_side: set[Node],
    roots: Sequence[GradientEdge],
    gradients: Sequence[Tensor],
) -> list[_WeightGroup]:
    """Weights with the nodes they hang from: on the way to an input, or roots that lead to no input."""
    free_roots = defaultdict(list)
    for root, gradient in zip(roots, gradients, strict=True):
        if root.node not in input_side:
            free_roots[root.node].append((root, gradient))
    group_of: dict[Node, _WeightGroup] = {}
    groups: dict[int, _WeightGroup] = {}
    for weight in weights:
        start = get_gradient_edge(weight).node
        if start not in above:
            continue
        nodes, climbed = _nodes_of_weight(start, above, input_side, free_roots)
        merged = _WeightGroup([weight], nodes)
        _mark(climbed)
        for other in {id(group_of[node]): group_of[node] for node in merged.nodes if node in group_of}.values():
            merged.weights += other.weights
            merged.nodes += [node for node in other.nodes if node not in merged.nodes]
            del groups[id(other)]
        groups[id(merged)] = merged
        group_of.update(dict.fromkeys(merged.nodes, merged))
    for group in groups.values():
        starts = [start for node in group.nodes for start in free_roots.get(node, ())]
        group.edges = [edge for edge, _ in starts]
        group.edge_gradients = [gradient for _, gradient in starts]
        if len(group.nodes) > 1:
            _mark(_between(group.nodes, above))
        group.nodes = [node for node in group.nodes if node in input_side]
    return list(groups.values())


def _mark(nodes: Iterable[Node]) -> None:
    for node in nodes:
        _metadata(node)[_NEEDED_AGAIN] = True


def _between(nodes: list[Node], above: dict[Node, list[Node]]) -> set[Node]:
    """What lies on a way from one of ``nodes`` to another: gradient flows there again in the second half."""
    upwards = _ancestors(nodes, above)
    found = set(nodes)
    stack = list(nodes)
    while stack:
        for below, _ in stack.pop().next_functions:
            if below is not None and below in upwards and below not in found:
                found.add(below)
                stack.append(below)
    return found


def _nodes_of_weight(
    start: Node,
    above: dict[Node, list[Node]],
    input_side: set[Node],
    free_roots: dict[Node, list[tuple[GradientEdge, Tensor]]],
) -> tuple[list[Node], set[Node]]:
    """Climbs from a weight until the way to the inputs is met; free roots on the climb are kept and passed. Where it
    ended, and all nodes that it has seen."""
    found: list[Node] = []
    seen = {start}
    stack = [start]
    while stack:
        node = stack.pop()
        if node in input_side:
            found.append(node)
            continue
        if node in free_roots:
            found.append(node)
        for upper in above[node]:
            if upper not in seen:
                seen.add(upper)
                stack.append(upper)
    return found, seen
