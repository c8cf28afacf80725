from pathlib import Path

import pytest
import torch

from experiments import exactness


@pytest.mark.parametrize("approx", exactness.APPROXES)
@pytest.mark.parametrize("setting", exactness.SETTINGS)
def test_each_approximation_is_exact_in_its_own_setting_only(setting: str, approx: str) -> None:
    row = exactness.compare(n=4, r=3, width=5, setting=setting, seed=1)
    if approx == setting:
        assert row[approx]["relative"] < 1e-14
    else:
        assert row[approx]["relative"] > 0.1


def test_exact_block_is_the_hessian_of_the_mean_squared_error() -> None:
    torch.manual_seed(0)
    model = exactness.DeepLinear(3, mean_over_positions=False).double()
    x, y = torch.randn(2, 2, 2, 3, dtype=torch.float64)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        parameters = {**dict(model.named_parameters()), "1.weight": weight}
        output = torch.func.functional_call(model, parameters, (x,))
        return torch.nn.functional.mse_loss(output, y)

    hessian = torch.func.hessian(loss)(model[1].weight.detach()).reshape(9, 9)
    torch.testing.assert_close(exactness.exact_block(model, x, "1.weight", 0.5), hessian)


def test_picture_and_table(tmp_path: Path) -> None:
    result = {
        s: exactness.compare(n=4, r=2, width=8, setting=s, seed=0) for s in ("expand", "reduce")
    }
    path = tmp_path / "picture.png"
    assert exactness.draw(result, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 150_000
    (table,) = exactness.tables(result)
    assert [row[0] for row in table.rows] == ["expand setting", "reduce setting"]
