"""200 bad hyperparameter files and 200 bad command lines, from fixed seeds.

Each must end before the first step with a non-zero exit code and an error that people can read.
"""

import json
import random
import string
from dataclasses import fields
from pathlib import Path

import pytest

from submission.hyperparameters import Hyperparameters

ROOT = Path(__file__).parents[1]
GOOD = {"kfac_approx": "reduce", "update_rule": "nadamw", "learning_rate": 1e-3}
NAMES = [f.name for f in fields(Hyperparameters)]
HUGE = 10**400  # larger than any float
JUNK = ["", "x", "1e-3", -1, -0.5, float("nan"), float("inf"), [], [1], {}, {"a": 1}, HUGE, 1e308]
RANGES = [
    {}, {"min": 0}, {"min": 0, "max": 1, "scaling": "log"}, {"min": 2, "max": 1, "scaling": "log"},
    {"feasible_points": []}, {"feasible_points": 3}, {"min": "a", "max": "b", "scaling": "linear"},
    {"min": 1, "max": 2, "scaling": "cubic"}, 3, None, [], "x",
    {"min": 1, "max": HUGE, "scaling": "linear"}, {"min": 1, "max": HUGE, "scaling": "log"},
]  # fmt: skip


def bad_file(draw):
    """The text of a tuning file that cannot be used, and what kind of fault it has."""
    kind = draw.choice(["value", "value", "name", "missing", "text", "shape", "range", "uneven"])
    if kind == "value":
        return json.dumps([{**GOOD, draw.choice(NAMES): draw.choice(JUNK)}])
    if kind == "name":
        return json.dumps([{**GOOD, "".join(draw.choices(string.ascii_lowercase, k=9)): 1}])
    if kind == "missing":
        gone = draw.choice(list(GOOD))
        return json.dumps([{k: v for k, v in GOOD.items() if k != gone}])
    if kind == "text":
        text = json.dumps([GOOD])
        deep = "[" * 100_000
        digits = '[{"learning_rate": ' + "1" * 5000 + "}]"
        return draw.choice([text[: draw.randrange(len(text))], deep, digits])
    if kind == "shape":
        return json.dumps(draw.choice([[], {}, 1, "x", None, [1], [[]], [None], [{}], [GOOD, 3]]))
    if kind == "range":
        return json.dumps({"learning_rate": draw.choice(RANGES)})
    return json.dumps([GOOD, {**GOOD, "damping": 0.1}])


def assert_readable(text):
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.strip()]
    assert lines
    assert "error" in lines[-1] or "steps_to_target: " in lines[-1], text
    assert len(lines[-1]) > 20


def exit_code(main, argv):
    """Of a command whose process would end with it."""
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    return code


def reporting(main):
    """A main of the quickstart's packages, as their processes call it."""
    from quickstart.errors import run_reporting_errors

    return lambda argv: run_reporting_errors(lambda: main(argv))


def test_200_bad_hyperparameter_files_stop_the_launcher(tmp_path, monkeypatch, capsys):
    from workloads_overrides import launch

    monkeypatch.chdir(ROOT)
    draw = random.Random(0)
    path = tmp_path / "points.json"
    for _ in range(200):
        path.write_text(bad_file(draw))
        argv = [
            "--dry-run", "--", "--workload=ogbg", f"--data_dir={tmp_path}", "--experiment_name=x",
            f"--experiment_dir={tmp_path}/runs", f"--tuning_search_space={path}",
        ]  # fmt: skip
        assert exit_code(launch.main, argv) == 2, path.read_text()
        printed = capsys.readouterr()
        assert_readable(printed.err)
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def quickstart_flags(tmp_path):
    pytest.importorskip("sklearn", reason="needs the quickstart's packages (./run.sh setup)")
    return [
        "--workload=images", f"--submission_path={ROOT}/submission/submission.py",
        f"--experiment_dir={tmp_path}/runs", "--max_global_steps=1", "--batch_size=8",
        f"--tuning_search_space={tmp_path}/points.json",
    ]  # fmt: skip


def test_200_bad_hyperparameter_files_stop_the_quickstart(
    tmp_path, quickstart_flags, monkeypatch, capsys
):
    from quickstart import runner, workloads

    built = {}

    def build_once(name, data_dir):
        return built.setdefault(name, workloads.build_workload(name, data_dir))

    monkeypatch.setattr(runner, "build_workload", build_once)
    draw = random.Random(1)
    for number in range(200):
        (tmp_path / "points.json").write_text(bad_file(draw))
        argv = [*quickstart_flags, f"--experiment_name=x{number}"]
        code = exit_code(reporting(runner.main), argv)
        assert code == 1, (tmp_path / "points.json").read_text()
        assert_readable(capsys.readouterr().err)
    assert not list((tmp_path / "runs").rglob("*measurements.csv"))


# What each flag takes, by name: whole numbers, numbers, files, folders or a choice.
FLAGS = {
    "quickstart.runner": ["rng_seed", "max_global_steps", "batch_size", "eval_every",
                          "num_tuning_trials", "hparam_start_index", "workload", "framework"],
    "quickstart.study": ["jobs", "seeds", "max_global_steps", "workload"],
    "quickstart.tuning": ["jobs", "seed", "max_global_steps", "workload"],
    "steps_to_target": ["target", "plot", "reference"],
    "experiments": [],
    "workloads_overrides.launch": ["set", "batch-size"],
    "workloads_overrides.slurm": ["studies", "time", "cpus", "gpus", "mem", "sbatch", "runner"],
}  # fmt: skip
BAD = ["", "x", "1.5.2", "-1x", "=", "1e", "--", "nan?", "\x00", "ü", " ", "0x"]


def main_of(module):
    from importlib import import_module

    if module == "experiments":
        return reporting(import_module("experiments.__main__").main)
    if module == "steps_to_target":
        return import_module("steps_to_target.cli").main
    found = import_module(module).main
    return reporting(found) if module.startswith("quickstart") else found


def bad_command_line(module, draw):
    """Arguments with an unknown flag or a value that no flag of that name takes."""
    unknown = "--" + "".join(draw.choices(string.ascii_lowercase, k=9))
    if not FLAGS[module] or draw.random() < 0.3:
        given = [unknown]
    else:
        given = [f"--{draw.choice(FLAGS[module])}={draw.choice(BAD)}"]
    if module == "workloads_overrides.slurm":
        return [*given, "--dry-run", "--", "--workload=ogbg"]
    return [*given, "--"] if module == "workloads_overrides.launch" else given


@pytest.mark.parametrize("module", list(FLAGS))
def test_bad_command_lines_end_with_one_error(module, tmp_path, monkeypatch, capsys):
    pytest.importorskip("absl", reason="needs the quickstart's packages (./run.sh setup)")
    main = main_of(module)
    monkeypatch.chdir(tmp_path)
    draw = random.Random(module)
    for _ in range(200 // len(FLAGS) + 1):
        argv = bad_command_line(module, draw)
        code = exit_code(main, argv)
        assert code not in (0, None), argv
        assert_readable(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
