"""Groups, ratios, AlgoPerf's scoring, warnings, and the paper's rows."""

import math

import numpy as np
import pytest
from make_fixtures import rows_to, study_folder, write_trial

from steps_to_target import (
    CompareError,
    Profile,
    load_runs,
    performance_profile,
    render_profile,
    render_text,
    summarize,
)
from steps_to_target.differences import Caution, grouped
from steps_to_target.output.text import method_rows, to_text


def _group(summary, workload, method):
    return next(g for g in summary.of(workload) if g.method == method)


def test_means_ratios_and_order(small_set):
    summary = summarize(load_runs([small_set]), "nesterov")
    assert summary.workloads == ["librispeech_conformer", "ogbg"]
    names = [group.method for group in summary.of("ogbg")]
    assert names[:3] == ["nesterov", "adamw", "kfac_reduce"]
    assert all(name.startswith("paper: ") for name in names[3:])
    kfac = _group(summary, "ogbg", "kfac_reduce")
    assert kfac.steps.mean == pytest.approx((8421 + 9474 + 7368) / 3)
    expected = (8421 + 9474 + 7368) / (16842 + 17895 + 18947)
    assert kfac.ratio_steps.value == pytest.approx(expected)
    assert kfac.ratio_steps.low < expected < kfac.ratio_steps.high
    assert kfac.reached == 3
    adamw = _group(summary, "ogbg", "adamw")
    assert adamw.statuses == {"missed": 1, "out of time": 1, "cut short": 1, "crashed": 1}
    assert adamw.ratio_steps is None
    assert adamw.algoperf_seconds == math.inf


def test_fastest_trial_of_each_study_counts_when_trials_are_tuned(tmp_path):
    crossings = {0: (16_000, 9_000, None), 1: (8_000, 12_000, None), 2: (None, None, None)}
    for study, trials in crossings.items():
        for trial, step in enumerate(trials, start=1):
            write_trial(
                study_folder(tmp_path, "mine", study, "ogbg", trial),
                "ogbg",
                rows_to("ogbg", step),
                hparams={"learning_rate": trial},
            )
    (group,) = summarize(load_runs([tmp_path]), paper=False).groups
    assert group.repetitions == "3 studies, fastest of 3 trials"
    assert group.steps.total == 3
    assert sorted(group.step_values) == [8421, 9474, math.inf]
    assert group.algoperf_steps == 9474
    assert group.steps.mean == (8421 + 9474) / 2


def test_equal_trials_are_repetitions(tmp_path):
    for trial, step in enumerate((8_000, 9_000, 10_000), start=1):
        write_trial(
            study_folder(tmp_path, "mine", 0, "ogbg", trial),
            "ogbg",
            rows_to("ogbg", step),
            hparams={"learning_rate": 1, "seed": trial},
        )
    (group,) = summarize(load_runs([tmp_path]), paper=False).groups
    assert (group.repetitions, group.steps.n) == ("3 runs", 3)


def test_unknown_reference_lists_what_there_is(small_set):
    with pytest.raises(
        CompareError, match=r"did you mean 'nesterov'.*adamw, kfac_reduce, nesterov"
    ):
        summarize(load_runs([small_set]), "nestorov")


def test_unlike_runs_are_warned_about(tmp_path):
    write_trial(study_folder(tmp_path, "a", 0, "ogbg"), "ogbg", rows_to("ogbg", 9000))
    write_trial(
        study_folder(tmp_path, "b", 0, "ogbg"),
        "ogbg",
        rows_to("ogbg", 9000),
        meta={
            "gpu_model_name": "NVIDIA A100",
            "gpu_count": 4,
            "git_commit_hash": "fedcba9876543210",
            "workload.step_hint": 80_000,
            "workload.max_allowed_runtime_sec": 18_477,
        },
        flags={"max_global_steps": 60_000, "tuning_ruleset": "self"},
        hparams={"batch_size": 256},
    )
    write_trial(
        study_folder(tmp_path, "b", 1, "ogbg"),
        "ogbg",
        rows_to("ogbg", 9000),
        hparams={"batch_size": 512},
    )
    text = "\n".join(summarize(load_runs([tmp_path]), "a").warnings)
    for words in (
        "hardware differs: 8 x Tesla V100-SXM2-16GB (a, b); 4 x NVIDIA A100 (b)",
        "batch sizes differ: 256 (b); 512 (b)",
        "step budgets (max_global_steps) differ: none (a, b); 60,000 steps (b)",
        "step hints differ",
        "time limits differ",
        "AlgoPerf versions differ: 0123456789 (a, b); fedcba9876 (b)",
        "tuning rulesets differ",
    ):
        assert words in text


def test_like_runs_give_no_warning(tmp_path):
    for method in ("a", "b"):
        write_trial(study_folder(tmp_path, method, 0, "ogbg"), "ogbg", rows_to("ogbg", 9000))
    assert summarize(load_runs([tmp_path]), "a").warnings == ()


def test_mean_without_the_misses_and_missing_reference_are_said(small_set, tmp_path):
    write_trial(study_folder(tmp_path, "a", 0, "ogbg"), "ogbg", rows_to("ogbg", 9000))
    write_trial(study_folder(tmp_path, "a", 1, "ogbg"), "ogbg", rows_to("ogbg", None))
    (warning,) = summarize(load_runs([tmp_path])).warnings
    assert warning == (
        "ogbg: a: means are over the repetitions that reached the target; misses are not in them: "
        "1 of 2"
    )
    warnings = "\n".join(summarize(load_runs([small_set]), "adamw").warnings)
    assert "librispeech_conformer: no run of the reference 'adamw'" in warnings
    assert "ogbg: the reference 'adamw' never reached" in warnings


def test_a_thousand_warnings_of_one_kind_take_one_line():
    cautions = [Caution("steps are odd", f"run {n}", f"{n} s") for n in range(1000)]
    cautions += [Caution("hardware differs", name, "a; b") for name in ("ogbg", "wmt")]
    cautions += [Caution("targets differ", name, name) for name in ("ogbg", "wmt")]
    assert grouped(cautions) == [
        "steps are odd: 1000 in all: run 0, run 1, run 2 and 997 more (the first: 0 s)",
        "ogbg, wmt: hardware differs: a; b",
        "targets differ: ogbg: ogbg; wmt: wmt",
    ]


def test_version_is_algoperfs_not_that_of_the_repository_that_started_it(tmp_path):
    own = {"submission_path": "submission/submission.py"}
    for method, commit, flags, known in (
        ("theirs", "aaaaaaaaaaaa", {}, None),
        ("ours", "bbbbbbbbbbbb", own, None),  # this project's commit, AlgoPerf's is not logged
        ("ours_again", "cccccccccccc", own, "aaaaaaaaaaaa"),
    ):
        meta = {"git_commit_hash": commit} | ({"algoperf.git_commit_hash": known} if known else {})
        trial = study_folder(tmp_path, method, 0, "ogbg")
        write_trial(trial, "ogbg", rows_to("ogbg", 9000), meta=meta, flags=flags)
    assert summarize(load_runs([tmp_path]), "ours").warnings == ()
    meta = {"git_commit_hash": "dddddddddddd", "algoperf.git_commit_hash": "eeeeeeeeeeee"}
    trial = study_folder(tmp_path, "later", 0, "ogbg")
    write_trial(trial, "ogbg", rows_to("ogbg", 9000), meta=meta, flags=own)
    (warning,) = summarize(load_runs([tmp_path]), "ours").warnings
    assert (
        "AlgoPerf versions differ: eeeeeeeeee (later); aaaaaaaaaa (ours_again, theirs)" in warning
    )


def test_steps_of_another_kind_are_not_compared(tmp_path):
    rows = [row | {"global_step": 1 + 3 * i} for i, row in enumerate(rows_to("ogbg", 16_000))]
    for index, row in enumerate(rows):
        row["accumulated_submission_time"] = 240.0 * (index + 1)
    write_trial(study_folder(tmp_path, "queue", 0, "ogbg"), "ogbg", rows)
    write_trial(study_folder(tmp_path, "a", 0, "ogbg"), "ogbg", rows_to("ogbg", 16_000))
    summary = summarize(load_runs([tmp_path]), "a")
    queue = _group(summary, "ogbg", "queue")
    assert queue.reached == 1
    assert (queue.steps.n, queue.ratio_steps) == (0, None)
    assert queue.ratio_seconds.value > 0
    assert any("outer steps only" in warning for warning in summary.warnings)


def test_leaderboard_rows_stand_below_where_the_target_is_algoperfs(small_set):
    plain = summarize(load_runs([small_set]), "nesterov")
    summary = summarize(load_runs([small_set]), "nesterov", leaderboard=True)
    caspr = _group(summary, "ogbg", "CASPR (8 V100)")
    assert (caspr.steps.mean, caspr.seconds.mean, caspr.published) == (6_654, 2_192, True)
    own, before = ([(g.method, g.steps) for g in s.groups if g.runs] for s in (summary, plain))
    assert own == before
    assert all(group.ratio_steps is None for group in summary.groups if "A100" in group.method)
    of_ogbg = [group.published for group in summary.of("ogbg")]
    assert of_ogbg == sorted(of_ogbg)


def test_paper_rows_and_verdict(small_set):
    summary = summarize(load_runs([small_set]), "nesterov")
    reduce = _group(summary, "ogbg", "paper: K-FAC-reduce")
    assert (reduce.steps.mean, reduce.steps.stderr) == (15_566, 429)
    assert reduce.ratio_steps.value == pytest.approx(15_566 / 31_887)
    assert reduce.seconds.mean == pytest.approx(1.23 * 3600)
    assert not any(group.published for group in summary.of("librispeech_conformer"))
    (note,) = summary.paper_notes
    assert "kfac_reduce takes 0.471" in note
    assert "the paper's K-FAC-reduce 0.488, inside" in note
    assert not any(g.published for g in summarize(load_runs([small_set]), paper=False).groups)


@pytest.mark.parametrize(
    ("workload", "row", "steps", "share", "hours", "of_hours"),
    [
        ("ogbg", "reference (Nesterov)", "31,887 ± 2,070", "1", "2.33 ± 0.22 h", "1"),
        ("ogbg", "K-FAC-expand", "16,106 ± 863", "51 %", "1.32 ± 0.11 h", "57 %"),
        ("ogbg", "K-FAC-reduce", "15,566 ± 429", "49 %", "1.23 ± 0.03 h", "53 %"),
        ("imagenet_vit", "reference (NAdamW)", "122,139 ± 1,119", "1", "26.10 ± 0.24 h", "1"),
        ("imagenet_vit", "K-FAC-expand", "87,464 ± 245", "72 %", "19.57 ± 0.13 h", "75 %"),
        ("imagenet_vit", "K-FAC-reduce", "92,550 ± 731", "76 %", "20.28 ± 0.00 h", "78 %"),
    ],
)
def test_paper_rows_read_as_the_paper(tmp_path, workload, row, steps, share, hours, of_hours):
    trial = study_folder(tmp_path, "kfac_expand", 0, workload)
    write_trial(trial, workload, rows_to(workload, 9000))
    groups = summarize(load_runs([tmp_path])).of(workload)
    assert next(group.method for group in groups if group.published).startswith("paper: reference")
    (cells,) = [cells for cells in method_rows(groups) if cells[0] == f"paper: {row}"]
    assert cells[2:6] == [steps, share, hours, of_hours]


def test_methods_of_every_step_are_compared_with_figure_5(tmp_path):
    for method, factor in (("reference_every_step", 1.0), ("kfac_expand_every_step", 0.8)):
        for study in (0, 1):
            trial = study_folder(tmp_path, method, study, "imagenet_vit")
            write_trial(trial, "imagenet_vit", rows_to("imagenet_vit", int(9000 * factor) + study))
    summary = summarize(load_runs([tmp_path]), "reference_every_step")
    rows = {cells[0]: cells[2:6] for cells in method_rows(summary.of("imagenet_vit"))}
    assert rows["paper, Figure 5: reference (NAdamW)"] == ["117,400", "1", "25.00 h", "1"]
    assert rows["paper, Figure 5: K-FAC-expand"] == ["92,600", "79 %", "50.00 h", "200 %"]
    assert rows["paper, Figure 5: K-FAC-reduce"] == ["93,700", "80 %", "37.00 h", "148 %"]
    assert not any(name.startswith("paper: ") for name in rows)
    (note,) = summary.paper_notes
    assert "the paper's K-FAC-expand 0.789" in note


def _to_target(root, method, study, step, target, metric="mean_average_precision"):
    meta = {"workload.validation_target_value": target, "workload.target_metric_name": metric}
    trial = study_folder(root, method, study, "ogbg")
    return write_trial(trial, "ogbg", rows_to("ogbg", step), meta=meta)


def test_steps_to_one_target_are_never_divided_by_steps_to_another(tmp_path):
    for study in (0, 1):
        _to_target(tmp_path, "ref", study, 9000 + study, 0.28098)
        _to_target(tmp_path, "mine", study, 9000 + study, 0.2)
        _to_target(tmp_path, "both", study, 9000 + study, (0.28098, 0.2)[study])
    summary = summarize(load_runs([tmp_path]), "ref")
    high, low = summary.tables
    assert (high, low) == (
        "ogbg (validation/mean_average_precision >= 0.2)",
        "ogbg (validation/mean_average_precision >= 0.28098)",
    )
    assert {g.method for g in summary.of(high)} == {"both", "mine"}
    assert all(g.ratio_steps is None and g.ratio_seconds is None for g in summary.of(high))
    papers = [g.method for g in summary.of(low) if g.published]
    assert len(papers) == 3
    assert not any(g.published for g in summary.of(high))
    assert [g.method for g in summary.of(low) if not g.published] == ["ref", "both"]
    assert any("targets differ" in warning for warning in summary.warnings)
    profile = performance_profile(summary, ["ogbg"])
    assert profile.workloads == (high, low)
    assert "ogbg: validation/mean_average_precision >= 0.2\n" in render_text(summary)


@pytest.mark.parametrize("other", [(0.281, "mean_average_precision"), (0.28098, "accuracy")])
def test_tables_are_apart_by_value_and_by_metric(tmp_path, other):
    _to_target(tmp_path, "ref", 0, 9000, 0.28098)
    _to_target(tmp_path, "mine", 0, 9000, *other)
    summary = summarize(load_runs([tmp_path]), "ref", paper=False)
    assert len(summary.tables) == 2
    assert all(group.ratio_steps is None for group in summary.groups)


def test_paper_rows_are_not_for_another_target(tmp_path):
    meta = {"workload.validation_target_value": 0.1}
    for study in (0, 1):
        for method in ("ref", "kfac_reduce"):
            trial = study_folder(tmp_path, method, study, "ogbg")
            write_trial(trial, "ogbg", rows_to("ogbg", 9000), meta=meta)
    summary = summarize(load_runs([tmp_path]), "ref")
    assert any("published rows are for another target" in warning for warning in summary.warnings)
    assert summary.paper_notes == ()


def test_text_is_whole(small_set):
    text = render_text(summarize(load_runs([small_set]), "nesterov"), width=150, runs=True)
    for words in (
        "ogbg: validation/mean_average_precision >= 0.28098",
        "librispeech_conformer: validation/wer <= 0.085884",
        "8,421 ± 608",
        "0.471 [0.415, 0.531]",
        "31,887 ± 2,070",
        "8,421 (after 7,368)",
        "adamw study 2 trial 1: cut short: best",
    ):
        assert words in text


def test_run_without_logged_time_still_has_steps(tmp_path):
    times = ("accumulated_submission_time", "score", "total_duration")
    rows = [{k: v for k, v in row.items() if k not in times} for row in rows_to("ogbg", 9000)]
    trial = write_trial(study_folder(tmp_path, "a", 0, "ogbg"), "ogbg", rows, final=False)
    (trial / "measurements.csv").unlink()
    summary = summarize(load_runs([tmp_path]), paper=False)
    (group,) = summary.groups
    assert (group.steps.mean, group.seconds.n) == (9474, 0)
    text = render_text(summary, width=150, runs=True)
    assert "no time logged" in text
    assert "not reached" not in text


def test_markup_in_names_is_shown_as_it_is(tmp_path):
    method = "[red]x[bold]"
    write_trial(tmp_path / method / "study_0" / "ogbg_jax" / "trial_1", "ogbg", rows_to("ogbg", 9))
    assert method in render_text(summarize(load_runs([tmp_path])), width=150, runs=True)


def test_profile_and_score(small_set):
    summary = summarize(load_runs([small_set]), "nesterov")
    profile = performance_profile(summary)
    assert profile.workloads == ("librispeech_conformer", "ogbg")
    assert profile.scores["kfac_reduce"] == pytest.approx(1.0)
    assert profile.scores["adamw"] == 0.0
    assert profile.ratios["adamw"]["ogbg"] == math.inf
    assert profile.absent == ("adamw: librispeech_conformer",)
    # A method at ratio r on its only workload scores (4 - r) / 3, up to the grid of 100 points.
    single = performance_profile(summary, ["ogbg"])
    ratio = single.ratios["nesterov"]["ogbg"]
    assert ratio == pytest.approx(17_895 / 8_421, rel=1e-3)
    assert single.scores["nesterov"] == pytest.approx((4 - ratio) / 3, abs=0.02)
    assert performance_profile(summary, measure="steps").scores.keys() == profile.scores.keys()
    assert "over 1 workload(s): ogbg" in to_text(render_profile(single), 150)


@pytest.mark.parametrize("width", [80, 120])
def test_score_of_many_methods_and_workloads_fits_the_width(width):
    workloads = tuple(f"a_workload_with_a_long_name_{n}" for n in range(20))
    methods = [f"submission_number_{n}" for n in range(12)]
    ratios = {m: dict.fromkeys(workloads, 1.0 + i) for i, m in enumerate(methods)}
    taus = np.linspace(1, 4, 100)
    scores = dict.fromkeys(methods, 0.5)
    profile = Profile("seconds", workloads, taus, dict.fromkeys(methods, taus), scores, ratios, ())
    text = to_text(render_profile(profile), width)
    assert max(map(len, text.splitlines())) <= width
    for method in methods:
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [method]]
        assert line.split()[1] == "0.5000"
    assert "20/20" in text
    assert "0/20" in text


def test_tables_fit_eighty_columns(small_set):
    text = render_text(summarize(load_runs([small_set]), "nesterov"), width=80, runs=True)
    assert max(map(len, text.splitlines())) <= 80
    assert "8,421" in text


def test_score_beyond_four_times_the_best_is_zero(tmp_path):
    rows = rows_to("ogbg", 9000)
    slow = [row | {"accumulated_submission_time": 5 * row["score"]} for row in rows]
    write_trial(study_folder(tmp_path, "fast", 0, "ogbg"), "ogbg", rows)
    write_trial(study_folder(tmp_path, "slow", 0, "ogbg"), "ogbg", slow)
    assert performance_profile(summarize(load_runs([tmp_path]))).scores == {"fast": 1, "slow": 0}


def test_unknown_workload_of_a_profile(small_set):
    summary = summarize(load_runs([small_set]))
    with pytest.raises(CompareError, match="no run on workload wmt; these have runs"):
        performance_profile(summary, ["wmt"])
