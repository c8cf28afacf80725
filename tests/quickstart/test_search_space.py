from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quickstart.errors import QuickstartError
from quickstart.search_space import read_points


def write(folder: Path, content: Any) -> Path:
    path = folder / "space.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_list_of_points(tmp_path: Path) -> None:
    path = write(tmp_path, [{"a": 1, "b": "x"}, {"a": 2, "b": None}])
    first, second = read_points(path, 5, seed=0)
    assert (first.a, first.b, second.a, second.b) == (1, "x", 2, None)
    assert len(read_points(path, 1, seed=0)) == 1


def test_points_drawn_from_a_space(tmp_path: Path) -> None:
    space = {
        "choice": {"feasible_points": ["p", "q"]},
        "rate": {"min": 1e-4, "max": 1e-1, "scaling": "log"},
        "share": {"min": 0.2, "max": 0.4, "scaling": "linear"},
    }
    path = write(tmp_path, space)
    points = read_points(path, 64, seed=1)
    assert {point.choice for point in points} == {"p", "q"}
    assert all(1e-4 <= point.rate <= 1e-1 and 0.2 <= point.share <= 0.4 for point in points)
    below = sum(point.rate < 10**-2.5 for point in points)
    assert 28 <= below <= 36  # half of the draws below the geometric middle
    assert read_points(path, 64, seed=1) == points
    assert read_points(path, 64, seed=2) != points


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([], "one or more points"),
        ([{}], "one or more points"),
        ([1], "one or more points"),
        ({}, "names no hyperparameter"),
        ("3", "holds a int"),
        ([{"a": 1}, {"b": 1}], "point 2 and point 1 differ in: a, b"),
        ([{"a b": 1}], "'a b' is no hyperparameter name"),
        ([{"class": 1}], "'class' is no hyperparameter name"),
        ([{"_a": 1}], "'_a' is no hyperparameter name"),
        ({"a": {"feasible_points": []}}, "a needs"),
        ({"a": {"min": 0, "max": 1, "scaling": "log"}}, "positive limits"),
        ({"a": {"min": 0, "max": 1, "scaling": "cubic"}}, "a needs"),
        ({"a": 3}, "a needs"),
    ],
)
def test_bad_files(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(QuickstartError, match=message):
        read_points(write(tmp_path, content), 1, seed=0)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(QuickstartError, match="--tuning_search_space: cannot read"):
        read_points(tmp_path / "nowhere.json", 1, seed=0)
