"""A loss of which its own gradients are all that is known: what the empirical Fisher is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .graph import GraphError, graph_kept
from .likelihoods import Likelihood

NO_LABELS = (
    "of a loss's own gradients no labels can be sampled and no GGN be made: "
    "fisher_type='empirical' takes them, other Fishers a likelihood"
)
NO_LOSS = (
    "of a loss by its own gradients the loss itself is needed: update(outputs, OwnGradients(), "
    "loss=loss)"
)
OTHER_OUTPUTS = "the loss that update was given does not depend on the outputs that it was given"


@dataclass(frozen=True)
class OwnGradients(Likelihood):
    """Any loss that adds up functions of the outputs of one example each, such as CTC.

    No labels can be sampled. An example is one term. A mask, one entry for each example, says which
    count; it is in the loss already. The loss that is given has its own scale: what gradient
    accumulation or a GradScaler multiply it by comes after. A loss of several entries is taken as
    unreduced. `targets` are the gradient of the summed loss at the outputs.

    Args:
        batch_dim: the dimension of the outputs that counts the examples.
        is_sum: whether the loss that is given is the sum over the examples, not their mean.
    """

    batch_dim: int = 0
    is_sum: bool = False

    def example_dim(self, logits: Tensor) -> int:
        return self.batch_dim % max(logits.dim(), 1)

    def term_shape(self, logits: Tensor) -> torch.Size:
        return torch.Size([logits.shape[self.example_dim(logits)]])

    def _root_weight(
        self, mask: Tensor | None, logits: Tensor, targets: Tensor | None
    ) -> Tensor | None:
        del mask, targets
        return None if self.scale == 1.0 else logits.new_full((), math.sqrt(self.scale))

    def _at_targets(self, logits: Tensor, targets: Tensor) -> Tensor:
        return targets.to(logits.dtype)

    def _sampled(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        raise ValueError(NO_LABELS)

    def _hessian_root(self, logits: Tensor) -> Iterator[Tensor]:
        raise ValueError(NO_LABELS)

    def gradient_of(self, loss: Tensor | None, outputs: Tensor, terms: Tensor) -> Tensor:
        """The gradient of the summed loss at the outputs; the graph is kept.

        Args:
            terms: the number of examples that count.

        Raises:
            ValueError: no loss is given.
            GraphError: its graph is gone, or does not come from the outputs.
        """
        if loss is None:
            raise ValueError(NO_LOSS)
        with graph_kept():
            (gradient,) = torch.autograd.grad(
                loss.sum(), outputs, retain_graph=True, allow_unused=True
            )
        if gradient is None:
            raise GraphError(OTHER_OUTPUTS)
        is_mean = not self.is_sum and loss.numel() == 1
        return gradient * terms if is_mean else gradient
