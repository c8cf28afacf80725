"""Parameters, or rows of them, that a part of the curvature covers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterSlice:
    """Rows start:stop of a parameter; the whole parameter by default.

    Args:
        name: the parameter's name in the model.
    """

    name: str
    parameter: nn.Parameter
    start: int | None = None
    stop: int | None = None

    @property
    def data(self) -> Tensor:
        """The values, detached."""
        return (
            self.parameter.detach()[self.start : self.stop]
            if self.is_sliced
            else self.parameter.detach()
        )

    @property
    def grad(self) -> Tensor | None:
        """The gradient (a view), or None."""
        grad = self.parameter.grad
        return grad[self.start : self.stop] if grad is not None and self.is_sliced else grad

    @property
    def is_sliced(self) -> bool:
        """Whether only some rows are meant."""
        return self.start is not None or self.stop is not None


@dataclass(frozen=True)
class LinearView:
    """A linear map inside a fused module (attention, recurrent), seen as an nn.Linear.

    Attributes:
        weight_slice: [P_out, P_in].
        bias_slice: [P_out] or None.
    """

    weight_slice: ParameterSlice
    bias_slice: ParameterSlice | None

    @property
    def weight(self) -> Tensor:
        """[P_out, P_in], detached."""
        return self.weight_slice.data

    @property
    def bias(self) -> Tensor | None:
        """[P_out], detached, or None."""
        return None if self.bias_slice is None else self.bias_slice.data
