"""`--paper`: what it would run, with what, and the paper's numbers."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from experiments import __main__ as entry
from experiments import cifar, corpus, gpt_ggn_timing, registry, results, update_step_timing
from experiments.paper import command, figures, numbers, sizes
from experiments.paper.figures import FIGURES, Extra
from quickstart.errors import QuickstartError
from submission.hyperparameters import Hyperparameters
from workloads_overrides import launch, slurm

QUIET = Console(quiet=True)
RUNS = Path("runs")


def commands(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    assert entry.main([*arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line) for line in lines if "./run.sh" in line]


@pytest.mark.parametrize(
    ("name", "runs", "gpus"), [("ogbg", 15, 1), ("imagenet_vit", 9, 4), ("every_step", 3, 4)]
)
def test_a_dry_run_prints_every_command(
    name: str, runs: int, gpus: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    *found, compare = commands(capsys, name, "--paper", f"--data-dir={tmp_path}")
    assert len(found) == runs
    assert {line[0] for line in found} == {f"NPROC={gpus}"}
    seeds = runs // 3
    seen = set()
    for _, script, word, *arguments in found:
        assert (script, word) == ("./run.sh", "algoperf")
        options, flags = launch.parse_options(arguments)
        assert options.paper_budget
        given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
        assert given["workload"] == ("ogbg" if name == "ogbg" else "imagenet_vit")
        (point,) = json.loads((results.ROOT / given["tuning_search_space"]).read_text())
        Hyperparameters.from_tuning_point(point)
        method, study = given["experiment_name"].split("/")
        assert int(given["rng_seed"]) == int(study.removeprefix("study_")) + 1
        seen.add((method, study))
    assert len(seen) == runs
    assert {study for _, study in seen} == {f"study_{seed}" for seed in range(seeds)}
    assert compare[:2] == ["./run.sh", "compare"]
    assert compare[-1] in {method for method, _ in seen}


def test_the_search_has_15_trials_of_each_approximation(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    *found, _ = commands(capsys, "ogbg", "--paper", "--search", f"--data-dir={tmp_path}")
    assert len(found) == 30
    for number, line in enumerate(found):
        first = number % 15
        assert f"--hparam_start_index={first}" in line
        assert f"--hparam_end_index={first + 1}" in line
        assert "--num_tuning_trials=15" in line


def test_figure_5_was_not_searched_for(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        command.main("every_step", ["--search"], QUIET)


def test_slurm_gets_one_array_for_each_method(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ["--slurm", "--partition gpu --time 24:00:00", f"--data-dir={tmp_path}"]
    *found, _ = commands(capsys, "imagenet_vit", "--paper", *given)
    assert [line[:8] for line in found] == 3 * [
        ["NPROC=4", "./run.sh", "slurm", "--partition", "gpu", "--time", "24:00:00", "--studies"]
    ]


def test_arguments_behind_a_double_dash_reach_launcher_and_runner(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    extra = ["--", "--miniature", "--", "--max_global_steps=20"]
    first, *_ = commands(capsys, "ogbg", "--paper", f"--data-dir={tmp_path}", "--dry-run", *extra)
    cut = first.index("--")
    assert "--miniature" in first[:cut]
    assert "--max_global_steps=20" in first[cut:]


def test_missing_data_and_gpus_end_it_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    with pytest.raises(QuickstartError, match=r"dataset_info.json is missing; get it"):
        command.main("ogbg", [f"--data-dir={tmp_path}"], QUIET)
    monkeypatch.setattr(command, "_missing", lambda *_: None)
    monkeypatch.setattr(command.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(QuickstartError, match="have 4 GPUs each, this machine has 1"):
        command.main("imagenet_vit", [f"--data-dir={tmp_path}"], QUIET)


def test_runs_that_finished_are_left_out_and_failures_do_not_end_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def run(arguments: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "steps_to_target" in arguments:
            started.append("compare")
            return subprocess.CompletedProcess(arguments, 0)
        name = next(a for a in arguments if a.startswith("--experiment_name="))
        started.append(name.partition("=")[2])
        folder = tmp_path / "runs" / started[-1] / "ogbg_pytorch" / "trial_1"
        folder.mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(arguments, int("expand" in started[-1]))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(command, "_missing", lambda *_: None)
    flags = [f"--data-dir={tmp_path}", f"--runs-dir={tmp_path / 'runs'}", "--seeds=1", "--gpus=1"]
    assert command.main("ogbg", flags, QUIET) == 1
    assert started == ["reference/study_0", "kfac_expand/study_0", "kfac_reduce/study_0", "compare"]
    assert "these failed, see above: kfac_expand/study_0" in capsys.readouterr().err
    started.clear()
    assert command.main("ogbg", flags, QUIET) == 1
    assert started == ["kfac_expand/study_0", "compare"]
    started.clear()  # with other arguments it is another run
    command.main("ogbg", [*flags, "--", "--miniature"], QUIET)
    assert started[:-1] == ["reference/study_0", "kfac_expand/study_0", "kfac_reduce/study_0"]


def test_slurm_trials_are_checked_and_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = []

    def submit(study: slurm.Study, local: bool) -> list[SimpleNamespace]:
        assert not local
        sent.append(study)
        return [SimpleNamespace(job_id=f"7_{number}") for number in range(len(study.trials))]

    monkeypatch.setattr(command, "_missing", lambda *_: None)
    monkeypatch.setattr(command.slurm, "submit", submit)
    monkeypatch.chdir(tmp_path)  # and back, whatever the command does
    flags = [f"--data-dir={tmp_path}", f"--runs-dir={tmp_path / 'runs'}", "--slurm"]
    assert command.main("ogbg", [*flags, "--partition gpu"], QUIET) == 0
    shown = capsys.readouterr().out
    assert "kfac_reduce/study_4/trial_1: job 7_4" in shown
    assert "when they are done: ./run.sh compare" in shown
    assert [len(study.trials) for study in sent] == [5, 5, 5]
    names = [trial.command for trial in sent[2].trials]
    assert "--experiment_name=kfac_reduce/study_4" in names[4]
    assert sent[0].parameters["slurm_partition"] == "gpu"


@pytest.mark.parametrize("name", ["update_step_timing", "gpt_ggn_timing", "marginal_likelihood"])
def test_tables_have_a_paper_size(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ((script, word, *arguments),) = commands(capsys, name, "--paper")
    assert (script, word) == ("./run.sh", "experiments")
    assert arguments[0] == name
    experiment = registry.find(name)
    assert experiment is not None
    size = experiment.load().PAPER_SIZE
    assert size is not None
    assert set(size.flags) <= set(arguments)
    with pytest.raises(QuickstartError, match="is missing"):
        entry.main([name, "--paper"])


def test_a_paper_size_needs_a_gpu_or_insistence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cifar, "load", lambda _: None)
    monkeypatch.setattr(sizes.torch.cuda, "is_available", lambda: False)
    with pytest.raises(QuickstartError, match="no GPU here"):
        entry.main(["update_step_timing", "--paper", f"--data-dir={tmp_path}"])


def test_experiments_of_one_size_refuse_it() -> None:
    with pytest.raises(QuickstartError, match="exactness has one size only"):
        entry.main(["exactness", "--paper"])


def test_gpt2s_encoding_is_tiktokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoding:
        def encode_ordinary(self, text: str) -> list[int]:
            return [50_000 + ord(letter) for letter in text]

    class Package:
        def get_encoding(self, name: str) -> Encoding:
            assert name == "gpt2"
            return Encoding()

    monkeypatch.setitem(sys.modules, "tiktoken", Package())
    assert corpus.encode_gpt2("ab").tolist() == [50_097, 50_098]
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(QuickstartError, match="needs the package tiktoken"):
        corpus.encode_gpt2("ab")


def test_the_papers_tables_stand_beside_ours() -> None:
    seconds = {kind: {"128": [1.0, 1.0]} for kind in update_step_timing._FULL}
    result = {"data": "x", "batch_sizes": [128], "seconds": seconds}
    (table,) = update_step_timing.tables(result)
    assert [row[0] for row in table.rows] == ["128", "256", "512", "1024", "2048"]
    assert [row[-2:] for row in table.rows] == [
        ("0.24 ± 0.01", "0.17 ± 0.01"),
        ("0.38 ± 0.02", "0.24 ± 0.02"),
        ("0.75 ± 0.03", "0.43 ± 0.03"),
        ("1.36 ± 0.05", "0.63 ± 0.04"),
        ("OOM", "1.17 ± 0.08"),
    ]
    timed = {"corpus": "x", "tokens": 1, "seconds": {"expand": [2.0], "reduce": [1.0]}}
    (table,) = gpt_ggn_timing.tables(timed)
    assert [row[-2:] for row in table.rows] == [
        ("9.55 ± 0.13 min", "100%"),
        ("6.68 ± 0.04 min", "70%"),
    ]
    assert numbers.TEST_NLL["expand", True] == (0.244, 0.004)


def test_figures_have_the_papers_rows() -> None:
    found = {
        (name, method): (figure.row(method).steps, figure.row(method).hours)
        for name, figure in FIGURES.items()
        for method in (*figures.METHODS, *(figures.SEARCHED if figure.searched else ()))
    }
    assert found["ogbg", "search_reduce"] == found["ogbg", "kfac_reduce"] == (15_566, 1.23)
    assert found["every_step", "kfac_expand"] == (92_600, 50)
    assert found["imagenet_vit", "reference"] == (122_139, 26.10)
    runs = list(figures.plan(FIGURES["ogbg"], 5, False, RUNS, RUNS, Extra()))
    assert figures.hours_in_all(FIGURES["ogbg"], runs) == pytest.approx(5 * (2.33 + 1.32 + 1.23))
