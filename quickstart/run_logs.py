"""A run's folder: names, files and format as AlgoPerf's logger writes them."""

import csv
import hashlib
import importlib
import io
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quickstart import locks
from quickstart.errors import QuickstartError, explain_os_error, writing

ROOT = Path(__file__).resolve().parents[1]
MEASUREMENTS = "measurements.csv"
EVAL_MEASUREMENTS = "eval_measurements.csv"
RUN_RECORD = "quickstart_run.json"
# Modules that show, start or choose runs, and have no influence on how one goes.
_NO_INFLUENCE = ("errors", "parallel", "reporting", "settings", "study", "tuning")


def workload_folder(experiment_dir: Path, experiment_name: str, workload: str) -> Path:
    """<experiment_dir>/<experiment_name>/<workload>_pytorch."""
    return experiment_dir / experiment_name / f"{workload}_pytorch"


def open_workload_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Makes way for a run in the folder; never asks.

    Raises:
        QuickstartError: if it holds a run and neither `resume` nor `overwrite` is given, or if it
            is to be overwritten and holds something else than runs.
    """
    try:
        entries = sorted(folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise explain_os_error(error, folder) from error
    if entries and not resume and not overwrite:
        raise QuickstartError(
            f"{folder} holds a run already: --resume_last_run goes on with it, --overwrite "
            "deletes it, another --experiment_name keeps it"
        )
    if entries and overwrite:
        strangers = [e.name for e in entries if not re.fullmatch(r"trial_\d+", e.name)]
        if strangers or folder.is_symlink():
            raise QuickstartError(
                f"--overwrite: {folder} holds {strangers or 'a link'}, which is no run of this "
                "program: delete it yourself or choose another --experiment_name"
            )
        try:
            locks.delete(folder)
        except locks.RunInUseError as error:
            raise QuickstartError(f"--overwrite: {error}") from error
        except OSError as error:
            raise explain_os_error(error, folder) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class MetricsLogger:
    """Scalars of a run in two CSV files, and in wandb if a run is active.

    AlgoPerf's logger reads and rewrites a whole file at each call. This one appends a line, and
    rewrites only when a new column appears; the files come out the same.

    Args:
        folder: the trial's folder.
        use_wandb: whether scalars also go to the active wandb run.
    """

    def __init__(self, folder: Path, use_wandb: bool = False) -> None:
        self._tables = {name: _Table(folder / name) for name in (MEASUREMENTS, EVAL_MEASUREMENTS)}
        self._use_wandb = use_wandb

    def append_scalar_metrics(
        self,
        metrics: dict[str, Any],
        global_step: int,
        preemption_count: int | None = None,
        is_eval: bool = False,
    ) -> None:
        """Appends a row; `metrics` gains `global_step` and `preemption_count`, as in AlgoPerf."""
        metrics["global_step"] = global_step
        if preemption_count is not None:
            metrics["preemption_count"] = preemption_count
        self._tables[MEASUREMENTS].append(metrics)
        if is_eval:
            self._tables[EVAL_MEASUREMENTS].append(metrics)
        if self._use_wandb:
            importlib.import_module("wandb").log(metrics)

    def finish(self) -> None:
        """Ends the wandb run, if there is one."""
        if self._use_wandb:
            importlib.import_module("wandb").finish()

    def contents(self) -> dict[str, str]:
        """The files' text, for a checkpoint."""
        return {name: table.text() for name, table in self._tables.items()}

    def restore(self, contents: dict[str, str]) -> None:
        """Puts the files back to what they were at a checkpoint."""
        for name, table in self._tables.items():
            table.restore(contents.get(name, ""))


class _Table:
    """One CSV file whose columns may grow."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        new = [
            name for name in (row if self._columns else sorted(row)) if name not in self._columns
        ]
        self._columns += new
        self._rows.append(dict(row))
        if new or not self._path.exists():
            self._rewrite()
        else:
            try:
                with self._path.open("a", encoding="utf-8", newline="") as file:
                    file.write(self._format(self._rows[-1:], header=False))
            except OSError as error:
                raise explain_os_error(error, self._path) from error

    def text(self) -> str:
        return self._format(self._rows, header=True) if self._rows else ""

    def restore(self, text: str) -> None:
        reader = csv.DictReader(io.StringIO(text))
        self._rows = [{k: v for k, v in row.items() if v != ""} for row in reader]
        self._columns = list(reader.fieldnames or [])
        if self._rows:
            self._rewrite()
        else:
            self._path.unlink(missing_ok=True)

    def _rewrite(self) -> None:
        with writing(self._path) as temporary:
            temporary.write_text(self.text(), encoding="utf-8")

    def _format(self, rows: list[dict[str, Any]], header: bool) -> str:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, self._columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()


def meta_data(workload: Any, rng_seed: int, batch_size: int) -> dict[str, Any]:
    """Properties of the workload and of the machine, under AlgoPerf's names where it has one."""
    meta: dict[str, Any] = {}
    for name in sorted(dir(workload)):
        if name.startswith("_") or name in ("param_shapes", "model_params_types"):
            continue
        value = getattr(workload, name)
        if isinstance(value, bool | int | float | str):
            meta[f"workload.{name}"] = value
    meta["workload.train_batch_size"] = batch_size
    meta["os_platform"] = platform.platform()
    meta["python_version"] = platform.python_version()
    meta["python_compiler"] = platform.python_compiler()
    meta["torch_version"] = torch.__version__
    meta["torch_threads"] = torch.get_num_threads()
    meta["code_version"] = code_version()
    meta["cpu_model_name"] = _cpu_model_name()
    meta["cpu_count"] = os.cpu_count()
    if torch.cuda.is_available():
        meta["gpu_model_name"] = torch.cuda.get_device_name(0)
        meta["gpu_count"] = torch.cuda.device_count()
    meta["rng_seed"] = rng_seed
    return meta


def code_version(submission: Path | None = None) -> str:
    """Digest of the Python files that decide a run's outcome: quickstart's and the submission's.

    Args:
        submission: the submission's file; all Python files of its folder count. None leaves it
            out.
    """
    files = [f for f in sorted((ROOT / "quickstart").glob("*.py")) if f.stem not in _NO_INFLUENCE]
    if submission is not None:
        files += sorted(submission.resolve().parent.rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _cpu_model_name() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or None
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or None
