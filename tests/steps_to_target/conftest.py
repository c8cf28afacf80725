"""Makes ``make_fixtures`` importable and writes the small synthetic set once."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def small_set(tmp_path_factory):
    """Folder with three methods on two workloads, read-only by agreement."""
    from make_fixtures import make_small_set

    root = tmp_path_factory.mktemp("runs")
    make_small_set(root)
    return root


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
