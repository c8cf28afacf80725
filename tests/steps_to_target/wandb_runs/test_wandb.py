"""wandb: names, pushing offline (idempotent), reading back, and the service through a stand-in."""

import importlib
import json
from types import SimpleNamespace

import pytest
from make_fixtures import rows_to, study_folder, write_trial

from steps_to_target import CompareError, load_runs, summarize, wandb_environment
from steps_to_target.wandb_runs import read as wandb_read
from steps_to_target.wandb_runs.names import DESCRIPTION, run_group, run_id, run_name
from steps_to_target.wandb_runs.push import run_config, run_history, run_summary
from steps_to_target.wandb_runs.read import log_chunks, read_records, read_service


def test_live_runs_are_named_as_pushed_ones():
    names = wandb_environment(workload="ogbg", method="kfac", study="3")
    assert names == {
        "WANDB_NAME": "kfac ogbg s3 t1",
        "WANDB_RUN_GROUP": "ogbg/kfac",
        "WANDB_JOB_TYPE": "study_3",
        "WANDB_TAGS": "ogbg,kfac,study_3",
    }


def test_ids_depend_on_what_a_run_is(small_set):
    runs = load_runs([small_set])
    ids = {run_id(run.identity) for run in runs}
    assert len(ids) == len(runs)
    assert ids == {run_id(run.identity) for run in load_runs([small_set])}


def test_summary_has_what_the_runs_table_sorts_by(small_set):
    runs = load_runs([small_set])
    summary = summarize(runs, "nesterov")
    run = next(r for r in runs if r.method == "kfac_reduce" and r.workload == "ogbg")
    entries = run_summary(run, summary)
    assert entries["steps_to_target"] == 8421
    assert entries["steps_to_target_after"] == 7368
    assert entries["steps_ratio_to_reference"] == pytest.approx(
        8421 / ((16842 + 17895 + 18947) / 3)
    )
    assert entries["method_steps_ratio"] == pytest.approx(0.4706, abs=1e-4)
    missed = next(r for r in runs if r.method == "adamw")
    assert not {"steps_to_target", "steps_ratio_to_reference"} & set(run_summary(missed, summary))


class _Item:
    """What wandb's API gives for a run."""

    def __init__(self, run_id, config, rows, group="", job_type="", name="lively-name-1"):
        self.id, self.config, self.name = run_id, config, name
        self.group, self.job_type, self._rows = group, job_type, rows

    def scan_history(self):
        return iter(self._rows)


def _api(*items):
    return SimpleNamespace(runs=lambda path: list(items), run=lambda path: items[0])


def test_algoperfs_own_runs_from_the_service():
    config = {
        "workload": "ogbg",
        "framework": "pytorch",
        "experiment_name": "group/kfac/study_2",
        "hparam_start_index": 3,
        "hparam_end_index": 4,
        "max_global_steps": None,
        "learning_rate": 0.1,
    }
    rows = [dict(row) for row in rows_to("ogbg", 16_000)]
    last = {"score": rows[-1]["score"], "global_step": rows[-1]["global_step"]}
    (run,) = read_service("me/project", api=_api(_Item("abc", config, [*rows, last])))
    assert (run.workload, run.method, run.study, run.trial) == ("ogbg", "kfac", "2", "4")
    assert run.hparams == {"learning_rate": 0.1}
    assert run.flags["workload"] == "ogbg"
    assert run.crossing.step == 16842
    assert run.path == "wandb:me/project/abc"
    assert run.ending.final_row


def test_names_set_by_the_launcher_win():
    config = {"workload": "ogbg", "experiment_name": "x"}
    item = _Item("abc", config, [], group="ogbg/kfac", job_type="study_5")
    (run,) = read_service("me/project/abc", api=_api(item))
    assert (run.method, run.study, run.trial) == ("kfac", "5", "abc")


def test_pushed_runs_read_back_the_same(small_set):
    for run in load_runs([small_set]):
        item = _Item(run_id(run.identity), run_config(run), run_history(run))
        (back,) = read_service("me/project", api=_api(item))
        assert back.identity == run.identity
        assert (back.status, back.crossing, back.test_crossing) == (
            run.status,
            run.crossing,
            run.test_crossing,
        )


def test_service_errors_take_one_line():
    def fail(path):
        raise ValueError("could not find project\nsecond line")

    with pytest.raises(CompareError, match=r"^wandb:me/x cannot be read: could not find project$"):
        read_service("me/x", api=SimpleNamespace(runs=fail))
    with pytest.raises(CompareError, match="expected wandb:ENTITY/PROJECT"):
        read_service("me")


def test_missing_wandb_says_how_to_get_it(monkeypatch, small_set, tmp_path):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(wandb_read, "import_module", absent)
    with pytest.raises(CompareError, match="pip install wandb"):
        wandb_read.load_wandb()


def test_torn_log_gives_the_records_before(tmp_path):
    header = b":W&B\xe1\xbe\x00"
    body = b"\0\0\0\0" + (3).to_bytes(2, "little") + b"\x01" + b"abc"
    assert list(log_chunks(header + body + body[:9])) == [b"abc"]
    assert list(log_chunks(b"")) == []


@pytest.fixture
def wandb_offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    place = tmp_path / "pushed"
    place.mkdir()
    return place


def _folders(place):
    return sorted(path.name for path in (place / "wandb").glob("offline-run-*"))


def test_push_offline_is_idempotent_and_reads_back(wandb_offline, tmp_path):
    push = importlib.import_module("steps_to_target.wandb_runs.push").push_to_wandb
    root = tmp_path / "runs"
    for method, step in (("nesterov", 16_000), ("kfac", 8_000)):
        write_trial(study_folder(root, method, 0, "ogbg"), "ogbg", rows_to("ogbg", step))
    runs = load_runs([root])
    summary = summarize(runs, "nesterov", paper=False)
    first = push(runs, summary, "project", folder=wandb_offline)
    assert (first.written, first.unchanged, first.offline) == (2, 0, True)
    assert "wandb sync" in str(first)
    before = _folders(wandb_offline)
    again = push(runs, summary, "project", folder=wandb_offline)
    assert (again.written, again.unchanged) == (0, 2)
    assert _folders(wandb_offline) == before

    config, rows, names = read_records(next((wandb_offline / "wandb").glob("*/run-*.wandb")))
    identity = next(r.identity for r in runs if run_id(r.identity) == names["id"])
    assert (names["name"], names["group"]) == (run_name(identity), run_group(identity))
    assert config[DESCRIPTION]["identity"]["workload"] == "ogbg"
    assert rows[0]["global_step"] == 1

    back = load_runs([wandb_offline])
    assert [(r.identity, r.status, r.crossing) for r in back] == [
        (r.identity, r.status, r.crossing) for r in runs
    ]

    # A run that went on is pushed again and takes the place of its older state.
    write_trial(study_folder(root, "kfac", 0, "ogbg"), "ogbg", rows_to("ogbg", 9_000))
    runs = load_runs([root])
    summary = summarize(runs, "nesterov", paper=False)
    changed = push(runs, summary, "project", folder=wandb_offline)
    assert (changed.written, changed.unchanged) == (1, 1)
    assert len(_folders(wandb_offline)) == 2
    assert [r.crossing for r in load_runs([wandb_offline])] == [r.crossing for r in runs]


def test_published_rows_are_pushed_beside_the_runs_and_not_read_as_runs(wandb_offline, tmp_path):
    push = importlib.import_module("steps_to_target.wandb_runs.push").push_to_wandb
    root = tmp_path / "runs"
    write_trial(study_folder(root, "kfac", 0, "ogbg"), "ogbg", rows_to("ogbg", 8_000))
    runs = load_runs([root])
    summary = summarize(runs, leaderboard=True)
    published = [group for group in summary.groups if group.published]
    assert {"paper: K-FAC-reduce", "CASPR (8 V100)", "muon_torch (4 A100)"} <= {
        group.method for group in published
    }
    first = push(runs, summary, "project", folder=wandb_offline)
    assert first.written == 1 + len(published)
    assert push(runs, summary, "project", folder=wandb_offline).written == 0
    back = load_runs([wandb_offline])
    assert [run.identity for run in back] == [run.identity for run in runs]
    item = _Item("x", {}, [], job_type="published")
    assert read_service("me/project", api=_api(item)) == []


def test_the_page_has_every_workload_with_its_target(small_set):
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")
    make_page = importlib.import_module("steps_to_target.wandb_runs.page").make_page
    summary = summarize(load_runs([small_set]), "nesterov", leaderboard=True)
    page = make_page(summary, "project", "me")
    headings = [block.text for block in page.blocks if hasattr(block, "text")]
    assert [text.partition(":")[0] for text in headings] == summary.workloads
    grids = [block for block in page.blocks if hasattr(block, "panels")]
    assert [grid.runsets[0].project for grid in grids] == ["project"] * len(headings)
    assert "ogbg" in grids[summary.workloads.index("ogbg")].runsets[0].filters
    assert [panel.title for panel in grids[summary.workloads.index("ogbg")].panels] == [
        "steps to target", "hours to target", *["validation/mean_average_precision"] * 2
    ]  # fmt: skip


def test_disabled_wandb_and_missing_folder_are_said(wandb_offline, monkeypatch, small_set):
    push = importlib.import_module("steps_to_target.wandb_runs.push").push_to_wandb
    runs = load_runs([small_set])
    with pytest.raises(CompareError, match="no such folder"):
        push(runs, summarize(runs), "project", folder=wandb_offline / "none")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(CompareError, match="WANDB_MODE=disabled"):
        push(runs, summarize(runs), "project", folder=wandb_offline)


def test_config_is_plain_json(small_set):
    for run in load_runs([small_set]):
        json.dumps(run_config(run), allow_nan=False)
