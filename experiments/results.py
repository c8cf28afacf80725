"""One JSON document per experiment: the result, and how and where it was obtained."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quickstart.errors import QuickstartError, writing

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_FOLDER = ROOT / "runs" / "experiments"
DEFAULT_DATA_DIR = ROOT / "data"

_PACKAGES = ("torch", "numpy", "scikit-learn", "laplace-torch", "curvlinops-for-pytorch")


def machine() -> dict[str, Any]:
    """CPU, GPU, threads and system."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are there."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def document(
    experiment: str, settings: Mapping[str, Any], result: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """A result with its machine, date, versions and settings; paths lose their folders."""
    return {
        "experiment": experiment,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "machine": machine(),
        "versions": versions(),
        "settings": {k: v.name if isinstance(v, Path) else v for k, v in settings.items()},
        "result": dict(result),
    }


def result_path(folder: Path, experiment: str) -> Path:
    """Where the document lies below the folder of all experiments."""
    return folder / experiment / "result.json"


def write(folder: Path, content: Mapping[str, Any]) -> Path:
    """Writes a document, whole or not at all.

    Raises:
        QuickstartError: the folder cannot be written.
    """
    path = result_path(folder, content["experiment"])
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def read(folder: Path, experiment: str) -> dict[str, Any]:
    """The document of an experiment.

    Raises:
        QuickstartError: there is none, or it is damaged.
    """
    path = result_path(folder, experiment)
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QuickstartError(
            f"no result of {experiment} in {folder}: run `python -m experiments {experiment}`"
        ) from None
    except (OSError, ValueError) as error:
        raise QuickstartError(
            f"{path} is damaged ({error}): run `python -m experiments {experiment}` again"
        ) from error
    return content


def synchronize(device: torch.device) -> None:
    """Waits for a GPU, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def default_device() -> str:
    """The first GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
