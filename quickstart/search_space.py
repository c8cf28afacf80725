"""Tuning search spaces in AlgoPerf's JSON format: a list of points, or a space to draw from."""

import collections
import contextlib
import json
import keyword
import math
import reprlib
from pathlib import Path
from typing import Any

from quickstart.errors import QuickstartError


def read_points(path: Path, num_trials: int, seed: int) -> list[Any]:
    """Reads the hyperparameter points of a file.

    Args:
        path: JSON file with a list of points, or a dictionary that gives each hyperparameter
            either {"feasible_points": [...]} or {"min": a, "max": b, "scaling": "log" | "linear"}.
        num_trials: how many points to draw from a space; of a list, at most so many are used.
        seed: decides which points a space yields.

    Returns:
        Named tuples with one field per hyperparameter.

    Raises:
        QuickstartError: if there is no such file or it is not such a space.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QuickstartError(
            f"--tuning_search_space: cannot read {path} ({error.strerror}): give a JSON file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise QuickstartError(f"--tuning_search_space: {path} is not JSON ({error})") from error
    if isinstance(content, list):
        points = _check_points(content, path)[:num_trials]
    elif isinstance(content, dict):
        points = _draw(content, num_trials, seed, path)
    else:
        raise QuickstartError(f"{path} holds a {type(content).__name__}; a list of points or a "
                              "dictionary of hyperparameters is needed")  # fmt: skip
    names = list(points[0])
    bad = [n for n in names if not n.isidentifier() or keyword.iskeyword(n) or n.startswith("_")]
    if bad:
        raise QuickstartError(f"{path}: {bad[0]!r} is no hyperparameter name (use a Python name)")
    hyperparameters = collections.namedtuple("Hyperparameters", names)  # type: ignore[misc]
    return [hyperparameters(**point) for point in points]


def _check_points(content: list[Any], path: Path) -> list[dict[str, Any]]:
    if not content or not all(isinstance(point, dict) and point for point in content):
        raise QuickstartError(f"{path} must list one or more points, each a dictionary of values")
    for index, point in enumerate(content):
        if point.keys() != content[0].keys():
            names = ", ".join(sorted(point.keys() ^ content[0].keys()))
            raise QuickstartError(f"{path}: point {index + 1} and point 1 differ in: {names}")
    return content


def _draw(space: dict[str, Any], num_trials: int, seed: int, path: Path) -> list[dict[str, Any]]:
    if not space:
        raise QuickstartError(f"{path} names no hyperparameter")
    from scipy.stats import qmc  # Only needed here, and slow to import.

    draws = qmc.Halton(len(space), rng=seed).random(num_trials)
    return [
        {
            name: _place(description, float(u), name, path)
            for (name, description), u in zip(space.items(), row, strict=True)
        }
        for row in draws
    ]


def _place(description: Any, u: float, name: str, path: Path) -> Any:
    """The value that lies at the fraction `u` in [0, 1) of a hyperparameter's range."""
    match description:
        case {"feasible_points": [_, *_] as values}:
            return values[int(u * len(values))]
        case {
            "min": int() | float() as low,
            "max": int() | float() as high,
            "scaling": "linear" | "log" as scaling,
        }:
            with contextlib.suppress(OverflowError):  # integers of hundreds of digits
                low, high = float(low), float(high)
                if scaling == "linear" and math.isfinite(high - low):
                    return low + u * (high - low)
                if scaling == "log" and low > 0 and math.isfinite(high / low) and high > 0:
                    return low * math.exp(u * math.log(high / low))
    raise QuickstartError(
        f'{path}: {name} needs {{"feasible_points": [...]}} or {{"min": ..., "max": ..., '
        '"scaling": "linear" or "log"} (finite; positive limits for "log"), not '
        f"{reprlib.repr(description)}"
    )
