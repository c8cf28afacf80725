"""How runs are named, grouped and identified in wandb. Needs no wandb."""

from __future__ import annotations

import hashlib

from steps_to_target.model import Identity


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
