"""The model as recorded passes have shown it: parameters, their blocks, and who inverts them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .blocks.block import Block, Collecting, Sums, statistics_dtype
from .blocks.structure import Structure, check_excluded
from .config import KFACConfig
from .discovery import (
    found_in,
    merged_over_ranks,
    place_examples,
    structure_from,
    tracked,
    trainable_parameters,
    unwrap,
    warn_of_low_coverage,
)
from .fisher.collect import Collection
from .fisher.losses import LossTerms
from .fisher.setting import detect_setting, warn_of_folded_positions
from .fisher.step import RecordedPass
from .operations.compiled import CompiledModules, modules_run_by, uncompiled
from .operations.record import Recording
from .operations.traced import RefusalError
from .operations.uses import Use
from .ranks import collectives
from .ranks.placement import owners, turns_of
from .ranks.sharded import wholes_seen
from .state import KFACState

logger = logging.getLogger(__name__)


class SeenModel:
    """What is known of a model; `discover` adds what a recorded pass shows.

    Args:
        model: wrappers are looked through.
        config: what counts as a Kronecker block, and where inverses are kept.
        state: keeps what was seen; the curvature of blocks that change is dropped from it.

    Attributes:
        parameters: name -> trainable parameter.
        structure: the blocks.
        observed: names of the blocks whose statistics are collected.
        owners: name of a block -> the rank that computes its inverse; empty where every rank does.
        turns: name of a block -> the step of an interval that renews its inverse; None where one
            step renews all.
    """

    def __init__(self, model: nn.Module, config: KFACConfig, state: KFACState) -> None:
        self._model, self._config, self._state = unwrap(model), config, state
        check_excluded(config.exclude, (name for name, _ in self._model.named_parameters()))
        self._look_at_parameters()
        self.structure, self._structures = Structure(), 0
        self._noted: set[str] = set()  # parameters whose other uses were looked at
        self._found: tuple[dict[Any, None], dict[str, str]] = ({}, {})  # by this rank alone
        self._restructure()
        self._compiled = CompiledModules(self._is_summed, self._dtype_of)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without compiled functions."""
        return {**self.__dict__, "_compiled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compiled = CompiledModules(self._is_summed, self._dtype_of)

    # ---- parameters ---------------------------------------------------------------------------

    def _look_at_parameters(self) -> None:
        self.parameters = trainable_parameters(self._model)
        self._all_parameters = list(self._model.parameters())
        self._trains = self._requires_grad()

    def _requires_grad(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._all_parameters]

    @property
    def is_outdated(self) -> bool:
        """Whether parameters were frozen or unfrozen since they were looked at."""
        return self._trains != self._requires_grad()

    def follow(self) -> None:
        """Follows parameters that were replaced, added, frozen or unfrozen."""
        before = {name: parameter.shape for name, parameter in self.parameters.items()}
        self._look_at_parameters()
        if before != {name: parameter.shape for name, parameter in self.parameters.items()}:
            changed = {n for n, p in self.parameters.items() if before.get(n, p.shape) != p.shape}
            if self._state.uses is not None:
                self._state.uses = {
                    use: None
                    for use in self._state.uses
                    if not any(piece.parameter in changed for piece in use.pieces)
                }
            self._restructure()
            self._state.inverses_stale = True

    @property
    def tracked(self) -> dict[str, nn.Parameter]:
        """The parameters whose uses are recorded."""
        return tracked(self.parameters, self._config.exclude)

    @contextmanager
    def followed_by(self, recording: Recording, *, may_sum: bool) -> Iterator[None]:
        """Inside, a recording sees the model's operations, on the whole of sharded parameters.

        Args:
            may_sum: whether compiled modules may give sums over positions in place of rows.
        """
        compiled = self._compiled
        compiled.recording, compiled.may_compile = recording, may_sum
        compiled.structure_key = self._structures
        with (
            uncompiled(),
            modules_run_by(compiled.run if self._gives_sums else None),
            wholes_seen(self._model, recording.see_whole),
            recording,
        ):
            yield
        compiled.recording = None

    @property
    def _gives_sums(self) -> bool:
        """Whether what is collected are sums over the positions of each example."""
        config = self._config
        return (
            config.fisher_type == "empirical"
            and self._state.approx == "reduce"
            and not config.eigenvalue_correction
            and self._state.examples_share == 1
        )

    def _is_summed(self, use: Use) -> bool:
        role = self.structure.roles.get(use)
        if role is None or role.block not in self.observed:
            return False
        block = self.structure.by_name[role.block]
        if not block.takes_sums:
            raise RefusalError(f"the statistics of '{block.name}' are no sums over positions")
        return True

    def _dtype_of(self, use: Use) -> torch.dtype:
        return statistics_dtype(self.parameters[use.pieces[0].parameter])

    @property
    def names(self) -> list[str]:
        """Names that a mapping of `sharing` may use: of blocks, parameters, and all modules."""
        modules = (name for name, _ in self._model.named_modules())
        blocks = (block.name for block in self.structure.blocks)
        return list(dict.fromkeys([*blocks, *self.parameters, *modules]))

    # ---- saved states ---------------------------------------------------------------------------

    @property
    def _shares_inverses(self) -> bool:
        return self._config.inverse_placement == "one_rank" and bool(self.owners)

    def to_dict(self) -> dict[str, Any]:
        """What tells whether a saved state fits."""
        return {
            "kfac_approx": self._config.kfac_approx,
            "parameters": list(self.parameters),
            "inverses_complete": not self._shares_inverses,
        }

    def restore(self, saved: Mapping[str, Any], device: torch.device) -> KFACState:
        """A saved state again, with which it goes on.

        Raises:
            ValueError: it is of another version, approximation or model; nothing has changed then.
        """
        state, approx = KFACState.from_dict(saved, device), self._config.kfac_approx
        if saved["kfac_approx"] != approx:
            raise ValueError(
                f"K-FAC state was made with kfac_approx={saved['kfac_approx']!r}, not {approx!r}"
            )
        self._check(state, list(saved["parameters"]))
        if not saved["inverses_complete"]:
            # It has those of one rank: all make theirs anew, at the same step.
            state.inverses_stale = True
        self._state, self._found = state, ({}, {})
        self._look_at_parameters()
        self.structure = Structure()
        self._restructure()
        if self._shares_inverses:
            for name, owner in self.owners.items():
                if owner != collectives.rank():
                    state.of(self.structure.by_name[name]).inverse = None
        return state

    def _check(self, state: KFACState, names: Sequence[str]) -> None:
        """Raises a ValueError unless a state is of this model."""
        parameters = trainable_parameters(self._model)
        differing = sorted(set(parameters) ^ set(names))
        for use in state.uses or {}:
            for piece in use.pieces:
                size = parameters[piece.parameter].numel() if not differing else 0
                fits = piece.numel == size if piece.is_whole else piece.offset < size
                if not differing and not fits:
                    differing = [f"the size of {piece.parameter}"]
        if differing or list(parameters) != list(names):
            raise ValueError(f"K-FAC state belongs to another model: it differs in {differing[:5]}")

    # ---- blocks -------------------------------------------------------------------------------

    def _restructure(self) -> None:
        """Makes the blocks anew; what is kept of those that are the same stays."""
        state, before = self._state, self.structure.by_name
        self._structures += 1
        self.structure = structure_from(
            state.uses, state.others, self.parameters, self._config, state.approx or "expand"
        )
        now = self.structure.by_name
        for name in list(state.blocks):
            if name not in now or before.get(name, now[name]) != now[name]:
                del state.blocks[name]
        adam = self._config.rule.is_finished
        self.observed = [b.name for b in self.structure.blocks if b.has_factors or not adam]
        config = self._config
        costs = {block.name: block.cost() for block in self.preconditioned}
        in_turns = config.renewal == "in_turns"
        self.turns = turns_of(costs, config.inverse_update_steps) if in_turns else None
        costs = {b.name: b.cost() for b in self.structure.blocks if b.has_factors}
        self.owners = owners(costs, config.inverse_placement, self.turns)

    @property
    def observed_blocks(self) -> list[Block]:
        """The blocks whose statistics are collected."""
        by_name = self.structure.by_name
        return [by_name[name] for name in self.observed]

    @property
    def preconditioned(self) -> list[Block]:
        """The blocks that are not trained by their raw gradient."""
        raw = self._config.fallback == "gradient"
        return [b for b in self.structure.blocks if b.has_factors or not raw]

    def collection(self, recorded: RecordedPass) -> Collection:
        """What collects the statistics of a recorded pass."""
        config = self._config
        # Sums of few rows may stay rows: as long as factors, or, if these are diagonalised or
        # averaged over time, until then. Not if they are added over ranks.
        is_average = config.factor_decay > 0 or config.damping_kind == "exact"
        uses = 0 if is_average else config.inverse_update_steps
        collecting = Collecting(
            like=torch.empty(0, device=next(iter(self.parameters.values())).device),
            ragged_scaling=config.ragged_scaling,
            uses=None if collectives.world_size() > 1 else uses,
            keeps_rows=config.eigenvalue_correction,
        )
        return Collection(
            recorded.recording,
            self.structure,
            self.observed,
            self.parameters,
            collecting,
            sharing=recorded.sharing,
            examples_share=self._state.examples_share,
            precision=config.factor_precision,
        )

    def forget_averages(self, recorded: RecordedPass) -> None:
        """Lets go of the curvature of the blocks that a recorded pass has called."""
        if collectives.world_size() > 1:  # ranks may call different blocks
            return
        for call in recorded.recording.calls:
            role = self.structure.roles.get(call.use)
            if role is not None and role.block in self._state.blocks:
                self._state.blocks[role.block].curvature = None

    def empty_sums(self) -> dict[str, Callable[[int], Sums]]:
        """Name of an observed block -> what makes its empty sums from the number of losses."""
        found: dict[str, Callable[[int], Sums]] = {}
        for block in self.observed_blocks:
            parameter = self.parameters[block.pieces[0].parameter]
            own = Collecting(torch.empty(0)).for_parameter(parameter)
            found[block.name] = partial(block.empty_sums, own)
        return found

    # ---- discovery ------------------------------------------------------------------------------

    def discover(self, recorded: RecordedPass, losses: list[LossTerms]) -> None:
        """Finds blocks that are not known yet, over all ranks the first time.

        Also decides the approximation where that was left open.
        """
        state, recording, known = self._state, recorded.recording, self._state.uses
        unplaced = place_examples(recording, losses, recorded.sharing)
        noted = recording.others.keys() - self._noted
        if known is not None and not noted and all(call.use in known for call in recording.calls):
            return
        uses, others = found_in(recording, losses, self.parameters, unplaced)
        self._noted |= recording.others.keys()
        if known is None:
            state.uses, state.others = merged_over_ranks(uses, others)
            self._restructure()
            self._look_at_outputs(recorded, losses[0])
            warn_of_low_coverage(self.structure)
            return
        new = {use: None for use in uses if use not in known}
        new_others = {name: how for name, how in others.items() if name not in state.others}
        if collectives.world_size() > 1:
            self._found = ({**self._found[0], **new}, {**self._found[1], **new_others})
        elif new or new_others:
            self._take_up(new, new_others)

    def _look_at_outputs(self, recorded: RecordedPass, loss: LossTerms) -> None:
        examples = self.collection(recorded).numbers_of_examples()
        if self._state.approx is None:
            self._state.approx, reason = detect_setting(
                loss.likelihood, loss.logits, recorded.sharing, examples.values()
            )
            self._restructure()
            logger.info("K-FAC-%s is chosen: %s", self._state.approx, reason)
        if recorded.sharing is None and self._state.approx == "reduce":
            warn_of_folded_positions(examples, loss.likelihood, loss.logits)

    @property
    def discoveries(self) -> int:
        """Number of uses that only this rank knows of."""
        return len(self._found[0]) + len(self._found[1])

    def share_discoveries(self) -> None:
        """Takes up what any rank has found; on all ranks together."""
        found, self._found = self._found, ({}, {})
        self._take_up(*merged_over_ranks(*found))

    def _take_up(self, uses: Mapping[Any, None], others: Mapping[str, str]) -> None:
        state, before = self._state, len(self.structure.blocks)
        state.uses = {**(state.uses or {}), **uses}
        state.others = {**others, **state.others}
        self._restructure()
        state.inverses_stale = True
        logger.info(
            "K-FAC: seen for the first time: %d uses of parameters (%d blocks, %d before)",
            len(uses) + len(others), len(self.structure.blocks), before,
        )  # fmt: skip
