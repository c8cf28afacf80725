"""Is there an AlgoPerf to launch, and is it one that the launcher supports?"""

import importlib
import importlib.util
from contextlib import suppress
from types import ModuleType
from typing import Any

from workloads_overrides.errors import LaunchError

ALGOPERF_COMMIT = "2c90454fc05d5bdf3598b0c7651e611f132a7060"
"""The commit of github.com/mlcommons/algorithmic-efficiency that everything here is tested with."""


def require_algoperf() -> None:
    """Raises LaunchError, with what to do, unless a supported AlgoPerf can be imported."""
    package, runner = _exists("algoperf"), _exists("submission_runner")
    if package and runner:
        return
    if package:
        raise LaunchError(
            "AlgoPerf's package is installed but its submission_runner.py is not importable: put "
            "the folder of AlgoPerf's repository on PYTHONPATH, or run `./run.sh setup --algoperf`"
        )
    if _exists("algorithmic_efficiency"):
        raise LaunchError(
            "found AlgoPerf v0.5 (package `algorithmic_efficiency`); this launcher supports the "
            f"package `algoperf` (commit {ALGOPERF_COMMIT[:8]}): `./run.sh setup --algoperf`. "
            "With v0.5 call its own submission_runner.py, without overrides"
        )
    raise LaunchError("AlgoPerf is not importable; install it: `./run.sh setup --algoperf`")


def import_runner() -> ModuleType:
    """Imports AlgoPerf's `submission_runner`; device assumptions must be in place before.

    Raises:
        LaunchError: A package that AlgoPerf needs is missing.
    """
    with suppress(ImportError):
        # triton and TensorFlow carry clashing copies of LLVM: the process crashes when triton
        # comes second, and the runner imports TensorFlow first.
        importlib.import_module("triton")
    return _import("submission_runner")


def import_package() -> ModuleType:
    """Imports the package `algoperf`."""
    return _import("algoperf")


def import_registry() -> ModuleType:
    """Imports AlgoPerf's registry of workloads."""
    return _import("algoperf.workloads.workloads")


def workload_class(registry: Any, name: str) -> type:
    """Imports the PyTorch class of a workload without building it.

    Raises:
        LaunchError: AlgoPerf has no such workload, or its packages are missing.
    """
    if name not in registry.WORKLOADS:
        raise LaunchError(
            f"--workload={name}: AlgoPerf has no such workload; it has "
            f"{', '.join(registry.WORKLOADS)}"
        )
    entry = registry.WORKLOADS[name]
    path = f"{registry.BASE_WORKLOADS_DIR}{entry['workload_path']}_pytorch/workload.py"
    try:
        found = registry.import_workload(path, entry["workload_class_name"], return_class=True)
    except ImportError as error:
        raise LaunchError(f"--workload={name} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise LaunchError(f"--workload={name}: AlgoPerf's registry gave {found!r}, not a class")
    return found


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module without a spec, as a script run as __main__ is
        return True


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LaunchError(f"AlgoPerf cannot be imported: {error}") from error
