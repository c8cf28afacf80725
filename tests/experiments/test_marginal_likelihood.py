"""The parts without laplace-torch run always; the whole needs requirements/experiments.txt."""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from experiments import marginal_likelihood as experiment
from experiments.marginal_likelihood import command, training
from quickstart import images
from quickstart.errors import QuickstartError

needs_laplace = pytest.mark.skipif(
    importlib.util.find_spec("laplace") is None,
    reason="laplace-torch is missing: see requirements/experiments.txt",
)


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    experiment.add_flags(parser)
    return parser.parse_args(["--device=cpu", "--epochs=5", "--seeds", "0", *flags])


@needs_laplace
@pytest.mark.slow
def test_weight_decays_are_learned_and_reported(tmp_path: Path) -> None:
    flags = ("--train-images=256", "--repeats=1", "--large-batches=0")
    result = experiment.run(options(*flags), tmp_path, Console(quiet=True))
    assert len(result["runs"]) == 6
    for run in result["runs"]:
        learned = np.array(list(run["weight_decay"].values()))
        fixed = run["method"] == "fixed"
        assert np.allclose(learned, 1 / 256) == fixed
        assert len(run["log_marginal_likelihoods"]) == (0 if fixed else training.HYPERSTEPS)
    tested, timed = experiment.tables(result)
    assert len(tested.rows) == 6
    assert timed.rows[0][-1] == "100%"
    assert experiment.draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size < 200_000


@needs_laplace
def test_trained_nets_are_taken_over_with_the_same_flags_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--train-images=64", "--repeats=1", "--large-batches=0", "--resume", "--methods")
    sgd = ("--optimizer=sgd", "--learning-rate=0.1", "--last-learning-rate=1e-6")
    given = (*flags, "expand", "reduce", *sgd, "--weight-decay=5e-3")
    result = experiment.run(options(*given), tmp_path, Console(quiet=True))
    assert [run["method"] for run in result["runs"]] == ["expand", "reduce"] * 2
    tested, timed = experiment.tables(result)
    assert [row[-2:] for row in tested.rows] == [
        ("0.422 ± 0.013", "88.89 ± 0.24"),
        ("0.703 ± 0.012", "86.71 ± 0.13"),
        ("0.244 ± 0.004", "92.52 ± 0.12"),
        ("0.352 ± 0.008", "93.50 ± 0.06"),
    ]
    assert [row[-2:] for row in timed.rows] == [("196 ± 22", "100%"), ("99 ± 23", "50.5%")]

    monkeypatch.setattr(command, "train", lambda *_: pytest.fail("trained again"))
    again = experiment.run(options(*given), tmp_path, Console(quiet=True))
    assert again["runs"] == result["runs"]
    with pytest.raises(pytest.fail.Exception):
        experiment.run(options(*given, "--epochs=6"), tmp_path, Console(quiet=True))


@needs_laplace
def test_training_starts_at_the_weight_decay_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    class Laplace:
        def marglik_training(self, model: object, batches: object, **given: object) -> object:
            seen.update(given)
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "load_laplace", lambda: (Laplace(), {"expand": None}))
    flags = ("--weight-decay=5e-3", "--optimizer=sgd", "--last-learning-rate=1e-6", "--whole-train")
    with pytest.raises(KeyboardInterrupt):
        experiment.run(options(*flags), tmp_path, Console(quiet=True))
    assert seen["optimizer_cls"] is torch.optim.SGD
    assert seen["scheduler_kwargs"]["eta_min"] == 1e-6
    digits = images.load_digits().splits
    count = len(digits["train"]) + len(digits["validation"])
    assert seen["prior_prec_init"] == pytest.approx(5e-3 * count)
    assert seen["marglik_frequency"] == 5


def test_batches_are_every_training_image_once() -> None:
    data = images.load_digits()
    batches = training.Batches(data, 500, seed=0, augment=False, device=torch.device("cpu"))
    sizes = [len(y) for _, y in batches]
    assert sizes == [500, 500, 437]
    assert len(batches) == 3
    seen = torch.cat([x for x, _ in batches]).flatten(1).sort(0).values
    whole = data.images[data.splits["train"]].reshape(1437, -1)
    expected = torch.from_numpy(whole).float().div(127.5).sub(1).sort(0).values
    torch.testing.assert_close(seen, expected)


def test_digits_move_by_at_most_one_pixel() -> None:
    pixels = np.zeros((200, 1, 5, 5), dtype=np.uint8)
    pixels[:, 0, 2, 2] = 255
    moved = training.augmented(pixels, False, np.random.default_rng(0))
    places = {tuple(place) for place in np.argwhere(moved[:, 0])[:, 1:]}
    assert places == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)}
    assert (moved.sum((1, 2, 3)) == 255).all()


def test_without_the_package_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "laplace", None)
    with pytest.raises(QuickstartError, match=r"pip install --no-deps -r requirements/exp"):
        experiment.run(options(), tmp_path, Console(quiet=True))


@needs_laplace
def test_bad_sizes_are_explained(tmp_path: Path) -> None:
    for flags, text in (
        (("--epochs=4",), "--epochs must be 5 or more"),
        (("--repeats=0",), "must be 1 or more"),
        (("--depth=11",), "--depth: the depth of a Wide ResNet is 6n"),
    ):
        with pytest.raises(QuickstartError, match=text):
            experiment.run(options(*flags), tmp_path, Console(quiet=True))
