"""Read runs from wandb: offline folders, or the service through its API.

Both runs that AlgoPerf logged itself (its flags and hyperparameters flat in the config) and runs
that ``push`` pushed or that a launcher described (``names.describe``) are understood. wandb is
imported only here and only when needed.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from steps_to_target.errors import CompareError
from steps_to_target.model import Identity, Run
from steps_to_target.reading.tables import column
from steps_to_target.reading.trial import Targets, assess, find_ending
from steps_to_target.wandb_runs.names import DESCRIPTION, PUBLISHED

SUFFIX = ".wandb"
Row = dict[str, float]

_BLOCK = 32_768
_FILE_HEADER = 7
_CHUNK = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4

# Flags of submission_runner and of absl that AlgoPerf puts into the config beside hyperparameters.
_FLAG_NAMES = """
    ? _wandb alsologtostderr append_timestamp capture_jax_trace data_dir delta_threshold
    experiment_dir experiment_name experimental_orbax_use_distributed_process_id framework
    halt_on_nan hbm_oom_exit help helpfull helpshort helpxml hparam_end_index
    hparam_start_index imagenet_v2_data_dir librispeech_tokenizer_vocab_path log_dir
    logger_levels logtostderr max_global_steps num_tuning_trials only_check_args
    op_conversion_fallback_to_while_loop overwrite pdb pdb_post_mortem profile profile_file
    pytorch_eval_num_workers resume_last_run rng_seed run_with_pdb run_with_profiling
    runtime_oom_exit save_checkpoints save_intermediate_checkpoints
    set_pytorch_max_split_size showprefixforinfo skip_evals stderrthreshold submission_path
    test_random_seed test_randomize_ordering_seed test_srcdir test_tmpdir
    tfds_debug_list_dir torch_compile tt_check_filter tt_single_core_summaries
    tuning_ruleset tuning_search_space use_cprofile_for_profiling use_wandb v verbosity
    workload xml_output_file
"""
_FLAGS = frozenset(_FLAG_NAMES.split())


def load_wandb() -> Any:
    """The wandb module.

    Raises:
        CompareError: it is not installed.
    """
    try:
        return import_module("wandb")
    except ImportError as error:
        raise CompareError(
            f"wandb cannot be imported ({error}); install it: pip install wandb"
        ) from error


def offline_files(path: Path) -> list[Path]:
    """The ``run-*.wandb`` files at or below ``path``."""
    if path.is_file():
        return [path] if path.suffix == SUFFIX else []
    found = []
    for folder, folders, files in os.walk(path):
        folders.sort()
        found += [Path(folder, name) for name in sorted(files) if name.endswith(SUFFIX)]
    return found


def log_chunks(data: bytes) -> Iterator[bytes]:
    """Split a ``.wandb`` file (LevelDB's log format) into its records; stops where it is torn."""
    position, pending = _FILE_HEADER, b""
    while position + _CHUNK.size <= len(data):
        room = _BLOCK - position % _BLOCK
        if room < _CHUNK.size:
            position += room
            continue
        _, length, kind = _CHUNK.unpack_from(data, position)
        position += _CHUNK.size
        body = data[position : position + length]
        if len(body) < length or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return
        position += length
        pending = body if kind in (_FULL, _FIRST) else pending + body
        if kind in (_FULL, _LAST):
            yield pending


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _numbers(row: Mapping[str, Any]) -> Row:
    kept: Row = {}
    for key, value in row.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, str) and value.lower() in ("nan", "infinity", "-infinity"):
            value = float(value)
        if isinstance(value, int | float):
            try:
                kept[key] = float(value)
            except OverflowError:
                continue
    return kept


def _items(items: Iterable[Any]) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): _value(item.value_json) for item in items}


def read_records(path: Path) -> tuple[dict[str, Any], list[Row], dict[str, str]]:
    """Config, history and names of one offline run.

    Returns:
        The config, the logged rows in order, and ``id``, ``group``, ``job_type`` and ``name``
        (and ``finished``, when the file holds the run's end).

    Raises:
        CompareError: wandb is not installed or the file cannot be opened.
    """
    load_wandb()
    messages = import_module("wandb.proto.wandb_internal_pb2")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CompareError(f"{path} cannot be read: {error.strerror or error}") from error
    config: dict[str, Any] = {}
    rows: list[Row] = []
    names: dict[str, str] = {}
    for chunk in log_chunks(data):
        record = messages.Record()
        try:
            record.ParseFromString(chunk)
        except Exception:  # google.protobuf's DecodeError; what follows a damaged record is lost
            break
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config.update(_items(record.run.config.update))
            names = {
                "id": record.run.run_id,
                "group": record.run.run_group,
                "job_type": record.run.job_type,
                "name": record.run.display_name,
            }
        elif kind == "config":
            config.update(_items(record.config.update))
        elif kind == "history":
            rows.append(_numbers(_items(record.history.item)))
        elif kind == "exit":
            names["finished"] = "yes"
    return config, rows, names


def _strip(name: str, prefix: str) -> str:
    return name[len(prefix) :] if name.startswith(prefix) else ""


def _identity(config: Mapping[str, Any], names: Mapping[str, str]) -> Identity:
    """Which run this is, from the group that ``wandb_environment`` sets, else AlgoPerf's flags."""
    workload = str(config.get("workload") or "unknown")
    parts = [part for part in str(config.get("experiment_name") or "").split("/") if part]
    study = _strip(names.get("job_type", ""), "study_")
    if parts and parts[-1].startswith("study_"):
        study = study or _strip(parts[-1], "study_")
        parts = parts[:-1]
    method = _strip(names.get("group", ""), f"{workload}/") or names.get("group", "")
    method = method or (parts[-1] if parts else "") or names.get("name", "") or "runs"
    start = config.get("hparam_start_index")
    single = isinstance(start, int) and config.get("hparam_end_index") == start + 1
    trial = str(start + 1) if isinstance(start, int) and single else names.get("id", "1")
    return Identity(workload, method, study or "0", trial, str(config.get("framework") or ""))


def build_run(
    path: str,
    config: Mapping[str, Any],
    rows: list[Row],
    names: Mapping[str, str],
    targets: Targets | None,
    starts: int = 1,
) -> Run:
    """Judge a wandb run from its config and history."""
    known = config.get(DESCRIPTION)
    if isinstance(known, dict) and isinstance(known.get("identity"), dict):
        own = known["identity"]
        fields = ("workload", "method", "study", "trial", "framework")
        identity = Identity(*(str(own.get(name, "")) for name in fields))
        files = [known.get(name) for name in ("hparams", "meta", "flags")]
        hparams, meta, flags = (item if isinstance(item, dict) else {} for item in files)
    else:
        identity = _identity(config, names)
        hparams = {key: value for key, value in config.items() if key not in _FLAGS}
        flags = {key: value for key, value in config.items() if key in _FLAGS}
        meta = {}
    log = pd.DataFrame(rows, dtype=float)
    metrics = log[[name for name in log if name.startswith("validation/")]]
    timed = column(log, "accumulated_submission_time", "total_duration").notna()
    evaluations = log[metrics.notna().any(axis=1) | timed].reset_index(drop=True)
    return assess(
        identity,
        path,
        evaluations,
        log,
        find_ending(log, known=True),
        problem="no row with a validation metric" if evaluations.empty else "",
        starts=starts,
        hparams=hparams,
        meta=meta,
        flags=flags,
        targets=targets,
    )


def read_offline(path: Path, targets: Targets | None = None) -> list[Run]:
    """All offline wandb runs at or below ``path``; a run that was resumed has several files.

    Published rows that ``push`` wrote beside them are no runs.
    """
    parts: dict[str, list[tuple[Path, dict[str, Any], list[Row], dict[str, str]]]] = {}
    for file in offline_files(path):
        config, rows, names = read_records(file)
        if names.get("job_type") == PUBLISHED:
            continue
        parts.setdefault(names.get("id", "") or str(file), []).append((file, config, rows, names))
    runs = []
    for starts in parts.values():
        file, config, rows, names = starts[-1]
        if not _digest(config):  # what was pushed is whole each time
            config = {key: value for _, other, _, _ in starts for key, value in other.items()}
            rows = [row for _, _, own, _ in starts for row in own]
        else:
            starts = starts[-1:]
        runs.append(build_run(str(file.resolve()), config, rows, names, targets, len(starts)))
    return runs


def _digest(config: Mapping[str, Any]) -> str:
    known = config.get(DESCRIPTION)
    return str(known.get("digest", "")) if isinstance(known, dict) else ""


def read_service(path: str, targets: Targets | None = None, *, api: Any = None) -> list[Run]:
    """Runs of a project on wandb's service.

    Args:
        path: ``ENTITY/PROJECT`` or ``ENTITY/PROJECT/RUN``.
        targets: targets by workload that replace the built-in ones.
        api: a ``wandb.Api`` (None: made here).

    Raises:
        CompareError: wandb is not installed, or the service cannot be reached or does not know it.
    """
    parts = path.strip("/").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise CompareError(
            f"wandb:{path}: expected wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/RUN"
        )
    try:
        service = api if api is not None else load_wandb().Api()
        found = [service.run(path)] if len(parts) == 3 else list(service.runs(path))
        own = [item for item in found if getattr(item, "job_type", "") != PUBLISHED]
        return [_service_run(path, item, targets) for item in own]
    except CompareError:
        raise
    except Exception as error:  # wandb's errors share no base class with those of its transport
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CompareError(f"wandb:{path} cannot be read: {lines[0]}") from error


def _service_run(path: str, item: Any, targets: Targets | None) -> Run:
    rows = [_numbers(row) for row in item.scan_history()]
    names = {
        "id": str(item.id),
        "group": str(getattr(item, "group", "") or ""),
        "job_type": str(getattr(item, "job_type", "") or ""),
        "name": str(item.name),
    }
    project = "/".join(path.strip("/").split("/")[:2])
    return build_run(f"wandb:{project}/{item.id}", dict(item.config), rows, names, targets)
