"""Curvature of a model on one batch, without an optimizer: for experiments, tests and Laplace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .accumulation import completed
from .capture import Recording
from .curvature import Curvature, KroneckerFactors, as_curvature, average_sums
from .likelihoods import Likelihood, as_likelihood
from .partition import Partition, demote_uncalled, partition, unwrap
from .passes import fisher_passes
from .recorder import check_names
from .sampling import sampling_seed
from .setting import detect_setting
from .sharing import SharingRule
from .statistics import KroneckerPart


def kronecker_factors(
    model: nn.Module,
    inputs: Any,
    *,
    likelihood: Likelihood | str,
    kfac_approx: str,
    fisher_type: str = "mc",
    mc_samples: int = 1,
    mask: Tensor | None = None,
    sharing: SharingRule = None,
    generator: torch.Generator | None = None,
    targets: Tensor | None = None,
    ragged_scaling: str = "sqrt",
    bias: str = "joint",
) -> dict[str, KroneckerFactors]:
    """A and B of every linear layer of a model on one batch.

    A ⊗ B estimates the layer's block of the GGN of the mean loss over its terms.

    Args:
        model: its mode (train or eval) is used as it is; nothing about it changes.
        inputs: a tensor or any single argument; a plain tuple or list is passed as several
            arguments, a dict as keyword arguments.
        likelihood: "categorical", "bernoulli", "gaussian" or a `Likelihood`.
        kfac_approx: "expand", "reduce", or "auto" (see `setting`).
        fisher_type: "mc", "type-2" (exact) or "empirical" (needs `targets`).
        mc_samples: label samples for "mc".
        mask: which loss terms count, see `likelihoods`.
        sharing: see `sharing.resolve`.
        generator: of the label samples (and of the signs of "empirical" where BatchNorm mixes
            the examples, see `passes`); by default one with a fixed seed, so repeated calls
            agree. Pass your own for independent draws.
        targets: true labels, where they are needed.
        ragged_scaling: see `factors.RAGGED_SCALINGS`.
        bias: see `config.BIASES`. Where it is "separate", the last row and column of A are zero
            but for the corner; where it is "output", A has none for it.

    Returns:
        Layer name -> factors.
    """
    everything = curvature(
        model,
        inputs,
        likelihood=likelihood,
        kfac_approx=kfac_approx,
        fisher_type=fisher_type,
        mc_samples=mc_samples,
        mask=mask,
        sharing=sharing,
        generator=generator,
        targets=targets,
        ragged_scaling=ragged_scaling,
        bias=bias,
        layers_only=True,
    )
    return {
        name: block for name, block in everything.items() if isinstance(block, KroneckerFactors)
    }


def curvature(
    model: nn.Module,
    inputs: Any,
    *,
    likelihood: Likelihood | str,
    kfac_approx: str,
    fisher_type: str = "mc",
    mc_samples: int = 1,
    mask: Tensor | None = None,
    sharing: SharingRule = None,
    generator: torch.Generator | None = None,
    targets: Tensor | None = None,
    ragged_scaling: str = "sqrt",
    bias: str = "joint",
    max_factor_side: int = 8192,
    layers_only: bool = False,
    parts: Partition | None = None,
    share: float | None = None,
) -> dict[str, Curvature]:
    """Curvature of all trainable parameters; arguments as in `kronecker_factors`.

    Args:
        max_factor_side: larger sides keep only the diagonal of their factor.
        layers_only: leave out everything but linear layers.
        parts: of the (unwrapped) model, by `partition` with the same settings, for a caller that
            has many batches; parameters that are in none of them are left out.
        share: of this batch in a data set whose curvature is added up batch by batch. Then A is
            multiplied by it, and whatever comes from gradients is a sum over the terms.

    Returns:
        Layer name -> `KroneckerFactors` or, for normalisation layers, `UnitwiseCurvature`;
        parameter name -> `DiagonalCurvature` for parameters in no supported layer.
    """
    model = unwrap(model)
    likelihood = as_likelihood(likelihood)
    if kfac_approx == "auto":
        kfac_approx = _detected(model, inputs, likelihood, sharing)
    parts = parts or partition(
        model, approx=kfac_approx, bias=bias, max_factor_side=max_factor_side
    )
    kept = [p for p in parts.parts if not layers_only or isinstance(p, KroneckerPart)]
    # Buffers are put back after the Fisher passes: autograd checks that nothing has changed them.
    with _undisturbed(model), torch.enable_grad():
        # Factors of few rows are formed last, divided already: their size is what they cost.
        recording = Recording(model, kept, sharing, ragged_scaling, uses=0)
        check_names(sharing, recording)
        with recording:
            logits = _call(model, inputs)
        recording.find_other_uses(logits)
        uncalled = [name for name, count in recording.calls.items() if not count]
        if uncalled:
            parts = demote_uncalled(parts, uncalled, max_factor_side)
            kept = [p for p in parts.parts if not layers_only or isinstance(p, KroneckerPart)]
            recording.replace(kept)
        if generator is None and fisher_type != "type-2":
            generator = torch.Generator(logits.device).manual_seed(sampling_seed(0, 0, 0))
        passes = fisher_passes(
            likelihood,
            logits,
            model,
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            mask=mask,
            targets=targets,
            generator=generator,
            examples=recording.examples.values(),
        )
        terms = likelihood.terms(logits.detach(), mask, targets).clamp(min=torch.finfo().tiny)
        # In float16 they would leave its range.
        divided = share is None and logits.dtype != torch.float16
        for fisher_pass in passes:
            if divided:
                vector = fisher_pass.vector
                fisher_pass = replace(fisher_pass, vector=vector / terms.to(vector.dtype).sqrt())
            recording.fisher_pass(logits, fisher_pass)
        recording.end_passes()
    if recording.out_of_memory is not None:
        raise torch.OutOfMemoryError(
            f"out of memory in {recording.out_of_memory}; pass fewer examples at a time"
        )
    sums = recording.sums
    recording.release()
    called = {part.name: part for part in parts.parts if part.name in sums}
    return {
        name: as_curvature(
            part,
            average_sums(
                part,
                completed(part, sums[name]),
                None if divided or share is not None else terms,
                1.0 if share is None else share,
            ),
        )
        for name, part in called.items()
    }


def _detected(model: nn.Module, inputs: Any, likelihood: Likelihood, sharing: SharingRule) -> str:
    """The setting that a forward pass shows."""
    parts = partition(model, approx="expand", max_factor_side=1).parts
    with _undisturbed(model), torch.enable_grad():
        recording = Recording(model, parts, sharing)
        with recording:
            logits = _call(model, inputs)
        approx, _ = detect_setting(likelihood, logits, sharing, recording.examples.values())
        recording.release()
    return approx


def _call(model: nn.Module, inputs: Any) -> Tensor:
    if type(inputs) in (tuple, list):
        output = model(*inputs)
    elif isinstance(inputs, Mapping):
        output = model(**inputs)
    else:
        output = model(inputs)
    if not isinstance(output, Tensor):
        raise TypeError(f"the model must return a tensor of logits, not {type(output).__name__}")
    return output


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Puts buffers (running statistics) back as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers() if buffers else ():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Leaves buffers and the global random state as they were."""
    # Walks through all modules take a share of the time of small models.
    parameters = model.parameters() if torch.cuda.is_available() else ()
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    with kept_buffers(model), torch.random.fork_rng(devices=devices):
        yield
