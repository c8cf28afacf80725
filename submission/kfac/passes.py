"""The Fisher passes of one forward pass: which would-be gradients are propagated together.

All examples go through the graph at once: they do not meet on the way, so each one's gradients can
be told apart. BatchNorm with the statistics of the batch is the exception: there the gradients of
one example's loss reach the activations of all others. Sampled labels ("mc") are independent with
mean zero, so products of different examples vanish on average; the other Fisher types need

- `type-2`: a pass for each example (exact, N times the cost),
- `empirical`: a random sign for each example (unbiased, no extra cost).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .likelihoods import Likelihood


@dataclass(frozen=True)
class FisherPass:
    """Would-be gradients that are propagated at once.

    Attributes:
        vector: in the shape of the logits.
        zero_mean: whether examples are independent with mean zero in it.
        single: whether it belongs to one example alone.
    """

    vector: Tensor
    zero_mean: bool
    single: bool = False


def mixes_examples(model: nn.Module) -> bool:
    """Whether a BatchNorm of the model uses the statistics of the batch, as in training mode."""
    return any(
        isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        for module in model.modules()
    )


def fisher_passes(
    likelihood: Likelihood,
    logits: Tensor,
    model: nn.Module,
    *,
    fisher_type: str,
    mc_samples: int,
    mask: Tensor | None,
    targets: Tensor | None,
    generator: torch.Generator | None,
) -> Iterator[FisherPass]:
    """What to propagate; arguments as in `Likelihood.would_be_gradients`."""
    vectors = likelihood.would_be_gradients(
        logits,
        fisher_type=fisher_type,
        mc_samples=mc_samples,
        mask=mask,
        targets=targets,
        generator=generator,
    )
    if fisher_type == "mc" or not mixes_examples(model):
        for vector in vectors:
            yield FisherPass(vector, zero_mean=fisher_type == "mc")
    elif fisher_type == "empirical":
        for vector in vectors:
            yield FisherPass(vector * _signs(vector, generator), zero_mean=True)
    else:
        for vector in vectors:
            for alone in one_example_at_a_time(vector):
                yield FisherPass(alone, zero_mean=False, single=True)


def one_example_at_a_time(vector: Tensor) -> Iterator[Tensor]:
    """The rows of a vector, each with zeros in place of all others."""
    for example in range(vector.shape[0]):
        alone = torch.zeros_like(vector)
        alone[example] = vector[example]
        yield alone


def _signs(vector: Tensor, generator: torch.Generator | None) -> Tensor:
    """1 or -1 for each example, in a shape that broadcasts over the vector."""
    shape = (vector.shape[0], *(1,) * (vector.dim() - 1))
    coins = torch.randint(0, 2, shape, generator=generator, device=vector.device)
    return (2 * coins - 1).to(vector.dtype)
