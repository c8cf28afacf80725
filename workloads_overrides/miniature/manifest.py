"""The note that a miniature data folder carries: how large its splits are.

AlgoPerf's workloads state the sizes of the full data sets as properties; on other data their
evaluations would run forever or not at all. `--miniature` reads the sizes from this file.
"""

import json
from pathlib import Path

from workloads_overrides.errors import LaunchError
from workloads_overrides.properties import Value

FILE_NAME = "miniature.json"

UNREACHABLE_TARGET = 2.0
"""Accuracy and average precision end at 1: a run on miniature data never stops at a target."""


def properties_for(train: int, evaluation: int, eval_batch_size: int) -> dict[str, Value]:
    """The workload properties of a folder with `evaluation` examples in each evaluation split."""
    return {
        "num_train_examples": train,
        "num_eval_train_examples": evaluation,
        "num_validation_examples": evaluation,
        "num_test_examples": evaluation,
        "eval_batch_size": eval_batch_size,
        "validation_target_value": UNREACHABLE_TARGET,
        "test_target_value": UNREACHABLE_TARGET,
    }


def write(folder: Path, workloads: list[str], properties: dict[str, Value]) -> None:
    """Writes the note; `workloads` are the AlgoPerf workloads that can read the folder."""
    text = json.dumps({"workloads": workloads, "properties": properties}, indent=2)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def read_properties(folder: Path, workload: str) -> dict[str, Value]:
    """Reads the workload properties of a miniature data folder.

    Raises:
        LaunchError: The folder has no (readable) note, or holds data of other workloads.
    """
    path = folder / FILE_NAME
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        workloads, properties = list(note["workloads"]), dict(note["properties"])
    except FileNotFoundError:
        raise LaunchError(
            f"--miniature: {folder} has no {FILE_NAME}; make a miniature data folder with "
            "`python -m workloads_overrides.miniature {ogbg,imagenet} FOLDER`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise LaunchError(
            f"--miniature: {path} is damaged ({error!r}); make the folder again"
        ) from None
    if workload not in workloads:
        raise LaunchError(
            f"--miniature: {folder} holds data of {', '.join(workloads)}, not of {workload}"
        )
    return properties
