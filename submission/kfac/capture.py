"""Hooks that follow one forward pass and the Fisher passes through its graph.

Hooks exist only inside `Recording` (the steps that need factors). A forward hook hands a layer's
input to its collector, so that nothing has to be kept for A, and puts an identity (`Tap`) behind
the layer's output. Would-be gradients are then propagated to the layer *outputs* only: no
gradient of a weight is computed, `.grad` is untouched, DDP's reducer does not fire; the tap hands
each output's gradient to the collector and lets it go.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from .collectors import Collector, ExpandCollector, ReduceCollector, UnitwiseCollector
from .eigenvalue_correction import is_correctable
from .factors import products_in
from .fused import fused_of, roll_up, unroll
from .graph import (
    GraphError,
    Tap,
    earliest,
    gradients,
    is_differentiated,
    leaves_beside,
    reaches_beside,
)
from .parameters import LinearView
from .passes import FisherPass, one_example_at_a_time
from .sharing import (
    Positions,
    Sharing,
    SharingError,
    SharingRule,
    first_examples,
    number_of_examples,
    resolve,
)
from .statistics import (
    DiagonalPart,
    KroneckerPart,
    Part,
    RowPairs,
    Sums,
    UnitwisePart,
    add_squares,
    empty_diagonal_sums,
)
from .tied import TiedCollector


class Recording:
    """One recorded forward pass of a model, and its Fisher passes.

    Use as a context manager around the forward pass, then call `fisher_pass` for every vector of
    would-be gradients, then `end_passes`, then read `sums`.

    Args:
        model: the (unwrapped) model that the parts belong to.
        parts: what to collect.
        sharing: how rows share weights, see `sharing.resolve`.
        ragged_scaling: see `factors.RAGGED_SCALINGS`.
        uses: how often an inverse is applied before it is renewed, to decide whether a factor that
            is a sum over few rows is kept as these rows (0: whenever they are few); None for never.
        keep_rows: also keep all rows (see `row_pairs`), for the eigenvalue correction.
        watched: parts of which only the calls are counted.
        examples_share: this share of the examples, the first, enters the factors of linear layers
            (not norms), where the first dimension counts the examples; see `out_of_memory`.

        called: is told the name of every layer that is called, before its statistics are taken.
        precision: of the products behind the factors, see `factors.PRECISIONS`.

    Attributes:
        sums: part name -> sums.
        out_of_memory: what was being done when memory ran out, in words; None if it did not. The
            sums are of no use then.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Iterable[Part],
        sharing: SharingRule = None,
        ragged_scaling: str = "sqrt",
        uses: int | None = None,
        keep_rows: bool = False,
        watched: Iterable[Part] = (),
        examples_share: float = 1.0,
        called: Callable[[str], None] | None = None,
        precision: str = "float32",
    ) -> None:
        self.sums: dict[str, Sums] = {}
        self.out_of_memory: str | None = None
        self._sharing = sharing
        self._collectors: dict[str, Collector] = {}
        self._diagonals: list[DiagonalPart] = []
        self._modules: list[tuple[KroneckerPart | UnitwisePart, Collector]] = []
        self._edges: list[GradientEdge] = []
        self._handles: list[RemovableHandle] = []
        self._model = model
        self._unrolled: list[tuple[nn.Module, Any]] = []
        self._inside_fused: set[nn.Module] = set()
        self._below: dict[Node, Node | None] = {}
        self._used_elsewhere: set[str] = set()
        self._examples: dict[str, int] = {}
        self._listening = False
        self._heard = False
        self._waits_for_layers = self._is_last_pass = False
        self._examples_share = examples_share
        self._called = called
        self._precision = precision
        self._device_type = next((p.device.type for p in model.parameters()), "cpu")
        self._watched = [p for p in watched if isinstance(p, KroneckerPart | UnitwisePart)]
        self._watched_calls = {part.name: 0 for part in self._watched}
        for part in parts:
            if isinstance(part, DiagonalPart):
                self._diagonals.append(part)
                self.sums[part.name] = empty_diagonal_sums(part)
            else:
                collector = make_collector(part, ragged_scaling, uses, keep_rows)
                self._collectors[part.name] = collector
                self._modules.append((part, collector))
                self.sums[part.name] = collector.sums

    def __enter__(self) -> Recording:
        for part, collector in self._modules:
            for module, own in collector.hooked():
                if not isinstance(module, LinearView):
                    # First of all hooks: others may change the output.
                    self._handles.append(
                        module.register_forward_hook(
                            self._forward_hook(part, own), with_kwargs=True, prepend=True
                        )
                    )
        for part in self._watched:
            for module in hooked_modules(part):
                if not isinstance(module, LinearView):
                    hook = partial(self._count_call, part.name)
                    self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        names = [*self._collectors, *self._watched_calls]
        for name, module in self._model.named_modules():
            fused = fused_of(module)
            prefix = f"{name}." if name else ""
            if (
                fused is not None
                and fused.unsupported(module) is None
                and any(f"{prefix}{which}" in names for which in fused.views(module, prefix))
            ):
                tap = partial(self._tap_fused, prefix)
                unroll(module, tap)
                self._unrolled.append((module, tap))
                self._inside_fused.update(module.children())
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module, tap in self._unrolled:
            roll_up(module, tap)
        self._unrolled.clear()
        if exc_type is None:
            with self._collecting("the statistics of the inputs"):
                for collector in self._collectors.values():
                    collector.end_forward()
        else:
            self.release()

    @property
    def names(self) -> list[str]:
        """Names that a mapping of `sharing` may use: of layers, and of all modules."""
        modules = (name for name, _ in self._model.named_modules())
        return list(dict.fromkeys([*self.calls, *modules]))

    @property
    def calls(self) -> Mapping[str, int]:
        """Part name -> how often its module was called in the forward pass.

        0 where `find_other_uses` has found that its parameters are also used some other way.
        """
        collected = {name: collector.calls for name, collector in self._collectors.items()}
        calls = {**collected, **self._watched_calls}
        return {name: 0 if name in self._used_elsewhere else calls[name] for name in calls}

    @property
    def examples(self) -> Mapping[str, int]:
        """Layer name -> number of examples that its last call had."""
        return self._examples

    def find_other_uses(self, logits: Tensor) -> list[str]:
        """Names of layers whose parameters the logits depend on besides the layers' own calls.

        Such as an embedding's weight that is multiplied with by hand. Their factors would leave
        that use out.
        """
        if logits.grad_fn is None or not self._below:
            return []
        found = leaves_beside(logits.grad_fn, self._below)
        parts = [*(part for part, _ in self._modules), *self._watched]
        self._used_elsewhere = {
            part.name
            for part in parts
            if any(id(piece.parameter) in found for piece in part.slices)
        }
        return sorted(self._used_elsewhere)

    def _count_call(
        self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        if is_differentiated(output):
            self._watched_calls[name] += 1
            self._remember(args[0] if args else next(iter(kwargs.values())), output)

    def _remember(self, x: Any, y: Tensor) -> GradientEdge:
        """Keeps the graph's way around a layer for `find_other_uses`; returns its output's edge."""
        edge = get_gradient_edge(y)
        has_graph = isinstance(x, Tensor) and x.requires_grad
        self._below[edge.node] = get_gradient_edge(x).node if has_graph else None
        return edge

    def replace(self, parts: Iterable[Part]) -> None:
        """Goes on with other parts: drops modules that are not in it, adds its parameters."""
        parts = list(parts)
        kept = {part.name for part in parts if not isinstance(part, DiagonalPart)}
        for name in set(self._collectors) - kept:
            del self._collectors[name], self.sums[name]
        for part in parts:
            if isinstance(part, DiagonalPart) and part.name not in self.sums:
                self._diagonals.append(part)
                self.sums[part.name] = empty_diagonal_sums(part)

    def row_pairs(self) -> dict[str, RowPairs]:
        """Name of a linear layer -> rows of its inputs and would-be gradients, where kept."""
        return {name: c.rows for name, c in self._collectors.items() if c.rows}

    def shared_over(self) -> dict[str, str]:
        """Module name -> how its rows share the weight, in words, of modules that were called."""
        return {
            name: collector.sharing_in_words()
            for name, collector in self._collectors.items()
            if collector.calls
        }

    def _forward_hook(
        self, part: KroneckerPart | UnitwisePart, collector: Collector
    ) -> Callable[..., Tensor | None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            if not is_differentiated(output):
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            called: Any = module
            if isinstance(part, KroneckerPart) and module is not part.embedding:
                called = part.kind.as_called(module, x, output)
            known = self._rule_inside(part.name, x) if module in self._inside_fused else None
            return self._tap(part.name, collector, x, output, called, known)

        return hook

    def _rule_inside(self, name: str, x: Tensor) -> Sharing:
        """The sharing inside an unrolled module, which has brought the examples to the front."""
        sharing = resolve(self._sharing, name, len(x))
        return replace(sharing, batch_dim=0) if isinstance(sharing, Positions) else sharing

    def _tap_fused(
        self,
        prefix: str,
        which: str,
        x: Tensor,
        y: Tensor,
        *,
        mask: Tensor | None = None,
        batch_dim: int = 0,
        position: int | None = None,
    ) -> Tensor:
        """What a fused module's `forward` calls for each of its linear maps."""
        name = prefix + which
        collector = self._collectors.get(name)
        if name in self._watched_calls and is_differentiated(y):
            self._watched_calls[name] += 1
            self._remember(x, y)
        if collector is None or not is_differentiated(y):
            return y
        known: Sharing
        if mask is not None:
            known = Positions(mask=mask)
        else:
            known = self._rule_inside(name, x.movedim(batch_dim, 0))
            if position is not None and isinstance(known, Positions) and known.mask is not None:
                known = Positions(mask=known.mask[:, position : position + 1])
        return self._tap(name, collector, x, y, collector.part.module, known, batch_dim)

    def _tap(
        self,
        name: str,
        collector: Collector,
        x: Tensor,
        y: Tensor,
        module: Any,
        known: Sharing | None = None,
        batch_dim: int = 0,
    ) -> Tensor:
        """Takes the input x of a call and puts a tap behind its output y.

        `module` is as the call saw it; `known` is the sharing where the caller knows it;
        `batch_dim` counts the examples in x and y.
        """
        self._edges.append(self._remember(x, y))
        if self.out_of_memory is not None:
            return y
        if self._called is not None:
            self._called(name)
        x = x.detach().movedim(batch_dim, 0)
        share = self._examples_share if isinstance(collector.part, KroneckerPart) else 1.0
        doing = f"the statistics of layer '{name}' (input {list(x.shape)})"
        with self._collecting(doing):
            try:
                sharing = known or resolve(self._sharing, name, len(x))
                self._examples[name] = number_of_examples(sharing, x)
                sharing, used, scale = first_examples(sharing, len(x), share)
                collector.forward(x[:used], sharing, module)
                collector.output(y)
            except SharingError as error:
                raise SharingError(f"layer '{name}': {error}") from None
        call = collector.calls - 1
        # The graph outlives the recording: it must not keep what the collector holds.
        owner = weakref.ref(collector)

        def callback(g: Tensor) -> None:
            self._heard = True
            collector = owner()
            if not self._listening or collector is None or self.out_of_memory is not None:
                return
            g = g.detach().movedim(batch_dim, 0)
            doing = f"the statistics of layer '{name}' (gradient {list(g.shape)})"
            with self._collecting(doing):
                collector.gradient(call, g if scale == 1 else g[:used] * scale)
                if self._is_last_pass:
                    collector.forget(call)

        tapped: Tensor = Tap.apply(y, callback)  # type: ignore[no-untyped-call]
        return tapped

    @contextmanager
    def _collecting(self, doing: str) -> Iterator[None]:
        """Statistics are taken inside."""
        # Autocast is for the model's passes: a curvature of 8 bits could not be inverted.
        has_autocast = torch.amp.is_autocast_available(self._device_type)
        plain = torch.autocast(self._device_type, enabled=False) if has_autocast else nullcontext()
        with self._memory_watched(doing), products_in(self._precision), torch.no_grad(), plain:
            yield

    @contextmanager
    def _memory_watched(self, doing: str) -> Iterator[None]:
        """When memory runs out inside, lets go of everything that was collected and goes on."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.out_of_memory = doing
            self.sums.clear()
            self._collectors.clear()

    def fisher_pass(self, logits: Tensor, which: FisherPass) -> None:
        """Propagates would-be gradients and adds their statistics.

        The graph is kept, since the ordinary backward pass comes after. Parameters that are in no
        layer come along where the square of their summed gradient is right: in the gradients of
        one example, and on average where those of different examples are independent with mean
        zero. Otherwise they take one pass for each example.

        Args:
            logits: the model's output, attached to the graph.
            which: the would-be gradients.
        """
        come_along = which.zero_mean or which.single
        if self._edges:
            parameters = [part.parameter for part in self._diagonals] if come_along else []
            self._propagate(logits, which, parameters)
        if self.out_of_memory is None and self._diagonals and not (come_along and self._edges):
            for alone in one_example_at_a_time(which.vector, which.example_dim):
                self._square_gradients(logits, alone)

    def is_reached_beside(self, loss: Tensor, logits: Tensor) -> bool:
        """Whether the loss depends on a recorded layer some other way than through the logits."""
        if loss.grad_fn is None or logits.grad_fn is None:
            return False
        nodes = {edge.node for edge in self._edges}
        return reaches_beside(loss.grad_fn, get_gradient_edge(logits), nodes)

    @property
    def has_bare_parameters(self) -> bool:
        """Whether it collects for parameters that are in no layer, from gradients of their own."""
        return bool(self._diagonals)

    def begin_loss_pass(self) -> None:
        """The statistics are to come from the backward pass of the loss, see `loss_pass`."""
        self.end_passes()
        # The graph holds this recording by its taps, and so must not be held by it.
        self._waits_for_layers, self._is_last_pass = bool(self._edges), True
        self._edges.clear()
        self._below.clear()
        self._heard = False

    def listen(self, on: bool) -> None:
        """Whether gradients that pass the taps are those of the loss, and to be collected."""
        self._listening = on

    def end_loss_pass(self, scale: Tensor) -> None:
        """The backward pass of the loss has come: its gradients were `scale` times too large."""
        if self.out_of_memory is not None:
            return
        if self._waits_for_layers:
            self._check_heard()
        with self._collecting("the statistics of the gradients"):
            for collector in self._collectors.values():
                collector.end_pass(single=False)
                collector.rescale_gradients(1 / scale)

    def _check_heard(self) -> None:
        if not self._heard:
            raise GraphError(
                "no recorded layer is in the graph of the logits: they belong to another forward "
                "pass than the last one inside record(), or were computed from detached outputs"
            )

    def _propagate(self, logits: Tensor, which: FisherPass, parameters: list[nn.Parameter]) -> None:
        edges: list[Any] = list(earliest(self._edges))
        grads: Sequence[Tensor | None] = []
        self._listening, self._heard = True, False
        try:
            with self._memory_watched(f"the Fisher pass (outputs {list(logits.shape)})"):
                grads = gradients(logits, [*edges, *parameters], which.vector)
        finally:
            self._listening = False
        if self.out_of_memory is not None:
            return
        self._check_heard()
        with self._collecting("the statistics of the gradients"):
            for collector in self._collectors.values():
                collector.end_pass(which.single)
            if parameters:
                self._add_squares(grads[len(edges) :])

    def end_passes(self) -> None:
        """All Fisher passes are over."""
        with self._collecting("the statistics of the inputs"):
            for collector in self._collectors.values():
                collector.end_passes()

    def _square_gradients(self, logits: Tensor, vector: Tensor) -> None:
        parameters = [part.parameter for part in self._diagonals]
        with self._memory_watched("the squares of parameter gradients"), torch.no_grad():
            self._add_squares(gradients(logits, parameters, vector))

    def _add_squares(self, grads: Sequence[Tensor | None]) -> None:
        for part, grad in zip(self._diagonals, grads, strict=True):
            if grad is not None:
                add_squares(part, self.sums[part.name], grad)

    def release(self) -> None:
        """Lets go of the graph and of all tensors; who needs the sums has taken them."""
        self._edges.clear()
        self._below.clear()
        self._collectors = {}
        self._modules.clear()
        self._diagonals.clear()
        self._watched.clear()
        self.sums = {}


def make_collector(
    part: KroneckerPart | UnitwisePart, ragged_scaling: str, uses: int | None, keep_rows: bool
) -> Collector:
    """A fresh collector for a part."""
    if isinstance(part, UnitwisePart):
        return UnitwiseCollector(part)
    if part.embedding is not None:
        return TiedCollector(part, ragged_scaling)
    if part.approx == "expand":
        return ExpandCollector(part, uses, keep_rows and is_correctable(part))
    return ReduceCollector(part, ragged_scaling, uses, keep_rows and is_correctable(part))


def hooked_modules(part: KroneckerPart | UnitwisePart) -> list[nn.Module]:
    """The modules whose calls count as calls of a part."""
    return [part.module, *getattr(part, "also", ())]
