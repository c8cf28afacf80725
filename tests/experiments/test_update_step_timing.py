import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from experiments import cifar
from experiments import update_step_timing as timing
from quickstart.errors import QuickstartError
from submission.kfac import kronecker_factors
from submission.kfac.linalg.convolution import shifted_products


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    timing.add_flags(parser)
    return parser.parse_args(["--depth=10", "--width=1", "--repeats=2", "--device=cpu", *flags])


def write_images(folder: Path, side: int, train: int = 10, test: int = 2) -> None:
    """An image folder of two classes, with so many images of each."""
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((side, side, 3), 100 * label + i, np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def test_run_times_everything_and_says_what_the_data_are(tmp_path: Path) -> None:
    result = timing.run(options("--batch-sizes", "2", "4"), tmp_path, Console(quiet=True))
    (table,) = timing.tables(result)
    assert "photographs" in table.title
    ours = [row for row in table.rows if row[0] in ("2", "4")]
    assert len(ours) == 2
    assert all("±" in cell for row in ours for cell in (*row[1:4], *row[5:7]))
    assert timing.draw(result, tmp_path / "picture.png")


def test_epochs_are_passes_over_all_training_images(tmp_path: Path) -> None:
    write_images(tmp_path, side=8)
    flags = (f"--data-dir={tmp_path}", "--batch-sizes", "5", "8", "--epochs=3")
    result = timing.run(options(*flags), tmp_path, Console(quiet=True))
    for seconds in result["seconds"].values():
        assert [len(seconds[size]) for size in ("5", "8")] == [3, 3]
    with pytest.raises(QuickstartError, match="--epochs needs --data-dir"):
        timing.run(options("--epochs=3"), tmp_path, Console(quiet=True))


def test_fast_paths_are_off_inside_only_and_change_no_factor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    add_second_moment = shifted_products.add_second_moment

    def counted(*arguments: object) -> None:
        calls.append(1)
        add_second_moment(*arguments)

    monkeypatch.setattr(shifted_products, "add_second_moment", counted)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 4, 3, padding=1), torch.nn.Flatten()).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)

    def factor() -> torch.Tensor:
        return kronecker_factors(model, x, likelihood="gaussian", kfac_approx="expand")[
            "0"
        ].input_covariance

    fast = factor()
    assert calls
    calls.clear()
    with timing.fast_convolutions_off():
        slow = factor()
    assert not calls
    torch.testing.assert_close(slow, fast)
    factor()
    assert calls


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_becomes_a_cell(error: Exception) -> None:
    def work() -> list[float]:
        raise error

    assert timing.unless_out_of_memory(work) is None
    seconds = {kind: {"8": [1.0, 2.0], "9": None} for kind in timing._FULL}
    (table,) = timing.tables({"data": "x", "batch_sizes": [8, 9], "seconds": seconds})
    assert table.rows[1] == ("9", "OOM", "OOM", "OOM", "-", "OOM", "OOM", "-", "-")


def test_other_errors_are_not_taken_for_out_of_memory() -> None:
    def work() -> list[float]:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        timing.unless_out_of_memory(work)


def test_image_folder(tmp_path: Path) -> None:
    write_images(tmp_path, side=4)
    data = cifar.load(tmp_path)
    assert {name: len(members) for name, members in data.splits.items()} == {
        "train": 18,
        "validation": 2,
        "test": 4,
    }
    assert np.array_equal(data.images[:, 0, 0, 0] // 100, data.classes)
    images, classes = cifar.tensors(data, data.splits["test"], torch.device("cpu"))
    assert images.shape == (4, 3, 4, 4)
    assert classes.tolist() == [0, 0, 1, 1]

    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    with pytest.raises(QuickstartError, match="same names"):
        cifar.load(tmp_path)


def test_with_the_fast_paths_off_the_factors_are_the_same() -> None:
    from experiments.update_step_timing import fast_convolutions_off

    model = nn.Sequential(nn.Conv2d(8, 4, 3, 2, 1), nn.Conv2d(4, 3, 3, padding=1), nn.Flatten(2))
    model.append(nn.AdaptiveAvgPool1d(1)).append(nn.Flatten())
    x = torch.randn(20, 8, 9, 9)
    for approx in ("expand", "reduce"):
        options = {"likelihood": "categorical", "kfac_approx": approx, "fisher_type": "type-2"}
        fast = kronecker_factors(model, x, **options)
        with fast_convolutions_off():
            plain = kronecker_factors(model, x, **options)
        for name, block in plain.items():
            torch.testing.assert_close(
                fast[name].input_covariance, block.input_covariance, rtol=1e-4, atol=1e-5
            )


def test_crops_of_photographs_have_the_shape_of_cifar() -> None:
    from experiments import photographs

    x, y = photographs.crops(100, torch.device("cpu"))
    assert x.shape == (100, 3, 32, 32)
    assert float(x.min()) >= -1
    assert float(x.max()) <= 1
    assert set(y.tolist()) <= set(range(10))
    assert torch.equal(photographs.crops(7, torch.device("cpu"))[0], x[:7])
    with pytest.raises(ValueError, match="crops of photographs, not"):
        photographs.crops(10**6, torch.device("cpu"))
