"""Everything that K-FAC carries from step to step, and how it is saved and restored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .eigenbasis_adam import Moments
from .inverses import Inverse
from .statistics import Sums

STATE_VERSION = 4


def _no_failures() -> dict[str, int]:
    return {"statistics": 0, "inverse": 0, "memory": 0}


def _no_seconds() -> dict[str, float]:
    return {"factors": 0.0, "inverses": 0.0, "precondition": 0.0}


@dataclass
class KFACState:
    """The mutable state of `KFAC`.

    Attributes:
        damping: λ in use.
        approx: "expand" or "reduce"; None until it is decided.
        step: finished steps.
        updates: part name -> factor updates in its moving average.
        corrections: updates of the corrected eigenvalues in the present basis.
        inverses_stale: whether inverses have to be made: there are none yet, or some are missing.
        damping_changed: whether the damping has changed since the inverses were made.
        failures, failures_in_a_row: updates that were dropped, by kind.
        seconds: time spent, by phase.
        examples_share: share of the examples whose rows enter the factors; halved whenever memory
            runs out.
        called: names of the layers that were called as modules so far; None before the first
            update.
        shared_over: part name -> how its rows are shared, in words.
        averages: part name -> averages (see `curvature.average_sums`).
        inverses: part name -> inverse.
        moments, count: of `eigenbasis_adam`: part name -> moments, and the number of steps in them.
    """

    damping: float
    approx: str | None
    step: int = 0
    updates: dict[str, int] = field(default_factory=dict)
    corrections: int = 0
    inverses_stale: bool = True
    damping_changed: bool = False
    failures_in_a_row: int = 0
    failures: dict[str, int] = field(default_factory=_no_failures)
    seconds: dict[str, float] = field(default_factory=_no_seconds)
    examples_share: float = 1.0
    called: list[str] | None = None
    shared_over: dict[str, str] = field(default_factory=dict)
    averages: dict[str, Sums] = field(default_factory=dict)
    inverses: dict[str, Inverse] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    count: Tensor | None = None

    def keep_only(self, names: Collection[str]) -> None:
        """Forgets what is known of parts that are not among the names."""
        for known in (self.averages, self.inverses, self.updates, self.moments):
            for name in known.keys() - set(names):
                del known[name]

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain Python values only."""
        return {
            "version": STATE_VERSION,
            "damping": self.damping,
            "approx": self.approx,
            "step": self.step,
            "updates": dict(self.updates),
            "corrections": self.corrections,
            "inverses_stale": self.inverses_stale,
            "damping_changed": self.damping_changed,
            "failures_in_a_row": self.failures_in_a_row,
            "failures": dict(self.failures),
            "seconds": dict(self.seconds),
            "examples_share": self.examples_share,
            "called": None if self.called is None else list(self.called),
            "shared_over": dict(self.shared_over),
            "averages": {name: dict(sums) for name, sums in self.averages.items()},
            "inverses": {name: dict(inverse) for name, inverse in self.inverses.items()},
            "moments": {name: dict(moments) for name, moments in self.moments.items()},
            "count": self.count,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], device: torch.device) -> KFACState:
        """The state again, its tensors on `device`.

        Raises:
            ValueError: it was saved by another version.
        """
        if saved.get("version") != STATE_VERSION:
            raise ValueError(
                f"K-FAC state has version {saved.get('version')}, this code reads {STATE_VERSION}"
            )
        return cls(
            damping=float(saved["damping"]),
            approx=saved["approx"],
            step=int(saved["step"]),
            updates={k: int(v) for k, v in saved["updates"].items()},
            corrections=int(saved["corrections"]),
            inverses_stale=bool(saved["inverses_stale"]),
            damping_changed=bool(saved["damping_changed"]),
            failures_in_a_row=int(saved["failures_in_a_row"]),
            failures={k: int(v) for k, v in saved["failures"].items()},
            seconds={k: float(v) for k, v in saved["seconds"].items()},
            examples_share=float(saved["examples_share"]),
            called=None if saved["called"] is None else list(saved["called"]),
            shared_over=dict(saved["shared_over"]),
            averages=_to_device(saved["averages"], device),
            inverses=_to_device(saved["inverses"], device),
            moments=_to_device(saved["moments"], device),
            count=None if saved["count"] is None else saved["count"].to(device, copy=True),
        )


def _to_device(
    tensors: Mapping[str, Mapping[str, Tensor]], device: torch.device
) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: value.detach().to(device, copy=True) for key, value in group.items()}
        for name, group in tensors.items()
    }
