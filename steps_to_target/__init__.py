"""Steps and time to target, compared: from AlgoPerf's log folders, the quickstart's, or wandb.

The command line is ``python -m steps_to_target RUNS... --reference NAME``; the functions below are
what it is made of. Each is imported when it is first used, with the packages that it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steps_to_target.errors import CompareError
    from steps_to_target.model import Crossing, Identity, Note, Run, Status
    from steps_to_target.output.export import write_csv, write_json
    from steps_to_target.output.plots import plot_profile, plot_runs
    from steps_to_target.output.report import write_html
    from steps_to_target.output.text import render_profile, render_table, render_text
    from steps_to_target.reading.load import Loaded, load, load_runs
    from steps_to_target.scoring import Profile, performance_profile
    from steps_to_target.summary import Group, Summary, summarize
    from steps_to_target.targets import Override, Target
    from steps_to_target.wandb_runs.names import wandb_environment
    from steps_to_target.wandb_runs.push import push_to_wandb

_HOMES = {
    "errors": ["CompareError"],
    "model": ["Crossing", "Identity", "Note", "Run", "Status"],
    "output.export": ["write_csv", "write_json"],
    "output.plots": ["plot_profile", "plot_runs"],
    "output.report": ["write_html"],
    "output.text": ["render_profile", "render_table", "render_text"],
    "reading.load": ["Loaded", "load", "load_runs"],
    "scoring": ["Profile", "performance_profile"],
    "summary": ["Group", "Summary", "summarize"],
    "targets": ["Override", "Target"],
    "wandb_runs.names": ["wandb_environment"],
    "wandb_runs.push": ["push_to_wandb"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CompareError",
    "Crossing",
    "Group",
    "Identity",
    "Loaded",
    "Note",
    "Override",
    "Profile",
    "Run",
    "Status",
    "Summary",
    "Target",
    "load",
    "load_runs",
    "performance_profile",
    "plot_profile",
    "plot_runs",
    "push_to_wandb",
    "render_profile",
    "render_table",
    "render_text",
    "summarize",
    "wandb_environment",
    "write_csv",
    "write_html",
    "write_json",
]


def __getattr__(name: str) -> Any:
    """Import a function or class from where it lives."""
    if name in _HOME_OF:
        return getattr(import_module(f"steps_to_target.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'steps_to_target' has no attribute {name!r}")
