"""Files that are written: JSON, CSV, pictures and the page."""

import csv
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from make_fixtures import rows_to, study_folder, write_trial

pytest.importorskip("matplotlib", reason="pictures need matplotlib")
pytest.importorskip("jinja2", reason="the page needs jinja2")

from steps_to_target import (
    CompareError,
    load_runs,
    performance_profile,
    plot_profile,
    plot_runs,
    summarize,
    write_csv,
    write_html,
    write_json,
)
from steps_to_target.output.panels import mean_curve
from steps_to_target.output.plots import table_figure

MAGIC = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


class _Page(HTMLParser):
    """Collects what a browser would load, and checks that tags are closed."""

    def __init__(self):
        super().__init__()
        self.loaded, self.open, self.cells, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data"):
                self.loaded.append(value)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells.append(data)


def test_json(small_set, tmp_path):
    runs = load_runs([small_set])
    path = write_json(runs, summarize(runs, "nesterov"), tmp_path / "out.json")
    document = json.loads(path.read_text())
    kfac = next(
        m for m in document["methods"] if m["method"] == "kfac_reduce" and m["workload"] == "ogbg"
    )
    assert kfac["ratio_steps"]["value"] == pytest.approx(0.4706, abs=1e-4)
    assert kfac["fraction_reached"] == 1
    run = next(r for r in document["runs"] if r["status"] == "reached" and r["workload"] == "ogbg")
    assert run["validation"]["step"] == 8421
    assert run["hyperparameters"]["beta1"] == 0.9
    assert document["benchmark_score"]["seconds"]["workloads"] == ["librispeech_conformer", "ogbg"]
    missed = next(m for m in document["methods"] if m["method"] == "adamw")
    assert missed["steps"]["mean"] is None


def test_csv(small_set, tmp_path):
    runs = load_runs([small_set])
    with open(write_csv(runs, tmp_path / "out.csv"), newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(runs)
    first = next(
        row for row in rows if row["method"] == "kfac_reduce" and row["workload"] == "ogbg"
    )
    assert (first["steps_to_target"], first["steps_before"]) == ("8421", "7368")
    assert next(row for row in rows if row["status"] == "missed")["steps_to_target"] == ""


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures(small_set, tmp_path, suffix):
    runs = [run for run in load_runs([small_set]) if run.workload == "librispeech_conformer"]
    path = plot_runs(runs, tmp_path / f"curves.{suffix}")
    assert path.read_bytes().startswith(MAGIC[suffix])
    profile = performance_profile(summarize(runs))
    path = plot_profile(profile, tmp_path / f"profile.{suffix}")
    assert path.read_bytes().startswith(MAGIC[suffix])
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"curves.{suffix}", f"profile.{suffix}"]


def test_picture_shows_each_method_target_and_crossings(small_set):
    runs = load_runs([small_set])
    runs = [run for run in runs if run.workload == "ogbg"]
    methods = ["adamw", "kfac_reduce", "nesterov"]
    steps, times, parts = table_figure("ogbg", runs, methods).axes
    for axes in (steps, times):
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert {"nesterov (3)", "kfac_reduce (3)", "adamw (4)"} <= set(lines)
        looks = [lines[name] for name in ("nesterov (3)", "kfac_reduce (3)", "adamw (4)")]
        assert len({str(line.get_linestyle()) + line.get_marker() for line in looks}) == 3
        named = {"nesterov (3)", "kfac_reduce (3)", "adamw (4)"}
        assert named <= {text.get_text() for text in axes.texts}
        level = [line for line in axes.get_lines() if set(line.get_ydata()) == {0.28098}]
        assert len(level) == 1
    marks = [line for line in steps.get_lines() if line.get_linestyle() == "None"]
    assert sorted(x for line in marks for x in line.get_xdata()) == [
        7368,
        8421,
        9474,
        16842,
        17895,
        18947,
    ]
    assert [label.get_text() for label in parts.get_yticklabels()] == ["kfac_reduce"]
    assert len(parts.patches) == 6
    assert len({patch.get_hatch() for patch in parts.patches}) == 6


def test_odd_names_in_pictures(tmp_path, recwarn):
    methods = ["_hidden", "a$\\frac$b", "方法", "a\\b{c}^d", "tab\there"]
    for method in methods:
        trial = study_folder(tmp_path, method, 0, "ogbg")
        write_trial(trial, "ogbg", rows_to("ogbg", 9000), timed=True)
    runs = load_runs([tmp_path])
    assert plot_runs(runs, tmp_path / "x.png").stat().st_size > 0
    names = table_figure("ogbg", runs, sorted(run.method for run in runs)).axes[0].texts
    assert len(names) == len(methods) + 1  # and the target's
    assert not recwarn.list


def test_mean_curve_on_the_common_stretch():
    one = (np.array([0.0, 10.0]), np.array([0.0, 1.0]))
    other = (np.array([5.0, 20.0]), np.array([1.5, 3.0]))
    x, mean, spread = mean_curve([one, other])
    assert (x[0], x[-1]) == (5.0, 10.0)
    assert mean[0] == pytest.approx(1.0)
    assert spread[0] == pytest.approx(0.5)
    assert mean_curve([one, (np.array([11.0, 12.0]), np.zeros(2))]) is None
    assert mean_curve([]) is None


def test_pictures_of_runs_without_usable_numbers(tmp_path):
    rows = [row | {"validation/mean_average_precision": math.nan} for row in rows_to("ogbg", None)]
    write_trial(study_folder(tmp_path, "nan", 0, "ogbg"), "ogbg", rows)
    write_trial(study_folder(tmp_path, "none", 0, "ogbg"), "ogbg", [], final=False)
    write_trial(study_folder(tmp_path, "one", 0, "ogbg"), "ogbg", rows_to("ogbg", 9)[:1])
    runs = load_runs([tmp_path])
    assert plot_runs(runs, tmp_path / "x.png").stat().st_size > 0
    assert write_html(runs, summarize(runs), tmp_path / "x.html").stat().st_size > 0


def test_page_is_self_contained_and_whole(small_set, tmp_path):
    runs = load_runs([small_set])
    summary = summarize(runs, "nesterov")
    text = write_html(runs, summary, tmp_path / "page.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert all(item.startswith(("data:image/png;base64,", "#")) for item in page.loaded)
    assert sum(item.startswith("data:") for item in page.loaded) == 3
    assert not {"script", "link", "iframe"}.intersection(page.tags)
    assert "http" not in text.replace("http-equiv", "")
    content = " ".join(" ".join(page.cells).split())
    for words in ("8,421 ± 608", "cut short", "31,887 ± 2,070", "learning_rate", "benchmark score"):
        assert words in content
    assert page.tags.count("details") == len(runs)


def test_page_escapes_what_comes_from_logs(tmp_path):
    hparams = {"<script>alert(1)</script>": "</td><img src=x>"}
    trial = tmp_path / "<b>m" / "study_0" / "ogbg_jax" / "trial_1"
    write_trial(trial, "ogbg", rows_to("ogbg", 9000), hparams=hparams)
    runs = load_runs([tmp_path])
    text = write_html(runs, summarize(runs), tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img src=x>" not in text
    assert "&lt;b&gt;m" in text


def test_files_that_cannot_be_written(small_set, tmp_path):
    runs = load_runs([small_set])
    with pytest.raises(CompareError, match=r"cannot be written: No such file or directory"):
        write_csv(runs, tmp_path / "nowhere" / "out.csv")
    with pytest.raises(CompareError, match=r"ends in \.png, \.svg or \.pdf"):
        plot_runs(runs, tmp_path / "out.bmp")
    with pytest.raises(CompareError, match="no runs to draw"):
        plot_runs([], tmp_path / "out.png")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CompareError, match="cannot be written"):
        write_csv(runs, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]
