"""Figures 1 and 2: the exact GGN of a deep linear net, both approximations, and their errors.

A deep linear net with weight sharing (N examples, R shared positions), one middle layer. In the
expand setting the loss has a term for every position, and K-FAC-expand is exact (Lemma 3); in the
reduce setting the outputs are averaged over the positions first, and K-FAC-reduce is exact
(Lemma 5). The exact block comes from Jacobians by `torch.func`, in float64.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from experiments import pictures
from experiments.tables import Table
from quickstart.errors import QuickstartError
from submission.kfac import Gaussian, kronecker_factors

SMALL: list[str] = []
PAPER_SIZE = None  # it is this one
PAPER = """
The paper's Figures 1 and 2 show the same: N = 4, R = 2, P_in = P_out = 8, K-FAC-expand exact in the
expand setting, K-FAC-reduce exact in the reduce setting. The paper gives pictures, no numbers.
"""

SETTINGS = ("expand", "reduce")
APPROXES = ("expand", "reduce")
LAYER = "1"  # the middle one of three


class DeepLinear(nn.Sequential):
    """Three linear layers of one width, without bias, with nothing in between.

    Args:
        width: P_in and P_out of each layer.
        mean_over_positions: the reduce setting; [N, R, width] -> [N, width].
    """

    def __init__(self, width: int, mean_over_positions: bool) -> None:
        super().__init__(*(nn.Linear(width, width, bias=False) for _ in range(3)))
        self.mean_over_positions = mean_over_positions

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, R, width] to outputs [N, R, width], or their mean [N, width]."""
        y = x
        for layer in self:
            y = layer(y)
        return y.mean(1) if self.mean_over_positions else y


def exact_block(model: nn.Module, x: Tensor, parameter: str, variance: float) -> Tensor:
    """The GGN block of one parameter for the mean squared error: [P, P], weights row by row."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(weight: Tensor) -> Tensor:
        replaced = {**parameters, parameter: weight}
        return cast(Tensor, torch.func.functional_call(model, replaced, (x,))).flatten()

    jacobian = torch.func.jacrev(outputs)(parameters[parameter]).flatten(1)
    block: Tensor = jacobian.mT @ jacobian / (variance * jacobian.shape[0])
    return block


def compare(n: int, r: int, width: int, setting: str, seed: int) -> dict[str, Any]:
    """One row of the figures: blocks as nested lists, and errors.

    Returns:
        'exact' and, for each approximation, 'block', 'largest' |error| and 'relative' error
        (Frobenius norms).
    """
    generator = torch.Generator().manual_seed(seed)
    model = DeepLinear(width, setting == "reduce").double()
    with torch.no_grad():
        for weight in model.parameters():
            shape = weight.shape
            weight.copy_(torch.randn(shape, generator=generator, dtype=weight.dtype) / width**0.5)
    x = torch.randn(n, r, width, generator=generator, dtype=torch.float64)
    likelihood = Gaussian()
    exact = exact_block(model, x, f"{LAYER}.weight", likelihood.variance)
    row: dict[str, Any] = {"exact": exact.tolist()}
    for approx in APPROXES:
        factors = kronecker_factors(
            model, x, likelihood=likelihood, kfac_approx=approx, fisher_type="type-2"
        )
        block = factors[LAYER].to_dense()
        row[approx] = {
            "block": block.tolist(),
            "largest": (block - exact).abs().max().item(),
            "relative": ((block - exact).norm() / exact.norm()).item(),
        }
    return row


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes and seed."""
    parser.add_argument("--n", type=int, default=4, help="examples (default: 4)")
    parser.add_argument("--r", type=int, default=2, help="shared positions (default: 2)")
    parser.add_argument("--width", type=int, default=8, help="P_in = P_out (default: 8)")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Both settings."""
    del folder, console
    if min(options.n, options.r, options.width) < 1:
        raise QuickstartError("--n, --r and --width must be 1 or more")
    return {s: compare(options.n, options.r, options.width, s, options.seed) for s in SETTINGS}


def tables(result: dict[str, Any]) -> list[Table]:
    """Errors: one row per setting."""
    rows = []
    for setting in SETTINGS:
        cells = [f"{result[setting][a][k]:.1e}" for a in APPROXES for k in ("largest", "relative")]
        rows.append((f"{setting} setting", *cells))
    header = ("", *(f"{a}: {kind}" for a in APPROXES for kind in ("largest |error|", "relative")))
    return [Table("Error against the exact GGN block of the middle layer", header, tuple(rows))]


def draw(result: dict[str, Any], path: Path) -> bool:
    """The figure: exact, expand, reduce, and both errors; one row per setting."""
    picture, axes = pictures.figure(5, 2, 11, 4.8)
    for row, setting in enumerate(SETTINGS):
        exact = np.array(result[setting]["exact"])
        blocks = {a: np.array(result[setting][a]["block"]) for a in APPROXES}
        shown = [("exact GGN", exact), *((f"K-FAC-{a}", blocks[a]) for a in APPROXES)]
        shown += [(f"|error| of {a}", np.abs(blocks[a] - exact)) for a in APPROXES]
        limit = np.abs(exact).max()
        for axis, (title, matrix) in zip(axes[row], shown, strict=True):
            colours = "Reds" if "error" in title else "RdBu_r"
            low = 0 if "error" in title else -limit
            axis.imshow(matrix, cmap=colours, vmin=low, vmax=limit, interpolation="nearest")
            if "error" in title:
                title = f"{title}\nat most {matrix.max():.0e}"
            axis.set_title(title, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row][0].set_ylabel(f"{setting} setting")
    pictures.save(picture, path)
    return True
