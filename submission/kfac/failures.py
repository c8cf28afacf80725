"""What is done about updates that could not be used: counted, logged, and ended if they go on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from .state import KFACState

logger = logging.getLogger(__name__)


class KFACError(RuntimeError):
    """Training cannot go on: too many updates in a row failed."""


@dataclass(frozen=True)
class Trouble:
    """Something that went wrong in a step: a key of `KFACState.failures`, and what, in words."""

    kind: str
    message: str


def account(
    state: KFACState, troubles: Sequence[Trouble], *, updated: bool, max_failures: int
) -> None:
    """Counts the troubles of a step that has ended; an update with any is one failure in a row.

    Args:
        updated: whether the step has taken in statistics, which ends failures in a row.

    Raises:
        KFACError: `max_failures` updates in a row have failed.
    """
    if not troubles:
        if updated:
            state.failures_in_a_row = 0
        return
    for trouble in troubles:
        state.failures[trouble.kind] += 1
        logger.warning(
            "K-FAC step %d: %s; the previous ones stay in use", state.step - 1, trouble.message
        )
    state.failures_in_a_row += 1
    if state.failures_in_a_row >= max_failures:
        raise KFACError(
            f"{state.failures_in_a_row} K-FAC updates in a row failed, the last because "
            f"{troubles[-1].message}. Lower the learning rate or raise the damping (now "
            f"{state.damping:g})."
        )
