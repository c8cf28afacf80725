"""Would-be gradients of the Fisher / GGN at a model's outputs.

A likelihood says which loss the outputs ("logits") go into. From it come vectors v with the shape
of the logits whose outer products average to the Hessian of the loss with respect to the logits:

- `mc`: gradients at labels *sampled from the model* (Monte-Carlo Fisher; eq. 5 of the paper);
- `type-2`: the columns of a square root of the loss Hessian (exact GGN);
- `empirical`: gradients at the true labels (not the Fisher; offered since peers use it).

Convention: v belongs to the negative log-likelihood of one *term*, unscaled. `terms` is the number
of terms that the mean loss divides by; factors divide by it once. A mask (bool or non-negative
weights) removes terms or weights them; masked entries may hold anything, NaN included.

Shapes: the first dimension of the logits counts the examples; a Categorical's classes are in
`class_dim`; everything else are terms of their own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .sampling import sampled_indices


@dataclass(frozen=True)
class Likelihood(ABC):
    """Base class. `scale` multiplies the loss of every term, and so the GGN, linearly."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be positive and finite, not {self.scale}")

    # ---- what a loss has to say -------------------------------------------------------------

    @abstractmethod
    def term_shape(self, logits: Tensor) -> torch.Size:
        """Shape of the loss terms: that of the logits without the class dimension."""

    @abstractmethod
    def _sampled(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Gradient of the negative log-likelihood at a sampled label, shape of the logits."""

    @abstractmethod
    def _at_targets(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Gradient of the negative log-likelihood at the given labels, shape of the logits."""

    @abstractmethod
    def _hessian_root(self, logits: Tensor) -> Iterator[Tensor]:
        """Columns of the square root of each term's Hessian; one per output of a term.

        Every yielded tensor has the shape of the logits and holds that column of all terms.
        """

    def _term_mask(
        self, mask: Tensor | None, logits: Tensor, targets: Tensor | None
    ) -> Tensor | None:
        """The mask in the shape of the terms, or None."""
        del targets
        return None if mask is None else self._expand_mask(mask, logits)

    def example_dim(self, logits: Tensor) -> int:
        """The dimension of the logits that counts the examples: the first of the terms'."""
        del logits
        return 0

    # ---- what the engine asks ---------------------------------------------------------------

    def terms(
        self, logits: Tensor, mask: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """Number of terms (sum of weights) of the mean loss, a scalar tensor."""
        mask = self._term_mask(mask, logits, targets)
        if mask is None:
            return torch.full((), float(self.term_shape(logits).numel()), device=logits.device)
        return mask.sum(dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)

    def would_be_gradients(
        self,
        logits: Tensor,
        *,
        fisher_type: str,
        mc_samples: int = 1,
        mask: Tensor | None = None,
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Vectors v (shape of the logits) with Σ v vᵀ = Hessian of the summed loss, per example.

        `mc` yields mc_samples vectors, each divided by √mc_samples; `empirical` one; `type-2` one
        for each output of an example, so that terms of one example are never mixed.

        The vectors are in float32 where the logits are in half precision.

        Raises:
            ValueError: unknown fisher_type, `empirical` without targets, targets or mask of
                another shape, negative weights or labels out of range (found on the CPU; elsewhere,
                where looking would synchronise, they make the vectors NaN).
        """
        logits = logits.detach()
        if logits.dtype in (torch.float16, torch.bfloat16):
            # Half precision would move probabilities: uniform numbers have 8 bits in bfloat16.
            logits = logits.float()
        if targets is not None:
            self._check_shape(logits, targets)
        weight = self._root_weight(mask, logits, targets)
        if fisher_type == "mc":
            root_samples = math.sqrt(mc_samples)
            for _ in range(mc_samples):
                yield self._weighted(self._sampled(logits, generator), weight) / root_samples
        elif fisher_type == "empirical":
            if targets is None:
                raise ValueError("fisher_type='empirical' needs the targets of the batch")
            if targets.device.type == "cpu":  # elsewhere looking would synchronise
                self._check_targets(logits, targets, self._term_mask(mask, logits, targets))
            yield self._weighted(self._at_targets(logits, targets), weight)
        elif fisher_type == "type-2":
            for column in self._hessian_root(logits):
                yield from self._one_term_at_a_time(self._weighted(column, weight))
        else:
            raise ValueError(
                f"fisher_type must be 'mc', 'type-2' or 'empirical', not {fisher_type!r}"
            )

    def _check_shape(self, logits: Tensor, targets: Tensor) -> None:
        """Raises a ValueError for targets of another shape."""
        if targets.shape != logits.shape:
            raise ValueError(
                f"the targets have shape {list(targets.shape)}, the logits {list(logits.shape)}: "
                "they would be broadcast; give both the same shape"
            )

    def _check_targets(self, logits: Tensor, targets: Tensor, mask: Tensor | None) -> None:  # noqa: B027
        """Raises a ValueError for labels that are none and are not masked."""

    # ---- shared -----------------------------------------------------------------------------

    def _expand_mask(self, mask: Tensor, logits: Tensor) -> Tensor:
        """Broadcasts a mask given per term, or per leading dimensions of the terms."""
        shape = self.term_shape(logits)
        if mask.shape != shape:
            if mask.shape != shape[: mask.dim()]:
                raise ValueError(
                    f"mask has shape {list(mask.shape)}; the loss has terms of shape {list(shape)} "
                    f"(logits {list(logits.shape)})"
                )
            mask = mask.reshape(*mask.shape, *(1,) * (len(shape) - mask.dim())).expand(shape)
        return mask

    def _root_weight(
        self, mask: Tensor | None, logits: Tensor, targets: Tensor | None
    ) -> Tensor | None:
        """√(weight · scale) in a shape that broadcasts over the logits, or None."""
        mask = self._term_mask(mask, logits, targets)
        if mask is None:
            return None if self.scale == 1.0 else logits.new_full((), math.sqrt(self.scale))
        if mask.device.type == "cpu" and mask.dtype != torch.bool and bool((mask < 0).any()):
            raise ValueError(
                f"the mask has negative weights (down to {float(mask.min()):g}); weights of loss "
                "terms must be at least 0"
            )
        return self._unsqueeze_classes((mask.to(logits.dtype) * self.scale).sqrt(), logits)

    def _unsqueeze_classes(self, per_term: Tensor, logits: Tensor) -> Tensor:
        """Gives a tensor of the terms' shape a class dimension of size 1 where logits have one."""
        del logits
        return per_term

    @staticmethod
    def _weighted(vector: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None or (weight.device.type == "cpu" and bool((weight == 1).all())):
            return vector
        return torch.where(weight == 0, 0, vector * weight)  # NaN stays, and is found

    def _one_term_at_a_time(self, column: Tensor) -> Iterator[Tensor]:
        """Splits a column into vectors that touch one term of every example each."""
        shape = self.term_shape(column)
        positions = shape[1:].numel()
        if positions == 1:
            yield column
            return
        for position in range(positions):
            index = torch.zeros(positions, dtype=torch.bool, device=column.device)
            index[position] = True
            index = index.reshape(1, *shape[1:]).expand(shape)
            yield torch.where(self._unsqueeze_classes(index, column), column, 0)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax cross-entropy; one term per distribution.

    Args:
        class_dim: dimension of the logits that holds the classes (-1, or 1 for PyTorch's layout
            [N, C, ...] of images and sequences).
        label_smoothing: only changes the empirical gradients; the Hessian with respect to the
            logits does not depend on the labels.
        ignore_index: label that marks terms without loss; needs `targets`.
    """

    class_dim: int = -1
    label_smoothing: float = 0.0
    ignore_index: int | None = None

    def _dim(self, logits: Tensor) -> int:
        return self.class_dim % logits.dim()

    def example_dim(self, logits: Tensor) -> int:
        return 1 if self._dim(logits) == 0 and logits.dim() > 1 else 0

    def term_shape(self, logits: Tensor) -> torch.Size:
        dim = self._dim(logits)
        return logits.shape[:dim] + logits.shape[dim + 1 :]

    def _unsqueeze_classes(self, per_term: Tensor, logits: Tensor) -> Tensor:
        return per_term.unsqueeze(self._dim(logits))

    def _term_mask(
        self, mask: Tensor | None, logits: Tensor, targets: Tensor | None
    ) -> Tensor | None:
        mask = super()._term_mask(mask, logits, targets)
        if self.ignore_index is None:
            return mask
        if targets is None:
            raise ValueError("ignore_index needs the targets of the batch")
        if targets.shape != self.term_shape(logits):
            raise ValueError(
                f"ignore_index needs class indices of shape {list(self.term_shape(logits))}, not "
                f"targets of shape {list(targets.shape)}"
            )
        valid = targets != self.ignore_index
        return valid if mask is None else mask * valid

    def _sampled(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        dim = self._dim(logits)
        p = logits.softmax(dim)
        flat = p.movedim(dim, -1).reshape(-1, p.shape[dim])
        # Rows that are not distributions (NaN under a mask) still need some label.
        usable = flat.isfinite().all(-1, keepdim=True)
        flat = torch.where(usable, flat, 1.0)
        labels = sampled_indices(flat, generator).reshape(self.term_shape(logits))
        return p - self._one_hot(labels, logits)

    def _one_hot(self, labels: Tensor, logits: Tensor) -> Tensor:
        dim = self._dim(logits)
        return torch.zeros_like(logits).scatter_(dim, labels.unsqueeze(dim), 1.0)

    def _check_shape(self, logits: Tensor, targets: Tensor) -> None:
        if targets.shape not in (self.term_shape(logits), logits.shape):
            raise ValueError(
                f"the targets have shape {list(targets.shape)}; class indices have the shape "
                f"{list(self.term_shape(logits))}, soft labels that of the logits, "
                f"{list(logits.shape)} (classes in dimension {self._dim(logits)})"
            )

    def _check_targets(self, logits: Tensor, targets: Tensor, mask: Tensor | None) -> None:
        if targets.shape != self.term_shape(logits) or targets.shape == logits.shape:
            return
        classes = logits.shape[self._dim(logits)]
        wrong = (targets < 0) | (targets >= classes)
        wrong = wrong if mask is None else wrong & (mask != 0)
        if bool(wrong.any()):
            raise ValueError(
                f"label {int(targets[wrong][0])} is not in 0 .. {classes - 1}: mask the terms that "
                "have no label, or give Categorical(ignore_index=...)"
            )

    def _at_targets(self, logits: Tensor, targets: Tensor) -> Tensor:
        dim, smoothing = self._dim(logits), self.label_smoothing
        classes = logits.shape[dim]
        if targets.shape == logits.shape:
            q = (1 - smoothing) * targets.to(logits.dtype) + smoothing / classes
            return logits.softmax(dim) * q.sum(dim, keepdim=True) - q
        labels = targets.long()
        known = (labels >= 0) & (labels < classes)  # others may stand under a mask
        less = torch.where(known, smoothing - 1, torch.nan).to(logits.dtype).unsqueeze(dim)
        p = logits.softmax(dim)  # in place from here: passes over it are what this costs
        if smoothing:
            p.sub_(smoothing / classes)
        return p.scatter_add_(dim, torch.where(known, labels, 0).unsqueeze(dim), less)

    def _hessian_root(self, logits: Tensor) -> Iterator[Tensor]:
        # diag(p) - p pᵀ = Σ_c s_c s_cᵀ with s_c = √p_c (e_c - p).
        dim = self._dim(logits)
        p = logits.softmax(dim)
        for c in range(p.shape[dim]):
            column = -p * p.select(dim, c).unsqueeze(dim).sqrt()
            column.select(dim, c).add_(p.select(dim, c).sqrt())
            yield column


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Sigmoid cross-entropy; every logit is a term, unless the mask removes it."""

    label_smoothing: float = 0.0

    def term_shape(self, logits: Tensor) -> torch.Size:
        return logits.shape

    def _sampled(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        p = logits.sigmoid()
        uniform = torch.rand(p.shape, generator=generator, dtype=p.dtype, device=p.device)
        return p - (uniform < p).to(p.dtype)

    def _at_targets(self, logits: Tensor, targets: Tensor) -> Tensor:
        q = (1 - self.label_smoothing) * targets.to(logits.dtype) + 0.5 * self.label_smoothing
        return logits.sigmoid() - q

    def _hessian_root(self, logits: Tensor) -> Iterator[Tensor]:
        p = logits.sigmoid()
        yield (p * (1 - p)).sqrt()


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Squared error; every output is a term.

    Args:
        variance: σ² of the likelihood. 0.5 makes the negative log-likelihood of a term (f - y)²,
            the term of `torch.nn.MSELoss`; 1.0 makes it (f - y)² / 2.
    """

    variance: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.variance) and self.variance > 0):
            raise ValueError(f"variance must be positive and finite, not {self.variance}")

    def term_shape(self, logits: Tensor) -> torch.Size:
        return logits.shape

    def _sampled(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(
            logits.shape, generator=generator, dtype=logits.dtype, device=logits.device
        )
        return noise / math.sqrt(self.variance)

    def _at_targets(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits - targets) / self.variance

    def _hessian_root(self, logits: Tensor) -> Iterator[Tensor]:
        yield torch.full_like(logits, 1 / math.sqrt(self.variance))


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}


def as_likelihood(likelihood: Likelihood | str) -> Likelihood:
    """A likelihood object from its name, or the object itself.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"likelihood must be one of {', '.join(LIKELIHOODS)} or a Likelihood, "
            f"not {likelihood!r}"
        )
    return LIKELIHOODS[likelihood]()
