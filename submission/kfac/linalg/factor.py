"""One Kronecker factor, A or B, as it is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
        old = Factor(self.dense(), "dense") if self.form == "rows" else self
        if new.form == "rows" and not old.is_diagonal:
            rows = new.values * math.sqrt(weight)
            old.values.baddbmm_(rows.mT, rows, beta=1 - weight)  # one pass over the average
        else:
            old.values.lerp_(new.dense(), weight)
        return old
