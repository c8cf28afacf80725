"""Folders: layouts, names, and what is made of damaged or partial ones."""

import json
import math

import pandas as pd
import pytest
from make_fixtures import evaluation, rows_to, study_folder, write_csv, write_trial

from steps_to_target import CompareError, Status, load_runs
from steps_to_target.model import Ending
from steps_to_target.reading.trial import find_ending

EVALUATIONS, MEASUREMENTS = "eval_measurements.csv", "measurements.csv"


def _notes(run):
    return [str(note) for note in run.notes]


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
    for step, place in ((100, "first"), (9000, "second")):
        trial = study_folder(tmp_path / place, "kfac", 0, "ogbg")
        write_trial(trial, "ogbg", rows_to("ogbg", step))
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
    assert any("goes back in steps: 1 time" in note for note in _notes(run))
    for number in (1, 2):
        meta = json.loads((trial / "meta_data_0.json").read_text()) | {"gpu_model_name": "A100"}
        (trial / f"meta_data_{number}.json").write_text(json.dumps(meta))
    run = _one(trial)
    assert run.resumes == 2
    assert any("hardware: 8 x Tesla V100-SXM2-16GB, then 8 x A100" in n for n in _notes(run))


def test_evaluations_lost_from_one_file_are_taken_from_the_other(tmp_path):
    trial = write_trial(study_folder(tmp_path, "mine", 0, "ogbg"), "ogbg", rows_to("ogbg", 16_000))
    whole = _one(trial)
    lines = (trial / EVALUATIONS).read_text().splitlines(keepends=True)
    (trial / EVALUATIONS).write_text("".join(lines[:4]) + lines[4][:20])
    run = _one(trial)
    assert run.crossing == whole.crossing
    assert any("taken from measurements.csv" in note for note in _notes(run))
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


@pytest.mark.parametrize(
    ("meta", "limit"),
    [
        ({}, 1.5 * 12_011),
        ({"python_version": "3.11.10"}, 1.5 * 12_011),
        ({"python_version": "3.8.10"}, 3 * 12_011),  # AlgoPerf v0.5's
        ({"python_version": "3.9.1"}, 3 * 12_011),
        ({"workload.max_allowed_runtime_sec": 18_477, "workload.step_hint": 80_000}, 3 * 18_477),
    ],
)
def test_self_tuning_has_the_time_of_its_version(tmp_path, meta, limit):
    path = study_folder(tmp_path, "mine", 0, "ogbg")
    for seconds, status in ((limit - 5, Status.MISSED), (limit + 5, Status.OUT_OF_TIME)):
        write_trial(
            path,
            "ogbg",
            rows_to("ogbg", None),
            final_seconds=seconds,
            flags={"tuning_ruleset": "self"},
            meta=meta,
        )
        assert _one(path).status is status


def test_final_row_is_told_from_evaluations_and_training_rows():
    training, row = {"global_step": 5.0, "loss": 1.0}, evaluation("ogbg", 5, 9.0, 0.1)
    last = {"global_step": 7.0, "score": 12.0, "preemption_count": 0.0}

    def ending(*rows):
        return find_ending(pd.DataFrame(rows, dtype=float), known=True)

    assert ending(training, row | {"train/loss": 0.5}) == Ending(False, 5.0, 9.0, 0.5)
    assert ending(training, row, last) == Ending(True, 7.0, 12.0, 0.03)
    assert not ending(training, row, last, training).final_row
    assert find_ending(pd.DataFrame(), known=False) == Ending(known=False)


def test_loss_that_turned_nan_is_a_crash_though_algoperf_leaves_its_cell_empty(tmp_path):
    rows = rows_to("ogbg", None)[:8]
    trial = write_trial(study_folder(tmp_path, "mine", 0, "ogbg"), "ogbg", rows, final=False)
    with (trial / MEASUREMENTS).open("a") as stream:
        columns = (trial / MEASUREMENTS).read_text().splitlines()[0].count(",")
        stream.write("99999" + "," * columns + "\n")
    run = _one(trial)
    assert run.status is Status.CRASHED
    assert "training loss nan when the log stops" in run.evidence
    rows[-1] |= {"train/loss": math.nan, "validation/mean_average_precision": math.nan}
    write_trial(trial, "ogbg", rows, final=False)
    assert _one(trial).status is Status.CRASHED


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
    elif kind == "tensors in cells":
        frame = pd.read_csv(path)
        for name in ("global_step", "validation/mean_average_precision"):
            frame[name] = [f"tensor({value}, device='cuda:0')" for value in frame[name]]
        frame.to_csv(path, index=False)
        (trial / MEASUREMENTS).unlink()
    elif kind in ("semicolons", "decimal commas"):
        frame = pd.read_csv(path)
        frame.to_csv(path, sep=";" if kind == "semicolons" else ",", decimal=",", index=False)
        (trial / MEASUREMENTS).unlink()


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("empty csv", Status.CRASHED),
        ("header only", Status.CRASHED),
        ("one row", Status.CRASHED),
        ("no metric column", Status.UNREADABLE),
        ("no step column", Status.UNREADABLE),
        ("nan metrics", Status.MISSED),
        ("half a line", Status.REACHED),
        ("duplicate steps", Status.REACHED),
        ("interleaved", Status.REACHED),
        ("binary", Status.UNREADABLE),
        ("folder in place of csv", Status.UNREADABLE),
        ("broken json", Status.REACHED),
        ("json of another kind", Status.REACHED),
        ("semicolons", Status.UNREADABLE),
        ("decimal commas", Status.UNREADABLE),
        ("tensors in cells", Status.UNREADABLE),
    ],
)
def test_broken_input_gives_a_row_with_a_status_and_evidence(tmp_path, kind, status):
    trial = write_trial(study_folder(tmp_path, "mine", 0, "ogbg"), "ogbg", rows_to("ogbg", 16_000))
    _break(kind, trial)
    run = _one(tmp_path)
    assert run.status is status
    assert run.evidence
    assert run.workload == "ogbg"
