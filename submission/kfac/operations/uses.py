"""What was seen: uses of parameters, and the calls in which they were used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from .operation import LinearOperation, UnitOperation
from .pieces import Matrix, Piece
from .sharing import Sharing


@dataclass(frozen=True)
class LinearUse:
    """A matrix that rows are multiplied by.

    Attributes:
        matrix: the weight.
        bias: what is added to each output, P_out entries of each group; None without.
        one_hot: whether the rows are one-hot (an embedding: P_in are the words).
        diagonal_input: approximations for which A is kept as a diagonal, see `LinearOperation`.
    """

    matrix: Matrix
    bias: Piece | None = None
    one_hot: bool = False
    diagonal_input: tuple[str, ...] = ()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The parameters' entries that are used."""
        return (self.matrix.piece,) if self.bias is None else (self.matrix.piece, self.bias)


@dataclass(frozen=True)
class UnitUse:
    """A scale, a shift, or both, of each unit."""

    scale: Piece | None
    shift: Piece | None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The parameters' entries that are used."""
        return tuple(piece for piece in (self.scale, self.shift) if piece is not None)


Use = LinearUse | UnitUse


@dataclass(eq=False)
class Call:
    """One operation on parameters in a recorded forward pass.

    Attributes:
        use: which parameters, and as what.
        operation: the geometry of the call.
        inputs: what the graph keeps too; None where it is not needed.
        version: the input's version when it was used.
        edge: of the output in the graph.
        below: the graph's nodes of what came in, as far as it has any.
        batch_dim: the dimension of input and output that counts the examples, where the operation
            itself says so; None where the rule does.
        sharing: how rows share the weight, where the operation itself says so.
        handle: of the hook that hears the output's gradient.
    """

    use: Use
    operation: LinearOperation | UnitOperation
    inputs: Tensor | None
    version: int
    edge: GradientEdge | None
    below: tuple[Node, ...]
    batch_dim: int | None = None
    sharing: Sharing | None = None
    handle: RemovableHandle | None = None

    def release(self) -> None:
        """Lets go of the graph and of the input."""
        if self.handle is not None:
            self.handle.remove()
        self.inputs = self.edge = self.handle = None
        self.below = ()


@dataclass(eq=False)
class SeenLoss:
    """A loss of torch's that was computed inside a recording (see `fisher.losses`).

    Attributes:
        function: the name of torch's function.
        arguments: name -> value, as the function was given them.
        output: the loss, a scalar or with one entry for each term.
    """

    function: str
    arguments: dict[str, Any]
    output: Tensor
