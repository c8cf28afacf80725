import json
from pathlib import Path

import pytest

from experiments import __main__ as command
from experiments import page, registry, results
from experiments.tables import Table, mean_and_error, plus_minus
from quickstart.errors import QuickstartError


def test_list_names_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    shown = capsys.readouterr().out
    assert all(e.name in shown for e in registry.EXPERIMENTS)


@pytest.mark.parametrize("experiment", registry.EXPERIMENTS, ids=lambda e: e.name)
def test_every_module_offers_what_the_registry_asks(experiment: registry.Experiment) -> None:
    if experiment.extra:
        pytest.importorskip("laplace", reason="`./run.sh experiments` installs it")
    module = experiment.load()
    assert module.PAPER.strip()
    assert all(isinstance(flag, str) for flag in module.SMALL)
    for function in ("add_flags", "run", "tables", "draw"):
        assert callable(getattr(module, function))


def test_a_run_writes_document_picture_and_page(tmp_path: Path) -> None:
    assert command.main(["exactness", f"--folder={tmp_path}", "--width=4"]) == 0
    content = json.loads((tmp_path / "exactness" / "result.json").read_text())
    assert content["settings"] == {"n": 4, "r": 2, "width": 4, "seed": 0}
    assert {"cpu", "threads", "gpus"} <= content["machine"].keys()
    assert {"python", "torch"} <= content["versions"].keys()
    assert sorted(p.name for p in (tmp_path / "exactness").iterdir()) == [
        "picture.png",
        "result.json",
    ]

    docs = tmp_path / "docs"
    assert command.main(["page", f"--folder={tmp_path}", f"--docs={docs}"]) == 0
    text = (docs / "results.md").read_text()
    assert "## exactness (Figures 1, 2)" in text
    assert "pictures/exactness.png" in text
    assert "width=4" in text
    assert (docs / "pictures" / "exactness.png").stat().st_size < 150_000
    assert str(tmp_path) not in text


def test_unknown_experiments_and_missing_or_damaged_results_are_explained(tmp_path: Path) -> None:
    with pytest.raises(QuickstartError, match="no experiment 'nothing'; there are: exactness"):
        command.main(["nothing"])
    with pytest.raises(QuickstartError, match="no result of exactness"):
        page.write(tmp_path, registry.EXPERIMENTS[:1], tmp_path)
    path = results.result_path(tmp_path, "exactness")
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(QuickstartError, match="is damaged"):
        results.read(tmp_path, "exactness")


def test_tables() -> None:
    table = Table("Times", ("batch", "s"), (("a|b", "1"),))
    assert table.to_markdown() == "**Times**\n\n| batch | s |\n| --- | ---: |\n| a\\|b | 1 |\n"
    with pytest.raises(ValueError, match="2 cells"):
        Table("Times", ("batch",), (("1", "2"),))


def test_mean_and_standard_error() -> None:
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert plus_minus([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert plus_minus([1.5], 1) == "1.5"
