"""The flags of AlgoPerf's `submission_runner`, read and completed before AlgoPerf is imported.

AlgoPerf parses its flags with absl after seconds of imports and fails late: on a missing search
space only after it built the data set, and an existing run folder makes it wait for an answer on
the terminal. Here the same mistakes cost one line.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workloads_overrides.data_folders import how_to_get
from workloads_overrides.errors import LaunchError
from workloads_overrides.points import require_valid_points

REQUIRED = ("workload", "data_dir", "experiment_name")
ROOT = Path(__file__).resolve().parents[1]
RUNS_VARIABLE = "KFAC_RUNS_DIR"  # the image sets it to the folder that outlives the container
DEFAULTS = {
    "framework": "pytorch",
    "submission_path": "submission/submission.py",
    "experiment_dir": os.environ.get(RUNS_VARIABLE) or "runs",
}
DEFAULT_SEARCH_SPACE = "tuning_search_space.json"


@dataclass(frozen=True)
class RunnerFlags:
    """A command line in absl's syntax: `--name=value`, `--name value`, `--flag`, `--noflag`."""

    argv: tuple[str, ...]

    def value(self, name: str) -> str | None:
        """The last value given for a flag, None where it was not given."""
        found = None
        for position, token in enumerate(self.argv):
            key, equals, value = _split(token)
            if key != name:
                continue
            following = self.argv[position + 1 : position + 2]
            found = value if equals else "".join(following)
        return found

    def is_on(self, name: str) -> bool:
        """Whether a boolean flag was switched on."""
        on = False
        for token in self.argv:
            key, equals, value = _split(token)
            if key == name:
                on = not equals or value.lower() in ("true", "t", "1", "yes", "y")
            elif key == f"no{name}":
                on = False
        return on

    def mentions(self, name: str) -> bool:
        """Whether a flag was given at all, a boolean one with or without `no`."""
        return any(_split(token)[0] in (name, f"no{name}") for token in self.argv)

    def with_default(self, name: str, value: str | int | None = None) -> "RunnerFlags":
        """Adds a flag unless it was given."""
        if self.mentions(name):
            return self
        token = f"--{name}" if value is None else f"--{name}={value}"
        return RunnerFlags((*self.argv, token))

    def replaced(self, name: str, value: str) -> "RunnerFlags":
        """Appends a flag; absl takes the last one given."""
        return RunnerFlags((*self.argv, f"--{name}={value}"))


def complete(argv: Sequence[str], working_directory: Path) -> RunnerFlags:
    """Checks the runner's flags and adds those that follow from the others.

    Added unless given: `DEFAULTS` and the search space; `--resume_last_run`, so that the runner
    never waits for an answer; for the ImageNet workloads `--imagenet_v2_data_dir`, if the folder
    `imagenet_v2` is in the data folder or, as AlgoPerf's download leaves it, beside it.

    Args:
        argv: The flags as typed, without the program's name.
        working_directory: Folder that AlgoPerf resolves `--submission_path` in.

    Raises:
        LaunchError: A flag is missing, or names a file or folder that is not there.
    """
    flags = RunnerFlags(tuple(argv))
    missing = [f"--{name}" for name in REQUIRED if not flags.value(name)]
    if missing:
        raise LaunchError(f"missing: {', '.join(missing)} (flags of AlgoPerf's submission_runner)")
    framework = flags.value("framework")
    if framework not in (None, "pytorch"):
        raise LaunchError(f"--framework={framework}: this submission is for pytorch")
    for name, value in DEFAULTS.items():
        flags = flags.with_default(name, value)
    is_self_tuning = flags.value("tuning_ruleset") == "self"
    if is_self_tuning and flags.mentions("tuning_search_space"):
        raise LaunchError("--tuning_search_space: the self-tuning ruleset takes none")
    if not is_self_tuning:
        flags = flags.with_default("tuning_search_space", DEFAULT_SEARCH_SPACE)
        flags = _located(flags, "tuning_search_space", working_directory)
    flags = _with_module_path(flags, working_directory)
    if not is_self_tuning:
        submission = _find(Path(str(flags.value("submission_path"))), working_directory)
        _check_search_space(Path(str(flags.value("tuning_search_space"))), submission)
    data_dir = Path(str(flags.value("data_dir"))).expanduser()
    if not os.path.isdir(data_dir):  # Path.is_dir raises for names that are too long
        workload = str(flags.value("workload"))
        known = workload.startswith(("ogbg", "imagenet"))
        rest = how_to_get(workload, data_dir) if known else "give the data set's folder"
        raise LaunchError(f"--data_dir={data_dir}: no such folder; {rest}")
    if str(flags.value("workload")).startswith("imagenet"):
        flags = flags.with_default("imagenet_v2_data_dir", str(_beside(data_dir)))
    if not flags.is_on("overwrite"):
        flags = flags.with_default("resume_last_run")
    return flags


def _beside(data_dir: Path) -> Path:
    for folder in (data_dir, data_dir.parent):
        if (folder / "imagenet_v2").is_dir():
            return folder
    raise LaunchError(
        f"no folder imagenet_v2 (the test split) in {data_dir} or beside it; name the folder that "
        f"holds it with --imagenet_v2_data_dir, or {how_to_get('imagenet', data_dir)}"
    )


def trial_folders(flags: RunnerFlags) -> Path | None:
    """The folder that will hold `trial_*`; None if its name is only known when the run starts."""
    if flags.is_on("append_timestamp"):
        return None
    root = Path(str(flags.value("experiment_dir"))).expanduser()
    workload_folder = f"{flags.value('workload')}_{flags.value('framework')}"
    return root / str(flags.value("experiment_name")) / workload_folder


def _split(token: str) -> tuple[str | None, str, str]:
    if not token.startswith("-"):
        return None, "", ""
    key, equals, value = token.lstrip("-").partition("=")
    return key, equals, value


def _find(path: Path, working_directory: Path) -> Path:
    """A file in the current folder or, for one that is not there, in this project's."""
    here, project = working_directory / path, ROOT / path
    return project if project.is_file() and not here.is_file() else here


def _located(flags: RunnerFlags, name: str, working_directory: Path) -> RunnerFlags:
    """Lets a file of this project be named from any folder."""
    given = Path(str(flags.value(name)))
    found = _find(given, working_directory)
    return flags if found == working_directory / given else flags.replaced(name, str(found))


def _with_module_path(flags: RunnerFlags, working_directory: Path) -> RunnerFlags:
    """AlgoPerf turns the path into a dotted module name: it has to be relative.

    Modules are found in the current folder and, as ./run.sh puts it on Python's path, in this
    project's.
    """
    given = Path(str(flags.value("submission_path")))
    absolute = _find(given, working_directory)
    if absolute.suffix != ".py" or not absolute.is_file():
        raise LaunchError(
            f"--submission_path={given}: no such Python file in {working_directory}, nor in the "
            "project's folder"
        )
    for folder in (working_directory.resolve(), ROOT):
        if absolute.resolve().is_relative_to(folder):
            if str(folder) not in sys.path:
                sys.path.append(str(folder))
            relative = absolute.resolve().relative_to(folder)
            break
    else:
        raise LaunchError(
            f"--submission_path={given}: AlgoPerf needs a path inside the current folder, "
            f"{working_directory}"
        )
    if str(relative) == str(given):
        return flags
    return flags.replaced("submission_path", relative.as_posix())


def _check_search_space(path: Path, submission: Path) -> None:
    source = f"--tuning_search_space={path}"
    try:
        space = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"{source}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise LaunchError(f"{source}: not JSON ({error})") from None
    if not isinstance(space, dict | list) or not space:
        raise LaunchError(f"{source}: must hold a non-empty JSON object or list of objects")
    if isinstance(space, dict):
        for name, values in space.items():
            _check_range(source, name, values)
        return
    if not all(isinstance(point, dict) and point for point in space):
        raise LaunchError(f"{source}: every point must be a JSON object of hyperparameters")
    for number, point in enumerate(space, start=1):
        differing = sorted(point.keys() ^ space[0].keys())
        if differing:
            raise LaunchError(f"{source}: point {number} and point 1 differ in {differing[0]!r}")
    require_valid_points(space, submission, source)


def _check_range(source: str, name: str, values: object) -> None:
    """What AlgoPerf can draw from: feasible points, or an interval with a scaling."""
    match values:
        case {"feasible_points": [_, *_]}:
            return
        case {"min": int() | float() as low, "max": int() | float() as high, "scaling": scaling}:
            with contextlib.suppress(OverflowError):  # integers of hundreds of digits
                in_order = math.isfinite(float(high) - float(low)) and low <= high
                if in_order and (scaling == "linear" or (scaling == "log" and low > 0)):
                    return
    raise LaunchError(
        f'{source}: {name!r} needs {{"feasible_points": [...]}} or {{"min": ..., "max": ..., '
        '"scaling": "linear" or "log"}, with min <= max, and above 0 for "log"'
    )
