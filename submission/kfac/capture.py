"""Hooks that follow one forward pass and the Fisher passes through its graph.

Hooks exist only inside `Recording` (the steps that need factors). A forward hook hands a layer's
input to its collector, so that nothing has to be kept for A, and puts an identity (`_Tap`) behind
the layer's output. Would-be gradients are then propagated to the layer *outputs* only: no
gradient of a weight is computed, `.grad` is untouched, DDP's reducer does not fire; the tap hands
each output's gradient to the collector and lets it go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from .eigenvalue_correction import is_correctable
from .fused import fused_of
from .parameters import LinearView
from .sharing import Positions, Sharing, SharingError, SharingRule, resolve
from .statistics import (
    Collector,
    DiagonalPart,
    ExpandCollector,
    KroneckerPart,
    Part,
    ReduceCollector,
    RowPairs,
    Sums,
    UnitwiseCollector,
    UnitwisePart,
    empty_diagonal_sums,
)
from .tied import TiedCollector


class _Tap(torch.autograd.Function):
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


class Recording:
    """One recorded forward pass of a model, and its Fisher passes.

    Use as a context manager around the forward pass, then call `fisher_pass` for every vector of
    would-be gradients, then read `sums`.

    Args:
        model: the (unwrapped) model that the parts belong to.
        parts: what to collect.
        sharing: how rows share weights, see `sharing.resolve`.
        ragged_scaling: see `factors.RAGGED_SCALINGS`.
        low_rank: keep factors that are sums over few rows as these rows.
        keep_rows: also keep all rows (see `row_pairs`), for the eigenvalue correction.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Iterable[Part],
        sharing: SharingRule = None,
        ragged_scaling: str = "sqrt",
        low_rank: bool = False,
        keep_rows: bool = False,
    ) -> None:
        self.sums: dict[str, Sums] = {}
        self._sharing = sharing
        self._collectors: dict[str, Collector] = {}
        self._diagonals: list[DiagonalPart] = []
        self._modules: list[tuple[KroneckerPart | UnitwisePart, Collector]] = []
        self._edges: list[GradientEdge] = []
        self._handles: list[RemovableHandle] = []
        self._model = model
        self._unrolled: list[nn.Module] = []
        self._listening = False
        for part in parts:
            if isinstance(part, DiagonalPart):
                self._diagonals.append(part)
                self.sums[part.name] = empty_diagonal_sums(part)
            else:
                collector = make_collector(part, ragged_scaling, low_rank, keep_rows)
                self._collectors[part.name] = collector
                self._modules.append((part, collector))
                self.sums[part.name] = collector.sums

    def __enter__(self) -> Recording:
        for part, collector in self._modules:
            for module, own in collector.hooked():
                if not isinstance(module, LinearView):
                    hook = self._forward_hook(part, own)
                    self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for name, module in self._model.named_modules():
            fused = fused_of(module)
            if fused is not None:
                # An attribute of the instance hides the class's method until it is deleted.
                tap = partial(self._tap_fused, f"{name}." if name else "")
                module.__dict__["forward"] = partial(fused.forward, module, tap)
                self._unrolled.append(module)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._unrolled:
            del module.__dict__["forward"]
        self._unrolled.clear()
        if exc_type is None:
            for collector in self._collectors.values():
                collector.end_forward()
        else:
            self.release()

    @property
    def calls(self) -> Mapping[str, int]:
        """Module name -> how often it was called in the forward pass."""
        return {name: collector.calls for name, collector in self._collectors.items()}

    def replace_uncalled(self, parts: Iterable[Part]) -> None:
        """Drops modules that were not called; takes their parameters, in `parts`, instead."""
        for name, collector in list(self._collectors.items()):
            if not collector.calls:
                del self._collectors[name], self.sums[name]
        for part in parts:
            if isinstance(part, DiagonalPart) and part.name not in self.sums:
                self._diagonals.append(part)
                self.sums[part.name] = empty_diagonal_sums(part)

    def row_pairs(self) -> dict[str, RowPairs]:
        """Name of a linear layer -> rows of its inputs and would-be gradients, where kept."""
        return {name: c.rows for name, c in self._collectors.items() if c.rows}

    def shared_over(self) -> dict[str, str]:
        """Module name -> how its rows share the weight, in words, of modules that were called."""
        return {
            name: collector.sharing_in_words()
            for name, collector in self._collectors.items()
            if collector.calls
        }

    def _forward_hook(
        self, part: KroneckerPart | UnitwisePart, collector: Collector
    ) -> Callable[..., Tensor | None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            if not (
                torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad
            ):
                return None
            x = args[0] if args else kwargs["input"]
            return self._tap(part.name, collector, x, output)

        return hook

    def _tap_fused(
        self, prefix: str, which: str, x: Tensor, y: Tensor, mask: Tensor | None, batch_dim: int
    ) -> Tensor:
        """What a fused module's `forward` calls for each of its linear maps."""
        collector = self._collectors.get(prefix + which)
        if collector is None or not (torch.is_grad_enabled() and y.requires_grad):
            return y
        known = None if mask is None else Positions(mask=mask)
        return self._tap(prefix + which, collector, x, y, known, batch_dim)

    def _tap(
        self,
        name: str,
        collector: Collector,
        x: Tensor,
        y: Tensor,
        known: Sharing | None = None,
        batch_dim: int = 0,
    ) -> Tensor:
        """Takes the input x of a call and puts a tap behind its output y.

        `known` is the sharing where the caller knows it; `batch_dim` counts the examples in x, y.
        """
        with torch.no_grad():
            x = x.detach().movedim(batch_dim, 0)
            try:
                collector.forward(x, known or resolve(self._sharing, name, len(x)))
            except SharingError as error:
                raise SharingError(f"layer '{name}': {error}") from None
        call = collector.calls - 1
        self._edges.append(get_gradient_edge(y))

        def callback(g: Tensor) -> None:
            if self._listening:
                with torch.no_grad():
                    collector.gradient(call, g.detach().movedim(batch_dim, 0))

        tapped: Tensor = _Tap.apply(y, callback)  # type: ignore[no-untyped-call]
        return tapped

    def fisher_pass(self, logits: Tensor, vector: Tensor, *, zero_mean: bool) -> None:
        """Propagates would-be gradients (shape of the logits) and adds their statistics.

        The graph is kept, since the ordinary backward pass comes after.

        Args:
            logits: the model's output, attached to the graph.
            vector: would-be gradients of all examples.
            zero_mean: whether the vectors of different examples are independent with mean zero
                (sampled labels). Then the square of a summed parameter gradient has the sum of
                the examples' squares as its mean, and one pass serves the parameters that are in
                no layer as well; otherwise these take one pass for each example.
        """
        if self._edges:
            parameters = [part.parameter for part in self._diagonals] if zero_mean else []
            self._propagate(logits, vector, parameters)
        if self._diagonals and not (zero_mean and self._edges):
            for example in range(logits.shape[0]):
                alone = torch.zeros_like(vector)
                alone[example] = vector[example]
                self._square_gradients(logits, alone)

    def _propagate(self, logits: Tensor, vector: Tensor, parameters: list[nn.Parameter]) -> None:
        edges: list[Any] = list(earliest(self._edges))
        self._listening = True
        try:
            grads = _grad(logits, [*edges, *parameters], vector)
        finally:
            self._listening = False
        with torch.no_grad():
            for collector in self._collectors.values():
                collector.end_pass()
            if parameters:
                self._add_squares(grads[len(edges) :])

    def _square_gradients(self, logits: Tensor, vector: Tensor) -> None:
        with torch.no_grad():
            self._add_squares(_grad(logits, [part.parameter for part in self._diagonals], vector))

    def _add_squares(self, grads: Sequence[Tensor | None]) -> None:
        for part, grad in zip(self._diagonals, grads, strict=True):
            if grad is not None:
                total = self.sums[part.name]["F"]
                total += grad.to(total.dtype).square()

    def release(self) -> None:
        """Lets go of the graph and of all tensors but the sums."""
        self._edges.clear()
        self._collectors.clear()
        self._modules.clear()


def _grad(logits: Tensor, inputs: list[Any], vector: Tensor) -> Sequence[Tensor | None]:
    grads: Sequence[Tensor | None] = torch.autograd.grad(
        logits, inputs, vector.to(logits.dtype), retain_graph=True, allow_unused=True
    )
    return grads


def make_collector(
    part: KroneckerPart | UnitwisePart, ragged_scaling: str, low_rank: bool, keep_rows: bool
) -> Collector:
    """A fresh collector for a part."""
    if isinstance(part, UnitwisePart):
        return UnitwiseCollector(part)
    if part.embedding is not None:
        return TiedCollector(part, ragged_scaling)
    if part.approx == "expand":
        return ExpandCollector(part, keep_rows and is_correctable(part))
    return ReduceCollector(part, ragged_scaling, low_rank, keep_rows and is_correctable(part))


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
