"""Empirical factors out of the loss's own backward pass, which then needs no Fisher pass beside it.

The would-be gradients at the true labels are the gradient of the summed loss, and the loss that is
trained on is c times that sum. Its backward pass shows each call's outputs c times what a Fisher
pass would: c is measured at the logits, and taken out of the sums when they are complete.

BatchNorm with the statistics of the batch is where the two differ. A Fisher pass has random signs
there (see `passes`), and is right on average. In the loss's pass, what reaches an example's outputs
from the losses of others counts as the example's own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .. import tuning
from .collect import Collection
from .graph import GraphError, graph_kept, reaches_beside
from .passes import FisherPass


class LossPass:
    """A collection that waits for the backward pass of the loss.

    Args:
        collection: of the forward pass that the loss was computed from.
        logits: its output.
        which: the would-be gradients at the true labels.
        terms: number of loss terms, which the caller will divide by.

    Attributes:
        is_over: whether the backward pass has come, and to its end.
    """

    def __init__(
        self, collection: Collection, logits: Tensor, which: FisherPass, terms: Tensor
    ) -> None:
        self.collection, self.terms, self.is_over = collection, terms, False
        self._vector = which.vector
        self._scale: Tensor | None = None
        edge = get_gradient_edge(logits)
        self._at_logits = [call for call in collection.calls if call.edge == edge]
        collection.begin_loss_pass()
        self._handle = logits.register_hook(self._begin)  # type: ignore[no-untyped-call]

    def _begin(self, gradient: Tensor) -> None:
        """The pass has come to the logits."""
        if self._scale is not None:
            raise GraphError(
                "a second backward pass goes through a graph whose statistics were to come from "
                "one pass of the loss: leave `loss` out of kfac.update to have a pass of its own "
                "for them"
            )
        self._scale = proportion(gradient.detach(), self._vector, self.terms)
        self.collection.listen(True)
        for call in self._at_logits:  # their own hooks came before this one
            self.collection.hear(call, gradient.detach())
        # Only a pass that raises nothing gets there.
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self.is_over = True
        self.collection.listen(False)

    def collect(self) -> None:
        """Completes the sums, after the backward pass."""
        assert self._scale is not None
        self._handle.remove()
        self.collection.end_loss_pass(self._scale)

    def forget(self) -> None:
        """Waits no longer."""
        self._handle.remove()
        self.collection.listen(False)


def may_share(collection: Collection, loss: Tensor, logits: Tensor) -> bool:
    """Whether the loss depends on the calls through the logits alone, as the graph says.

    And no parameter needs gradients of its own, which take a Fisher pass anyway.
    """
    if not loss.requires_grad or loss.numel() != 1 or collection.has_diagonals:
        return False
    if loss.grad_fn is None or logits.grad_fn is None:
        return False
    nodes = {call.edge.node for call in collection.calls if call.edge is not None}
    return not reaches_beside(loss.grad_fn, get_gradient_edge(logits), nodes)


def is_multiple(loss: Tensor, logits: Tensor, which: FisherPass, terms: Tensor) -> bool:
    """Whether the loss's gradient at the logits is that of the would-be gradients, but for one
    number. Waits for the device.

    Not where weights of terms are others than 0 and 1 (the factors have their roots), or where the
    loss is not the likelihood's.
    """
    if not which.vector.any():
        return False
    with graph_kept():
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(proportion(gradient, which.vector, terms).isfinite())


def proportion(gradient: Tensor, vector: Tensor, terms: Tensor) -> Tensor:
    """c with gradient = c · vector, a scalar; NaN where it is no multiple, or not finite.

    Both are differences of probabilities and labels, of `terms` distributions. Tolerance: the
    rounding of the gradient's dtype, at most 25 %.
    """
    epsilon = torch.finfo(gradient.dtype).eps
    gradient = gradient.to(vector.dtype)
    squares = _dot(vector, vector)
    norm = squares.sqrt()
    scale = torch.where(squares > 0, _dot(gradient, vector) / squares, 1.0)
    rest = torch.linalg.vector_norm(torch.addcmul(gradient, vector, -scale))
    rounding = math.sqrt(epsilon) * norm + 8 * epsilon * terms.to(norm.dtype).sqrt()
    fits = (rest <= scale.abs() * torch.minimum(rounding, norm / 4)) & (scale != 0)
    return torch.where(fits, scale, torch.nan)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Σ one · other, without a tensor of the products.

    In pieces, since a CPU adds up float32 one by one: 1e-3 off after ten million, and so are norms.
    """
    length = tuning.LONGEST_DOT if one.device.type == "cpu" else max(one.numel(), 1)
    pieces = (torch.split(tensor.reshape(-1), length) for tensor in (one, other))
    return torch.stack([torch.dot(a, b) for a, b in zip(*pieces, strict=True)]).sum()
