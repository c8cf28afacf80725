"""Sees the operations on parameters, and the losses, of one forward pass.

A `Recording` is a torch function mode: every torch function that is called inside passes through
it, whoever calls it. What an operation does with parameters is said by its handler (see
`handlers`); everything else runs as it is. A recording computes no statistics and touches no state
but its own: it is a list of calls and losses. Passes through its graph, later, are heard by hooks
on the outputs of the calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from .functions import (  # noqa: F401 - they register their handlers
    attention,
    convolution,
    lookup,
    losses,
    norms,
    recurrent,
)
from .handlers import HANDLERS
from .operation import LinearOperation, UnitOperation
from .pieces import Alias, Piece, Tracker
from .uses import Call, LinearUse, SeenLoss, Use

Listener = Callable[[Call, Tensor], None]


class Recording(TorchFunctionMode):
    """One recorded forward pass.

    Args:
        parameters: name -> trainable parameter.

    Attributes:
        calls: operations on parameters, in their order.
        losses: torch's losses, likewise.
        others: name of a parameter -> the operation in which it was used some other way.
        bias_nodes: nodes of the graph that add a bias to a call's output -> the call's node.
        passed_by: nodes of outputs whose gradient is heard elsewhere -> the nodes of their inputs.
        mixes_examples: whether a BatchNorm used the statistics of the batch.
        is_collected: whether statistics were taken: backward passes from now on need no inputs.
        wholes: name of a parameter that is in parts -> the whole one that was used.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.losses: list[SeenLoss] = []
        self.others: dict[str, str] = {}
        self.bias_nodes: dict[Node, Node] = {}
        self.passed_by: dict[Node, tuple[Node, ...]] = {}
        self.mixes_examples = self.is_collected = False
        self.wholes: dict[str, Tensor] = {}
        self._tracker = Tracker(parameters)
        # Outputs to which a bias may be added; they are not kept for it.
        self._bare: dict[int, tuple[weakref.ref[Tensor], Call]] = {}
        self._log_probabilities: dict[int, tuple[Tensor, Tensor, int]] = {}
        self._listener: Listener | None = None

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        # What is needed only while operations are seen.
        self._tracker = Tracker({})
        self._bare.clear()
        self._log_probabilities.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None and torch.is_grad_enabled():
            output = handler(self, func, *args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if args and not self._tracker.follow(func, args, kwargs, output):
            self._note_others(func, args, kwargs, output)
        return output

    def see_whole(self, name: str, tensor: Tensor) -> None:
        """A parameter that is in parts is this tensor, as long as its module runs."""
        if self._tracker.is_tracked(name):
            self.wholes[name] = tensor
            self._tracker.add(name, tensor)

    # ---- for compiled modules -----------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no operations are seen."""
        with _pop_mode_temporarily():
            yield

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Inside `paused`, operations are seen again."""
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def seen(self) -> tuple[int, ...]:
        """How much was seen so far, beside calls: losses, log-probabilities and other uses."""
        return len(self.losses), len(self._log_probabilities), len(self.others)

    def forget_from(self, number: int) -> None:
        """Forgets all calls but the first ones."""
        for call in self.calls[number:]:
            call.release()
        del self.calls[number:]

    # ---- what handlers use --------------------------------------------------------------------

    def alias(self, tensor: Any) -> Alias | None:
        """The piece of a parameter that a tensor is, or None."""
        return self._tracker.alias(tensor)

    def piece(self, tensor: Any) -> Piece | None:
        """As `alias`, as a piece."""
        found = self.alias(tensor)
        return None if found is None else found.piece

    def apply(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a torch function as if the model had: for handlers that take operations apart."""
        return self.__torch_function__(func, (), args, kwargs)

    def call(
        self,
        use: Use,
        operation: LinearOperation | UnitOperation,
        x: Tensor | None,
        compute: Callable[[Any], Tensor],
        **known: Any,
    ) -> Tensor:
        """Computes an operation on parameters and records the call.

        Args:
            x: the input, as `compute` takes it; None where gradients alone matter.
            known: fields of `Call`.
        """
        if isinstance(x, Tensor) and x.layout != torch.strided:
            self.note(use, f"an operation on inputs of layout {x.layout}")
            return compute(x)
        y = compute(x)
        if y.requires_grad:
            y = _no_view(y)
            self.add(use, operation, x, y, **known)
        return y

    def add(
        self,
        use: Use,
        operation: LinearOperation | UnitOperation,
        x: Tensor | None,
        y: Tensor,
        **known: Any,
    ) -> Call:
        """Records a call that was computed from x to y."""
        call = Call(
            use,
            operation,
            None if x is None else x.detach(),
            0 if x is None else x._version,
            get_gradient_edge(y),
            **{"below": self.nodes_below(x), **known},
        )
        recording, number = weakref.ref(self), len(self.calls)

        def hear(g: Tensor | None) -> None:
            owner = recording()  # the graph must not keep the recording
            if owner is None or g is None:
                return
            if owner._listener is not None:
                owner._listener(owner.calls[number], g.detach())
            elif owner.is_collected:
                owner.calls[number].inputs = None  # the loss's pass: the graph lets go of it too

        call.handle = y.register_hook(hear)  # type: ignore[no-untyped-call]
        self.calls.append(call)
        if isinstance(use, LinearUse) and use.bias is None:
            self._bare[id(y)] = (weakref.ref(y), call)
        return call

    def pass_by(self, y: Tensor, *entering: Any) -> None:
        """The gradient of y, which parameters have made, is heard by a call of another output."""
        node = node_of(y)
        if node is not None:
            self.passed_by[node] = self.nodes_below(*entering)

    def join_bias(self, call: Call, bias: Tensor, y: Tensor) -> None:
        """A bias was added to the output of a call, which made y."""
        assert isinstance(call.use, LinearUse)
        call.use = replace(call.use, bias=self.piece(bias))
        node = node_of(y)
        if node is not None and call.edge is not None:
            self.bias_nodes[node] = call.edge.node

    def separate_bias(self, output: Node) -> list[Piece]:
        """Takes the biases that were joined to the call of an output away from it again."""
        separated = []
        for call in self.calls:
            use = call.use
            if isinstance(use, LinearUse) and use.bias and call.edge and call.edge.node is output:
                separated.append(use.bias)
                call.use = replace(use, bias=None)
        return separated

    def nodes_below(self, *entering: Any) -> tuple[Node, ...]:
        """Nodes of the graph that tensors come from which enter an operation.

        Those of pieces of parameters are left out: their uses are known.
        """
        tensors = (t for t in entering if isinstance(t, Tensor) and self.alias(t) is None)
        return tuple(node for node in map(node_of, tensors) if node is not None)

    def bare_call(self, y: Any) -> Call | None:
        """The call of a linear map without bias whose output a tensor is."""
        found = self._bare.get(id(y))
        return found[1] if found is not None and found[0]() is y else None

    def note(self, use: Use, how: str) -> None:
        """Parameters are used in a way that is not a recorded operation."""
        for piece in use.pieces:
            self.others.setdefault(piece.parameter, how)

    def _note_others(self, func: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, Tensor) or not first.requires_grad:
            return
        for arg in (*args, *kwargs.values()):
            for tensor in arg if isinstance(arg, tuple | list) else (arg,):
                found = self.alias(tensor)
                if found is not None:
                    name = getattr(func, "__name__", str(func)).strip("_")
                    how = " otherwise than as a linear map or unit by unit" * (func in HANDLERS)
                    self.others.setdefault(found.name, f"torch's `{name}`{how}")

    # ---- losses -------------------------------------------------------------------------------

    def see_loss(self, function: str, arguments: dict[str, Any], output: Tensor) -> None:
        """Records a loss, if it is one that is differentiated."""
        if output.requires_grad:
            source = self._log_probabilities.get(id(arguments.get("input")))
            if function == "nll_loss":
                dim = 1 if arguments["input"].dim() > 1 else 0
                if source is None or source[2] != dim:
                    return
                function, arguments = "cross_entropy", {**arguments, "input": source[1]}
            self.losses.append(SeenLoss(function, arguments, output))

    def see_log_probabilities(self, output: Tensor, logits: Tensor, dim: int) -> None:
        """Remembers whose log-probabilities a tensor is."""
        self._log_probabilities[id(output)] = (output, logits, dim % logits.dim())

    # ---- afterwards ---------------------------------------------------------------------------

    @contextmanager
    def heard_by(self, listener: Listener) -> Any:
        """Inside, gradients of the calls' outputs are shown to a listener."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None

    def listen(self, listener: Listener | None) -> None:
        """As `heard_by`, until it is called again."""
        self._listener = listener

    def release(self) -> None:
        """Lets go of the graph and of all tensors."""
        self.forget_from(0)
        self.bias_nodes.clear()
        self.passed_by.clear()
        self.losses.clear()
        self.wholes.clear()
        self._listener = None


def node_of(tensor: Tensor | None) -> Node | None:
    """The node of the graph that a tensor comes from, if there is one."""
    has_graph = tensor is not None and tensor.requires_grad
    return get_gradient_edge(tensor).node if has_graph and tensor is not None else None


def _no_view(y: Tensor) -> Tensor:
    """The output, in the same memory, but no view: what is done in place to a view takes the place
    of the node that the call's hook is on."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y
