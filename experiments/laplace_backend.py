"""K-FAC of this project as a curvature backend of laplace-torch (0.3).

    from laplace import Laplace, marglik_training
    from experiments.laplace_backend import KFACReduceGGN

    posterior = Laplace(model, "classification", hessian_structure="kron", backend=KFACReduceGGN)
    marglik_training(model, loader, backend=KFACReduceGGN)

`KFACExpandGGN` and `KFACReduceGGN` serve every model whose layers this project's engine handles. In
laplace-torch a Kronecker-factored Hessian is a list in the order of `model.parameters()`: two
factors for a weight, one dense block for a bias; so weight and bias are separate here. Parameters
outside K-FAC layers (scales, shifts, bare parameters), which the package's own backends leave out
or refuse, get the diagonal of their GGN.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from laplace.curvature import GGNInterface
from laplace.utils import Kron
from torch import Tensor, nn

from submission.kfac import (
    Categorical,
    DiagonalCurvature,
    Gaussian,
    KFACConfig,
    KroneckerFactors,
    Likelihood,
    UnitwiseCurvature,
)
from submission.kfac.blocks.block import Block
from submission.kfac.blocks.kronecker import KroneckerBlock
from submission.kfac.blocks.structure import Structure
from submission.kfac.discovery import unwrap
from submission.kfac.functional import blocks_and_curvature

OTHER_PARAMETERS = ("diagonal", "zero")
_CHUNK = 16  # examples whose Jacobians are in memory together
_ANY_SIDE = 1 << 62  # no factor is cut down to its diagonal: laplace-torch needs all of it


class KFACGGN(GGNInterface):  # type: ignore[misc]
    """The GGN by K-FAC; use a subclass, which says which approximation.

    Args:
        model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y: of laplace-torch.
        stochastic: sample labels from the model (one pass per sample) instead of the exact GGN (one
            pass per output); the class's by default.
        num_samples: of labels, if stochastic.
        kfac_approx: "expand" or "reduce", in place of the class's.
        other_parameters: what parameters outside K-FAC layers get: "diagonal", or "zero", which
            leaves them to the prior.
        seed: of the sampled labels.

    Raises:
        ValueError: an argument is none of these.
    """

    default_approx = ""
    default_stochastic = False

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool | None = None,
        num_samples: int = 1,
        kfac_approx: str | None = None,
        other_parameters: str = "diagonal",
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            last_layer,
            subnetwork_indices,
            dict_key_x,
            dict_key_y,
            self.default_stochastic if stochastic is None else stochastic,
            num_samples,
        )
        self.kfac_approx = kfac_approx or self.default_approx
        if self.kfac_approx not in ("expand", "reduce"):
            raise ValueError(
                f"kfac_approx must be 'expand' or 'reduce', not {self.kfac_approx!r}: take "
                "KFACExpandGGN or KFACReduceGGN, or pass it"
            )
        if other_parameters not in OTHER_PARAMETERS:
            raise ValueError(
                f"other_parameters must be 'diagonal' or 'zero', not {other_parameters!r}"
            )
        self.other_parameters = other_parameters
        self._generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Loss and Kronecker factors of one batch, scaled so that the batches of N examples add up.

        Raises:
            NotImplementedError: a layer's curvature does not fit laplace-torch's two factors.
        """
        if kwargs:
            raise TypeError(f"KFACGGN.kron knows no {', '.join(kwargs)}: pass backend_kwargs")
        target, inputs = self._target(x)
        # The engine's exact diagonal takes a pass per example and output; Jacobians are faster.
        apart = self.other_parameters == "zero" or not (
            self.stochastic or not isinstance(inputs, Tensor)
        )
        structure, found, logits = self._blocks(target, inputs, apart, share=len(y) / N)
        bare = [block for block in structure.blocks if block.needs_own_gradients]
        if bare and apart and self.other_parameters == "diagonal":
            found |= self._diagonals(target, inputs, bare, logits)
        parameters = dict(target.named_parameters())
        factors: dict[int, list[Tensor]] = {}
        for block in structure.blocks:
            if block.name in found and (block.has_factors or self.other_parameters == "diagonal"):
                own = _as_factors(block, parameters, found[block.name], len(y) / N)
                factors |= {id(parameters[name]): pair for name, pair in own.items()}
        kfacs = [factors.get(id(p)) or _zeros(p) for p in self.params]
        kron = Kron(
            [
                [factor.to(p.dtype) for factor in own]
                for own, p in zip(kfacs, self.params, strict=True)
            ]
        )
        return self.factor * self._loss(logits, y), kron

    @property
    def _kfac_likelihood(self) -> Likelihood:
        return Gaussian(variance=1.0) if self.likelihood == "regression" else Categorical()

    def _target(self, x: Any) -> tuple[nn.Module, Any]:
        """The (unwrapped) module whose curvature is wanted, and its input."""
        if not self.last_layer:
            return unwrap(self.model), x
        with torch.no_grad():
            features = self.model.forward_with_features(x)[1]
        return self._model, features

    def _blocks(
        self, target: nn.Module, inputs: Any, apart: bool, share: float
    ) -> tuple[Structure, dict[str, Any], Tensor]:
        """The blocks, the engine's curvature of them, and the logits of its forward pass.

        The inputs' factor, a mean over all batches, comes times this batch's share; the gradients'
        is a sum over the terms. `apart`: without parameters that are in no layer.
        """
        if not any(p.requires_grad for p in target.parameters()):
            with torch.no_grad():
                return Structure(), {}, target(inputs)
        seen: list[Tensor] = []
        handle = target.register_forward_hook(lambda _m, _a, output: seen.append(output.detach()))
        try:
            config = KFACConfig(
                kfac_approx=self.kfac_approx,
                fisher_type="mc" if self.stochastic else "type-2",
                mc_samples=self.num_samples,
                bias="separate",
                max_factor_side=_ANY_SIDE,
            )
            structure, found = blocks_and_curvature(
                target, (inputs,), self._kfac_likelihood, config, share=share,
                generator=self._generator,
                wanted=lambda block: not (apart and block.needs_own_gradients),
            )  # fmt: skip
        finally:
            handle.remove()
        return structure, dict(found), seen[-1]

    def _diagonals(
        self, target: nn.Module, x: Tensor, bare: list[Block], logits: Tensor
    ) -> dict[str, DiagonalCurvature]:
        """Exact diagonals of the summed GGN of bare parameters, from Jacobians per example."""
        wanted = {block.pieces[0].parameter for block in bare}
        values = {name: p.detach() for name, p in target.named_parameters()}
        fixed = {name: p for name, p in values.items() if name not in wanted}
        fixed |= dict(target.named_buffers())
        free = {name: values[name] for name in wanted}

        def outputs(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
            state = {**fixed, **parameters}
            output: Tensor = torch.func.functional_call(target, state, (example.unsqueeze(0),))
            return output.squeeze(0)

        jacobian = torch.func.vmap(
            torch.func.jacrev(outputs), (None, 0), chunk_size=_CHUNK, randomness="different"
        )
        squares = {name: torch.zeros_like(value) for name, value in free.items()}
        # In slices, so that the Jacobians of a large batch are not all kept.
        for part, f in zip(torch.split(x, _CHUNK), torch.split(logits, _CHUNK), strict=True):
            for name, j in jacobian(free, part).items():
                rows = j.reshape(*f.shape, -1)
                squares[name] += self._squares(rows, f).reshape(squares[name].shape)
        return {name: DiagonalCurvature(total) for name, total in squares.items()}

    def _squares(self, jacobian: Tensor, logits: Tensor) -> Tensor:
        """Σ diag(Jᵀ H J) for J [..., outputs, P] and H the Hessian at the logits: [P]."""
        if self.likelihood == "regression":
            return jacobian.square().flatten(0, -2).sum(0)
        p = logits.softmax(-1).unsqueeze(-1)
        variance = (p * jacobian.square()).sum(-2) - (p * jacobian).sum(-2).square()
        return variance.flatten(0, -2).sum(0)

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.likelihood != "regression":
            logits, y = logits.flatten(0, -2), y.flatten()
        loss: Tensor = self.lossfunc(logits, y)
        return loss.detach()


class KFACExpandGGN(KFACGGN):
    """The GGN by K-FAC-expand."""

    default_approx = "expand"


class KFACReduceGGN(KFACGGN):
    """The GGN by K-FAC-reduce."""

    default_approx = "reduce"


class SampledKFACExpandGGN(KFACExpandGGN):
    """K-FAC-expand with one sampled label per output, for `marglik_training`, which passes nothing
    to its backend."""

    default_stochastic = True


class SampledKFACReduceGGN(KFACReduceGGN):
    """K-FAC-reduce with one sampled label per output."""

    default_stochastic = True


def _as_factors(
    block: Block, parameters: Mapping[str, nn.Parameter], found: Any, share: float
) -> dict[str, list[Tensor]]:
    """Name of a parameter -> its factors in laplace-torch's form, of curvature with this share."""
    names = [piece.parameter for piece in block.pieces]
    if isinstance(found, KroneckerFactors):
        return _kronecker(block, parameters, found, share)
    if isinstance(found, UnitwiseCurvature):
        diagonals = found.blocks.diagonal(dim1=-2, dim2=-1).unbind(-1)
        return {
            name: _as_two(name, diagonal.reshape(parameters[name].shape), share)
            for name, diagonal in zip(names, diagonals, strict=True)
        }
    return {names[0]: _as_two(names[0], found.diagonal, share)}


def _as_two(name: str, diagonal: Tensor, share: float) -> list[Tensor]:
    """A diagonal in the shape of its parameter as one factor, or two where that is a matrix."""
    if diagonal.dim() < 2:
        return [torch.diag(diagonal)]
    warnings.warn(
        f"the diagonal of '{name}' {list(diagonal.shape)} is replaced by the product of its row "
        "and column sums: laplace-torch wants two factors for it",
        stacklevel=5,
    )
    diagonal = diagonal.flatten(1)
    total = diagonal.sum().clamp(min=torch.finfo(diagonal.dtype).tiny)
    rows, columns = torch.diag(diagonal.sum(1)), torch.diag(diagonal.sum(0) / total)
    return [rows, columns * share]


def _kronecker(
    block: Block, parameters: Mapping[str, nn.Parameter], found: KroneckerFactors, share: float
) -> dict[str, list[Tensor]]:
    if not isinstance(block, KroneckerBlock):
        raise _unsupported(block, "is used as its own transpose")
    if not all(piece.is_whole for piece in block.pieces):
        raise _unsupported(block, "is one of several maps in one parameter")
    a, b = found.input_covariance, found.gradient_covariance
    groups, out, into = block.matrix.shape
    if groups > 1:
        raise _unsupported(block, "has groups")
    a = torch.diag_embed(a) if found.diagonal_input else a
    b = torch.diag_embed(b) if found.diagonal_gradient else b
    factors = {}
    if block.bias is not None:
        factors[block.bias.parameter] = [b * (a[-1, -1] / share)]
        a = a[:-1, :-1]
    # laplace-torch's first factor is that of the weight's first dimension: an embedding's weight is
    # the transpose of a linear map's.
    stride = (into, 1)
    if tuple(block.matrix.piece.stride[1:]) == stride:
        first, second = b, a
    elif parameters[block.matrix.piece.parameter].shape == (into, out):
        first, second = a, b
    else:
        raise _unsupported(block, "is a transposed convolution")
    factors[block.matrix.piece.parameter] = [first, second]
    return factors


def _unsupported(block: Block, why: str) -> NotImplementedError:
    return NotImplementedError(
        f"layer '{block.name}' {why}: laplace-torch has no place for such factors. Freeze it "
        "(requires_grad_(False)) or use hessian_structure='diag'"
    )


def _zeros(parameter: Tensor) -> list[Tensor]:
    if parameter.dim() < 2:
        return [parameter.new_zeros(parameter.numel(), parameter.numel())]
    sides = parameter.shape[0], parameter.shape[1:].numel()
    return [parameter.new_zeros(side, side) for side in sides]
