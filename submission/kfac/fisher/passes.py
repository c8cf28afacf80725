"""The Fisher passes of one forward pass: which would-be gradients are propagated together.

All examples go through the graph at once: they do not meet on the way, so each one's gradients can
be told apart. BatchNorm with the statistics of the batch is the exception: there the gradients of
one example's loss reach the activations of all others. Sampled labels ("mc") are independent with
mean zero, so products of different examples vanish on average; the other Fisher types need

- `type-2`: a pass for each example (exact, N times the cost),
- `empirical`: a random sign for each example (unbiased, no extra cost). It changes nothing in
  statistics of single examples, and lets squares of sums over them be right on average too.

`type-2` also takes a pass for each row of the logits where these are not the examples of the layers
(nodes of graphs, positions folded into the first dimension, time first): rows of one example would
add up in a reduced layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .likelihoods import Likelihood


@dataclass(frozen=True)
class FisherPass:
    """Would-be gradients that are propagated at once.

    Attributes:
        vector: in the shape of the logits.
        zero_mean: whether examples are independent with mean zero in it.
        single: whether it belongs to one example alone.
        example_dim: the dimension of the vector that counts the examples.
    """

    vector: Tensor
    zero_mean: bool
    single: bool = False
    example_dim: int = 0


def fisher_passes(
    likelihood: Likelihood,
    logits: Tensor,
    *,
    mixes_examples: bool,
    fisher_type: str,
    mc_samples: int,
    mask: Tensor | None,
    targets: Tensor | None,
    generator: torch.Generator | None,
    examples: Iterable[int] = (),
    signs: bool | None = None,
) -> Iterator[FisherPass]:
    """What to propagate.

    Args:
        mixes_examples: whether a BatchNorm used the statistics of the batch.
        examples: the numbers of examples that the layers had.
        signs: whether true labels come with random signs; None where BatchNorm mixes examples.
            Not where rows of the logits are not the examples: those of one belong together.

    Others are as in `Likelihood.would_be_gradients`.
    """
    dim = likelihood.example_dim(logits)
    vectors = likelihood.would_be_gradients(
        logits,
        fisher_type=fisher_type,
        mc_samples=mc_samples,
        mask=mask,
        targets=targets,
        generator=generator,
    )
    mixed = fisher_type != "mc" and mixes_examples
    folded = any(n != logits.shape[dim] for n in examples)
    signed = mixed if signs is None else signs and (mixed or not folded)
    if fisher_type == "empirical" and signed:
        for vector in vectors:
            yield FisherPass(vector * _signs(vector, dim, generator), True, example_dim=dim)
    elif fisher_type != "type-2" or not (mixed or folded):
        for vector in vectors:
            yield FisherPass(vector, zero_mean=fisher_type == "mc", example_dim=dim)
    else:
        for vector in vectors:
            for alone in one_example_at_a_time(vector, dim):
                yield FisherPass(alone, zero_mean=False, single=True, example_dim=dim)


def one_example_at_a_time(vector: Tensor, dim: int = 0) -> Iterator[Tensor]:
    """Slices of a vector along `dim`, each with zeros in place of all others."""
    for example in range(vector.shape[dim]):
        alone = torch.zeros_like(vector)
        alone.select(dim, example).copy_(vector.select(dim, example))
        yield alone


def _signs(vector: Tensor, dim: int, generator: torch.Generator | None) -> Tensor:
    """1 or -1 for each example, in a shape that broadcasts over the vector."""
    shape = [1] * vector.dim()
    shape[dim] = vector.shape[dim]
    coins = torch.randint(0, 2, shape, generator=generator, device=vector.device)
    return (2 * coins - 1).to(vector.dtype)
