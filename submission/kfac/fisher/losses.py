"""Which likelihood's negative logarithm one of torch's losses is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..operations.uses import SeenLoss
from .likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from .own_gradients import OwnGradients

logger = logging.getLogger(__name__)

LEFT_OUT = (
    "K-FAC: the ctc_loss beside other losses has no part in the curvature, since no labels can be "
    "sampled from it: fisher_type='empirical' takes its own gradients"
)
UNEVEN = (
    "K-FAC: the terms of a loss with reduction='none' have weights of their own in the loss that "
    "is trained on (or some have none), but count alike in the curvature: state them by "
    "update(logits, likelihood, mask=weights) after record()"
)


@dataclass(eq=False)
class LossTerms:
    """A loss, as would-be gradients need it.

    Attributes:
        logits: what went into it.
        likelihood, mask, targets: as `Likelihood` takes them.
        output: the loss, where it was seen.
        is_sum: whether it adds its terms up, and does not average them.
        divisor: what a mean divides by, where that is not the sum of the weights.
    """

    logits: Tensor
    likelihood: Likelihood
    mask: Tensor | None = None
    targets: Tensor | None = None
    output: Tensor | None = None
    is_sum: bool = False
    divisor: int | None = None


def _cross_entropy(arguments: dict[str, Any]) -> LossTerms:
    logits, targets = arguments["input"], arguments["target"]
    class_dim = 1 if logits.dim() > 1 else 0
    is_soft = targets.is_floating_point()
    likelihood = Categorical(
        class_dim=class_dim,
        label_smoothing=float(arguments.get("label_smoothing", 0.0)),
        ignore_index=None if is_soft else int(arguments["ignore_index"]),
    )
    weight = arguments.get("weight")
    mask = None
    if weight is not None and not is_soft:
        known = (targets >= 0) & (targets < len(weight))
        mask = weight[torch.where(known, targets, 0)].to(logits.dtype)
    return LossTerms(logits, likelihood, mask, targets)


def _bernoulli(arguments: dict[str, Any]) -> LossTerms:
    logits, targets, weight = (arguments[key] for key in ("input", "target", "weight"))
    positive = arguments["pos_weight"]
    mask = None if weight is None else weight.expand(logits.shape)
    if positive is not None:
        # -w y log σ - (1 - y) log (1 - σ) has w y + 1 - y times the curvature.
        own = 1 + (positive - 1) * targets
        mask = own if mask is None else mask * own
    divisor = None if mask is None else logits.numel()
    return LossTerms(logits, Bernoulli(), mask, targets, divisor=divisor)


def _gaussian(arguments: dict[str, Any]) -> LossTerms:
    logits, targets = arguments["input"], arguments["target"]
    if targets.requires_grad and not logits.requires_grad:
        logits, targets = targets, logits
    weight = arguments.get("weight")
    targets = targets.detach().expand(logits.shape)
    return LossTerms(logits, Gaussian(), None if weight is None else weight, targets)


def _ctc(arguments: dict[str, Any]) -> LossTerms:
    outputs, is_mean = arguments["log_probs"], arguments["reduction"] == "mean"
    if outputs.dim() != 3:
        raise ValueError(
            f"ctc_loss was given log-probabilities {list(outputs.shape)} without a dimension of "
            "examples: give it [frames, examples, classes]"
        )
    return LossTerms(outputs, OwnGradients(batch_dim=1, is_sum=not is_mean))


_READERS: dict[str, Callable[[dict[str, Any]], LossTerms]] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy_with_logits": _bernoulli,
    "mse_loss": _gaussian,
    "ctc_loss": _ctc,
}


def terms_of(seen: SeenLoss) -> LossTerms:
    """The terms of a loss that was seen."""
    terms = _READERS[seen.function](seen.arguments)
    terms.output = seen.output
    terms.is_sum = seen.arguments.get("reduction", "mean") == "sum"
    return terms


def usable(seen: Sequence[SeenLoss], fisher_type: str, *, warns: bool) -> list[LossTerms]:
    """The terms of the losses that were seen, but for those that this Fisher cannot take.

    Args:
        warns: whether to say so if some are left out and others are not.
    """
    if fisher_type == "empirical":
        return [terms_of(loss) for loss in seen]
    found = [terms_of(loss) for loss in seen if loss.function != "ctc_loss"]
    if warns and found and len(found) < len(seen):
        logger.warning(LEFT_OUT)
    return found


def parts_of(
    losses: Sequence[LossTerms], reached: Mapping[int, AbstractSet[tuple[str, int]]]
) -> list[list[set[int]]]:
    """The numbers of the losses: means, each in its parts. Those of a part have the same examples.

    Losses that have a call in common are of the same examples, unless of other rows of the same
    outputs. Parts that have a block in common, but no call, belong to one mean. Losses that reach
    no call are in none.

    Args:
        losses: as they were seen.
        reached: number of a loss -> the calls that its gradients came to: (block, number).
    """
    parts: list[set[int]] = []
    for number, loss in enumerate(losses):
        if reached.get(number):
            beside = [
                part for part in parts
                if any(
                    reached[number] & reached[other]
                    and not have_other_rows(loss.logits, losses[other].logits)
                    for other in part
                )
            ]  # fmt: skip
            parts = [part for part in parts if part not in beside]
            parts.append({number}.union(*beside))
    means: list[list[set[int]]] = []
    for part in parts:
        blocks = _blocks(part, reached)
        joined = [mean for mean in means if any(blocks & _blocks(other, reached) for other in mean)]
        means = [mean for mean in means if mean not in joined]
        means.append([part, *(other for mean in joined for other in mean)])
    return means


def _blocks(
    part: AbstractSet[int], reached: Mapping[int, AbstractSet[tuple[str, int]]]
) -> set[str]:
    return {block for number in part for block, _ in reached[number]}


def have_other_rows(one: Tensor, other: Tensor) -> bool:
    """Whether logits are different rows of the same outputs: chunks, or every so many."""
    whole = one._base
    if whole is None or other._base is not whole:
        return False
    if one.dim() > 1 and one.shape[-1] != whole.shape[-1]:
        return False
    if one.shape[1:] == other.shape[1:] == whole.shape[1:]:
        return len(one) + len(other) <= len(whole)
    (first, end), (start, last) = _memory(one), _memory(other)
    return end <= start or last <= first


def _memory(view: Tensor) -> tuple[int, int]:
    """From which entry of its storage to which a view reaches."""
    steps = zip(view.shape, view.stride(), strict=True)
    start = int(view.storage_offset())
    return start, start + int(sum((size - 1) * stride for size, stride in steps)) + 1


def watch_weights(loss: LossTerms) -> None:
    """Has the backward pass warn if the terms of an unreduced loss do not count alike in it."""
    output, targets = loss.output, loss.targets
    assert output is not None
    ignored = getattr(loss.likelihood, "ignore_index", None)

    def check(gradient: Tensor) -> None:
        counted = gradient.detach().flatten()
        if ignored is not None and targets is not None:
            counted = counted[(targets != ignored).flatten()]
        if len(counted) and counted.max() - counted.min() > 1e-3 * counted.abs().max():
            logger.warning(UNEVEN)

    output.register_hook(check)  # type: ignore[no-untyped-call]


def check_statement(seen: Sequence[SeenLoss], logits: Tensor, likelihood: Likelihood) -> None:
    """Whether a stated likelihood is that of a loss that was seen on the same outputs.

    Raises:
        ValueError: it is of another kind, or has its classes in another dimension.
    """
    for loss in seen:
        terms = terms_of(loss)
        if terms.logits is not logits or not isinstance(
            likelihood, Bernoulli | Categorical | Gaussian
        ):
            continue
        found, dim = terms.likelihood, logits.dim()
        fits = type(found) is type(likelihood)
        if fits and isinstance(found, Categorical) and isinstance(likelihood, Categorical):
            fits = found.class_dim % dim == likelihood.class_dim % dim
        if not fits:
            raise ValueError(
                f"the loss seen on these outputs, torch's {loss.function}, is that of {found}, not "
                f"of {likelihood}: state that, or leave update out"
            )


def check_class_dim(logits: Tensor, likelihood: Likelihood) -> None:
    """Has the backward pass of the loss say where the classes are.

    A cross-entropy's gradient sums to zero over them. Where it does so over another dimension than
    the stated likelihood's, the backward pass raises a ValueError.
    """
    if not isinstance(likelihood, Categorical) or logits.dim() < 3:
        return
    stated = likelihood.class_dim % logits.dim()

    def check(gradient: Tensor) -> None:
        gradient = gradient.detach().float()
        limit = 1e-3 * gradient.abs().sum()
        sums = [gradient.sum(dim).abs().sum() <= limit for dim in range(gradient.dim())]
        fits = [dim for dim, fit in enumerate(torch.stack(sums).tolist()) if fit]
        if fits and stated not in fits and bool(limit > 0):
            raise ValueError(
                f"the likelihood says that the classes of outputs {list(logits.shape)} are in "
                f"dimension {stated}, but the loss's gradient sums to zero over dimension "
                f"{fits[0]}: state Categorical(class_dim={fits[0]}), or compute torch's "
                "cross_entropy inside record()"
            )

    logits.register_hook(check)  # type: ignore[no-untyped-call]
