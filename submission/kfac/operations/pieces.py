"""Parameters, views of them, and which tensors of a forward pass these are.

A `Piece` says which entries of a parameter a tensor holds, as sizes and strides of the parameter
laid out row by row: the same on every rank, device and after a reload. Transposed, reshaped, sliced
and cast tensors are pieces like the parameter itself. A `Matrix` is a piece seen as
[groups, P_out, P_in].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """Entries of a parameter.

    Attributes:
        parameter: its name in the model.
        size, stride, offset: of a view of the parameter laid out row by row.
        is_whole: whether these are all of its entries.
    """

    parameter: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_whole: bool

    @classmethod
    def of_view(cls, name: str, view: Tensor, numel: int) -> Piece:
        """From a view (on any device) of a tensor laid out row by row, with `numel` entries."""
        stride = tuple(
            1 if length == 1 else step
            for length, step in zip(view.shape, view.stride(), strict=True)
        )
        whole = view.numel() == numel
        return cls(name, tuple(view.shape), stride, int(view.storage_offset()), whole)

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.size)

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor in the parameter's shape; a view where that is contiguous."""
        tensor = tensor.contiguous()
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)

    def mark(self, covered: Tensor) -> bool:
        """Marks the entries in a flat bool tensor; whether none of them was marked before."""
        own = covered.as_strided(self.size, self.stride, self.offset)
        free = not bool(own.any())
        own.fill_(True)
        return free

    @property
    def entries(self) -> tuple[Any, ...]:
        """The same for all orders of the same entries."""
        dims = sorted(
            ((step, length) for length, step in zip(self.size, self.stride, strict=True)
             if length > 1),
            reverse=True,
        )  # fmt: skip
        merged: list[tuple[int, int]] = []
        for step, length in dims:
            if merged and merged[-1][0] == step * length:
                merged[-1] = (step, merged[-1][1] * length)
            else:
                merged.append((step, length))
        return (self.parameter, self.offset, *merged)

    @property
    def label(self) -> str:
        """For reports: the parameter's name, and which rows of it."""
        if self.is_whole:
            return self.parameter
        first, length = self.offset, self.numel
        (step, rows) = max(zip(self.stride, self.size, strict=True), default=(1, 1))
        if step * rows == length:  # neighbouring rows of the first dimension
            return f"{self.parameter}[{first // step}:{first // step + rows}]"
        return f"{self.parameter}[{first}:+{length}]"


@dataclass(frozen=True)
class Matrix:
    """A piece as matrices.

    Attributes:
        piece: with the dimensions of the groups first, then those of P_out, then those of P_in.
        shape: (groups, P_out, P_in).
    """

    piece: Piece
    shape: tuple[int, int, int]

    def read(self, tensor: Tensor) -> Tensor:
        """[groups, P_out, P_in] of a tensor in the parameter's shape."""
        return self.piece.of(tensor).reshape(self.shape)


class Alias:
    """A tensor of the forward pass that is a piece of a parameter.

    Attributes:
        name: the parameter's.
        view: on the meta device, of the parameter laid out row by row.
        numel: of the parameter.
    """

    def __init__(self, name: str, view: Tensor, numel: int) -> None:
        self.name, self.view, self.numel = name, view, numel

    @property
    def piece(self) -> Piece:
        """The entries, in the order of the tensor."""
        return Piece.of_view(self.name, self.view, self.numel)

    def derived(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function of views makes of it: an alias, several, or None where it is no view."""
        try:
            made = function(self.view, *args, **kwargs)
        except (RuntimeError, TypeError, IndexError):
            return None
        if isinstance(made, tuple | list):
            return [self._alias(one) for one in made]
        return self._alias(made)

    def _alias(self, made: Any) -> Alias | None:
        if not isinstance(made, Tensor) or made._base is None:
            return None
        return Alias(self.name, made, self.numel)

    def matrix(
        self, groups: tuple[int, ...], out: tuple[int, ...], into: tuple[int, ...]
    ) -> Matrix:
        """As matrices, from the dimensions that are groups, outputs and inputs."""
        ordered = self.view.permute(*groups, *out, *into)
        shape = tuple(
            math.prod(self.view.shape[dim] for dim in dims) for dims in (groups, out, into)
        )
        with suppress(RuntimeError):  # strides that do not merge: reading makes a copy
            ordered = ordered.view(shape)
        assert len(shape) == 3
        return Matrix(Piece.of_view(self.name, ordered, self.numel), shape)


# Functions whose output holds the same entries in another order, or fewer of them. "copies" have
# memory of their own, but entries in the same order.
VIEWS = (
    "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "view", "reshape",
    "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as",
    "select", "narrow", "chunk", "split", "tensor_split", "split_with_sizes", "unbind", "adjoint",
    "__getitem__",
)  # fmt: skip
COPIES = (
    "to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "cuda",
    "cpu",
)  # fmt: skip
PROPERTIES = ("T", "mT", "H", "mH")


def _functions(names: tuple[str, ...]) -> set[Any]:
    spaces = (torch, Tensor)
    return {getattr(space, name) for name in names for space in spaces if hasattr(space, name)}


_VIEW_FUNCTIONS = _functions(VIEWS)
_COPY_FUNCTIONS = _functions(COPIES)
_VIEW_GETTERS = {getattr(Tensor, name).__get__: name for name in PROPERTIES}


class Tracker:
    """Knows which tensors of a forward pass are parameters, or pieces of them.

    Args:
        parameters: name -> trainable parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._tracked = frozenset(parameters)
        self._known: dict[int, tuple[Tensor, Alias]] = {}  # keeps the tensors, and so their ids

    def is_tracked(self, name: str) -> bool:
        """Whether a parameter is one of those that are followed."""
        return name in self._tracked

    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor stands for a parameter; the caller keeps it."""
        self._names[id(tensor)] = name

    def alias(self, tensor: Any) -> Alias | None:
        """The piece that a tensor is, or None."""
        if not isinstance(tensor, Tensor):
            return None
        found = self._known.get(id(tensor))
        if found is not None:
            return found[1]
        name = self._names.get(id(tensor))
        if name is None:
            return None
        view = torch.empty(tensor.shape, device="meta")
        alias = Alias(name, view.view(view.shape), tensor.numel())
        self._known[id(tensor)] = (tensor, alias)
        return alias

    def follow(self, function: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> bool:
        """Remembers what a function of a piece has made, where that is a piece again."""
        if not args:
            return False
        source = self.alias(args[0])
        if source is None:
            return False
        if function in _COPY_FUNCTIONS:
            made: Any = source
        elif function in _VIEW_FUNCTIONS:
            if any(isinstance(arg, Tensor) for arg in args[1:]):
                return False  # an index of tensors: rows are looked up
            made = source.derived(function, *args[1:], **kwargs)
        else:
            name = _VIEW_GETTERS.get(function)
            if name is None:
                return False
            made = source.derived(lambda view: getattr(view, name))
        if isinstance(made, list):
            if not isinstance(output, tuple | list):
                return False
            for one, tensor in zip(made, output, strict=True):
                self._remember(tensor, one)
            return all(one is not None for one in made)
        return self._remember(output, made)

    def _remember(self, tensor: Any, alias: Alias | None) -> bool:
        if alias is None or not isinstance(tensor, Tensor):
            return False
        self._known[id(tensor)] = (tensor, alias)
        return True
