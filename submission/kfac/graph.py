"""The autograd graph of a recorded forward pass: taps on outputs, and gradients of these."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


class GraphError(RuntimeError):
    """The graph of the logits is not one that would-be gradients can be propagated through."""


class Tap(torch.autograd.Function):
    """Identity whose backward pass shows the gradient to a callback.

    The output shares the input's memory but is no view of it, so that modules after it may work
    in place (views of custom functions may not; the layers tapped here do not need their output
    for their own backward pass).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, callback: Callable[[Tensor], None]) -> Tensor:
        ctx.callback = callback
        alias = x.new_empty(0)
        alias.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
        return alias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.callback(grads[0])
        return grads[0], None


def gradients(logits: Tensor, inputs: list[Any], vector: Tensor) -> Sequence[Tensor | None]:
    """Gradients of logits · vector with respect to edges or tensors; None where they have no part.

    The graph is kept.

    Raises:
        GraphError: the graph cannot be used, and what to do about it.
    """
    try:
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            logits, inputs, vector.to(logits.dtype), retain_graph=True, allow_unused=True
        )
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise GraphError(
                "the graph of the logits has been freed: call update before the loss's backward "
                "pass (or keep the graph with retain_graph=True)"
            ) from error
        raise
    return grads


def is_differentiated(output: Any) -> bool:
    """Whether the output of a module is part of a graph."""
    return torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad


def saves_elsewhere() -> bool:
    """Whether what the graph saves is not the tensors themselves: in a checkpoint, under hooks.

    PyTorch 2.5 does not tell of hooks.
    """
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return inside_checkpoint() or (hooks is not None and hooks(True) is not None)


def inside_checkpoint() -> bool:
    """Whether `torch.utils.checkpoint` is among the callers."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


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


def leaves_beside(start: Node, below: Mapping[Node, Node | None]) -> set[int]:
    """ids of the leaf tensors that a graph reaches without entering the layers that were tapped.

    Args:
        start: where to begin.
        below: node of a layer's output -> node of its input, where the walk goes on, if it has one.
    """
    found: set[int] = set()
    seen: set[Node] = set()
    stack: list[Node | None] = [start]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in below:
            stack.append(below[node])
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        stack += [child for child, _ in node.next_functions]
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
