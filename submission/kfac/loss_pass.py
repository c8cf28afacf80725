"""Empirical factors out of the loss's own backward pass, which then needs no Fisher pass beside it.

The would-be gradients at the true labels are the gradient of the summed loss, and the loss that is
trained on is c times that sum. Its backward pass shows each layer's outputs c times what a Fisher
pass would: c is measured at the logits, and taken out of the sums when they are complete.

BatchNorm with the statistics of the batch is where the two differ. A Fisher pass has random signs
there (see `passes`), and is right on average. In the loss's pass, what reaches an example's outputs
from the losses of others counts as the example's own: a part of it that falls with the batch, and
what K-FAC libraries that take the loss's pass all do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .capture import Recording
from .graph import GraphError
from .passes import FisherPass


class LossPass:
    """A recording that waits for the backward pass of the loss.

    Args:
        recording: of the forward pass that the loss was computed from.
        logits: its output.
        which: the would-be gradients at the true labels.
        terms: number of loss terms, which the caller will divide by.
    """

    def __init__(
        self, recording: Recording, logits: Tensor, which: FisherPass, terms: Tensor
    ) -> None:
        self.recording, self.terms = recording, terms
        self._vector = which.vector
        self._scale: Tensor | None = None
        recording.begin_loss_pass()
        self._handle = logits.register_hook(self._measure)  # type: ignore[no-untyped-call]

    def _measure(self, gradient: Tensor) -> None:
        if self._scale is not None:
            raise GraphError(
                "a second backward pass goes through a graph whose statistics were to come from "
                "one pass of the loss: leave `loss` out of KFAC.update to have a pass of its own "
                "for them"
            )
        self._scale = proportion(gradient.detach(), self._vector)

    @property
    def is_over(self) -> bool:
        """Whether the backward pass has come."""
        return self._scale is not None

    def end(self) -> None:
        """Completes the sums. The loss's backward pass must have come."""
        assert self._scale is not None
        self._handle.remove()
        self.recording.end_loss_pass(self._scale)

    def drop(self) -> None:
        """Stops to wait."""
        self._handle.remove()
        self.recording.release()


def is_shareable(recording: Recording, loss: Tensor, logits: Tensor, which: FisherPass) -> bool:
    """Whether the loss's gradient is that of the would-be gradients, but for one number.

    Not where weights of terms are others than 0 and 1 (the factors have their roots), where the
    loss is not the likelihood's, or where it depends on layers besides through the logits
    (penalties on activations). Nor where parameters in no layer need a pass of their own anyway.
    """
    if (
        recording.has_bare_parameters
        or not which.vector.any()
        or recording.is_reached_beside(loss, logits)
    ):
        return False
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(proportion(gradient, which.vector).isfinite())


def proportion(gradient: Tensor, vector: Tensor) -> Tensor:
    """c with gradient = c · vector, a scalar; NaN where it is no multiple, or not finite.

    Both are differences of probabilities and labels: as exact as these are.
    """
    epsilon = torch.finfo(gradient.dtype).eps
    gradient = gradient.to(vector.dtype)
    squares = vector.square().sum()
    scale = torch.where(squares > 0, (gradient * vector).sum() / squares, 1.0)
    rest = torch.linalg.vector_norm(gradient - scale * vector)
    rounding = math.sqrt(epsilon) * squares.sqrt() + 8 * epsilon * math.sqrt(vector.numel())
    return torch.where((rest <= scale.abs() * rounding) & (scale != 0), scale, torch.nan)
