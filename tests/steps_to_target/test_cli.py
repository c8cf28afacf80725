"""The command line: what it prints, and its one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_fixtures import rows_to, write_trial

from steps_to_target.cli import main


def test_table_and_files(small_set, tmp_path, capsys):
    files = {kind: str(tmp_path / f"out.{kind}") for kind in ("json", "csv")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", path)]
    assert main([str(small_set), "--reference", "nesterov", *options]) == 0
    printed = capsys.readouterr()
    assert "0.471 [0.415, 0.531]" in printed.out
    assert "AlgoPerf benchmark score" in printed.out
    assert f"written: {files['json']}" in printed.out
    assert printed.err == ""
    assert json.loads((tmp_path / "out.json").read_text())["reference"] == "nesterov"


def test_subset_of_workloads(small_set, capsys):
    assert main([str(small_set), "--workloads", "ogbg", "--no-paper", "--no-runs"]) == 0
    out = capsys.readouterr().out
    assert "librispeech" not in out
    assert "paper:" not in out
    assert "over 1 workload(s): ogbg" in out


def test_target_override(small_set, capsys):
    option = "ogbg:mean_average_precision=0.2"
    assert main([str(small_set), "--target", option, "--workloads", "ogbg"]) == 0
    assert "ogbg: validation/mean_average_precision >= 0.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{none}"], "no such folder"),
        (["{empty}"], "no run found in"),
        (["{runs}", "--reference", "x"], "adamw, kfac_reduce, nesterov"),
        (["{runs}", "--workloads", "wmt"], "these have runs: librispeech_conformer, ogbg"),
        (["{runs}", "--target", "x"], "expected WORKLOAD:METRIC=NUMBER"),
        (["{runs}", "--csv", "{none}/x.csv"], "cannot be written"),
        (["{runs}", "--plot", "x.bmp"], "ends in .png, .svg or .pdf"),
        (["{runs}", "--nonsense"], "unrecognized arguments: --nonsense"),
        ([], "the following arguments are required: RUNS"),
        (["wandb:mine"], "expected wandb:ENTITY/PROJECT"),
    ],
)
def test_errors_take_one_line(small_set, tmp_path, capsys, arguments, words):
    (tmp_path / "empty").mkdir()
    places = {"none": tmp_path / "none", "empty": tmp_path / "empty", "runs": small_set}
    assert main([argument.format(**places) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert words in printed.err


@pytest.mark.skipif(os.name != "posix", reason="folder names are bytes on POSIX systems only")
def test_folder_names_that_are_no_text_and_terminals_without_signs(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"m\xff", b"study_0", b"ogbg_jax", b"trial_1")
    write_trial(Path(os.fsdecode(name)), "ogbg", rows_to("ogbg", 9000))
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "steps_to_target",
            str(tmp_path),
            "--json",
            str(tmp_path / "o.json"),
        ],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert b"9,474" in result.stdout
    assert json.loads((tmp_path / "o.json").read_text())["runs"][0]["status"] == "reached"


def test_help_and_module_entry():
    result = subprocess.run(
        [sys.executable, "-m", "steps_to_target", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for words in ("--reference NAME", "--to-wandb PROJECT", "study_*", "examples:", "exit status"):
        assert words in result.stdout
