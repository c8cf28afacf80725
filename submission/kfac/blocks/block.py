"""What every kind of curvature block is: its parameters, what is collected, what is kept.

A `Block` is a description: a value without tensors, the same on every rank. It makes a `Collector`,
which fills `Sums` from the calls of a recorded pass. Sums over batches and ranks become a
`BlockCurvature`, which is averaged over time, and inverted to an `Inverse`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..linalg.eigenbasis import Basis
from ..linalg.inverses import FactorInverse, Request
from ..operations.pieces import Piece
from ..operations.sharing import Sharing


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others: sums are never kept in half."""
    wide = tensor.dtype in (torch.float64, torch.complex128)
    return torch.float64 if wide else torch.float32


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor with its real and imaginary parts along a last dimension; a view."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@dataclass(frozen=True)
class Collecting:
    """How statistics are collected.

    Attributes:
        like: an empty tensor of the dtype and device of the sums.
        ragged_scaling: see `linalg.kfac.RAGGED_SCALINGS`.
        uses: how often an inverse is applied before it is renewed, to decide whether a factor that
            is a sum over few rows is kept as these rows (0: whenever they are few); None for never.
        keeps_rows: whether all rows are kept, for the eigenvalue correction.
    """

    like: Tensor
    ragged_scaling: str = "sqrt"
    uses: int | None = None
    keeps_rows: bool = False

    def for_parameter(self, parameter: Tensor) -> Collecting:
        """The same for sums of the dtype and device that a parameter asks for."""
        dtype = statistics_dtype(parameter)
        if self.like.dtype == dtype and self.like.device == parameter.device:
            return self
        return replace(self, like=torch.empty(0, dtype=dtype, device=parameter.device))


@dataclass(frozen=True)
class InverseSettings:
    """How curvature is inverted.

    Attributes:
        kind: see `linalg.damping.DAMPING_KINDS`; blocks without factors are damped on their
            product.
        damping, relative: λ, and whether it is in units of the mean eigenvalue.
        uses: how often an inverse will be applied before it is renewed.
    """

    kind: str
    damping: float
    relative: bool
    uses: int


@dataclass(eq=False)
class HeardCall:
    """A call whose output's gradient has arrived.

    Attributes:
        operation: its geometry.
        x: its input, the examples in front where they are a dimension; None where not needed.
        sharing: how its rows share the parameters.
        transposed: whether the block's matrix is used as its transpose.
        used: how many of the examples are used, the first.
        scale: what their gradients are multiplied by (see `sharing.first_examples`).
    """

    operation: Any
    x: Tensor | None
    sharing: Sharing
    transposed: bool = False
    used: int = 0
    scale: float = 1.0


class Inverse(ABC):
    """The damped inverse of a block's curvature: a dataclass of tensors."""

    def eigenbasis(self) -> Basis:
        """The eigenvectors that it knows; by default the basis of the entries themselves."""
        return Basis()

    @abstractmethod
    def apply(self, gradient: Tensor) -> Tensor:
        """(curvature + damping)⁻¹ · gradient, in the block's canonical view."""

    def with_damping(self, strength: Tensor) -> Inverse | None:
        """The inverse with another damping, where that is cheap."""
        del strength
        return None


class BlockCurvature(ABC):
    """Curvature of a block on average: a dataclass of tensors.

    Scale (the convention of the whole project): blocks of the GGN of the *mean* loss over its
    terms; no further factor of N, R or the number of samples is needed.
    """

    @abstractmethod
    def mean_eigenvalue(self) -> Tensor:
        """[groups], or [1]."""

    @abstractmethod
    def moved_towards(self, new: Any, weight: float) -> BlockCurvature:
        """(1 - weight) · this + weight · new, in this one's memory where possible."""

    def requests(self, settings: InverseSettings) -> list[Request]:
        """The factors to be inverted."""
        del settings
        return []

    @abstractmethod
    def inverse(
        self,
        settings: InverseSettings,
        found: Sequence[FactorInverse | None],
        before: Inverse | None = None,
    ) -> Inverse | None:
        """The damped inverse, from the inverses of the requests; None where it cannot be had.

        Args:
            before: the one until now, where a basis that follows the eigenvectors will do.
        """

    @abstractmethod
    def quadratic_form(self, step: Tensor) -> Tensor:
        """stepᵀ · curvature · step; step in the block's canonical view."""

    @abstractmethod
    def public(self) -> Any:
        """What users are shown: see `curvature`."""

    def strength(self, settings: InverseSettings) -> Tensor:
        """What is added to the curvature: λ, or λ times its mean eigenvalue; [groups].

        A dead block keeps the plain λ.
        """
        mean = self.mean_eigenvalue()
        plain = torch.full_like(mean, settings.damping)
        return torch.where(mean > 0, settings.damping * mean, plain) if settings.relative else plain


class Sums(ABC):
    """Sums of statistics over calls, passes, batches and ranks.

    What comes from would-be gradients is kept apart for each loss, since losses may have different
    numbers of terms.

    Attributes:
        count: how often the block was reached: rows, examples or passes; a scalar.
    """

    count: Tensor

    @abstractmethod
    def pad(self, empty: Any) -> None:
        """Takes from empty sums those of the losses that it lacks."""

    @abstractmethod
    def tensors(self) -> list[tuple[Tensor, bool]]:
        """All that is added over ranks, and which of it are symmetric matrices."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Adds the sums of another batch."""

    @abstractmethod
    def rescale(self, factor: Tensor) -> None:
        """Makes the sums those of `factor` times the would-be gradients."""

    @abstractmethod
    def where_faults_show(self) -> list[Tensor]:
        """Tensors of which one is not finite if any entry of the sums is not."""

    @abstractmethod
    def curvature(self, divisors: Sequence[Tensor | None], input_scale: float) -> BlockCurvature:
        """Divides by the counts; the sums' memory is used, and they must not be used again.

        Args:
            divisors: for each loss, what its would-be gradients' squares are divided by: the number
                of its terms; None for 1.
            input_scale: sums of inputs are multiplied by it.
        """


class Collector(ABC):
    """Fills the sums of a block from one recorded pass.

    Attributes:
        sums: what was collected.
        loss: the number of the loss whose would-be gradients come.
        takes_inputs_late: whether inputs may be taken when the pass is over.
    """

    sums: Sums
    loss: int = 0
    takes_inputs_late = False

    @property
    def is_reached(self) -> bool:
        """Whether anything was collected."""
        return True

    @abstractmethod
    def input(self, call: HeardCall) -> None:
        """Takes the input of a call, the first time that a gradient of its output has come."""

    @abstractmethod
    def gradient(self, call: HeardCall, g: Tensor) -> None:
        """Takes a would-be gradient of a call's output, in the layout of its input."""

    def end_pass(self, single: bool) -> None:  # noqa: B027
        """All gradients of one pass, of one example alone or of all, have come."""

    def end(self) -> None:  # noqa: B027
        """All passes are over."""

    def words(self) -> str:
        """For the report: over what the rows of a call were shared."""
        return "-"


class Block(ABC):
    """Parameters whose curvature is approximated together: a frozen dataclass.

    Attributes:
        name: the module's where the parameters are a module's weight (and bias), otherwise the
            parameter's.
        has_factors: whether its curvature is a Kronecker product.
        needs_own_gradients: whether it is collected from gradients of the parameter itself.
        takes_sums: whether sums of inputs and gradients over the positions of each example are all
            that it is collected from.
    """

    name: str
    has_factors = False
    needs_own_gradients = False

    @property
    def takes_sums(self) -> bool:
        return False

    @property
    @abstractmethod
    def pieces(self) -> tuple[Piece, ...]:
        """The entries of parameters that it covers."""

    @abstractmethod
    def collector(self, collecting: Collecting) -> Collector:
        """A fresh collector."""

    @abstractmethod
    def empty_sums(self, collecting: Collecting, losses: int) -> Sums:
        """Zero sums."""

    @abstractmethod
    def canonical(self, values: Sequence[Tensor]) -> Tensor:
        """Tensors in the shapes of the pieces as one."""

    @abstractmethod
    def separated(self, value: Tensor) -> list[Tensor]:
        """The inverse of `canonical`: in the sizes of the pieces."""

    @property
    @abstractmethod
    def layout(self) -> tuple[tuple[int, ...], int]:
        """(shape, dim): how gradients lie side by side with others, see `batches`."""

    def public(self, curvature: BlockCurvature) -> Any:
        """A copy of a curvature of this block, as users are shown it."""
        return curvature.public()

    def cost(self) -> float:
        """Of the inverses of its factors, in multiplications."""
        return 0.0

    @abstractmethod
    def row(self, adam: bool, raw: bool) -> tuple[str, str, str, int]:
        """For the report: (kind, sides, what preconditions it, entries kept)."""

    def read(self, tensors: Mapping[str, Tensor | None]) -> Tensor | None:
        """Tensors of parameters (gradients, values) in the canonical view; None if all are missing.

        A missing one among others counts as zeros; sparse gradients cannot be had as one.
        """
        given = [tensors.get(piece.parameter) for piece in self.pieces]
        first = next((tensor for tensor in given if tensor is not None), None)
        if first is None or any(t is not None and t.layout != torch.strided for t in given):
            return None
        values = [
            first.new_zeros(piece.size) if tensor is None else piece.of(tensor)
            for piece, tensor in zip(self.pieces, given, strict=True)
        ]
        return self.canonical(values)


def write(
    blocks: Sequence[Block], values: Sequence[Tensor], tensors: Mapping[str, Tensor | None]
) -> None:
    """Writes values in the blocks' canonical views into the parameters' tensors."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    copied: list[tuple[Tensor, Tensor]] = []
    contiguous: dict[str, Tensor] = {}
    for block, value in zip(blocks, values, strict=True):
        for piece, new in zip(block.pieces, block.separated(value), strict=True):
            tensor = tensors.get(piece.parameter)
            if tensor is None:
                continue
            if not tensor.is_contiguous():
                if piece.parameter not in contiguous:
                    contiguous[piece.parameter] = tensor.contiguous()
                    copied.append((tensor, contiguous[piece.parameter]))
                tensor = contiguous[piece.parameter]
            target = as_real(piece.of(tensor))
            targets.append(target)
            # Of the target's own type: the fused copy looks at the types of one side only.
            sources.append(new.to(target.dtype).reshape(target.shape))
    if targets:
        torch._foreach_copy_(targets, sources)
    for tensor, changed in copied:
        tensor.copy_(changed)
