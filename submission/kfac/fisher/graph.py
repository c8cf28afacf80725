"""The autograd graph of a recorded forward pass: gradients of outputs, and what reaches what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

NOT_REACHED = (
    "no recorded layer is in the graph of the logits: they belong to another forward pass than the "
    "last one inside record(), or were computed from detached outputs"
)
FREED = (
    "the graph of the recorded pass is gone, since a backward pass has come through it: inside "
    "record() belong the forward pass and the loss alone, and update comes before "
    "loss.backward() too (or keep the graph with retain_graph=True)"
)
REENTRANT = (
    "activation checkpointing with use_reentrant=True runs its part without a graph: use "
    "checkpoint(..., use_reentrant=False)"
)
_ENQUEUED = "_static_graph_delay_allreduce_enqueued"  # of DistributedDataParallel


class GraphError(RuntimeError):
    """The graph of the logits is not one that would-be gradients can be propagated through."""


def gradients(logits: Tensor, inputs: list[Any], vector: Tensor) -> Sequence[Tensor | None]:
    """Gradients of logits · vector with respect to edges or tensors; None where they have no part.

    The graph is kept.

    Raises:
        GraphError: the graph cannot be used, and what to do about it.
    """
    with graph_kept(), _no_delayed_reduction(logits):
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            logits, inputs, vector.to(logits.dtype), retain_graph=True, allow_unused=True
        )
    return grads


@contextmanager
def graph_kept() -> Iterator[None]:
    """Inside, gradients are taken through the graph of a recorded pass.

    Raises:
        GraphError: a backward pass has come through it already.
    """
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise GraphError(FREED) from error
        raise


@contextmanager
def _no_delayed_reduction(logits: Tensor) -> Iterator[None]:
    """Inside, a pass starts no reduction of DistributedDataParallel's.

    With `static_graph` the node on its outputs takes the first pass that comes through it for the
    loss's, and adds up gradients over the ranks when that ends.
    """
    waiting = []
    if dist.is_available() and dist.is_initialized():
        for node in _nodes(logits.grad_fn):
            module = getattr(node, "ddp_weakref", lambda: None)()
            if getattr(module, "static_graph", False):
                if not getattr(module, _ENQUEUED, True):
                    waiting.append(module)
                break
    for module in waiting:
        setattr(module, _ENQUEUED, True)
    try:
        yield
    finally:
        for module in waiting:
            setattr(module, _ENQUEUED, False)


def _nodes(start: Node | None) -> Iterator[Node]:
    """All nodes of a graph."""
    seen: set[Node] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack += [child for child, _ in node.next_functions]


def earliest(edges: list[GradientEdge]) -> list[GradientEdge]:
    """Those edges from which no other one can be reached (towards the inputs of the graph).

    Asking autograd for these alone makes it visit all others on the way, without keeping what
    flows through them.
    """
    targets = {edge.node for edge in edges}
    reaches: dict[Node, bool] = {}  # node -> whether a target lies strictly below it
    for edge in edges:
        stack = [edge.node]
        while stack:
            node = stack[-1]
            if node in reaches:
                stack.pop()
                continue
            children = [child for child, _ in node.next_functions if child is not None]
            pending = [child for child in children if child not in reaches]
            if pending:
                stack.extend(pending)
                continue
            reaches[node] = any(child in targets or reaches[child] for child in children)
            stack.pop()
    unique: dict[tuple[Node, int], GradientEdge] = {}
    for edge in edges:
        if not reaches[edge.node]:
            unique[(edge.node, edge.output_nr)] = edge
    return list(unique.values())


def leaves_beside(
    starts: Sequence[Node | None],
    below: Mapping[Node, Sequence[Node | None]],
    entered: dict[Node, set[Node | None]],
) -> dict[int, str]:
    """Leaf tensors that a graph reaches without entering the recorded calls: id -> how.

    Raises:
        GraphError: there are recorded calls, and none of them is in the graph; or a part of the
            forward pass is not in the graph at all.

    Args:
        starts: where to begin.
        below: node of a call's output -> nodes of its input, where the walk goes on.
        entered: is filled with node of a call's output -> the nodes that it was entered from; None
            for the start.
    """
    found: dict[int, str] = {}
    seen: set[Node] = set()
    stack: list[tuple[Node | None, Node | None]] = [(start, None) for start in starts]
    while stack:
        node, above = stack.pop()
        if node is None:
            continue
        if node in below:
            entered.setdefault(node, set()).add(above)
        if node in seen:
            continue
        seen.add(node)
        if node in below:
            stack += [(child, node) for child in below[node]]
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise GraphError(REENTRANT)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = "" if above is None else above.name()
        stack += [(child, node) for child, _ in node.next_functions]
    if below and not any(node in seen for node in below):
        raise GraphError(NOT_REACHED)
    return found


def reaches_beside(start: Node, around: GradientEdge, targets: set[Node]) -> bool:
    """Whether a walk through a graph comes to one of the targets other than by the edge `around`.

    Other outputs of that edge's node are other ways.
    """
    if start is around.node:
        return False
    seen: set[Node] = set()
    stack: list[Node | None] = [start]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node in targets:
            return True
        seen.add(node)
        for child, number in node.next_functions:
            if child is not around.node:
                stack.append(child)
            elif number != around.output_nr:
                return True
    return False
