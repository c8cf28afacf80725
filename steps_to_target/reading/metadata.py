"""What a run's ``meta_data_0.json`` and ``flags_0.json`` say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from steps_to_target.judge import Budget

# AlgoPerf gives self-tuning submissions 1.5 times the workload's time limit; v0.5 gave 3 times.
_SELF_TUNING_FACTOR = 1.5
_SELF_TUNING_FACTOR_V05 = 3.0
# v0.5's (time limit, step hint) where later versions have others. criteo1tb kept both.
_V05_LIMITS = {
    (8_859, 36_189),
    (18_477, 80_000),
    (48_151, 133_333),
    (55_506, 48_000),
    (61_068, 80_000),
    (63_008, 186_666),
    (77_520, 186_666),
}
_FIRST_PYTHON_AFTER_V05 = (3, 11)

# This project's launcher starts AlgoPerf in this project's repository, whose commit
# AlgoPerf then takes for its own.
ALGOPERF_COMMIT = "algoperf.git_commit_hash"
_OWN_SUBMISSION = "submission/"


def positive(mapping: Mapping[str, Any], *names: str) -> float | None:
    """The first of the named entries that is a finite number above zero."""
    for name in names:
        value = mapping.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                continue
            if math.isfinite(number) and number > 0:
                return number
    return None


def is_version_05(meta: Mapping[str, Any]) -> bool:
    """Whether AlgoPerf v0.5 (2024) made a run: by its limits, or by the Python that it needed."""
    pair = (
        positive(meta, "workload.max_allowed_runtime_sec"),
        positive(meta, "workload.step_hint"),
    )
    if pair in _V05_LIMITS:
        return True
    version = re.match(r"(\d+)\.(\d+)", str(meta.get("python_version", "")))
    return version is not None and tuple(map(int, version.groups())) < _FIRST_PYTHON_AFTER_V05


def run_budget(meta: Mapping[str, Any], flags: Mapping[str, Any]) -> Budget:
    """Time limit and step budget of a run, from its meta data and flags."""
    seconds = positive(meta, "workload.max_allowed_runtime_sec")
    if seconds is not None and flags.get("tuning_ruleset") == "self":
        seconds *= _SELF_TUNING_FACTOR_V05 if is_version_05(meta) else _SELF_TUNING_FACTOR
    return Budget(seconds, positive(flags, "max_global_steps"))


def algoperf_commit(meta: Mapping[str, Any], flags: Mapping[str, Any]) -> str:
    """The commit of AlgoPerf that made a run; empty where only another repository's is logged."""
    commit = meta.get(ALGOPERF_COMMIT)
    if not isinstance(commit, str) or not commit:
        own = str(flags.get("submission_path", "")).startswith(_OWN_SUBMISSION)
        commit = "" if own else meta.get("git_commit_hash")
    return commit[:10] if isinstance(commit, str) else ""


def hardware(meta: Mapping[str, Any]) -> str:
    """``"8 x Tesla V100-SXM2-16GB"``, or the CPU where there is no GPU (empty: not logged)."""
    gpu, count = meta.get("gpu_model_name"), meta.get("gpu_count")
    if isinstance(gpu, str) and gpu:
        return f"{count} x {gpu}" if isinstance(count, int) else gpu
    cpu, cores = meta.get("cpu_model_name"), meta.get("cpu_count")
    if isinstance(cpu, str) and cpu:
        return f"CPU {cpu}" + (f", {cores} cores" if isinstance(cores, int) else "")
    return ""
