"""Copies of one log count once; runs that only look alike all count."""

import json
import shutil

import pytest
from make_fixtures import rows_to, study_folder, write_trial

from steps_to_target import load_runs, summarize


def _two(root):
    for trial, step in ((1, 8000), (2, 9000)):
        folder = study_folder(root, "mine", 0, "ogbg", trial)
        write_trial(folder, "ogbg", rows_to("ogbg", step), flags={"rng_seed": trial})
    return study_folder(root, "mine", 0, "ogbg", 1)


@pytest.mark.parametrize(
    "copy",
    [
        "mine/study_0/ogbg_pytorch/trial_1 copy",
        "mine/study_0/ogbg_pytorch/trial_1_old",
        "mine/study_0/ogbg_pytorch/trial_3",
        "mine/study_0/trial_1",  # as 18 of AlgoPerf v0.5's schedule_free_adamw
        "mine/study_0 (1)/ogbg_pytorch/trial_1",
        "mine copy/study_0/ogbg_pytorch/trial_1",
        "backup/mine/study_0/ogbg_pytorch/trial_1",
        "backup",
    ],
)
def test_copies_count_once_with_a_warning(tmp_path, copy):
    original = _two(tmp_path)
    alone = summarize(load_runs([tmp_path]), paper=False)
    shutil.copytree(original, tmp_path / copy)
    runs = load_runs([tmp_path])
    summary = summarize(runs, paper=False)
    assert [run.path for run in runs] == [str(original), str(original.with_name("trial_2"))]
    assert [group.steps for group in summary.groups] == [group.steps for group in alone.groups]
    (warning,) = summary.warnings
    assert "each log counts once" in warning
    assert str(tmp_path / copy) in warning


def test_a_copy_without_its_settings_or_with_other_line_ends_is_a_copy(tmp_path):
    original = _two(tmp_path)
    bare = tmp_path / "mine" / "study_0" / "ogbg_pytorch" / "trial_7"
    bare.mkdir()
    data = (original / "eval_measurements.csv").read_bytes()
    (bare / "eval_measurements.csv").write_bytes(data.replace(b"\n", b"\r\n"))
    assert len(load_runs([tmp_path])) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [("hparams.json", {"learning_rate": 0.5}), ("flags_0.json", {"rng_seed": 7})],
)
def test_equal_logs_of_other_settings_or_seeds_all_count(tmp_path, name, content):
    original = _two(tmp_path)
    twin = shutil.copytree(original, original.with_name("trial_3"))
    old = json.loads((twin / name).read_text())
    (twin / name).write_text(json.dumps(old | content))
    assert len(load_runs([tmp_path])) == 3


def test_runs_that_differ_in_the_last_digit_of_a_time_all_count(tmp_path):
    original = _two(tmp_path)
    twin = shutil.copytree(original, original.with_name("trial_3"))
    text = (twin / "eval_measurements.csv").read_text()
    last = text.splitlines()[-1].split(",")[2]
    for name in ("eval_measurements.csv", "measurements.csv"):
        changed = (twin / name).read_text().replace(last, last[:-1] + str((int(last[-1]) + 3) % 10))
        (twin / name).write_text(changed)
    assert len(load_runs([tmp_path])) == 3


def test_runs_without_an_evaluation_are_never_copies(tmp_path):
    for trial in (1, 2):
        folder = study_folder(tmp_path, "mine", 0, "ogbg", trial)
        write_trial(folder, "ogbg", [], final=False)
    assert len(load_runs([tmp_path])) == 2
