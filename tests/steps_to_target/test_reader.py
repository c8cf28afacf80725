"""Folders: layouts, names, and what is made of damaged or partial ones."""

import json
import shutil

import pytest
from make_fixtures import evaluation, rows_to, study_folder, write_csv, write_trial

from steps_to_target import CompareError, Status, load_runs

EVALUATIONS, MEASUREMENTS = "eval_measurements.csv", "measurements.csv"


def _one(path):
    (run,) = load_runs([path])
    return run


def test_small_set_statuses(small_set):
    runs = load_runs([small_set])
    assert len(runs) == 16
    by_study = {run.study: run.status for run in runs if run.method == "adamw"}
    assert by_study == {
        "0": Status.MISSED,
        "1": Status.OUT_OF_TIME,
        "2": Status.CUT_SHORT,
        "3": Status.CRASHED,
    }
    assert all(run.reached for run in runs if run.method != "adamw")
    kfac = [run for run in runs if run.method == "kfac_reduce" and run.workload == "ogbg"]
    assert [run.crossing.step for run in kfac] == [8421, 9474, 7368]
    assert kfac[0].crossing.previous_step == 7368
    assert kfac[0].time_parts["forward"] == pytest.approx(0.3 * kfac[0].seconds[-1])
    assert kfac[0].time_steps == 8421


@pytest.mark.parametrize("level", [0, 1, 2, 3, 4])
def test_any_level_of_the_folders_may_be_given(tmp_path, level):
    trial = write_trial(
        study_folder(tmp_path / "runs", "mine", 7, "ogbg"), "ogbg", rows_to("ogbg", 100)
    )
    place = [trial, *trial.parents][level]
    run = _one(place)
    assert (run.workload, run.framework, run.method, run.study, run.trial) == (
        "ogbg",
        "pytorch",
        "mine",
        "7",
        "1",
    )


def test_log_file_and_relative_path(tmp_path, monkeypatch):
    trial = write_trial(study_folder(tmp_path, "mine", 0, "ogbg"), "ogbg", rows_to("ogbg", 100))
    assert _one(trial / EVALUATIONS).method == "mine"
    monkeypatch.chdir(trial)
    assert _one(".").method == "mine"


def test_overlapping_paths_and_links_give_each_run_once(tmp_path):
    root = tmp_path / "runs"
    write_trial(study_folder(root, "mine", 0, "ogbg"), "ogbg", rows_to("ogbg", 100))
    (root / "loop").symlink_to(root)
    assert len(load_runs([root, root / "mine", root])) == 1


def test_algoperf_experiment_layout(tmp_path):
    folder = tmp_path / "experiments" / "shampoo" / "ogbg_jax" / "trial_3"
    run = _one(write_trial(folder, "ogbg", rows_to("ogbg", 100)).parents[1])
    assert (run.method, run.framework, run.study, run.trial) == ("shampoo", "jax", "0", "3")


def test_timestamped_experiments_are_studies_of_one_method(tmp_path):
    for stamp in ("2024-01-01-10-00-00", "2024-01-02-10-00-00"):
        folder = tmp_path / f"mine-{stamp}" / "ogbg_pytorch" / "trial_1"
        write_trial(folder, "ogbg", rows_to("ogbg", 100))
    runs = load_runs([tmp_path])
    assert [run.method for run in runs] == ["mine", "mine"]
    assert len({run.study for run in runs}) == 2


def test_same_trial_in_two_places_is_told_apart(tmp_path):
    for place in ("first", "second"):
        write_trial(study_folder(tmp_path / place, "kfac", 0, "ogbg"), "ogbg", rows_to("ogbg", 100))
    assert {run.method for run in load_runs([tmp_path])} == {"first/kfac", "second/kfac"}


def test_studies_kept_in_two_places_are_one_method(tmp_path):
    for study, place in enumerate(("first", "second")):
        write_trial(
            study_folder(tmp_path / place, "kfac", study, "ogbg"), "ogbg", rows_to("ogbg", 100)
        )
    assert {run.method for run in load_runs([tmp_path])} == {"kfac"}


def test_two_frameworks_of_one_method_are_told_apart(tmp_path):
    for framework in ("jax", "pytorch"):
        folder = tmp_path / "mine" / "study_0" / f"ogbg_{framework}" / "trial_1"
        write_trial(folder, "ogbg", rows_to("ogbg", 100))
    assert {run.method for run in load_runs([tmp_path])} == {"mine (jax)", "mine (pytorch)"}


def test_folder_without_workload_in_its_name_takes_it_from_the_flags(tmp_path):
    run = _one(write_trial(tmp_path / "exp" / "trial_1", "ogbg", rows_to("ogbg", 100)))
    assert (run.workload, run.framework, run.method) == ("ogbg", "pytorch", "exp")


def test_targets_come_from_the_table_without_meta_data(tmp_path):
    trial = write_trial(study_folder(tmp_path, "mine", 0, "ogbg"), "ogbg", rows_to("ogbg", 5000))
    (trial / "meta_data_0.json").unlink()
    run = _one(trial)
    assert run.status is Status.REACHED
    assert run.target.source == "AlgoPerf 2c90454f"


def test_resumes_are_counted_from_rows_and_from_files(tmp_path):
    rows = rows_to("ogbg", None)[:10] + [
        row | {"preemption_count": 1} for row in rows_to("ogbg", 16_000)[6:]
    ]
    trial = write_trial(study_folder(tmp_path, "mine", 0, "ogbg"), "ogbg", rows)
    run = _one(trial)
    assert (run.status, run.resumes) == (Status.REACHED, 1)
    assert any("goes back in steps 1 time" in note for note in run.notes)
    for number in (1, 2):
        meta = json.loads((trial / "meta_data_0.json").read_text()) | {"gpu_model_name": "A100"}
        (trial / f"meta_data_{number}.json").write_text(json.dumps(meta))
    run = _one(trial)
    assert run.resumes == 2
    assert any("other hardware: 8 x Tesla V100-SXM2-16GB, then 8 x A100" in n for n in run.notes)


def test_evaluations_lost_from_one_file_are_taken_from_the_other(tmp_path):
    trial = write_trial(study_folder(tmp_path, "mine", 0, "ogbg"), "ogbg", rows_to("ogbg", 16_000))
    whole = _one(trial)
    lines = (trial / EVALUATIONS).read_text().splitlines(keepends=True)
    (trial / EVALUATIONS).write_text("".join(lines[:4]) + lines[4][:20])
    run = _one(trial)
    assert run.crossing == whole.crossing
    assert any("taken from measurements.csv" in note for note in run.notes)
    (trial / EVALUATIONS).unlink()
    assert _one(trial).crossing == whole.crossing


def test_long_measurements_are_read_whole_when_they_must_be(tmp_path):
    rows = rows_to("ogbg", 20_000, count=400)
    trial = write_trial(study_folder(tmp_path, "mine", 0, "ogbg"), "ogbg", rows)
    whole = _one(trial)
    (trial / EVALUATIONS).write_text("")
    run = _one(trial)
    assert len(run.steps) == len(rows)
    assert run.crossing == whole.crossing


def test_self_tuning_has_half_as_much_time_again(tmp_path):
    rows = rows_to("ogbg", None)
    flags = {"tuning_ruleset": "self"}
    path = study_folder(tmp_path, "mine", 0, "ogbg")
    run = _one(write_trial(path, "ogbg", rows, final_seconds=13_000.0, flags=flags))
    assert run.status is Status.MISSED
    run = _one(write_trial(path, "ogbg", rows, final_seconds=18_100.0, flags=flags))
    assert run.status is Status.OUT_OF_TIME


def test_missing_folder_and_folder_without_runs(tmp_path):
    with pytest.raises(CompareError, match="no such folder"):
        load_runs([tmp_path / "nowhere"])
    with pytest.raises(CompareError, match="no run found in"):
        load_runs([tmp_path])
    with pytest.raises(CompareError, match="no folder given"):
        load_runs([])


def _header(trial):
    return (trial / EVALUATIONS).read_text().splitlines()[0]


def _break(kind, trial):
    path = trial / EVALUATIONS
    lines = path.read_text().splitlines(keepends=True)
    if kind == "empty csv":
        path.write_text("")
        (trial / MEASUREMENTS).write_text("")
    elif kind == "header only":
        path.write_text(lines[0])
        (trial / MEASUREMENTS).unlink()
    elif kind == "one row":
        path.write_text("".join(lines[:2]))
        (trial / MEASUREMENTS).unlink()
    elif kind == "no metric column":
        write_csv(path, [{"global_step": 1, "score": 2.0}, {"global_step": 2, "score": 4.0}])
        (trial / MEASUREMENTS).unlink()
    elif kind == "no step column":
        write_csv(path, [{"validation/mean_average_precision": 0.3, "score": 2.0}])
        (trial / MEASUREMENTS).unlink()
    elif kind == "nan metrics":
        rows = [evaluation("ogbg", step, step, float("nan")) for step in (1, 50, 90)]
        write_trial(trial, "ogbg", rows)
    elif kind == "half a line":
        path.write_text("".join(lines)[:-60])
    elif kind == "duplicate steps":
        path.write_text("".join(lines + lines[-3:]))
    elif kind == "interleaved":
        order = [0, *[i for pair in zip(range(1, 8), range(3, 10), strict=True) for i in pair]]
        path.write_text("".join(lines[i] for i in order))
    elif kind == "binary":
        path.write_bytes(bytes(range(256)) * 20)
        (trial / MEASUREMENTS).write_bytes(b"\0" * 1000)
    elif kind == "folder in place of csv":
        path.unlink()
        path.mkdir()
        (trial / MEASUREMENTS).unlink()
    elif kind == "broken json":
        for name in ("hparams.json", "meta_data_0.json", "flags_0.json"):
            (trial / name).write_text('{"a": ')
    elif kind == "json of another kind":
        for name in ("hparams.json", "meta_data_0.json", "flags_0.json"):
            (trial / name).write_text("[1, 2]")
    elif kind == "nothing at all":
        shutil.rmtree(trial)
        trial.mkdir()


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("empty csv", Status.CRASHED),
        ("header only", Status.CRASHED),
        ("one row", Status.CRASHED),
        ("no metric column", Status.UNREADABLE),
        ("no step column", Status.CRASHED),
        ("nan metrics", Status.MISSED),
        ("half a line", Status.REACHED),
        ("duplicate steps", Status.REACHED),
        ("interleaved", Status.REACHED),
        ("binary", Status.CRASHED),
        ("folder in place of csv", Status.UNREADABLE),
        ("broken json", Status.REACHED),
        ("json of another kind", Status.REACHED),
        ("nothing at all", Status.CRASHED),
    ],
)
def test_broken_input_gives_a_row_with_a_status_and_evidence(tmp_path, kind, status):
    trial = write_trial(study_folder(tmp_path, "mine", 0, "ogbg"), "ogbg", rows_to("ogbg", 16_000))
    _break(kind, trial)
    run = _one(tmp_path)
    assert run.status is status
    assert run.evidence
    assert run.workload == "ogbg"
