"""Makes new inverses of the averages: at once, or beside training, which goes on with the old ones.

In the background they are made by a thread, on a GPU on a stream of its own, and come into use at
the next step. They take what the device has left: the rest of this step, the loading of data, and
the next step's passes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import distributed
from .config import KFACConfig
from .eigenbasis_adam import turn_moments
from .inverses import Inverse, InverseSettings, invert_all
from .placements import exchange_inverses
from .state import KFACState
from .statistics import KroneckerPart, Part

EXPLICIT = 1 << 30  # uses of an inverse that are always worth an explicit one

logger = logging.getLogger(__name__)

Made = dict[str, Inverse]


@dataclass(frozen=True)
class _Begun:
    """Inverses that are being made: of which parts, by which rank, and where they come from."""

    parts: list[Part]
    mine: list[Part]
    owners: Mapping[str, int]
    made: Callable[[], Made]


class InverseRenewal:
    """Renews the inverses of a `KFACState`: `begin`, then `finish`.

    Attributes:
        in_background: whether what was begun is to be finished in the next step.
    """

    def __init__(self, config: KFACConfig) -> None:
        self._config = config
        self._begun: _Begun | None = None
        self.in_background = False

    def begin(self, state: KFACState, parts: Sequence[Part], owners: Mapping[str, int]) -> None:
        """Starts to make inverses of the averages of these parts.

        Args:
            owners: layer name -> the rank that computes its inverse, see `placements`; every rank
                computes those of parts that are not in it.
        """
        rank = distributed.rank()
        present = [part for part in parts if part.name in state.averages]
        mine = [part for part in present if owners.get(part.name, rank) == rank]
        settings = InverseSettings(
            kind=self._config.damping_kind,
            damping=state.damping,
            relative=self._config.relative_damping,
            uses=EXPLICIT if owners and self._exchanges else self._config.inverse_update_steps,
        )
        make: Callable[[], Made] = partial(invert_all, mine, dict(state.averages), settings)
        have_old = all(part.name in state.inverses for part in present)
        self.in_background = self._may_be_late and not owners and have_old
        if self.in_background and present:
            make = _Background(make, present[0].slices[0].data.device).result
        self._begun = _Begun(present, mine, owners, make)
        state.inverses_stale = state.damping_changed = False

    def finish(self, state: KFACState, parts: Sequence[Part]) -> list[str] | None:
        """Takes the inverses that were begun into use; waits for them.

        Args:
            parts: all parts that are in use.

        Returns:
            Names of the parts whose average could not be inverted; their old inverse stays. None if
            nothing was begun.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return None
        self.in_background = False
        try:
            made = begun.made()
        except BaseException:
            state.inverses_stale = True
            raise
        present = begun.parts
        lost = {part.name for part in begun.mine} - made.keys()
        failed = [float(part.name in lost) for part in present]
        if begun.owners and present:
            flags = torch.tensor(failed, device=present[0].slices[0].data.device)
            distributed.all_reduce_sums([flags])
            failed = flags.tolist()
        names = [part.name for part, flag in zip(present, failed, strict=True) if flag]
        if begun.owners and self._exchanges:
            layers = [
                part
                for part in present
                if isinstance(part, KroneckerPart) and part.name not in names
            ]
            kind = self._config.damping_kind
            made.update(exchange_inverses(layers, begun.owners, made, kind))
        old = dict(state.inverses)
        state.inverses.update({name: made[name] for name in made if name not in names})
        turn_moments(state.moments, parts, old, state.inverses)
        state.corrections = 0
        return names

    def drop(self) -> bool:
        """Forgets what was begun, after waiting for it; returns whether there was anything."""
        begun, self._begun = self._begun, None
        self.in_background = False
        if begun is not None:
            try:
                begun.made()
            except Exception:
                logger.warning("K-FAC: inverses that are not needed any more failed", exc_info=True)
        return begun is not None

    @property
    def _may_be_late(self) -> bool:
        """Whether the settings allow for inverses that come into use in the next step.

        Corrected eigenvalues are of this step's rows in the new basis. Other precisions than
        float32 are switched on for the whole process, and so for the thread.
        """
        plain = self._config.factor_precision == "float32"
        return self._config.background_inverses and plain and not self._config.eigenvalue_correction

    @property
    def _exchanges(self) -> bool:
        return self._config.inverse_placement == "exchanged"


class _Background:
    """Work in a thread; on a GPU, on a stream that begins where the caller's is now."""

    def __init__(self, work: Callable[[], Made], device: torch.device) -> None:
        self._device = device
        self._work: Callable[[], Made] | None = work
        stream: Any = torch.cuda.Stream
        self._stream = stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        thread = ThreadPoolExecutor(1, thread_name_prefix="kfac-inverses")
        self._future = thread.submit(self._run)
        thread.shutdown(wait=False)  # it ends when the work is done

    def _run(self) -> Made:
        own = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        assert self._work is not None
        with torch.no_grad(), own:
            made = self._work()
        if self._stream is None:  # else what it reads must not be freed before `result`
            self._work = None
        return made

    def result(self) -> Made:
        """What the work returns, or raises; the caller's stream waits for it."""
        made = self._future.result()
        if self._stream is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._stream)
            for inverse in made.values():
                for tensor in inverse.values():
                    tensor.record_stream(here)
        return made
