"""Steps and time to target, compared: from AlgoPerf's log folders, the quickstart's, or wandb.

The command line is ``python -m steps_to_target RUNS... --reference NAME``; the functions below are
what it is made of. Names that need matplotlib or jinja2 are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from steps_to_target.errors import CompareError
from steps_to_target.export import write_csv, write_json
from steps_to_target.model import Crossing, Identity, Run, Status
from steps_to_target.reader import load_runs
from steps_to_target.scoring import Profile, performance_profile
from steps_to_target.summary import Group, Summary, summarize
from steps_to_target.targets import Target
from steps_to_target.text import render_profile, render_table, render_text
from steps_to_target.wandb_names import wandb_environment

if TYPE_CHECKING:
    from steps_to_target.plots import plot_profile, plot_runs
    from steps_to_target.report import write_html
    from steps_to_target.wandb_write import push_to_wandb

_LAZY = {
    "plot_profile": "plots",
    "plot_runs": "plots",
    "push_to_wandb": "wandb_write",
    "write_html": "report",
}

__all__ = [
    "CompareError",
    "Crossing",
    "Group",
    "Identity",
    "Profile",
    "Run",
    "Status",
    "Summary",
    "Target",
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
    """Import the plotting, reporting and wandb functions on first use."""
    if name in _LAZY:
        return getattr(import_module(f"steps_to_target.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'steps_to_target' has no attribute {name!r}")
