"""How runs are named, grouped and identified in wandb. Needs no wandb."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from steps_to_target.model import Identity

DESCRIPTION = "steps_to_target_run"
"""Config entry that says what a run is: identity, JSON files, and of a pushed run a digest."""

PUBLISHED = "published"
"""Job type of a row that is no run of one's own: the paper's, or a leaderboard's."""


def describe(
    identity: Identity,
    *,
    hparams: Mapping[str, Any],
    meta: Mapping[str, Any],
    flags: Mapping[str, Any],
) -> dict[str, Any]:
    """The config entry under ``DESCRIPTION``: all that a verdict needs beside the history.

    A launcher writes it at the start of a run, so that the live run gives the same verdict as the
    folder that it writes.

    Args:
        identity: which run it is.
        hparams, meta, flags: the contents of the run's JSON files.
    """
    return {
        "identity": asdict(identity),
        "hparams": dict(hparams),
        "meta": dict(meta),
        "flags": dict(flags),
    }


def run_id(identity: Identity) -> str:
    """An id that depends on what the run is, so that pushing it again finds it again."""
    parts = (
        identity.workload,
        identity.framework,
        identity.method,
        identity.study,
        identity.trial,
    )
    return "stt" + hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:16]


def run_name(identity: Identity) -> str:
    """Name in the runs table."""
    return f"{identity.method} {identity.workload} s{identity.study} t{identity.trial}"


def run_group(identity: Identity) -> str:
    """Group: all studies and trials of one method on one workload."""
    return f"{identity.workload}/{identity.method}"


def run_tags(identity: Identity) -> list[str]:
    """Tags (wandb allows 64 characters each)."""
    tags = [identity.workload, identity.method, f"study_{identity.study}"]
    if identity.framework:
        tags.append(identity.framework)
    return [tag[:64] for tag in tags]


def wandb_environment(
    *, workload: str, method: str, study: str, trial: str = "1"
) -> dict[str, str]:
    """Environment variables that make wandb name a live run as this package names pushed ones.

    AlgoPerf calls ``wandb.init`` itself and passes no name, so the environment is where a launcher
    can set one. Add ``WANDB_MODE=offline`` to work without an account and ``wandb sync`` later.
    """
    identity = Identity(workload, method, str(study), str(trial))
    return {
        "WANDB_NAME": run_name(identity),
        "WANDB_RUN_GROUP": run_group(identity),
        "WANDB_JOB_TYPE": f"study_{identity.study}",
        "WANDB_TAGS": ",".join(tag.replace(",", " ") for tag in run_tags(identity)),
    }
