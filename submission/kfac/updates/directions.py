"""Update rules: what is written in place of a gradient. One class each, in RULES by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..blocks.batches import Batch, make_batches
from ..blocks.block import Block, Inverse, statistics_dtype
from ..blocks.factors import EigenInverse
from ..linalg.eigenbasis import AdamStep, Basis, Moments, directions
from ..linalg.polar import with_equal_singular_values
from ..ranks.placement import exchange_gradients
from ..state import KFACState

Gradients = Mapping[str, Tensor | None]
Done = list[tuple[Block, Tensor]]


class RuleSettings(Protocol):
    """The settings of `KFACConfig` that rules read."""

    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def inverse_placement(self) -> str: ...


class Rule(ABC):
    """An update rule for blocks in batches; made anew when inverses or blocks are.

    Args:
        state: holds the inverses and moments of blocks.
        blocks: all blocks.
        parameters: name -> parameter.
        config: the settings.
        owners: name of a block -> the rank that computes its inverse.

    Attributes:
        is_finished: whether the results are updates to be multiplied by a learning rate, of
            Adam's size; else they are preconditioned gradients.
        follows_basis: whether it needs a basis near the eigenvectors, but no eigenvalues.
        needs: name of a setting -> the values that the rule works with.
        ignores: names of settings that it makes nothing of.
    """

    is_finished: ClassVar[bool] = False
    follows_basis: ClassVar[bool] = False
    needs: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignores: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        state: KFACState,
        blocks: Sequence[Block],
        parameters: Mapping[str, Tensor],
        config: RuleSettings,
        owners: Mapping[str, int],
    ) -> None:
        self.blocks, self._state, self._config, self._owners = blocks, state, config, owners
        self._parameters = parameters

    @abstractmethod
    def directions(self, gradients: Gradients) -> Done:
        """The results of one step, of blocks that have any; may change the moments."""

    def _like(self, block: Block) -> Tensor:
        return self._parameters[block.pieces[0].parameter]


class Preconditioned(Rule):
    """(curvature + damping)⁻¹ times the gradients, of blocks that have an inverse."""

    ignores = ("betas", "epsilon")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        inverses = {b.name: self._state.of(b).inverse for b in self.blocks}

        def put(name: str, inverse: Inverse) -> None:
            self._state.blocks[name].inverse = inverse

        present = [block for block in self.blocks if inverses[block.name] is not None]
        self._batches = make_batches(present, inverses, put, self._like)

    def directions(self, gradients: Gradients) -> Done:
        done: Done = []
        for batch in self._batches:
            for part, own in self._with_gradients(batch, gradients):
                joined = part.join([g.to(statistics_dtype(g)) for g in own])
                done += zip(part.blocks, part.separate(part.object.apply(joined), own), strict=True)
        if self._owners and self._config.inverse_placement == "one_rank":
            return self._exchanged(done, gradients)
        return done

    def _exchanged(self, done: Done, gradients: Gradients) -> Done:
        """The results of all ranks, where each keeps only its own blocks' inverses."""
        results = {block.name: value for block, value in done}
        exchanged: dict[str, Tensor] = {}
        for block in self.blocks:
            if block.name in self._owners:
                own = results.get(block.name)
                gradient = block.read(gradients) if own is None else own
                if gradient is not None:
                    # In memory of its own: it is written into the gradients later.
                    exchanged[block.name] = gradient.to(
                        statistics_dtype(gradient), copy=True, memory_format=torch.contiguous_format
                    )
        exchange_gradients(exchanged, self._owners)
        results.update(exchanged)
        return [(block, results[block.name]) for block in self.blocks if block.name in results]

    def _with_gradients(
        self, batch: Batch, gradients: Gradients
    ) -> list[tuple[Batch, list[Tensor]]]:
        """A batch with its gradients, or its blocks one by one where some have none."""
        own = [block.read(gradients) for block in batch.blocks]
        present = [g for g in own if g is not None]
        if len(present) == len(own):
            return [(batch, present)]
        return [
            (Batch((block,), None, self._state.of(block).inverse), [gradient])
            for block, gradient in zip(batch.blocks, own, strict=True)
            if gradient is not None
        ]


class EigenbasisAdam(Rule):
    """Adam's updates in the eigenbasis of the factors, see `linalg.eigenbasis`."""

    is_finished = True
    follows_basis = True
    needs: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "damping_kind": ("exact",),  # whose eigenvectors are the basis
        "eigenvalue_correction": (False,),
        "inverse_placement": ("every_rank", "exchanged"),  # the moments are on every rank
    }
    ignores = ("damping", "relative_damping", "fallback", "norm_rows")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        bases = {block.name: self._basis(block) for block in self.blocks}

        def put(name: str, basis: Basis) -> None:
            inverse = self._state.blocks[name].inverse
            assert isinstance(inverse, EigenInverse)
            inverse.basis = basis

        self._batches = make_batches(self.blocks, bases, put, self._like)
        self._moments: list[Moments | None] = [None] * len(self._batches)

    def _basis(self, block: Block) -> Basis | None:
        inverse = self._state.of(block).inverse
        basis = None if inverse is None else inverse.eigenbasis()
        return None if basis is None or basis.is_trivial else basis

    def directions(self, gradients: Gradients) -> Done:
        ready: list[tuple[Batch, list[Tensor], Moments]] = []
        for number, batch in enumerate(self._batches):
            own = [block.read(gradients) for block in batch.blocks]
            present = [g.to(statistics_dtype(g)) for g in own if g is not None]
            if len(present) == len(own):
                moments = self._moments[number]
                if moments is None:
                    moments = self._moments[number] = self._joined_moments(batch, present)
                ready.append((batch, present, moments))
                continue
            self._moments[number] = None
            with_gradient = (b for b, g in zip(batch.blocks, own, strict=True) if g is not None)
            for block, gradient in zip(with_gradient, present, strict=True):
                single = Batch((block,), None, self._basis(block))
                ready.append((single, [gradient], self._joined_moments(single, [gradient])))
        if not ready:
            return []
        joined = [batch.join(own) for batch, own, _ in ready]
        config = self._config
        step = AdamStep.of(self._state.count, joined, betas=config.betas, epsilon=config.epsilon)
        self._state.count = step.count
        bases = [batch.object or Basis() for batch, _, _ in ready]
        updates = directions(bases, [moments for _, _, moments in ready], joined, step)
        done: Done = []
        for (batch, like, _), basis, update in zip(ready, bases, updates, strict=True):
            finished = update if basis.is_trivial else self._finished(update)
            done += zip(batch.blocks, batch.separate(finished, like), strict=True)
        return done

    def _finished(self, update: Tensor) -> Tensor:
        """The update of blocks with a basis [groups, P_out, P_in], out of the basis again."""
        return update

    def _joined_moments(self, batch: Batch, like: Sequence[Tensor]) -> Moments:
        """The moments of a batch; those that the state keeps become views, and change with them."""
        own = []
        for block, gradient in zip(batch.blocks, like, strict=True):
            kept = self._state.of(block).moments
            own.append(Moments.zeros_like(gradient) if kept is None else kept)
        first, second = batch.join([m.first for m in own]), batch.join([m.second for m in own])
        views = zip(batch.separate(first, like), batch.separate(second, like), strict=True)
        for block, (one, two) in zip(batch.blocks, views, strict=True):
            self._state.of(block).moments = Moments(one, two)
        return Moments(first, second)


class EigenbasisPolar(EigenbasisAdam):
    """The polar factors of Adam's updates in the eigenbasis, as large as the updates.

    Muon (Jordan et al. 2024) takes the momentum to its polar factor; here it is the update of the
    rule above, which has the curvature's scale already. Matrices with a side above LARGEST_SIDE
    keep the update of the rule above.
    """

    LARGEST_SIDE = 16_384  # of vocabularies, which Muon's authors leave to Adam, too: dear to do

    def _finished(self, update: Tensor) -> Tensor:
        is_large = max(update.shape[-2:]) > self.LARGEST_SIDE
        return update if is_large else with_equal_singular_values(update)


RULES: dict[str, type[Rule]] = {
    "preconditioned": Preconditioned,
    "eigenbasis_adam": EigenbasisAdam,
    "eigenbasis_polar": EigenbasisPolar,
}
