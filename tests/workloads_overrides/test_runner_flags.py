import json
from pathlib import Path

import pytest

from workloads_overrides.errors import LaunchError
from workloads_overrides.runner_flags import RunnerFlags, complete, trial_folders


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A repository with a submission, its search space and a data folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / "submission.py").write_text("")
    (tmp_path / "tuning_search_space.json").write_text(json.dumps([{"learning_rate": 1.0}]))
    (tmp_path / "data").mkdir()
    return tmp_path


GIVEN = ("--workload=ogbg", "--data_dir=data", "--experiment_name=try")


def test_flags_are_read_in_every_form_that_absl_takes():
    flags = RunnerFlags(("--a=1", "-b=2", "--c", "3", "--a=4", "--overwrite", "--noprofile"))
    assert [flags.value(name) for name in ("a", "b", "c", "d")] == ["4", "2", "3", None]
    assert flags.is_on("overwrite")
    assert not flags.is_on("profile")
    assert flags.mentions("profile")
    assert not flags.mentions("d")


@pytest.mark.parametrize(
    ("argv", "on"),
    [
        (("--overwrite",), True),
        (("--overwrite=true",), True),
        (("--overwrite=False",), False),
        (("--overwrite", "--nooverwrite"), False),
        ((), False),
    ],
)
def test_boolean_flags(argv, on):
    assert RunnerFlags(argv).is_on("overwrite") is on


def test_what_follows_from_the_other_flags_is_added(folder):
    flags = complete(GIVEN, folder)
    assert flags.argv[:3] == GIVEN
    assert flags.value("framework") == "pytorch"
    assert flags.value("submission_path") == "submission/submission.py"
    assert flags.value("tuning_search_space") == "tuning_search_space.json"
    assert flags.is_on("resume_last_run")
    assert not flags.mentions("imagenet_v2_data_dir")
    assert trial_folders(flags) == Path("runs/try/ogbg_pytorch")


@pytest.mark.parametrize("place", ["data", "."])
def test_imagenet_v2_is_found_in_the_data_folder_or_beside_it(folder, place):
    (folder / place / "imagenet_v2").mkdir()
    flags = complete(("--workload=imagenet_vit", *GIVEN[1:]), folder)
    assert flags.value("imagenet_v2_data_dir") == place


def test_without_imagenet_v2_the_flag_is_asked_for(folder):
    with pytest.raises(LaunchError, match="name the folder that holds it"):
        complete(("--workload=imagenet_vit", *GIVEN[1:]), folder)


def test_what_is_given_stays(folder):
    given = (*GIVEN, "--overwrite", "--experiment_dir=elsewhere", "--tuning_ruleset=self")
    flags = complete(given, folder)
    assert not flags.mentions("resume_last_run")
    assert not flags.mentions("tuning_search_space")
    assert flags.value("experiment_dir") == "elsewhere"


def test_an_absolute_submission_path_becomes_relative(folder):
    path = folder / "submission" / "submission.py"
    flags = complete((*GIVEN, f"--submission_path={path}"), folder)
    assert flags.value("submission_path") == "submission/submission.py"


def test_a_submission_outside_the_folder_is_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "submission.py"
    outside.write_text("")
    with pytest.raises(LaunchError, match="inside the current folder"):
        complete((*GIVEN, f"--submission_path={outside}"), folder)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--framework=jax", "for pytorch"),
        ("--data_dir=nowhere", "no such folder"),
        ("--submission_path=nowhere.py", "no such Python file"),
        ("--submission_path=data", "no such Python file"),
        ("--tuning_search_space=nowhere.json", "No such file"),
        ("--tuning_search_space=submission/submission.py", "not JSON"),
        ("--tuning_search_space=empty.json", "non-empty"),
    ],
)
def test_a_flag_that_cannot_work_is_named(folder, flag, message):
    (folder / "empty.json").write_text("[]")
    with pytest.raises(LaunchError, match=message) as caught:
        complete((*GIVEN, flag), folder)
    assert str(caught.value).startswith(flag)


def test_missing_flags_are_listed_together(folder):
    with pytest.raises(LaunchError, match="missing: --workload, --data_dir, --experiment_name"):
        complete((), folder)


def test_the_run_folder_is_unknown_with_a_timestamp():
    assert trial_folders(RunnerFlags(("--append_timestamp",))) is None
