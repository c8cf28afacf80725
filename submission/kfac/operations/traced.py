"""Compiled modules with the statistics of K-FAC-reduce inside their graph.

The first recorded pass of a compiled module runs its graph uncompiled, node by node, while the
recording sees the operations: so it is known which node is which call. Then the graph is given, for
each call whose statistics are wanted,

- an output, Σ_r a: the sum of its input over the positions of each example,
- an input without a value, the *probe*, whose gradient is Σ_r g: the sum of the output's gradient,

and the user's own backend compiles it. From then on a step with statistics is a compiled step: no
hooks between operations, and nothing but sums leaves the graph. They stand in the recording as
calls like others, whose rows were added up before.

A graph that this cannot be done for is refused, see `compiled`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._functorch import config as functorch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .operation import LinearOperation
from .record import Recording
from .sharing import Positions, Sharing
from .uses import Call, Use

DONATIONS = "collect_bw_donated_buffer_idxs"  # torch's, which finds the buffers to give away
MOST_SIZES = 8  # of the inputs of one graph that are compiled for; others run uncompiled


class RefusalError(Exception):
    """The statistics of a graph cannot be had inside it; the message says why."""


@dataclass(frozen=True)
class Summed(LinearOperation):
    """A call whose rows were added up in a compiled graph: [N, groups, side] of input and gradient.

    Attributes:
        shape: see `LinearOperation`.
        positions: R, of each example.
    """

    shape: tuple[int, int, int]
    positions: int

    def leading(self, x: Tensor, sharing: Sharing) -> torch.Size:
        return torch.Size([len(x), self.positions])

    def summed_inputs(self, x: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).movedim(1, 0)

    def summed_gradients(self, g: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        return g.to(dtype).movedim(1, 0)

    def add_second_moment(self, *_: Any) -> None:
        raise RefusalError("the rows of a compiled call are sums")

    def input_rows(self, *_: Any) -> Tensor:
        raise RefusalError("the rows of a compiled call are sums")

    def gradient_rows(self, *_: Any) -> Tensor:
        raise RefusalError("the rows of a compiled call are sums")


# ---- nodes of the graph -------------------------------------------------------------------------


class _SumInputs(nn.Module):
    """Σ_r a, [N, groups, P_in]."""

    def __init__(self, call: _Traced, dtype: torch.dtype) -> None:
        super().__init__()
        self._call, self._dtype = call, dtype

    def forward(self, x: Tensor) -> Tensor:
        rows = self._call.in_front(x.detach())
        total = self._call.operation.summed_inputs(rows, Positions(), self._dtype)
        result: Tensor = total.movedim(0, 1).contiguous()
        return result


class _Probed(torch.autograd.Function):
    """The output as it is; the probe's gradient is Σ_r g, [N, groups, P_out]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, probe: Tensor, call: _Traced) -> Tensor:
        ctx.call, ctx.dtype = call, probe.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        rows = ctx.call.in_front(g)
        total = ctx.call.operation.summed_gradients(rows, Positions(), ctx.dtype)
        return g, total.movedim(0, 1).contiguous(), None


class _Probe(nn.Module):
    def __init__(self, call: _Traced) -> None:
        super().__init__()
        self._call = call

    def forward(self, y: Tensor, probe: Tensor) -> Tensor:
        found: Tensor = _Probed.apply(y, probe, self._call)  # type: ignore[no-untyped-call]
        return found


@dataclass(eq=False)
class _Traced:
    """A call, and where in the graph it is.

    Attributes:
        call: as it was recorded; nothing but its use and geometry after its pass.
        source, node: the nodes of its input and its output.
        inputs, outputs: their shapes.
    """

    call: Call
    source: fx.Node | None
    node: fx.Node
    inputs: torch.Size
    outputs: torch.Size

    @property
    def use(self) -> Use:
        """Which parameters."""
        return self.call.use

    @property
    def operation(self) -> Any:
        """The geometry."""
        return self.call.operation

    def in_front(self, tensor: Tensor) -> Tensor:
        """Input or gradient with the examples in front."""
        dim = self.call.batch_dim
        return tensor if dim is None else tensor.movedim(dim, 0)


class _Watched(fx.Interpreter):
    """Runs a graph node by node under a recording, and notes which node makes which call."""

    def __init__(self, module: fx.GraphModule, recording: Recording) -> None:
        super().__init__(module)
        self._recording = recording
        self.found: list[_Traced] = []
        self.problem = ""

    def run_node(self, n: fx.Node) -> Any:
        """As the base class; inputs of a node are looked at before it can write into them."""
        before = len(self._recording.calls)
        entering = [(node, self.env.get(node)) for node in n.all_input_nodes]
        output = super().run_node(n)
        for call in self._recording.calls[before:]:
            self._note(call, n, entering, output)
        return output

    def _note(self, call: Call, node: fx.Node, entering: Any, output: Any) -> None:
        made = isinstance(output, Tensor) and output.requires_grad
        if not made or get_gradient_edge(output) != call.edge:
            self.problem = f"'{node.name}' is several operations"
            return
        source = None
        x = call.inputs
        if x is not None:
            for candidate, value in entering:
                same = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
                if same and _is_same(value, x):
                    source = candidate
            if source is None:
                self.problem = f"the input of '{node.name}' is no value of the graph"
        inputs = torch.Size() if x is None else x.shape
        self.found.append(_Traced(call, source, node, inputs, output.shape))


def _is_same(one: Tensor, other: Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.stride(), one.dtype) == (
        other.data_ptr(), other.shape, other.stride(), other.dtype,
    )  # fmt: skip


# ---- one graph ----------------------------------------------------------------------------------


class Owner(Protocol):
    """What a graph asks of `compiled.CompiledModules`, where it is described."""

    recording: Any
    may_compile: bool
    structure_key: Any
    compiled: int

    @property
    def is_wanted(self) -> Callable[[Use], bool]: ...
    @property
    def dtype_of(self) -> Callable[[Use], torch.dtype]: ...
    def refuse_later(self, problem: str) -> None: ...


@dataclass(eq=False)
class _Compiled:
    """A graph with statistics, compiled for some sizes of its inputs.

    Attributes:
        calls: of the statistics, in the order of the probes.
        probes: shape and dtype of each probe.
        mixes_examples: see `Recording`.
        outputs: number of the graph's own outputs, which come first.
        run: takes the graph's inputs and the probes.
    """

    calls: list[tuple[Use, Summed]]
    probes: list[tuple[torch.Size, torch.dtype]]
    mixes_examples: bool
    outputs: int = 0
    run: Callable[..., Sequence[Any]] = lambda *_: ()

    def add(self, found: _Traced, dtype: torch.dtype) -> None:
        """A call whose statistics are part of the graph."""
        inputs, outputs = (found.in_front(torch.empty(size, device="meta"))
                           for size in (found.inputs, found.outputs))  # fmt: skip
        positions = found.operation.leading(inputs, Positions())[1:].numel()
        operation = Summed(found.operation.shape, positions)
        groups, side, _ = operation.shape
        self.calls.append((found.use, operation))
        self.probes.append((torch.Size([len(outputs), groups, side]), dtype))


class TracedGraph:
    """A graph that Dynamo has made of a module: what a backend returns for it.

    Args:
        owner: whose pass it is, and what is wanted.
        module: the graph.
        backend: compiles the graph with statistics.
    """

    def __init__(self, owner: Owner, module: fx.GraphModule, backend: Any) -> None:
        self._owner, self._module, self._backend = owner, module, backend
        self._watched: dict[Any, tuple[_Watched, Recording]] = {}
        self._compiled: dict[Any, _Compiled] = {}

    def __call__(self, *arguments: Any) -> Any:
        owner = self._owner
        key = (owner.structure_key, *(_size(argument) for argument in arguments))
        # Calls of the pass that goes on are not over.
        is_over = key in self._watched and self._watched[key][1] is not owner.recording
        if key not in self._compiled and is_over and owner.may_compile:
            self._compiled[key] = self._compile(*self._watched.pop(key), arguments)
        if key in self._compiled and owner.may_compile:
            return self._run(self._compiled[key], arguments)
        if key not in self._watched and len(self._compiled) + len(self._watched) >= MOST_SIZES:
            raise RefusalError(f"its inputs have more than {MOST_SIZES} sizes")
        return self._watch(key, arguments)

    def _watch(self, key: Any, arguments: Sequence[Any]) -> Any:
        recording = self._owner.recording
        before = recording.seen()
        watched = _Watched(self._module, recording)
        with recording.resumed():
            outputs = watched.run(*arguments)
        if recording.seen() != before:
            watched.problem = "a loss, or a use of a parameter that is no operation, is inside it"
        self._watched[key] = watched, recording
        if watched.problem:
            self._owner.refuse_later(watched.problem)
        return outputs

    def _compile(
        self, watched: _Watched, recording: Recording, arguments: Sequence[Any]
    ) -> _Compiled:
        wanted = [found for found in watched.found if self._owner.is_wanted(found.use)]
        if any(found.call.sharing is not None for found in wanted):
            raise RefusalError("an operation's first dimension does not count the examples")
        if any(getattr(found.call.operation, "padding_idx", None) is not None for found in wanted):
            raise RefusalError("an embedding leaves out the rows of its padding_idx")
        made = _Compiled([], [], recording.mixes_examples)
        module = self._with_statistics(wanted, made)
        for found in watched.found:
            found.call.release()
        # Tables of convolutions are constants in the graph.
        fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        given = [
            fake.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value
            for value in (*arguments, *_probes(made, arguments))
        ]
        with _without_donations():
            made.run = self._backend(module, given)
        self._owner.compiled += 1
        return made

    def _with_statistics(self, wanted: Sequence[_Traced], made: _Compiled) -> fx.GraphModule:
        """The graph with outputs Σ a and probes; `made` is told what they are."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        module = fx.GraphModule(self._module, graph)
        *nodes, end = self._module.graph.nodes
        for node in nodes:
            if node.op == "placeholder":
                copies[node] = graph.node_copy(node)
        probes = [graph.placeholder(f"probe_{number}") for number in range(len(wanted))]
        number_of = {found.node: number for number, found in enumerate(wanted)}
        sums: dict[int, fx.Node] = {}
        for node in nodes:
            if node.op == "placeholder":
                continue
            copies[node] = graph.node_copy(node, copies.__getitem__)
            number = number_of.get(node)
            if number is None:
                continue
            found = wanted[number]
            assert found.source is not None
            dtype = self._owner.dtype_of(found.use)
            module.add_submodule(f"sum_{number}", _SumInputs(found, dtype))
            module.add_submodule(f"probed_{number}", _Probe(found))
            sums[number] = graph.call_module(f"sum_{number}", (copies[found.source],))
            copies[node] = graph.call_module(f"probed_{number}", (copies[node], probes[number]))
        for found in wanted:
            made.add(found, self._owner.dtype_of(found.use))
        outputs = fx.map_arg(end.args[0], copies.__getitem__)
        own = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        made.outputs = len(own)
        graph.output((*own, *(sums[number] for number in range(len(wanted)))))
        graph.lint()
        module.recompile()
        return module

    def _run(self, made: _Compiled, arguments: Sequence[Any]) -> Any:
        recording = self._owner.recording
        probes = _probes(made, arguments)
        outputs = made.run(*arguments, *probes)
        recording.mixes_examples |= made.mixes_examples
        sums = outputs[made.outputs :]
        for (use, operation), x, probe in zip(made.calls, sums, probes, strict=True):
            recording.add(use, operation, x, probe, batch_dim=0, below=())
        return outputs[: made.outputs]


def _without_donations() -> Any:
    """Inside, backward passes are compiled that may come through their graph twice.

    The setting `donated_buffer=False` would do it if it were the same when they run: torch leaves
    the list of buffers None then, and what runs takes None for a list that is not empty.
    """
    for name in ("graph_compile", "jit_compile_runtime_wrappers"):
        module = sys.modules.get(f"torch._functorch._aot_autograd.{name}")
        if hasattr(module, DONATIONS):
            return mock.patch.object(module, DONATIONS, return_value=[])
    return functorch.patch(donated_buffer=False)


def _probes(made: _Compiled, arguments: Sequence[Any]) -> list[Tensor]:
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    return [
        torch.zeros((), dtype=dtype, device=device).expand(shape).requires_grad_()
        for shape, dtype in made.probes
    ]


def _size(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return (argument.shape, argument.dtype, argument.requires_grad)
    return argument
