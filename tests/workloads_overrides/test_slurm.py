"""Trials for a cluster: what is sent, and real jobs through submitit's local executor."""

import csv
import json
import os
import signal
import stat
import sys
import time
from pathlib import Path

import pytest

from workloads_overrides import slurm
from workloads_overrides.errors import LaunchError

pytest.importorskip("submitit", reason="submitit is not installed (./run.sh setup --dev does it)")

ROOT = Path(__file__).parents[2]
SUBMISSION = ROOT / "tests" / "quickstart" / "sgd_submission.py"
POINTS = [{"learning_rate": 0.1, "dropout_rate": 0.0}, {"learning_rate": 0.2, "dropout_rate": 0.0}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what the arguments of `algoperf` name."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / "submission.py").write_text("")
    (tmp_path / "points.json").write_text(json.dumps(POINTS))
    (tmp_path / "data").mkdir()
    return tmp_path


ALGOPERF = [
    "--paper-budget", "--", "--workload=ogbg", "--data_dir=data", "--experiment_name=kfac",
    "--tuning_search_space=points.json", "--num_tuning_trials=2",
]  # fmt: skip


def study(*options, argv=ALGOPERF, **environment):
    return slurm.make_study(*slurm.parse_options([*options, "--", *argv]), environment)


def test_a_trial_is_one_process_group_with_its_own_index_and_seed(folder):
    made = study("--studies", "3", NPROC="4")
    assert [trial.name for trial in made.trials] == [
        f"study_{s}/trial_{t}" for s in range(3) for t in (1, 2)
    ]
    trial = made.trials[3]
    assert trial.processes == 4
    assert trial.folder == str(ROOT)
    assert trial.command == (
        str(ROOT / "run.sh"), "algoperf", *ALGOPERF, "--experiment_name=kfac/study_1",
        "--rng_seed=2", "--hparam_start_index=1", "--hparam_end_index=2",
    )  # fmt: skip
    assert made.folder == folder / "runs" / "slurm_jobs" / "kfac"
    assert made.parameters["gpus_per_node"] == 4
    assert made.parameters["cpus_per_task"] == 16
    assert made.parameters["timeout_min"] == 24 * 60


def test_one_study_keeps_the_name_and_a_choice_of_trials(folder):
    made = study(argv=[*ALGOPERF, "--hparam_start_index=1", "--rng_seed=7"])
    (trial,) = made.trials
    assert trial.name == "trial_2"
    assert "--rng_seed=7" in trial.command
    assert sum(word.startswith("--experiment_name") for word in trial.command) == 1


def test_self_tuning_has_one_trial_a_study(folder):
    argv = [word for word in ALGOPERF if "tuning" not in word]
    made = study("--studies", "3", argv=[*argv, "--tuning_ruleset=self"])
    assert [trial.name for trial in made.trials] == [f"study_{n}/trial_1" for n in range(3)]
    for trial in made.trials:
        assert not any(word.startswith("--hparam") for word in trial.command)


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        ([], ["--tuning_ruleset=self"], "--tuning_search_space: the self-tuning ruleset takes"),
        ([], ["--overwrite"], "--overwrite: a trial that is queued again would delete"),
        ([], ["--append_timestamp"], "--append_timestamp: a trial that is queued again"),
        ([], ["--num_tuning_trials=3"], "points.json has 2 points"),
        ([], ["--num_tuning_trials=two"], "--num_tuning_trials=two: must be a whole number"),
        ([], ["--hparam_start_index=2"], "leave no trial"),
        ([], ["--rng_seed=0"], "--rng_seed=0: give 1 or more"),
        ([], ["--data_dir=nowhere"], "no such folder"),
        ([], ["--tuning_search_space=nowhere.json"], "No such file"),
        (["--folder", "a%j"], [], "placeholder"),
        (["--runner", "quickstart"], [], "Unknown command line flag 'paper-budget'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(folder, options, changed, message):
    with pytest.raises(LaunchError, match=message):
        study(*options, argv=[*ALGOPERF, *changed])


@pytest.mark.parametrize(
    "options", [["--time", "1"], ["--studies", "0"], ["--gpus", "-1"], ["--sbatch", "=1"], ["--x"]]
)
def test_wrong_options_end_with_code_2(folder, options, capsys):
    with pytest.raises(SystemExit) as stopped:
        study(*options)
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_without_arguments_and_with_a_wrong_nproc_one_line_tells(folder, capsys, monkeypatch):
    assert slurm.main(["--partition", "gpu"]) == 2
    monkeypatch.setenv("NPROC", "many")
    assert slurm.main(["--", *ALGOPERF]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: what is to run?")
    assert lines[1] == "error: NPROC=many is no number of processes: give 1 to 9999"


def test_a_dry_run_prints_exact_commands_and_no_key(folder, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("NPROC", "4")
    assert slurm.main(["--dry-run", "--time", "2-01:00:00", "--", *ALGOPERF]) == 0
    printed = capsys.readouterr().out
    assert f"NPROC=4 {ROOT}/run.sh algoperf --paper-budget -- --workload=ogbg" in printed
    assert "timeout_min=2940" in printed
    assert "WANDB_API_KEY" in printed
    assert "secret" not in printed
    assert not (folder / "runs").exists()


# ---- Slurm's commands, acted -------------------------------------------------------------------

SBATCH = '#!/bin/sh\necho "$@" >>"$ACTED"\nprintf "%s\\n" "Submitted batch job 4711"\n'
REFUSING = '#!/bin/sh\necho "sbatch: error: invalid partition specified: gpu" >&2\nexit 1\n'


@pytest.fixture
def acted(folder, monkeypatch):
    """Puts stand-ins for srun, sbatch and squeue on the PATH."""
    programs = folder / "bin"
    programs.mkdir()

    def act(name, text):
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)

    act("srun", "#!/bin/sh\n")
    act("sbatch", SBATCH)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("ACTED", str(folder / "acted"))
    monkeypatch.setenv("PYTHONPATH", "before")
    return act


def test_one_array_that_is_queued_again_and_holds_no_key(acted, folder, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    options = ["--partition", "gpu", "--sbatch", "gres=gpu:v100:2", "--gpus=0", "--at-once=1"]
    assert slurm.main([*options, "--time=10:00:00", "--", *ALGOPERF]) == 0
    jobs = folder / "runs" / "slurm_jobs" / "kfac"
    assert json.loads((jobs / "jobs.json").read_text()) == {
        "trial_1": "4711_0",
        "trial_2": "4711_1",
    }
    assert "trial_2: job 4711_1, output" in capsys.readouterr().out
    lines = (jobs / "4711_submission.sh").read_text().splitlines()
    for flag in (
        "array=0-1%1", "partition=gpu", "gres=gpu:v100:2", "export=ALL", "time=600",
        "signal=USR2@120", "nodes=1", "job-name=kfac",
    ):  # fmt: skip
        assert f"#SBATCH --{flag}" in lines
    assert "#SBATCH --requeue" in lines
    assert not any("gpus-per-node" in line for line in lines)
    assert any(line.startswith(f"export PYTHONPATH={ROOT}") for line in lines)
    files = [path for path in jobs.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".pkl" for path in files) == 2
    assert not any(b"secret" in path.read_bytes() for path in files)


def test_trials_that_are_queued_already_are_not_sent_again(acted, folder, capsys):
    assert slurm.main(["--", *ALGOPERF]) == 0
    acted("squeue", "#!/bin/sh\necho 4711_1\n")
    assert slurm.main(["--", *ALGOPERF]) == 2
    assert "queued or running (4711_1): wait for them" in capsys.readouterr().err
    acted("squeue", '#!/bin/sh\necho "slurm_load_jobs error: Invalid job id" >&2\nexit 1\n')
    assert slurm.main(["--", *ALGOPERF]) == 0
    assert (folder / "acted").read_text().count("\n") == 2


def test_what_slurm_refuses_is_one_line(acted, folder, capsys):
    acted("sbatch", REFUSING)
    assert slurm.main(["--", *ALGOPERF]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: Slurm refused the jobs: ")
    assert "invalid partition" in error


def test_without_slurm_the_local_executor_is_named(folder, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("PYTHONPATH", "")
    assert slurm.main(["--", *ALGOPERF]) == 2
    assert "with --local on this machine" in capsys.readouterr().err


# ---- real jobs, on this machine ----------------------------------------------------------------


def quickstart(folder, *more):
    """Arguments of trials of a few seconds: a ViT on scikit-learn's digits."""
    return [
        "--workload=images", f"--submission_path={SUBMISSION}", "--experiment_name=sgd",
        f"--experiment_dir={folder}/runs", f"--tuning_search_space={folder}/points.json",
        "--num_tuning_trials=2", "--batch_size=16", "--max_global_steps=6", "--eval_every=2",
        "--validation_target_value=2", "--test_target_value=2", *more,
    ]  # fmt: skip


def rows(trial):
    with (trial / "eval_measurements.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def local(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    return folder


@pytest.mark.slow
def test_the_trials_of_two_studies_train_as_jobs(local, capfd):
    options = ["--runner=quickstart", "--studies=2", "--local"]
    argv = quickstart(local, "--hparam_end_index=1")
    assert slurm.main([*options, "--", *argv]) == 0
    assert "study_1/trial_1: done" in capfd.readouterr().out
    for number in range(2):
        trial = local / "runs" / "sgd" / f"study_{number}" / "images_pytorch" / "trial_1"
        assert [row["global_step"] for row in rows(trial)] == ["1", "2", "4", "6"]
        assert json.loads((trial / "hparams.json").read_text()) == POINTS[0]
        assert json.loads((trial / "meta_data_0.json").read_text())["rng_seed"] == 1 + number


def test_a_trial_that_fails_is_named(local, capfd):
    study = slurm.make_study(
        *slurm.parse_options(["--runner=quickstart", "--", *quickstart(local)]), {"NPROC": "3"}
    )
    says = "import os; print('NPROC is', os.environ['NPROC']); raise SystemExit(%d)"
    for trial, code in zip(study.trials, (0, 7), strict=True):
        trial.command = (sys.executable, "-c", says % code)
    jobs = slurm.submit(study, local=True)
    assert slurm.wait(study, jobs) == 1
    printed = capfd.readouterr()
    assert "trial_1: done" in printed.out
    assert f"trial_2: failed, see {jobs[1].paths.stdout}" in printed.err
    assert "NPROC is 3" in jobs[0].stdout()
    assert "trial trial_2 ended with exit code 7" in jobs[1].stdout()


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_preempted_trial_is_queued_again_and_goes_on(local, monkeypatch):
    monkeypatch.setenv("TEST_SLEEP", "0.3")
    argv = quickstart(local, "--hparam_end_index=1", "--max_global_steps=12")
    made = slurm.make_study(*slurm.parse_options(["--runner=quickstart", "--", *argv]), {})
    (job,) = slurm.submit(made, local=True)
    trial = local / "runs" / "sgd" / "images_pytorch" / "trial_1"
    deadline = time.monotonic() + 120
    while not (trial / "checkpoint_2").exists():
        assert not job.done(), job.stdout()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (task,) = children(job._process.pid)
    (training,) = children(task)
    os.kill(task, signal.SIGUSR2)  # Slurm's warning
    assert job.result() == "trial_1"
    assert not Path(f"/proc/{training}").exists()
    assert "Requeued job" in job.stdout()
    assert "going on from step" in job.stdout()
    assert [row["global_step"] for row in rows(trial)] == [
        "1", "2", "4", "6", "8", "10", "12",
    ]  # fmt: skip
    assert [row["preemption_count"] for row in rows(trial)][::6] == ["0", "1"]
