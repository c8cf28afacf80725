"""One Kronecker factor, A or B, as it is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORMS = ("dense", "diagonal", "rows")


@dataclass
class Factor:
    """A positive semi-definite matrix for each group.

    Attributes:
        values: [groups, d, d] where dense, [groups, d] where diagonal; rows [groups, n, d],
            standing for the sum of their outer products.
        form: one of FORMS.
    """

    values: Tensor
    form: str

    @property
    def side(self) -> int:
        """d."""
        return self.values.shape[-1]

    @property
    def is_diagonal(self) -> bool:
        """Whether only the diagonal is kept."""
        return self.form == "diagonal"

    def trace(self) -> Tensor:
        """[groups]."""
        if self.form == "rows":
            return self.values.square().sum((-2, -1))
        diagonal = self.values if self.is_diagonal else self.values.diagonal(dim1=-2, dim2=-1)
        return diagonal.sum(-1)

    def mean_eigenvalue(self) -> Tensor:
        """trace / d, [groups]."""
        return self.trace() / self.side

    def dense(self) -> Tensor:
        """[groups, d, d]; diagonal factors stay as they are."""
        return self.values.mT @ self.values if self.form == "rows" else self.values

    def left_times(self, gradient: Tensor) -> Tensor:
        """factor · gradient; gradient [groups, d, k]."""
        if self.is_diagonal:
            return self.values.unsqueeze(-1) * gradient
        if self.form == "rows":
            return self.values.mT @ (self.values @ gradient)
        return self.values @ gradient

    def right_times(self, gradient: Tensor) -> Tensor:
        """gradient · factor; gradient [groups, k, d]."""
        return self.left_times(gradient.mT).mT

    def move_towards(self, new: Factor, weight: float) -> Factor:
        """(1 - weight) · this + weight · new, in this one's memory."""
        if self.form != new.form or self.form == "rows":
            old = Factor(self.dense(), "dense")
            torch.lerp(old.values, new.dense(), weight, out=old.values)
            return old
        self.values.lerp_(new.values, weight)
        return self
