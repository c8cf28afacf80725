import json

import pytest

from workloads_overrides import installation, launch
from workloads_overrides.miniature import manifest

GIVEN = ["--workload=ogbg", "--data_dir=data", "--experiment_name=try"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / "submission.py").write_text("")
    (tmp_path / "tuning_search_space.json").write_text(json.dumps([{"learning_rate": 1.0}]))
    (tmp_path / "data").mkdir()
    manifest.write(tmp_path / "data", ["ogbg"], manifest.properties_for(300, 64, 88))
    return tmp_path


def plan(*argv):
    return launch.make_plan(*launch.parse_options(argv))


def test_options_and_runner_flags_are_told_apart_by_the_double_dash(folder):
    made = plan("--batch-size", "16", "--set", "step_hint=7", "--", *GIVEN)
    assert made.batch_size == 16
    assert made.overrides == {"step_hint": 7}
    assert list(made.flags.argv[:3]) == GIVEN


def test_without_a_double_dash_unknown_flags_are_the_runners(folder):
    made = plan("--workload", "ogbg", "--batch-size=16", *GIVEN[1:])
    assert made.batch_size == 16
    assert made.workload == "ogbg"


def test_an_unknown_option_before_the_double_dash_is_refused(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        plan("--batchsize=16", "--", *GIVEN)
    assert stopped.value.code == 2
    assert "--batchsize=16" in capsys.readouterr().err


def test_set_beats_miniature_beats_paper_budget(folder):
    made = plan("--paper-budget", "--miniature", "--set", "num_test_examples=8", "--", *GIVEN)
    assert made.overrides["step_hint"] == 80_000
    assert made.overrides["validation_target_value"] == manifest.UNREACHABLE_TARGET
    assert made.overrides["num_test_examples"] == 8
    assert made.sources["step_hint"] == "paper budget"
    assert made.sources["validation_target_value"] == "miniature data"
    assert made.sources["num_test_examples"] == "--set"


def test_the_paper_budget_ends_the_run_unless_told_otherwise(folder):
    assert plan("--paper-budget", "--", *GIVEN).flags.value("max_global_steps") == "60000"
    told = plan("--paper-budget", "--", *GIVEN, "--max_global_steps=5")
    assert told.flags.value("max_global_steps") == "5"


def test_a_dry_run_prints_settings_and_command_and_needs_no_algoperf(folder, capsys, monkeypatch):
    monkeypatch.setattr(installation, "_exists", lambda module: False)
    assert launch.main(["--dry-run", "--paper-budget", "--batch-size=16", "--", *GIVEN]) == 0
    printed = capsys.readouterr().out
    assert "step_hint = 80000  (paper budget)" in printed
    assert "batch size  16" in printed
    assert "submission_runner --workload=ogbg --data_dir=data --experiment_name=try" in printed
    assert "--max_global_steps=60000" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch-size=0", "--", *GIVEN], "--batch-size 0: must be at least 1"),
        (["--set", "step_hint", "--", *GIVEN], "PROPERTY=VALUE"),
        (["--paper-budget", "--", *GIVEN, "--workload=wmt"], "no run of workload 'wmt'"),
        (["--miniature", "--", *GIVEN, "--workload=wmt"], "holds data of ogbg"),
        (["--miniature", "--", *GIVEN, "--data_dir=submission"], "has no miniature.json"),
        (["--", "--workload=ogbg"], "missing: --data_dir"),
    ],
)
def test_whatever_cannot_work_is_one_line_and_exit_code_2(folder, capsys, argv, message):
    assert launch.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_without_algoperf_a_launch_says_how_to_get_it(folder, capsys, monkeypatch):
    monkeypatch.setattr(installation, "_exists", lambda module: False)
    assert launch.main(["--", *GIVEN]) == 2
    assert "./run.sh setup --algoperf" in capsys.readouterr().err
