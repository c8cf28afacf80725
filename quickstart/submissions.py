"""Loads a submission, the Python file with AlgoPerf's functions."""

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from quickstart.errors import QuickstartError
from submission.algoperf_compat import spec

_REQUIRED = ("get_batch_size", "init_optimizer_state", "update_params", "data_selection")


@dataclass(frozen=True)
class Submission:
    """The functions of a submission.

    Attributes:
        path: its file.
        prepare_for_eval: None if it has none.
        needs_train_state: whether `update_params` takes `train_state`.
    """

    path: Path
    get_batch_size: Callable[[str], int]
    init_optimizer_state: Callable[..., Any]
    update_params: Callable[..., Any]
    data_selection: Callable[..., Any]
    prepare_for_eval: Callable[..., Any] | None
    needs_train_state: bool


def load(path: Path) -> Submission:
    """Imports a submission.

    A file that lies in a folder where Python looks for modules, or in a package, is imported as a
    dotted module name, as AlgoPerf does; any other one is loaded from its file.

    Raises:
        QuickstartError: if there is no such file, it cannot be imported or a function is missing.
    """
    if path.suffix != ".py" or not path.is_file():
        raise QuickstartError(f"--submission_path: {path} is no Python file")
    try:
        with _algoperf_stood_in_for():
            module = _import(path)
    except Exception as error:  # whatever the file does when it is imported
        raise QuickstartError(
            f"--submission_path: cannot import {path}: {type(error).__name__}: {error}"
        ) from error
    missing = [name for name in _REQUIRED if not callable(getattr(module, name, None))]
    if missing:
        raise QuickstartError(
            f"--submission_path: {path} lacks {', '.join(missing)}; a submission defines "
            f"{', '.join(_REQUIRED)} and may define prepare_for_eval"
        )
    return Submission(
        path=path,
        prepare_for_eval=getattr(module, "prepare_for_eval", None),
        needs_train_state="train_state" in inspect.signature(module.update_params).parameters,
        **{name: getattr(module, name) for name in _REQUIRED},
    )


@contextlib.contextmanager
def _algoperf_stood_in_for() -> Iterator[None]:
    """Lets a submission import `algoperf.spec`, with the values that this program's workloads use.

    A copy of this project's submission would otherwise make values of its own, which are equal to
    none of a workload's. Where AlgoPerf is installed it is left alone.
    """
    names = ("algoperf", "algorithmic_efficiency")
    if any(importlib.util.find_spec(name) is not None for name in names):
        yield
        return
    package, module = ModuleType("algoperf"), ModuleType("algoperf.spec")
    for item in (package, module):
        item.__spec__ = ModuleSpec(item.__name__, None)
    package.__path__ = []
    vars(module).update({k: getattr(spec, k) for k in dir(spec) if not k.startswith("_")})
    package.spec = module  # type: ignore[attr-defined]
    sys.modules |= {"algoperf": package, "algoperf.spec": module}
    try:
        yield
    finally:
        for name in ("algoperf", "algoperf.spec"):
            del sys.modules[name]


def _import(path: Path) -> Any:
    absolute = path.resolve()
    folders = [Path(entry or ".").resolve() for entry in sys.path]
    for folder in [f for f in folders if absolute.is_relative_to(f)] or [_above_package(absolute)]:
        parts = absolute.relative_to(folder).with_suffix("").parts
        if folder not in folders and len(parts) > 1:
            sys.path.append(str(folder))  # a package, whose modules import each other
        if all(part.isidentifier() for part in parts) and (folder in folders or len(parts) > 1):
            return importlib.import_module(".".join(parts))
    name = f"submission_{absolute.stem}"
    module_spec = importlib.util.spec_from_file_location(name, absolute)
    if module_spec is None or module_spec.loader is None:
        raise ImportError(f"Python cannot load {absolute}")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    module_spec.loader.exec_module(module)
    return module


def _above_package(file: Path) -> Path:
    """The folder that holds the outermost package around a file, else the file's own folder."""
    folder = file.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder
