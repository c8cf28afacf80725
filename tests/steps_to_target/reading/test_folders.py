"""What counts as a run: AlgoPerf's files do, whatever folder they are in, and nothing else does."""

import pytest
from make_fixtures import rows_to, study_folder, write_trial

from steps_to_target import CompareError, Status, load, load_runs
from steps_to_target.cli import main


def _good(root, method="mine", trial=1, step=9000):
    folder = study_folder(root, method, 0, "ogbg", trial)
    return write_trial(folder, "ogbg", rows_to("ogbg", step + trial), hparams={"lr": trial})


def _hollow(folder):
    """What macOS leaves beside the files of an archive."""
    folder.mkdir(parents=True)
    for name in ("eval_measurements.csv", "measurements.csv", "hparams.json"):
        (folder / f"._{name}").write_bytes(b"\0\5\x16\7" + b"\0" * 60)


@pytest.mark.parametrize(
    "where",
    [
        "__MACOSX/mine/study_0/ogbg_pytorch/trial_1",
        ".Trash-1000/mine/study_0/ogbg_pytorch/trial_1",
        ".snapshot/mine/study_0/ogbg_pytorch/trial_1",
        "lost+found/ogbg_pytorch/trial_1",
        "@eaDir/ogbg_pytorch/trial_1",
    ],
)
def test_hidden_folders_and_those_of_archives_are_skipped(tmp_path, where):
    _good(tmp_path)
    write_trial(tmp_path / where, "ogbg", rows_to("ogbg", 5000))
    assert [run.method for run in load_runs([tmp_path])] == ["mine"]


def test_hollow_folders_of_an_unpacked_archive_are_no_runs(tmp_path):
    _good(tmp_path)
    _hollow(tmp_path / "__MACOSX" / "mine" / "study_0" / "ogbg_pytorch" / "trial_1")
    _hollow(tmp_path / "mine" / "study_0" / "ogbg_pytorch" / "trial_2")
    loaded = load([tmp_path])
    assert len(loaded.runs) == 1
    assert any("1 empty trial folder(s)" in note for note in loaded.notes)


@pytest.mark.parametrize("name", ["archive", "Archived", "_archive", "archives"])
def test_archived_runs_are_left_out_with_a_word_and_read_when_named(tmp_path, name):
    _good(tmp_path)
    _good(tmp_path / name, "old", step=5000)
    loaded = load([tmp_path])
    assert [run.method for run in loaded.runs] == ["mine"]
    assert any(name in note for note in loaded.notes)
    assert [run.method for run in load_runs([tmp_path / name])] == ["old"]


@pytest.mark.parametrize("name", ["wandb", "checkpoints", "trial_notes", "plots"])
def test_folders_without_algoperfs_files_are_no_runs(tmp_path, name):
    trial = _good(tmp_path)
    (trial.parent / name).mkdir()
    (trial.parent / name / "results.csv").write_text("a,b\n1,2\n")
    (trial.parent / name / "config.json").write_text("{}")
    assert len(load_runs([tmp_path])) == 1


def test_measurements_of_something_else_are_no_run(tmp_path):
    _good(tmp_path)
    other = tmp_path / "laboratory" / "monday"
    other.mkdir(parents=True)
    (other / "measurements.csv").write_text("time,temperature\n1,20.5\n")
    assert len(load_runs([tmp_path])) == 1
    with pytest.raises(CompareError, match="no run found"):
        load_runs([tmp_path / "laboratory"])


def test_trial_that_only_has_its_settings_crashed(tmp_path):
    trial = _good(tmp_path)
    for name in ("eval_measurements.csv", "measurements.csv"):
        (trial / name).unlink()
    (run,) = load_runs([tmp_path])
    assert run.status is Status.CRASHED


@pytest.mark.parametrize(
    "name",
    ["mine.zip", "notes.txt", "results.json", "README", "hparams.json", "eval_measurements.csv.gz"],
)
def test_a_file_that_is_no_log_is_an_error_not_the_folder_around_it(tmp_path, capsys, name):
    _good(tmp_path)
    (tmp_path / name).write_bytes(b"PK\3\4")
    assert main([str(tmp_path / name)]) == 2
    assert f"{name} is no log of a run" in capsys.readouterr().err


def test_a_log_given_as_a_file_is_its_own_trial_only(tmp_path):
    trial = _good(tmp_path)
    _good(tmp_path, trial=2)
    (run,) = load_runs([trial / "eval_measurements.csv"])
    assert run.trial == "1"
    empty = tmp_path / "other" / "measurements.csv"
    empty.parent.mkdir()
    empty.write_text("")
    with pytest.raises(CompareError, match="is no log of a run"):
        load_runs([empty])


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            "obgb:mean_average_precision=0.2",
            "no run has the workload 'obgb' (did you mean 'ogbg'?)",
        ),
        ("ogbg:accuracy=0.2", "no run has the validation metric 'accuracy'"),
        ("ogbg:mean_averge_precision=0.2", "(did you mean 'mean_average_precision'?)"),
    ],
)
def test_typing_mistakes_in_targets_are_errors(tmp_path, capsys, option, words):
    _good(tmp_path)
    assert main([str(tmp_path), "--target", option]) == 2
    assert words in capsys.readouterr().err


def test_metric_without_a_known_direction_is_asked_for(tmp_path, capsys):
    trial = study_folder(tmp_path, "mine", 0, "ogbg")
    meta = {"workload.target_metric_name": "reward", "workload.validation_target_value": 0.2}
    rows = [
        {("validation/reward" if "average" in k and k[0] == "v" else k): v for k, v in row.items()}
        for row in rows_to("ogbg", 9000)
    ]
    write_trial(trial, "ogbg", rows, meta=meta)
    (run,) = load_runs([tmp_path])
    assert run.status is Status.UNREADABLE
    assert "--target 'ogbg:reward<=0.2'" in run.evidence
    assert main([str(tmp_path), "--target", "ogbg:reward>=0.2", "--no-paper"]) == 0
    assert "reached" in capsys.readouterr().out
