"""Linear layers and matrix products, however they are written."""

from __future__ import annotations

import math
import string
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..handlers import handles
from ..operation import Rows
from ..pieces import Alias
from ..uses import LinearUse
from .elementwise import record_shift

if TYPE_CHECKING:
    from ..record import Recording


@handles("linear")
def linear(
    rec: Recording, func: Any, input: Tensor, weight: Tensor, bias: Any = None, **known: Any
) -> Any:
    """y = x Wᵀ + b; `known`: fields of the call, from handlers that take others apart."""
    found = rec.alias(weight)
    if found is None:
        return shifted(rec, bias, (input, weight), lambda: func(input, weight, bias), known)
    view = found.view if weight.dim() == 2 else found.view.unsqueeze(0)
    matrix = Alias(found.name, view, found.numel).matrix((), (0,), (1,))
    folded = None if known else _folded(input)
    operation = Rows(matrix.shape, no_out=weight.dim() == 1, folded=folded)
    use = LinearUse(matrix, rec.piece(bias))
    known["below"] = rec.nodes_below(input, bias)
    return rec.call(use, operation, input, lambda x: func(x, weight, bias), **known)


def shifted(
    rec: Recording,
    bias: Any,
    entering: tuple[Tensor, ...],
    compute: Any,
    known: dict[str, Any],
    trailing: int = 0,
) -> Any:
    """The output of a map whose weight is no parameter, to which a bias is added."""
    if rec.alias(bias) is None:
        return NotImplemented
    y = compute()
    record_shift(rec, bias, y, {"below": rec.nodes_below(*entering), **known}, trailing)
    return y


@handles("matmul", "__matmul__", "__rmatmul__", "mm", "bmm")
def matmul(rec: Recording, func: Any, a: Any, b: Any = None, **kwargs: Any) -> Any:
    """x @ W or W @ x; W may have further dimensions of groups in front."""
    b = kwargs.pop("other", kwargs.pop("mat2", b))
    if kwargs or not isinstance(b, Tensor):
        return NotImplemented
    if getattr(func, "__name__", "") == "__rmatmul__":
        a, b = b, a
        func = torch.matmul
    left, right = rec.alias(a), rec.alias(b)
    if (left is None) == (right is None):
        return NotImplemented  # of two parameters: a weight that is computed
    if right is not None:
        return _product(rec, right, a, lambda x: func(x, b), on_right=True)
    assert left is not None
    return _product(rec, left, b, lambda x: func(a, x), on_right=False)


@handles("addmm", "baddbmm")
def addmm(
    rec: Recording, func: Any, input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """y = b + x W."""
    right = rec.alias(mat2)
    if right is None or rec.alias(mat1) is not None or kwargs or beta != 1 or alpha != 1:
        return NotImplemented
    bias = rec.alias(input)
    groups = right.view.shape[0] if right.view.dim() == 3 else 1
    if bias is not None and bias.view.numel() != groups * right.view.shape[-1]:
        return NotImplemented
    piece = None if bias is None else bias.piece
    below = rec.nodes_below(input, mat1)
    return _product(
        rec, right, mat1, lambda x: func(input, x, mat2), on_right=True, bias=piece, below=below
    )


@handles("grouped_mm", "_grouped_mm")
def grouped_mm(
    rec: Recording, func: Any, mat_a: Tensor, mat_b: Tensor, *, offs: Any = None, bias: Any = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """Experts: rows that were sorted by group, each group times its own matrix of a stack.

    Taken apart, so that each expert's rows are a linear map of their own; waits for the device.
    """
    stack = rec.alias(mat_b)
    apart = stack is not None and mat_b.dim() == 3 and mat_a.dim() == 2 and offs is not None
    if not apart or kwargs.get("out_dtype") is not None:
        return NotImplemented
    ends = offs.tolist()
    outputs = []
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > start:
            weight = rec.apply(Tensor.__getitem__, mat_b, group)
            y = rec.apply(torch.matmul, mat_a[start:end], weight)
            own = None if bias is None else rec.apply(Tensor.__getitem__, bias, group)
            outputs.append(y if own is None else rec.apply(torch.add, y, own))
    rest = len(mat_a) - (ends[-1] if ends else 0)
    return torch.cat([*outputs, mat_a.new_zeros(rest, mat_b.shape[-1])])


def _product(
    rec: Recording,
    weight: Alias,
    x: Tensor,
    compute: Any,
    *,
    on_right: bool,
    bias: Any = None,
    **known: Any,
) -> Any:
    """A product of x with a piece of a parameter on either side."""
    view = weight.view
    if not on_right and view.dim() >= 2:
        view = view.mT
    # Here view is [groups..., P_in, P_out], or [P_in].
    while view.dim() > 2 and (view.stride(0) == 0 or view.shape[0] == 1):
        view = view.select(0, 0)  # expanded: the same matrix for all
    no_out = view.dim() == 1
    if no_out:
        view = view.unsqueeze(-1)
    if any(step == 0 for step, size in zip(view.stride(), view.shape, strict=True) if size > 1):
        return NotImplemented
    batch = view.dim() - 2
    piece = Alias(weight.name, view, weight.numel)
    matrix = piece.matrix(tuple(range(batch)), (batch + 1,), (batch,))
    dims = max(x.dim(), batch + 2) if batch else x.dim()
    if x.dim() < 2 or dims < 2:
        return rec.call(
            LinearUse(matrix, bias), Rows(matrix.shape, no_out=no_out), x, compute, **known
        )
    if not batch and on_right:
        operation = Rows(matrix.shape, no_out=no_out, folded=_folded(x))
        return rec.call(LinearUse(matrix, bias), operation, x, compute, **known)
    if no_out and not on_right:
        return NotImplemented  # a vector times a matrix: the matrix's columns are no examples
    if batch and (x.dim() < dims or any(
        size != x.shape[dims - 2 - batch + i] for i, size in enumerate(view.shape[:batch])
    )):  # fmt: skip
        # Every group sees the same rows.
        shape = (*x.shape[: max(0, x.dim() - 2 - batch)], *view.shape[:batch], *x.shape[-2:])
        x = x.expand(shape)
    rows = tuple(range(dims - 2 - batch)) + ((dims - 2,) if on_right else (dims - 1,))
    groups = tuple(range(dims - 2 - batch, dims - 2))
    order = (*rows, *groups, dims - 1 if on_right else dims - 2)
    operation = Rows(matrix.shape, x_order=order, y_order=order, row_dims=len(rows))
    return rec.call(LinearUse(matrix, bias), operation, x, compute, **known)


@handles("einsum")
def einsum(rec: Recording, func: Any, equation: Any, *operands: Any) -> Any:
    """A product of two operands of which one is a piece of a parameter."""
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return NotImplemented
    aliases = [rec.alias(operand) for operand in operands]
    if (aliases[0] is None) == (aliases[1] is None):
        return NotImplemented
    weight_at = 0 if aliases[0] is not None else 1
    weight, x = aliases[weight_at], operands[1 - weight_at]
    assert weight is not None
    names = _subscripts(equation, [operand.dim() for operand in operands])
    if names is None:
        return NotImplemented
    inputs, output = names
    of_weight, of_x = inputs[weight_at], inputs[1 - weight_at]
    if any(len(set(some)) != len(some) for some in (of_weight, of_x, output)):
        return NotImplemented
    groups = [c for c in of_weight if c in of_x and c in output]
    into = [c for c in of_weight if c in of_x and c not in output]
    out = [c for c in of_weight if c not in of_x and c in output]
    rows = [c for c in of_x if c not in of_weight and c in output]
    expanded = any(step == 0 for step in weight.view.stride())
    if len(into) + len(groups) + len(out) != len(of_weight) or not into or expanded:
        return NotImplemented
    if len(rows) + len(into) + len(groups) != len(of_x):
        return NotImplemented
    matrix = weight.matrix(
        *(tuple(of_weight.index(c) for c in some) for some in (groups, out, into))
    )
    operation = Rows(
        matrix.shape,
        x_order=tuple(of_x.index(c) for c in (*rows, *groups, *into)),
        y_order=tuple(output.index(c) for c in (*rows, *groups, *out)),
        row_dims=len(rows),
    )

    def compute(x: Tensor) -> Tensor:
        both = [operands[0], operands[1]]
        both[1 - weight_at] = x
        result: Tensor = func(equation, *both)
        return result

    return rec.call(LinearUse(matrix), operation, x, compute)


def _subscripts(equation: str, dims: list[int]) -> tuple[list[str], str] | None:
    """The letters of the operands and of the output, an ellipsis spelled out."""
    equation = equation.replace(" ", "")
    left, arrow, output = equation.partition("->")
    inputs = left.split(",")
    unused = [c for c in string.ascii_letters if c not in equation]
    longest = ""
    for i, (names, dim) in enumerate(zip(inputs, dims, strict=True)):
        if "..." in names:
            count = dim - len(names.replace("...", ""))
            letters = "".join(unused[:count])[::-1]
            inputs[i] = names.replace("...", letters)
            longest = max(longest, letters, key=len)
    if any(len(names) != dim for names, dim in zip(inputs, dims, strict=True)):
        return None
    if not arrow:
        joined = "".join(inputs)
        output = longest + "".join(
            sorted(c for c in set(joined) if joined.count(c) == 1 and c not in longest)
        )
    return inputs, output.replace("...", longest)


def _folded(x: Tensor) -> tuple[int, ...] | None:
    """[N, R...] of rows [N·R, d] that are a view of a tensor with these dimensions apart."""
    base = x._base
    if x.dim() != 2 or base is None or base.numel() != x.numel():
        return None
    if not (base.is_contiguous() and x.is_contiguous()):
        return None
    # What the view was made from may be a view itself, of heads [N, R, heads, d / heads] say.
    before = getattr(x.grad_fn, "_saved_self_sym_sizes", ())
    for sizes in (tuple(map(int, before)), tuple(base.shape)):
        if len(sizes) >= 3 and sizes[-1] == x.shape[-1] and math.prod(sizes) == x.numel():
            # [1, N, d] may be N examples that were taken out of a list of one.
            flattened = sizes[0] > 1 if x.grad_fn is None else "View" in x.grad_fn.name()
            return sizes[:-1] if flattened else None
    return None
