"""How much arithmetic a step needs at the least: matrix products, by the best known algorithms.

Counted are the matrix products of forward and backward pass, of a Fisher backward pass to the
layers' outputs (no weight gradients), of the Kronecker factors, and of solving with them once.
Element-wise work, memory traffic and parameters outside K-FAC layers are left out, so a real step
takes longer; a step without K-FAC does, too.

- A sum of n outer products of rows of width d: n d² (symmetric: half of the 2 n d²).
- K-FAC-expand's A of a convolution: an entry is a sum of x[s·o + δ₁] x[s·o + δ₂]ᵀ over output
  positions o, which depends (up to borders) on δ₂ - δ₁ and on δ₁ modulo the stride s only: so many
  C×C products are enough. For a 3×3 kernel of stride 1 these are 25 instead of 81, 13 up to
  transposition. With stride 1 all of them also come from the Fourier transforms, half as many
  frequencies as positions, with three real products each: as much as 1.5 (see `correlations`).
- K-FAC-reduce: sums over positions first; then N rows an example each.
- A d×d factor of N < d rows need not be formed (Woodbury): N² d for the Gram matrix, N³/3, N² d to
  solve, 4 N d k to apply to k columns. Otherwise d³/3 for Cholesky and 2 d² k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import Case

TRANSFORM = 1.5  # products of positions that those of frequencies are worth


@dataclass(frozen=True)
class Layer:
    """One call of a linear layer.

    Attributes:
        examples, positions: rows of the input are examples · positions.
        inputs, outputs: sides of the weight matrix; a bias adds a column of ones to the inputs.
        bias: whether there is one.
        input_has_gradient: whether a backward pass goes on below.
        shift_classes: number of C×C products that a convolution's A takes as much as (half of the
            ordered ones, or the transform's), None for others.
        channels: C.
    """

    examples: int
    positions: int
    inputs: int
    outputs: int
    bias: bool
    input_has_gradient: bool
    shift_classes: float | None = None
    channels: int = 0

    @property
    def rows(self) -> int:
        """Rows of the input matrix."""
        return self.examples * self.positions

    @property
    def product(self) -> float:
        """Operations of inputs times weights."""
        return 2.0 * self.rows * self.inputs * self.outputs

    @property
    def in_side(self) -> int:
        """Side of A."""
        return self.inputs + int(self.bias)


@dataclass(frozen=True)
class Work:
    """Floating-point operations by purpose."""

    forward: float
    backward: float
    fisher: float
    factors: float
    solve: float

    @property
    def sgd(self) -> float:
        """Forward and backward pass."""
        return self.forward + self.backward

    @property
    def step(self) -> float:
        """One step with K-FAC."""
        return self.sgd + self.fisher + self.factors + self.solve

    @property
    def factors_only(self) -> float:
        """Forward pass, Fisher pass and factors."""
        return self.forward + self.fisher + self.factors


def count_work(case: Case, approx: str) -> Work:
    """Counts one step of the case.

    The case's model is run forward once.
    """
    layers, forward = _trace(case)
    linear = sum(layer.product for layer in layers)
    other = forward - linear  # attention: products of two activations
    to_outputs = sum(layer.product for layer in layers if layer.input_has_gradient) + 2 * other
    factors = solve = 0.0
    for layer in layers:
        for side, rows, form in _sides(layer, approx):
            formed, solved = _cheapest(layer, side, rows, form)
            factors += formed
            solve += solved
    return Work(forward, to_outputs + linear, to_outputs, factors, solve)


def _sides(layer: Layer, approx: str) -> Iterator[tuple[int, int, float]]:
    """For A, then B: (side, number of rows, operations to form it)."""
    rows = layer.rows if approx == "expand" else layer.examples
    a = float(rows) * layer.in_side**2
    if approx == "expand" and layer.shift_classes is not None:
        a = min(a, 2.0 * rows * layer.shift_classes * layer.channels**2)
    yield layer.in_side, rows, a
    yield layer.outputs, rows, float(rows) * layer.outputs**2


def _cheapest(layer: Layer, side: int, rows: int, form: float) -> tuple[float, float]:
    """(operations to form a factor, operations to apply its inverse once)."""
    columns = layer.in_side + layer.outputs - side
    dense = form, side**3 / 3 + 2.0 * side**2 * columns
    if rows >= side:
        return dense
    low = 0.0, 2.0 * rows**2 * side + rows**3 / 3 + 4.0 * rows * side * columns
    return min(dense, low, key=sum)


def _trace(case: Case) -> tuple[list[Layer], float]:
    """Calls of linear layers in one forward pass, and the operations of that pass."""
    layers: list[Layer] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        layers.append(_layer(module, args[0], output))

    counter = FlopCounterMode(display=False)
    with _hooks(case.model, hook), sdpa_kernel(SDPBackend.MATH), counter:
        case.model(case.inputs)
    return layers, float(counter.get_total_flops())


@contextmanager
def _hooks(model: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(hook)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer(module: nn.Module, x: Tensor, y: Tensor) -> Layer:
    assert isinstance(module, nn.Linear | nn.Conv2d)
    weight, bias = module.weight, module.bias is not None
    examples, outputs = y.shape[0], weight.shape[0]
    inputs = weight[0].numel()
    positions = y.numel() // (examples * outputs)
    if isinstance(module, nn.Linear):
        return Layer(examples, positions, inputs, outputs, bias, x.requires_grad)
    kernel = (weight.shape[2], weight.shape[3])
    stride = (int(module.stride[0]), int(module.stride[1]))
    classes = shift_classes(kernel, stride) / 2
    if stride == (1, 1):
        classes = min(classes, TRANSFORM)
    return Layer(
        examples, positions, inputs, outputs, bias, x.requires_grad, classes, module.in_channels
    )


def shift_classes(kernel: tuple[int, int], stride: tuple[int, int]) -> int:
    """Number of ordered pairs of kernel offsets that differ in difference or in phase."""
    per_dimension = [
        len({(a % s, b - a) for a, b in product(range(k), repeat=2)})
        for k, s in zip(kernel, stride, strict=True)
    ]
    return per_dimension[0] * per_dimension[1]
