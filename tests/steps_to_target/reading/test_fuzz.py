"""Whatever is in the files: a run with a status, tables and files, never an exception."""

import json
import math
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_fixtures import rows_to, study_folder, write_trial

from steps_to_target import Status, load_runs, render_text, summarize, write_csv, write_json

FILES = (
    "eval_measurements.csv",
    "measurements.csv",
    "hparams.json",
    "meta_data_0.json",
    "flags_0.json",
)
RELAXED = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

cells = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True).map(repr),
    st.integers(-5, 2000).map(str),
    st.sampled_from(["", "nan", "inf", "-inf", "1e400", "0x10", "None", '"', "a,b", "\0", "١٢"]),
)
columns = st.lists(
    st.sampled_from(
        [
            "global_step",
            "accumulated_submission_time",
            "score",
            "total_duration",
            "preemption_count",
            "loss",
            "time/forward",
            "validation/mean_average_precision",
            "test/mean_average_precision",
            "validation/loss",
            "",
        ]
    ),
    max_size=9,
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400)
)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
META_KEYS = [
    "workload.target_metric_name",
    "workload.validation_target_value",
    "workload.test_target_value",
    "workload.max_allowed_runtime_sec",
    "workload.step_hint",
    "gpu_model_name",
    "gpu_count",
    "git_commit_hash",
    "workload",
    "framework",
    "max_global_steps",
    "tuning_ruleset",
    "batch_size",
]
objects = st.dictionaries(st.sampled_from(META_KEYS), json_values, max_size=6)


@st.composite
def tables(draw):
    names = draw(columns)
    rows = draw(st.lists(st.lists(cells, max_size=len(names) + 1), max_size=8))
    end = draw(st.sampled_from(["", "\n", "\r\n"]))
    return "\n".join(",".join(row) for row in [names, *rows]) + end


@st.composite
def mutations(draw):
    """Cut, overwrite, double or swap pieces of a good file."""
    kind = draw(st.sampled_from(["cut", "overwrite", "double", "swap lines", "drop column"]))
    return kind, draw(st.floats(0, 1)), draw(st.floats(0, 1)), draw(st.binary(max_size=6))


def _mutate(data, mutation):
    kind, first, second, noise = mutation
    start = int(first * len(data))
    if kind == "cut":
        return data[:start]
    if kind == "overwrite":
        return data[:start] + noise + data[start + len(noise) :]
    if kind == "double":
        return data[:start] + data[int(second * start) :]
    lines = data.split(b"\n")
    if kind == "swap lines":
        one, other = int(first * (len(lines) - 1)), int(second * (len(lines) - 1))
        lines[one], lines[other] = lines[other], lines[one]
        return b"\n".join(lines)
    column = int(first * 14)
    parts = [line.split(b",") for line in lines]
    return b"\n".join(b",".join(part[:column] + part[column + 1 :]) for part in parts)


def _check(root):
    """Load, summarise, render and export; what comes out must be consistent."""
    runs = load_runs([root])
    assert len(runs) == 2
    for run in runs:
        assert isinstance(run.status, Status)
        assert run.evidence
        assert (run.status is Status.REACHED) == (run.crossing is not None)
        assert run.resumes >= 0
        assert len(run.steps) == len(run.seconds) == len(run.values) == len(run.test_values)
        assert all(
            later > earlier for earlier, later in zip(run.steps, run.steps[1:], strict=False)
        )
        if run.crossing:
            goal, value = run.target.validation, run.crossing.value
            assert value <= goal if run.target.lower_is_better else value >= goal
            before = run.crossing.previous_step
            assert before is None or before < run.crossing.step
    summary = summarize(runs, runs[0].method)
    text = render_text(summary, runs=True)
    assert all(str(run.status) in text for run in runs)
    for group in summary.groups:
        assert 0 <= group.steps.n <= group.steps.total
        assert math.isnan(group.steps.mean) == (group.steps.n == 0)
    document = json.loads(write_json(runs, summary, root / "out.json").read_text())
    assert len(document["runs"]) == 2
    assert write_csv(runs, root / "out.csv").read_text().count("\n") >= 3


def _folder(root):
    for method in ("good", "bad"):
        write_trial(
            study_folder(root, method, 0, "ogbg"), "ogbg", rows_to("ogbg", 16_000), timed=True
        )
    return study_folder(root, "bad", 0, "ogbg")


@RELAXED
@given(name=st.sampled_from(FILES), steps=st.lists(mutations(), min_size=1, max_size=3))
def test_damaged_files(name, steps):
    root = Path(tempfile.mkdtemp())
    try:
        path = _folder(root) / name
        data = path.read_bytes()
        for step in steps:
            data = _mutate(data, step)
        path.write_bytes(data)
        _check(root)
    finally:
        shutil.rmtree(root)


@RELAXED
@given(
    evaluations=tables(), measurements=tables(), meta=objects, flags=objects, hparams=json_values
)
def test_made_up_files(evaluations, measurements, meta, flags, hparams):
    root = Path(tempfile.mkdtemp())
    try:
        folder = _folder(root)
        contents = (evaluations, measurements, *map(json.dumps, (hparams, meta, flags)))
        for name, content in zip(FILES, contents, strict=True):
            (folder / name).write_text(content, encoding="utf-8", errors="replace")
        _check(root)
    finally:
        shutil.rmtree(root)
