"""Overriding properties of a workload class by a subclass: parsing, checking, building.

AlgoPerf describes a workload by read-only properties (`step_hint`, `num_validation_examples`,
`validation_target_value`, ...). A subclass that returns other values is all it takes to change
them, and AlgoPerf writes the values in force into the run's `meta_data_*.json`.
"""

import ast
import difflib
import math
from collections.abc import Callable, Iterable, Mapping

from workloads_overrides.errors import LaunchError

Value = bool | int | float | str | tuple[float, ...]


def parse_settings(texts: Iterable[str]) -> dict[str, Value]:
    """Reads `PROPERTY=VALUE` texts; a later setting of the same property wins.

    Values are Python literals (`3`, `0.5`, `True`, `(0.5, 1.0)`); anything else is a string.

    Raises:
        LaunchError: A text has no `=`, or its left side is no identifier.
    """
    settings: dict[str, Value] = {}
    for text in texts:
        name, equals, literal = text.partition("=")
        if not equals or not name.isidentifier():
            raise LaunchError(
                f"--set {text!r} is not of the form PROPERTY=VALUE, such as --set step_hint=80000"
            )
        try:
            settings[name] = ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            settings[name] = literal
    return settings


def override_properties(workload_class: type, overrides: Mapping[str, Value]) -> type:
    """Returns a subclass of `workload_class` whose named properties have the given values.

    The subclass keeps the name of its parent, since AlgoPerf logs it.

    Raises:
        LaunchError: A name is not a property of the class, or a value has the wrong type.
    """
    for name, value in overrides.items():
        _check(workload_class, name, value)
    properties = {name: property(_constant(value)) for name, value in overrides.items()}
    return type(workload_class.__name__, (workload_class,), properties)


def _constant(value: Value) -> Callable[[object], Value]:
    return lambda self: value


def _check(workload_class: type, name: str, value: Value) -> None:
    current_property = getattr(workload_class, name, None)
    if not isinstance(current_property, property):
        known = [key for key in dir(workload_class) if _is_property(workload_class, key)]
        close = difflib.get_close_matches(name, known, n=3) or known
        raise LaunchError(
            f"--set {name}: {workload_class.__name__} has no property of that name; "
            f"{'nearest' if close is not known else 'it has'}: {', '.join(close)}"
        )
    expected = _current_value(workload_class, current_property)
    problem = _type_problem(value, expected)
    if problem is not None:
        raise LaunchError(
            f"--set {name}={value!r}: {problem}; {workload_class.__name__} has {expected!r}"
        )


def _is_property(workload_class: type, name: str) -> bool:
    return not name.startswith("_") and isinstance(getattr(workload_class, name, None), property)


def _current_value(workload_class: type, current_property: property) -> object:
    """The property's value, or None where reading it needs an initialised workload."""
    bare: object = object.__new__(workload_class)
    try:
        return current_property.fget(bare) if current_property.fget else None
    except Exception:  # a property may fail in any way before the model and data exist
        return None


def _type_problem(value: Value, expected: object) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "the value must be finite"
    if isinstance(expected, bool):
        return None if isinstance(value, bool) else "the value must be True or False"
    if isinstance(expected, int):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return None if whole else "the value must be a whole number, at least 0"
    if isinstance(expected, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number else "the value must be a number"
    if isinstance(expected, str):
        return None if isinstance(value, str) else "the value must be a text"
    if isinstance(expected, tuple):
        return None if isinstance(value, tuple) else "the value must be a tuple, such as (0.5, 1.0)"
    return None
