"""Schedules against the run times that AlgoPerf allows."""

import pytest

from workloads_overrides import run_time
from workloads_overrides.run_time import A100_STEP_SECONDS, ALLOWANCES, Allowance, allowance_of, fit


@pytest.mark.parametrize("ruleset", ["external", "self"])
@pytest.mark.parametrize("slower", [1.0, 2.5, 6.0])
@pytest.mark.parametrize("workload", list(A100_STEP_SECONDS))
def test_no_run_ends_before_its_schedule(workload, slower, ruleset):
    _, allowance = allowance_of(workload)
    one = fit(allowance, slower * A100_STEP_SECONDS[workload], ruleset)
    assert one.length <= one.fits
    assert one.share <= 0.951
    assert one.length <= int(0.75 * allowance.step_hint)
    if one.share < 0.94:  # there is time for more: then it is not cut
        assert one.length == int(0.75 * allowance.step_hint)


def test_the_self_tuning_ruleset_allows_half_as_much_again():
    assert Allowance(10, 100).under("self") == 150.0
    assert Allowance(10, 100).under("external") == 100.0


def test_the_vit_of_the_published_entries_ends_in_time():
    """They ended after 111,000 to 121,000 steps of 0.8 s or more, without the target."""
    one = fit(ALLOWANCES["4 A100"]["imagenet_vit"], 0.85, "self")
    assert 100_000 < one.length < 0.75 * 167_999
    assert one.share == pytest.approx(0.95, abs=1e-3)


def test_the_table_of_other_step_times(tmp_path, capsys):
    path = tmp_path / "times.csv"
    path.write_text("submission,ogbg,imagenet_vit\nmine,0.5,\n")
    assert run_time.main(["--step-times", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "mine" in printed
    assert "ogbg" in printed
    assert "imagenet_vit" not in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "is no table of step times"),
        ("submission,ogbg\nmine,fast\n", "is no table of step times"),
        ("submission,ogbg\nmine,-1\n", "has -1.0 seconds per step; they must be above 0"),
        ("submission,ogb\nmine,1\n", "no run time is known for workload 'ogb'"),
    ],
)
def test_tables_that_are_none(tmp_path, capsys, text, message):
    path = tmp_path / "times.csv"
    path.write_text(text)
    assert run_time.main(["--step-times", str(path)]) == 2
    assert message in capsys.readouterr().err
