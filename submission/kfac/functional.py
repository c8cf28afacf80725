"""Curvature of a model on one batch, without an optimizer: for experiments, tests and Laplace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .blocks.block import Block, Collecting
from .blocks.public import Curvature, KroneckerFactors
from .blocks.structure import Structure
from .config import KFACConfig
from .discovery import (
    found_in,
    place_examples,
    structure_from,
    tracked,
    trainable_parameters,
    unwrap,
)
from .fisher import step as of_step
from .fisher.collect import Collection
from .fisher.likelihoods import Likelihood, as_likelihood
from .fisher.losses import LossTerms
from .fisher.passes import fisher_passes
from .fisher.sampling import sampling_seed
from .fisher.setting import detect_setting
from .operations.record import Recording
from .operations.sharing import SharingRule, check_names
from .ranks.sharded import wholes_seen


def kronecker_factors(
    model: nn.Module, inputs: Any, **arguments: Any
) -> dict[str, KroneckerFactors]:
    """A and B of every linear map of a model on one batch.

    A ⊗ B estimates the layer's block of the GGN of the mean loss over its terms.

    Args:
        model, inputs, **arguments: as in `curvature`. With bias="separate" the last row and column
            of A are zero but for the corner.

    Returns:
        Name of a block (the module's) -> factors.
    """
    found = curvature(model, inputs, layers_only=True, **arguments)
    return {name: block for name, block in found.items() if isinstance(block, KroneckerFactors)}


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
    share: float | None = None,
    layers_only: bool = False,
    **settings: Any,
) -> dict[str, Curvature]:
    """Curvature of all trainable parameters of a model on one batch.

    Args:
        model: its mode (train or eval) is used as it is; nothing about it changes.
        inputs: a tensor or any single argument; a plain tuple or list is passed as several
            arguments, a dict as keyword arguments.
        likelihood: "categorical", "bernoulli", "gaussian" or a `Likelihood`.
        kfac_approx: "expand", "reduce", or "auto" (see `fisher.setting`).
        fisher_type: "mc", "type-2" (exact) or "empirical" (needs `targets`).
        mc_samples: label samples for "mc".
        mask: which loss terms count, see `fisher.likelihoods`.
        sharing: see `operations.sharing.resolve`.
        generator: of the label samples (and of the signs of "empirical" where BatchNorm mixes
            the examples, see `fisher.passes`); by default one with a fixed seed, so repeated calls
            agree. Pass your own for independent draws.
        targets: true labels, where they are needed.
        share: of this batch in a data set whose curvature is added up batch by batch. Then A is
            multiplied by it, and whatever comes from gradients is a sum over the terms.
        layers_only: leave out everything but linear maps.
        **settings: others of `KFACConfig` that concern curvature: `bias`, `ragged_scaling`,
            `norm_rows`, `max_factor_side`, `factor_precision`, `exclude`.

    Returns:
        Name of a block -> `KroneckerFactors`; `UnitwiseCurvature` for scales and shifts;
        `DiagonalCurvature` for other parameters.

    Raises:
        TypeError: the model's output is not a tensor.
        RuntimeError: gradients cannot be computed, as under inference_mode, or the output has no
            graph.
    """
    config = KFACConfig(
        kfac_approx=kfac_approx, fisher_type=fisher_type, mc_samples=mc_samples, **settings
    )
    _, found = blocks_and_curvature(
        model, inputs, likelihood, config, mask=mask, sharing=sharing, generator=generator,
        targets=targets, share=share,
        wanted=lambda block: block.has_factors or not layers_only,
    )  # fmt: skip
    return found


def blocks_and_curvature(
    model: nn.Module,
    inputs: Any,
    likelihood: Likelihood | str,
    config: KFACConfig,
    *,
    mask: Tensor | None = None,
    sharing: SharingRule = None,
    generator: torch.Generator | None = None,
    targets: Tensor | None = None,
    share: float | None = None,
    wanted: Callable[[Block], bool] = lambda block: True,
) -> tuple[Structure, dict[str, Curvature]]:
    """The blocks of a model as well as the curvature of those wanted; otherwise as `curvature`."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("curvature needs gradients: call it outside of torch.inference_mode()")
    model = unwrap(model)
    likelihood = as_likelihood(likelihood)
    parameters, approx = trainable_parameters(model), config.kfac_approx
    # Buffers are put back after the Fisher passes: autograd checks that nothing has changed them.
    with _undisturbed(model), torch.enable_grad():
        modules = [name for name, _ in model.named_modules()]
        check_names(sharing, [*parameters, *modules])
        recording = Recording(tracked(parameters, config.exclude))
        with wholes_seen(model, recording.see_whole), recording:
            logits = _call(model, inputs)
        if not logits.requires_grad:
            raise RuntimeError(of_step.NO_GRAPH)
        losses = [LossTerms(logits, likelihood)]
        unplaced = place_examples(recording, losses, sharing)
        found = found_in(recording, losses, parameters, unplaced)

        def collection(approx: str) -> Collection:
            structure = structure_from(*found, parameters, config, approx)
            names = [block.name for block in structure.blocks if wanted(block)]
            like = torch.empty(0, device=logits.device)
            # Factors of few rows are formed last, divided already: their size is what they cost.
            collecting = Collecting(like, config.ragged_scaling, uses=0)
            return Collection(
                recording, structure, names, parameters, collecting, sharing=sharing,
                precision=config.factor_precision,
            )  # fmt: skip

        if approx == "auto":
            examples = collection("expand").numbers_of_examples().values()
            approx, _ = detect_setting(likelihood, logits, sharing, examples)
        collected = collection(approx)
        if generator is None and config.fisher_type != "type-2":
            generator = torch.Generator(logits.device).manual_seed(sampling_seed(0, 0, 0))
        passes = fisher_passes(
            likelihood,
            logits,
            mixes_examples=recording.mixes_examples,
            fisher_type=config.fisher_type,
            mc_samples=config.mc_samples,
            mask=mask,
            targets=targets,
            generator=generator,
            examples=collected.numbers_of_examples().values(),
        )
        terms = likelihood.terms(logits.detach(), mask, targets).clamp(min=torch.finfo().tiny)
        # In float16 they would leave its range.
        divided = share is None and logits.dtype != torch.float16
        for fisher_pass in passes:
            if divided:
                vector = fisher_pass.vector
                fisher_pass = replace(fisher_pass, vector=vector / terms.to(vector.dtype).sqrt())
            collected.fisher_pass(logits, fisher_pass)
    if collected.out_of_memory is not None:
        raise torch.OutOfMemoryError(
            f"out of memory in {collected.out_of_memory}; pass fewer examples at a time"
        )
    divisor = None if divided or share is not None else terms
    scale = 1.0 if share is None else share
    structure, found_sums = collected.structure, collected.finish()
    blocks = structure.by_name
    return structure, {
        name: blocks[name].public(found_sums[name].curvature([divisor], scale))
        for name in collected.names
        if name in found_sums
    }


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
