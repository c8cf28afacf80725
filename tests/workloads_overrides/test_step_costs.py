"""Costs beside AlgoPerf's NAdamW: what does not need AlgoPerf."""

import json
import re

import pytest

from workloads_overrides import step_costs


@pytest.fixture
def clone(tmp_path):
    reference = tmp_path / "clone" / step_costs.REFERENCE
    reference.parent.mkdir(parents=True)
    reference.write_text("")
    return tmp_path / "clone"


def test_the_first_step_is_the_one_with_an_update_and_the_second_does_not_count():
    outcome = {"step_seconds": [9.0, 5.0, 1.0, 3.0, 2.0], "memory_peak": 100.0}
    assert step_costs.Costs.of(outcome) == step_costs.Costs(update=9.0, other=2.0, memory=100.0)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--clone=nowhere"], "--clone: there is no .*setup --algoperf"),
        (["--clone=CLONE", "--steps=2"], "--steps must be 3 to 10, not 2"),
        (["--clone=CLONE", "ogb"], "no workload 'ogb'; there are mnist"),
    ],
)
def test_wrong_flags_are_refused_before_anything_runs(clone, capsys, flags, text):
    with pytest.raises(SystemExit):
        step_costs.main([flag.replace("CLONE", str(clone)) for flag in flags])
    assert re.search(text, capsys.readouterr().err)


def test_every_method_is_run_and_a_failure_does_not_end_the_table(
    clone, capsys, monkeypatch, tmp_path
):
    def measured(clone, workload, method, batch_size, steps, folder):
        if method == "expand":
            raise RuntimeError("no memory")
        return {"step_seconds": [1.0, 1.0, 0.5], "memory_peak": 2048.0}

    monkeypatch.setattr(step_costs, "measure", measured)
    out = tmp_path / "costs.json"
    assert step_costs.main([f"--clone={clone}", "ogbg", f"--out={out}"]) == 1
    printed = capsys.readouterr()
    header, rule, line = printed.out.splitlines()
    assert line == "| ogbg | 0.50 | 0.50 | - | 1.00 | - | 2,048 | 2,048 | - |"
    assert header.count("|") == rule.count("|") == line.count("|")
    assert printed.err == "could not be run: ogbg, expand: no memory\n"
    assert list(json.loads(out.read_text())["ogbg"]) == ["NAdamW", "reduce"]
