"""Scales and shifts by a parameter; a shift of a linear map's output is its bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..handlers import handles
from ..operation import UnitOperation
from ..pieces import Alias
from ..sharing import Positions, Segments, Sharing, SharingError, sum_rows
from ..uses import UnitUse

if TYPE_CHECKING:
    from ..record import Recording


@dataclass(frozen=True)
class Elementwise(UnitOperation):
    """y = x · γ, or y = x + β, broadcast over the leading dimensions.

    Attributes:
        shape: of γ or β, as it is broadcast: one dimension for each of the output's.
        sizes: of the output.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def row_dims(self) -> tuple[int, ...]:
        return tuple(dim for dim, size in enumerate(self.shape) if size == 1)

    def rows(self, x: Tensor, sharing: Sharing) -> Tensor:
        """[N, R, units] for Positions: R are the positions over which the parameter is broadcast.

        [rows, units] for Segments, summed over such positions of each row.
        """
        shape = self.shape
        if isinstance(sharing, Positions):
            x = x.movedim(sharing.batch_dim, 0)
            shape = (shape[sharing.batch_dim], *shape[: sharing.batch_dim],
                     *shape[sharing.batch_dim + 1 :])  # fmt: skip
        if shape[0] != 1:
            raise SharingError("examples have entries of the parameter of their own")
        shared = [dim for dim in range(1, x.dim()) if shape[dim] == 1]
        units = [dim for dim in range(1, x.dim()) if shape[dim] != 1]
        count = torch.Size(x.shape[dim] for dim in shared).numel()
        x = x.permute(0, *shared, *units).reshape(x.shape[0], count, -1)
        return x.sum(1) if isinstance(sharing, Segments) else x

    def gradients(
        self, x: Tensor | None, g: Tensor, sharing: Sharing, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor]:
        g = g.to(dtype)
        shift = sum_rows(self.rows(g, sharing), sharing)
        if x is None:
            return None, shift
        return sum_rows(self.rows(g * x.to(dtype), sharing), sharing), shift


@handles("add", "__add__", "__radd__", "add_", "__iadd__", "sub")
def add(rec: Recording, func: Any, input: Any, other: Any = None, **kwargs: Any) -> Any:
    """y = x + β."""
    if kwargs or not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return NotImplemented
    left, right = rec.alias(input), rec.alias(other)
    if (left is None) == (right is None) or (left is not None and _is_not_symmetric(func)):
        return NotImplemented
    x, shift = (input, other) if right is not None else (other, input)
    bare, below = rec.bare_call(x), rec.nodes_below(x)
    y = func(input, other)
    if not y.requires_grad:
        return y
    subtracted = getattr(func, "__name__", "") == "sub"
    if bare is not None and not subtracted and _is_bias(shift, y, bare.use):
        rec.join_bias(bare, shift, y)
    else:
        record_shift(rec, shift, y, {"below": below})
    return y


def _is_not_symmetric(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in ("sub", "add_", "__iadd__")


def _is_bias(shift: Tensor, y: Tensor, use: Any) -> bool:
    """Whether a shift has just an entry for each output of a linear map."""
    groups, out, _ = use.matrix.shape
    if groups != 1 or use.one_hot or shift.numel() != out or out == 1:
        return False
    dims = shift.dim()
    while dims and shift.shape[shift.dim() - dims] == 1:
        dims -= 1
    return y.shape[y.dim() - dims :].numel() == out and tuple(shift.shape[-dims:]) == tuple(
        y.shape[y.dim() - dims :]
    )


def record_shift(
    rec: Recording, shift: Any, y: Tensor, known: dict[str, Any], trailing: int = 0
) -> None:
    """Records y = ... + shift.

    Args:
        known: fields of the call, `below` among them.
        trailing: dimensions of y behind the last one of the shift.
    """
    found = rec.alias(shift)
    assert found is not None
    _record(rec, UnitUse(None, found.piece), found, None, y, known, trailing)


def _record(
    rec: Recording, use: UnitUse, found: Alias, x: Tensor | None, y: Tensor,
    known: dict[str, Any], trailing: int = 0,
) -> None:  # fmt: skip
    shape = (*found.view.shape, *(1,) * trailing)
    shape = (*(1,) * (y.dim() - len(shape)), *shape)
    if len(shape) > y.dim() or y.dim() < 2 or 1 not in shape:
        rec.note(use, "an elementwise operation without a dimension of examples")
    elif y.requires_grad:
        rec.add(use, Elementwise(shape, tuple(y.shape)), x, y, **known)


@handles("mul", "__mul__", "__rmul__")
def mul(rec: Recording, func: Any, input: Any, other: Any = None) -> Any:
    """y = x · γ."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return NotImplemented
    left, right = rec.alias(input), rec.alias(other)
    if (left is None) == (right is None):
        return NotImplemented
    scale, x = (left, other) if left is not None else (right, input)
    assert scale is not None
    y = func(input, other)
    if y.requires_grad:
        _record(rec, UnitUse(scale.piece, None), scale, x, y, {})
    return y
