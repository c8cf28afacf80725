"""Detection of the expand and the reduce setting."""

import logging
import re

import pytest
import torch
import torch.nn.functional as F
from nets import Mean, Pool, Tokens
from torch import nn

from submission.kfac import (
    KFAC,
    Bernoulli,
    Categorical,
    Gaussian,
    KFACConfig,
    Preconditioner,
    RaggedBatch,
    Segments,
    kronecker_factors,
)
from submission.kfac.fisher.setting import detect_setting, warn_of_folded_positions

GRAPHS = RaggedBatch(
    {
        "nodes": Segments.from_sizes(torch.tensor([2, 3])),
        "graphs": Segments(torch.arange(2), 2),
    }
)
CASES = [
    (Categorical(), (4, 10), None, "reduce"),
    (Categorical(), (4, 7, 10), None, "expand"),
    (Categorical(class_dim=1), (4, 10, 3, 3), None, "expand"),
    (Categorical(), (4, 1, 10), None, "reduce"),
    (Bernoulli(), (4, 128), None, "reduce"),
    (Bernoulli(), (4, 7, 128), None, "expand"),
    (Gaussian(), (4, 2), None, "reduce"),
    (Gaussian(), (4, 32, 32), None, "expand"),
    (Bernoulli(), (2, 3), GRAPHS, "reduce"),
    (Categorical(), (5, 3), GRAPHS, "expand"),
]


@pytest.mark.parametrize(("likelihood", "shape", "sharing", "expected"), CASES)
def test_the_outputs_tell_the_setting(likelihood, shape, sharing, expected):
    assert detect_setting(likelihood, torch.zeros(shape), sharing)[0] == expected


@pytest.mark.parametrize("pool", [True, False])
def test_functional_factors_follow_the_setting(pool):
    model, x = Tokens(pool), torch.randint(6, (5, 4))
    options = {"likelihood": "gaussian", "fisher_type": "type-2"}
    auto = kronecker_factors(model, x, kfac_approx="auto", **options)
    said = kronecker_factors(model, x, kfac_approx="reduce" if pool else "expand", **options)
    for name, block in said.items():
        assert torch.equal(block.input_covariance, auto[name].input_covariance)
        assert torch.equal(block.gradient_covariance, auto[name].gradient_covariance)


def run(kfac_approx, state=None, steps=range(4)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Mean(), nn.Linear(6, 3))
    config = KFACConfig(kfac_approx, factor_update_steps=2, inverse_update_steps=2)
    kfac = Preconditioner(model, config)
    if state is not None:
        model.load_state_dict(state[0])
        kfac.load_state_dict(state[1])
    for t in steps:
        torch.manual_seed(t)
        x, y = torch.randn(5, 2, 4), torch.randint(3, (5,))
        model.zero_grad()
        with kfac.record():
            logits = model(x)
        kfac.update(logits, "categorical")
        F.cross_entropy(logits, y).backward()
        kfac.precondition()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return model, kfac


def test_training_with_auto_is_training_with_the_approximation_it_finds(caplog):
    with caplog.at_level(logging.INFO):
        model, kfac = run("auto")
    assert "K-FAC-reduce is chosen: every example has one loss term" in caplog.text
    expected, _ = run("reduce")
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)
    assert {row.preconditioner for row in kfac.report()} == {"K-FAC-reduce"}


def test_a_resumed_run_keeps_the_decision():
    model, _ = run("auto")
    first, kfac = run("auto", steps=range(2))
    resumed, _ = run("auto", (first.state_dict(), kfac.state_dict()), range(2, 4))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_pooled_graphs_are_in_the_reduce_setting():
    ids = torch.tensor([0, 0, 1, 1, 1])
    model = Pool(ids, 2, "sum")
    rows = {"inner": Segments(ids, 2)}
    auto = kronecker_factors(
        model, torch.randn(5, 4), likelihood="gaussian", kfac_approx="auto", sharing=rows
    )
    assert auto["inner"].input_covariance.shape == (5, 5)


@pytest.mark.parametrize(
    "sharing",
    [Segments.from_sizes(torch.tensor([2, 3])), {"": Segments.from_sizes(torch.tensor([2, 3]))}],
    ids=["segments", "mapping"],
)
def test_outputs_for_the_rows_of_segments_are_the_expand_setting(sharing):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    kfac = Preconditioner(model, KFACConfig("auto", fisher_type="type-2"))
    with kfac.record(sharing):
        logits = model(torch.randn(5, 3))
    kfac.update(logits, "categorical")
    assert {row.preconditioner for row in kfac.report()} == {"K-FAC-expand"}


def test_positions_folded_into_the_outputs_are_the_expand_setting():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            return self.layer(x).flatten(0, 1)

    model, x = Folded(), torch.randn(5, 7, 3)
    kfac = Preconditioner(model, KFACConfig("auto"))
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "categorical")
    assert kfac.report()[0].preconditioner == "K-FAC-expand"
    options = {"likelihood": "categorical", "fisher_type": "type-2"}
    found, expected = (
        kronecker_factors(model, x, kfac_approx=approx, **options) for approx in ("auto", "expand")
    )
    torch.testing.assert_close(
        found["layer"].gradient_covariance, expected["layer"].gradient_covariance
    )


class Folding(nn.Module):
    """The layer inside sees positions as if they were examples."""

    def __init__(self, fold):
        super().__init__()
        self.inner, self.outer, self.fold = nn.Linear(3, 4), nn.Linear(4, 2), fold

    def forward(self, x):
        h = self.inner(self.fold(x)).tanh()
        return self.outer(h.unflatten(0, x.shape[:2]).mean(1) if h.dim() == 2 else h.mean(1))


def test_positions_folded_into_examples_by_a_copy_are_warned_of(caplog):
    model = Folding(lambda x: x.flatten(0, 1).clone())
    for approx, warned in (("expand", False), ("reduce", True)):
        caplog.clear()
        kfac = Preconditioner(model, KFACConfig(approx))
        with kfac.record():
            logits = model(torch.randn(5, 7, 3))
        kfac.update(logits, "categorical")
        assert ("inner: 35" in caplog.text) is warned


@pytest.mark.parametrize("approx", ["expand", "reduce", "auto"])
def test_positions_folded_into_examples_by_a_view_are_still_positions(approx, caplog):
    folded, plain = Folding(lambda x: x.flatten(0, 1)), Folding(lambda x: x)
    plain.load_state_dict(folded.state_dict())
    x = torch.randn(5, 7, 3)
    options = {"likelihood": "categorical", "kfac_approx": approx, "fisher_type": "type-2"}
    expected = kronecker_factors(plain, x, **options)
    for name, block in kronecker_factors(folded, x, **options).items():
        torch.testing.assert_close(block.to_dense(), expected[name].to_dense())
    assert "another number" not in caplog.text


class Words(nn.Module):
    """A language model that computes its loss inside, and may flatten its tokens on the way."""

    def __init__(self, flattens):
        super().__init__()
        self.words, self.hidden, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        self.flattens = flattens

    def forward(self, tokens):
        x = self.hidden(self.words(tokens)).tanh()
        logits = self.out(x.flatten(0, 1) if self.flattens else x)
        return F.cross_entropy(logits.view(-1, 9), tokens.flatten())


@pytest.mark.parametrize("flattens", [False, True])
def test_rows_flattened_for_a_loss_are_not_taken_for_examples(flattens, caplog):
    model = Words(flattens)
    optimizer = KFAC(model, lr=0.1, kfac_approx="reduce")
    with optimizer.record():
        loss = model(torch.randint(9, (3, 5)))
    loss.backward()
    optimizer.step()
    assert [row.sharing for row in optimizer.report()] == ["5 positions"] * 3
    assert not [r for r in caplog.records if "seem to be" in r.getMessage()]


@pytest.mark.parametrize("heads", [1, 2])
def test_rows_flattened_after_heads_were_joined_are_positions(heads, caplog):
    """As in Hugging Face's GPT-2: heads are joined by a view, and its `Conv1D` flattens again."""

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 9))

        def forward(self, x):
            rows = self.into(x).tanh().unflatten(-1, (heads, -1)).transpose(1, 2)
            joined = rows.transpose(1, 2).contiguous().reshape(*x.shape[:2], -1)
            return torch.addmm(torch.zeros(9), joined.view(-1, 6), self.out).view(*x.shape[:2], 9)

    model = Joined()
    optimizer = KFAC(model, lr=0.1, kfac_approx="reduce")
    with optimizer.record():
        loss = F.cross_entropy(model(torch.randn(3, 5, 4)).flatten(0, 1), torch.randint(9, (15,)))
    loss.backward()
    optimizer.step()
    assert [row.sharing for row in optimizer.report()] == ["5 positions"] * 2
    assert not caplog.records


@pytest.mark.parametrize(
    ("examples", "outputs", "message"),
    [
        ({"a": 3, "b": 3, "c": 1}, 15, None),  # flattened for the loss; c is broadcast
        ({"a": 3, "b": 3}, 3, None),
        ({"a": 15, "b": 3}, 15, r"3 examples, but .* \(a: 15\)"),
        ({"a": 15, "b": 15}, 3, r"3 examples, but .* \(a, b: 15\)"),
        ({"a": 4, "table": 289}, 4, None),  # relative positions, looked up once for all examples
        ({"table": 5, "a": 24, "b": 8}, 8, r"8 examples, but .* \(a: 24\)"),
    ],
)
def test_layers_that_take_positions_for_examples_are_named(examples, outputs, message, caplog):
    warn_of_folded_positions(examples, Categorical(), torch.zeros(outputs, 9))
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == (message is not None)
    if message:
        assert re.search(message, found[0])
