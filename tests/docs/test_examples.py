"""What the pages show works: the engine's six extensions, and the comparison in Python."""

import ast
import re
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from submission.kfac import KFAC, curvature
from submission.kfac.fisher import likelihoods
from submission.kfac.operations import handlers
from submission.kfac.operations.operation import Rows
from submission.kfac.operations.uses import LinearUse
from submission.kfac.updates import directions

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def block(page, words):
    (found,) = [text for text in blocks(page) if words in text]
    return found


@pytest.mark.parametrize("page", ["engine.md", "compare.md"])
def test_every_example_is_python(page):
    for text in blocks(page):
        code = textwrap.dedent(text)
        if code.startswith("elif"):
            code = f"if False: pass\n{code}"
        if "return " in code or "yield " in code:
            code = "def function():\n" + textwrap.indent(code, "    ")
        ast.parse(code)


def test_an_operation(monkeypatch):
    def my_product(x, weight):
        if has_torch_function((x, weight)):
            return handle_torch_function(my_product, (x, weight), x, weight)
        return x @ weight.T

    monkeypatch.setattr(F, "my_product", my_product, raising=False)
    names = {"handles": handlers.handles, "LinearUse": LinearUse, "Rows": Rows}
    exec(block("engine.md", "my_product"), names)
    try:
        layer = nn.Linear(4, 3, bias=False)
        x = torch.randn(6, 4)
        chosen = {"likelihood": "categorical", "kfac_approx": "expand", "fisher_type": "type-2"}
        expected = curvature(layer, x, **chosen)
        layer.forward = lambda x: F.my_product(x, layer.weight)
        found = curvature(layer, x, **chosen)
    finally:
        handlers.HANDLERS.pop(my_product)
    (one,), (other,) = found.values(), expected.values()
    torch.testing.assert_close(one.input_covariance, other.input_covariance)
    torch.testing.assert_close(one.gradient_covariance, other.gradient_covariance)


def test_a_likelihood():
    names = {"torch": torch, "Likelihood": likelihoods.Likelihood}
    exec(block("engine.md", "Poisson"), names)
    layer, x = nn.Linear(4, 3, bias=False).double(), torch.randn(6, 4, dtype=torch.float64)
    (found,) = curvature(
        layer, x, likelihood=names["Poisson"](), kfac_approx="expand", fisher_type="type-2"
    ).values()
    # The Hessian of exp(z) - y z is exp(z); the mean is over terms, three of each example.
    rates = layer(x).exp().detach()
    torch.testing.assert_close(found.gradient_covariance, torch.diag(rates.mean(0)) / 3)


def test_an_update_rule(monkeypatch):
    names = {"Rule": directions.Rule}
    exec(block("engine.md", "class Sign"), names)
    monkeypatch.setitem(directions.RULES, "sign", names["Sign"])
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = KFAC(model, direction="sign", base=lambda groups: torch.optim.SGD(groups, lr=0.1))
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.record():
        loss = F.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,)))
    loss.backward()
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close((new - old).abs(), torch.full_like(old, 0.1))


def test_the_comparison(monkeypatch, tmp_path):
    for name, pace in (("kfac", 500), ("nesterov", 1000)):
        folder = tmp_path / "runs" / name / "study_0" / "ogbg_pytorch" / "trial_1"
        folder.mkdir(parents=True)
        lines = ["global_step,accumulated_submission_time,validation/mean_average_precision"]
        lines += [f"{step},{step / 4},{step / pace}" for step in range(100, 400, 100)]
        (folder / "eval_measurements.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    exec(block("compare.md", "load_runs"), {})
    assert (tmp_path / "curves.svg").exists()
    assert (tmp_path / "report.html").exists()
