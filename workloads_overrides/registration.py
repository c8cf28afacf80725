"""Registering overrides with an imported AlgoPerf, in memory: no file of it is changed."""

import importlib
from collections.abc import Mapping
from typing import Any

from workloads_overrides.properties import Value, override_properties


def register_properties(registry: Any, overrides: Mapping[str, Value]) -> None:
    """Makes `registry.import_workload` build workloads with overridden properties.

    Args:
        registry: AlgoPerf's module `algoperf.workloads.workloads`.
        overrides: Values by property name, checked when a workload is imported.
    """
    original = registry.import_workload

    def import_workload(
        workload_path: str,
        workload_class_name: str,
        return_class: bool = False,
        workload_init_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        plain = original(workload_path, workload_class_name, return_class=True)
        overridden = override_properties(plain, overrides)
        return overridden if return_class else overridden(**(workload_init_kwargs or {}))

    registry.import_workload = import_workload


def register_batch_size(runner: Any, registry: Any, batch_size: int) -> None:
    """Makes the runner train with a global batch size other than the submission's own.

    Args:
        runner: AlgoPerf's module `submission_runner`.
        registry: AlgoPerf's module `algoperf.workloads.workloads`.
        batch_size: Examples per step over all processes.
    """
    original = runner.score_submission_on_workload

    def score(*args: Any, submission_path: str, **kwargs: Any) -> Any:
        name = registry.convert_filepath_to_module(submission_path)
        submission: Any = importlib.import_module(name)
        submission.get_batch_size = lambda workload_name: batch_size
        return original(*args, submission_path=submission_path, **kwargs)

    runner.score_submission_on_workload = score
