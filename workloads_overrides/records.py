"""What AlgoPerf writes about a run: whole files, its own version, and names in wandb.

Everything is replaced in memory, around AlgoPerf's own functions.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

COMMIT_KEY = "algoperf.git_commit_hash"
STAMP = ".stamp-algoperf"


def register_records(logger_utils: Any, commit: str) -> None:
    """Replaces the functions of `algoperf.logger_utils` that write files and start wandb.

    AlgoPerf rewrites its files in place: a disk that is full, or a kill, would take the log of the
    whole run with it. It takes for its version the commit of the folder that it is started in.

    Args:
        logger_utils: AlgoPerf's module.
        commit: of AlgoPerf, empty if it is not known.
    """
    logger_utils.write_to_csv = _whole(logger_utils.write_to_csv, path_position=1)
    logger_utils.write_json = _whole(logger_utils.write_json, path_position=0)
    get_meta_data = logger_utils.get_meta_data
    set_up_loggers = logger_utils.set_up_loggers

    def with_version(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found = dict(get_meta_data(*args, **kwargs))
        return {**found, COMMIT_KEY: commit} if commit else found

    def with_names(train_dir: str, configs: Any, hyperparameters: Any) -> Any:
        wandb = getattr(logger_utils, "wandb", None)
        if wandb is None or not configs.use_wandb:
            return set_up_loggers(train_dir, configs, hyperparameters)
        from steps_to_target.wandb_runs import live

        trial = Path(train_dir)
        names, init = live.arguments(trial), wandb.init
        wandb.init = lambda **given: init(**{**given, **names})
        try:
            logger = set_up_loggers(train_dir, configs, hyperparameters)
        finally:
            wandb.init = init
        wandb.config.update(live.description(trial), allow_val_change=True)
        return logger

    logger_utils.get_meta_data = with_version
    logger_utils.set_up_loggers = with_names


def _whole(write: Callable[..., Any], path_position: int) -> Callable[..., Any]:
    """A function that writes a file, made to leave the old file until the new one is whole."""

    def write_whole(*args: Any, **kwargs: Any) -> Any:
        path = Path(args[path_position])
        temporary = path.with_name(f".{path.name}.tmp")
        given = [*args]
        given[path_position] = str(temporary)
        try:
            if path.exists():
                shutil.copyfile(path, temporary)
            result = write(*given, **kwargs)
            if temporary.exists():  # only the first process writes
                os.replace(temporary, path)
            return result
        finally:
            temporary.unlink(missing_ok=True)

    return write_whole


def algoperf_commit(package: Path) -> str:
    """AlgoPerf's commit, or its version where the commit is not known (empty: neither is).

    Args:
        package: the folder of the package `algoperf`.
    """
    root = package.resolve().parent
    if (root / "submission_runner.py").is_file():  # a clone
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        top, *commit = found.stdout.split()[:2] or [""]
        if commit and Path(top).resolve() == root:
            return commit[0]
    stamp = Path(sys.prefix) / STAMP  # left by ./run.sh setup --algoperf and by the image's build
    if stamp.is_file():
        return (stamp.read_text(encoding="utf-8").split() or [""])[0]
    try:
        return f"version {metadata.version('algoperf')}"
    except metadata.PackageNotFoundError:
        return ""
