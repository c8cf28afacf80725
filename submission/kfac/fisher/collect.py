"""From one recorded pass to sums: propagates would-be gradients and hands them to collectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.block import Block, Collecting, Collector, HeardCall, Sums
from ..blocks.structure import Structure
from ..linalg.precision import own_products
from ..operations.operation import LinearOperation
from ..operations.record import Recording
from ..operations.sharing import (
    Positions,
    Sharing,
    SharingError,
    SharingRule,
    first_examples,
    number_of_examples,
    resolve,
)
from ..operations.uses import Call
from .graph import NOT_REACHED, GraphError, earliest, gradients
from .passes import FisherPass, one_example_at_a_time


class Collection:
    """The statistics of one recorded pass.

    Args:
        recording: of the forward pass.
        structure: the blocks, and which use belongs to which.
        observed: names of the blocks whose statistics are wanted.
        parameters: name -> trainable parameter.
        collecting: how.
        sharing: how rows share parameters, see `sharing.resolve`.
        examples_share: this share of the examples, the first, enters the factors of linear maps.
        precision: of products, see `linalg.precision.PRECISIONS`.

    Attributes:
        structure: as given.
        out_of_memory: what was being done when memory ran out, in words; None if it did not. The
            sums are of no use then.
        examples: name of a block -> number of examples that its last call had.
        reached: number of a loss -> the calls that its gradients came to: (block, number).
    """

    def __init__(
        self,
        recording: Recording,
        structure: Structure,
        observed: Sequence[str],
        parameters: Mapping[str, nn.Parameter],
        collecting: Collecting,
        *,
        sharing: SharingRule,
        examples_share: float = 1.0,
        precision: str = "float32",
    ) -> None:
        self._recording, self.structure = recording, structure
        self._parameters = parameters
        self._collecting = collecting
        self._sharing, self._share, self._precision = sharing, examples_share, precision
        self._blocks = {block.name: block for block in structure.blocks if block.name in observed}
        self._collectors: dict[str, Collector] = {}
        self._heard: dict[int, HeardCall] = {}
        self._loss = 0
        self._any_heard = False
        self._is_last_pass = False
        self._waiting: list[tuple[str, Call, HeardCall]] = []  # whose inputs are to be taken
        self.out_of_memory: str | None = None
        self.examples: dict[str, int] = {}
        self.reached: dict[int, set[tuple[str, int]]] = {}
        self._diagonals = [b for b in self._blocks.values() if b.needs_own_gradients]
        for block in self._diagonals:
            self._collectors[block.name] = self._collector(block)
        self._device_type = collecting.like.device.type

    def _collector(self, block: Block) -> Collector:
        parameter = self._parameters[block.pieces[0].parameter]
        return block.collector(self._collecting.for_parameter(parameter))

    @property
    def names(self) -> list[str]:
        """Of the blocks whose statistics are wanted, in their order."""
        return list(self._blocks)

    @property
    def has_diagonals(self) -> bool:
        """Whether there are parameters of which gradients of their own are needed."""
        return bool(self._diagonals)

    @property
    def calls(self) -> list[Call]:
        """The calls that belong to blocks."""
        roles = self.structure.roles
        return [c for c in self._recording.calls if self._is_wanted(roles.get(c.use))]

    def _is_wanted(self, role: Any) -> bool:
        return role is not None and role.block in self._blocks

    def numbers_of_examples(self) -> dict[str, int]:
        """Name of a block -> number of examples of its last call, before any gradient has come."""
        found = {}
        for call in self.calls:
            role = self.structure.roles[call.use]
            if call.inputs is not None and self._blocks[role.block].has_factors:
                x = _input_of(call)
                assert x is not None
                sharing = self._resolved(call, role.block, x)
                found[role.block] = number_of_examples(sharing, x)
                folded = getattr(call.operation, "folded", None)
                if folded is not None and isinstance(sharing, Positions):
                    found[role.block] = folded[0]
        return found

    # ---- hearing ------------------------------------------------------------------------------

    def _resolved(self, call: Call, name: str, x: Tensor) -> Sharing:
        if call.sharing is not None:
            return call.sharing
        sharing = resolve(self._sharing, name, len(x))
        if call.batch_dim is not None and isinstance(sharing, Positions):
            sharing = Positions(mask=sharing.mask)
        if isinstance(sharing, Positions) and sharing.mask is not None and len(x) == 1:
            # Broadcast over the examples: a position counts if any of them has it.
            sharing = replace(sharing, mask=sharing.mask.any(0, keepdim=True))
        operation = call.operation
        if isinstance(operation, LinearOperation) and isinstance(sharing, Positions):
            exist = operation.existing_rows(x, sharing)
            if exist is not None:
                mask = exist if sharing.mask is None else exist & sharing.mask.bool()
                sharing = replace(sharing, mask=mask)
        return sharing

    def hear(self, call: Call, g: Tensor) -> None:
        """Takes the gradient of a call's output."""
        role = self.structure.roles.get(call.use)
        if role is None or role.block not in self._blocks:
            return
        self._any_heard = True
        self.reached.setdefault(self._loss, set()).add((role.block, id(call)))
        if self.out_of_memory is not None:
            return
        doing = f"the statistics of layer '{role.block}' (gradient {list(g.shape)})"
        with self._collecting_in(doing), _named(role.block):
            self._take(call, role.block, role.transposed, g)

    def _take(self, call: Call, name: str, transposed: bool, g: Tensor) -> None:
        block = self._blocks[name]
        if name not in self._collectors:
            self._collectors[name] = self._collector(block)
        collector = self._collectors[name]
        collector.loss = self._loss
        if call.batch_dim is not None:
            g = g.movedim(call.batch_dim, 0)
        first = id(call) not in self._heard
        if first:
            self._heard[id(call)] = self._first_heard(call, name, transposed, g)
        heard = self._heard[id(call)]
        if call.inputs is not None and call.inputs._version != call.version:
            raise GraphError(
                f"the input of layer '{name}' was written into between its call and the pass that "
                "its statistics come from: its factor cannot be had"
            )
        # Inputs are shown and not kept: the graph lets go of them in the loss's own pass.
        heard.x = _input_of(call, heard.used)
        may_wait = collector.takes_inputs_late and not self._is_last_pass
        if first and may_wait and not self._collecting.keeps_rows:
            self._waiting.append((name, call, heard))
        elif first:
            collector.input(heard)
        collector.gradient(heard, g if heard.scale == 1 else g[: heard.used] * heard.scale)
        heard.x = None
        if self._is_last_pass:
            call.inputs = None

    def _first_heard(self, call: Call, name: str, transposed: bool, g: Tensor) -> HeardCall:
        x = _input_of(call)
        counted = g if x is None else x
        sharing = self._resolved(call, name, counted)
        self.examples[name] = number_of_examples(sharing, counted)
        scale, used = 1.0, len(counted)
        if self._blocks[name].has_factors and x is not None:
            sharing, used, scale = first_examples(sharing, len(x), self._share)
        return HeardCall(call.operation, None, sharing, transposed, used, scale)

    @contextmanager
    def _collecting_in(self, doing: str) -> Iterator[None]:
        """Statistics are taken inside."""
        own = own_products(self._precision, self._device_type)
        with self._memory_watched(doing), torch.no_grad(), own:
            yield

    @contextmanager
    def _memory_watched(self, doing: str) -> Iterator[None]:
        """When memory runs out inside, lets go of everything that was collected and goes on."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.out_of_memory = doing
            self._collectors.clear()

    # ---- passes -------------------------------------------------------------------------------

    def fisher_pass(self, logits: Tensor, which: FisherPass, loss: int = 0) -> None:
        """Propagates would-be gradients and adds their statistics.

        The graph is kept, since the ordinary backward pass comes after. Parameters of which
        gradients of their own are needed come along where the square of their summed gradient is
        right: in the gradients of one example, and on average where those of different examples are
        independent with mean zero. Otherwise they take one pass for each example.

        Args:
            logits: the model's output, attached to the graph.
            which: the would-be gradients.
            loss: the number of the loss.
        """
        self._loss = loss
        come_along = which.zero_mean or which.single
        edges = [call.edge for call in self.calls]
        if edges:
            self._propagate(logits, which, edges, self._diagonals if come_along else [])
        if self.out_of_memory is None and self._diagonals and not (come_along and edges):
            for alone in one_example_at_a_time(which.vector, which.example_dim):
                with self._memory_watched("the squares of parameter gradients"), torch.no_grad():
                    self._add_squares(self._diagonals, gradients(logits, self._own(), alone))

    def _own(self) -> list[Any]:
        names = (block.pieces[0].parameter for block in self._diagonals)
        return [self._recording.wholes.get(name, self._parameters[name]) for name in names]

    def _propagate(
        self, logits: Tensor, which: FisherPass, edges: list[Any], diagonals: list[Block]
    ) -> None:
        ends = earliest(edges)
        own = self._own() if diagonals else []
        grads: Sequence[Tensor | None] = []
        with (
            self._memory_watched(f"the Fisher pass (outputs {list(logits.shape)})"),
            self._recording.heard_by(self.hear),
        ):
            grads = gradients(logits, [*ends, *own], which.vector)
        if self.out_of_memory is not None:
            return
        self.check_heard()
        with self._collecting_in("the statistics of the inputs"):
            # The peak of memory is in the pass: until now A is represented by the inputs, which the
            # graph keeps for the loss's own pass anyway.
            waiting, self._waiting = self._waiting, []
            for name, call, heard in waiting:
                with _named(name):
                    heard.x = _input_of(call, heard.used)
                    self._collectors[name].input(heard)
                    heard.x = None
        with self._collecting_in("the statistics of the gradients"):
            for collector in self._collectors.values():
                collector.end_pass(which.single)
            self._add_squares(diagonals, grads[len(ends) :])

    def _add_squares(self, blocks: Sequence[Block], grads: Sequence[Tensor | None]) -> None:
        for block, grad in zip(blocks, grads, strict=True):
            if grad is not None:
                collector: Any = self._collectors[block.name]
                collector.loss = self._loss
                collector.add_gradient(grad)

    def check_heard(self) -> None:
        """Raises a GraphError where no gradient has come to any call."""
        if not self._any_heard:
            raise GraphError(NOT_REACHED)

    # ---- the pass of the loss -------------------------------------------------------------------

    def begin_loss_pass(self) -> None:
        """The statistics are to come from the backward pass of the loss, see `loss_pass`."""
        self._is_last_pass, self._any_heard = True, False

    def listen(self, on: bool) -> None:
        """Whether gradients that come are those of the loss, and to be collected."""
        self._recording.listen(self.hear if on else None)

    def end_loss_pass(self, scale: Tensor) -> None:
        """The backward pass of the loss has come: its gradients were `scale` times too large."""
        if self.out_of_memory is not None:
            return
        if self._recording.calls:
            self.check_heard()
        with self._collecting_in("the statistics of the gradients"):
            for collector in self._collectors.values():
                collector.end_pass(single=False)
                collector.sums.rescale(1 / scale)

    # ---- results --------------------------------------------------------------------------------

    def finish(self) -> dict[str, Sums]:
        """Name of a block -> its sums, of blocks that were reached; lets go of the graph."""
        with self._collecting_in("the statistics of the inputs"):
            for collector in self._collectors.values():
                collector.end()
        found = {name: c.sums for name, c in self._collectors.items() if c.is_reached}
        self.release()
        return found

    def words(self) -> dict[str, str]:
        """Name of a block -> over what its rows were shared."""
        return {name: collector.words() for name, collector in self._collectors.items()}

    def release(self) -> None:
        """Lets go of the graph and of all tensors."""
        self._recording.release()
        self._heard.clear()
        self._waiting.clear()


def _input_of(call: Call, used: int | None = None) -> Tensor | None:
    """The input of a call with its first `used` examples (None for all), these in front."""
    x = call.inputs
    if x is None:
        return None
    return (x if call.batch_dim is None else x.movedim(call.batch_dim, 0))[:used]


@contextmanager
def _named(block: str) -> Iterator[None]:
    """Says of which block an error in the sharing of rows is."""
    try:
        yield
    except SharingError as error:
        raise SharingError(f"layer '{block}': {error}") from None
