"""What a launcher tells wandb about a run that is starting, so that it reads as its folder does.

The name, group and job type are those of ``names``; the config gets the run's identity and JSON
files, which hold the targets, limits and versions that AlgoPerf itself does not tell wandb. A trial
that is resumed goes on as the same wandb run: its id lies in the trial's folder.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steps_to_target.reading import folders
from steps_to_target.wandb_runs.names import DESCRIPTION, describe, run_group, run_name

PROJECT = "kfac-algoperf"
ID_FILE = "wandb_run_id.txt"
# What a user sets in the environment stays as it is.
_VARIABLES = {
    "project": "WANDB_PROJECT",
    "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "id": "WANDB_RUN_ID",
    "resume": "WANDB_RESUME",
}


def _files(trial: Path) -> dict[str, dict[str, Any]]:
    """The JSON files of the run's first start, as the reader of folders takes them."""
    named = {"hparams": trial / "hparams.json"}
    for key, stem in (("meta", "meta_data"), ("flags", "flags")):
        numbered = folders.numbered_files(trial, stem)
        named[key] = numbered[0] if numbered else trial / f"{stem}_0.json"
    return {key: folders.read_json(path)[0] for key, path in named.items()}


def arguments(trial: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Arguments of ``wandb.init`` for the run in a trial's folder.

    Args:
        trial: the folder, in which its flags already lie.
        environment: variables that win over the names that would be given.
    """
    trial = trial.resolve()
    identity, _ = folders.identify(trial, _files(trial)["flags"])
    given = {
        "project": PROJECT,
        "name": run_name(identity)[:128],
        "group": run_group(identity)[:128],
        "job_type": f"study_{identity.study}"[:64],
    }
    file = trial / ID_FILE
    if file.exists():
        given |= {"id": file.read_text(encoding="utf-8").strip(), "resume": "allow"}
    else:
        given["id"] = secrets.token_hex(4)
        file.write_text(given["id"] + "\n", encoding="utf-8")
    return {key: value for key, value in given.items() if not environment.get(_VARIABLES[key])}


def description(trial: Path) -> dict[str, Any]:
    """The entry of wandb's config that says what run lies in a trial's folder."""
    files = _files(trial.resolve())
    identity, _ = folders.identify(trial.resolve(), files["flags"])
    return {DESCRIPTION: describe(identity, **files)}
