"""Fused modules: the unrolled forward computes the same, and its factors are the exact ones."""

import pytest
import torch
import torch.nn.functional as F
from ggn import exact_ggn, relative_error
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from submission.kfac import KFACConfig, Positions, Preconditioner, curvature


def flat_tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for item in output if item is not None for t in flat_tensors(item)]


def assert_same_outputs(model, *args, **kwargs):
    """While the model is recorded. Returns what the preconditioner reports after an update."""
    torch.manual_seed(5)
    expected = flat_tensors(model(*args, **kwargs))
    kfac = Preconditioner(model, KFACConfig())
    torch.manual_seed(5)
    with kfac.record():
        recorded = model(*args, **kwargs)
    got = flat_tensors(recorded)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert "forward" not in vars(model)
    kfac.update(got[0], "gaussian")
    got[0].square().sum().backward()
    kfac.precondition()
    assert not any(kfac.failures.values())
    return kfac.report()


ATTENTION = {
    "plain": ({}, {}),
    "batch first": ({"batch_first": True}, {}),
    "no bias": ({"bias": False}, {}),
    "dropout": ({"dropout": 0.3}, {}),
    "other key and value sizes": ({"kdim": 3, "vdim": 5}, {}),
    "extra key and value": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "no attention weights": ({}, {"need_weights": False}),
    "attention per head": ({}, {"average_attn_weights": False}),
    "causal": (
        {},
        {"attn_mask": torch.triu(torch.full((4, 4), float("-inf")).double(), 1), "is_causal": True},
    ),
    "padding": ({}, {"key_padding_mask": torch.tensor([[False] * 4, [False, False, True, True]])}),
}


@pytest.mark.parametrize("case", list(ATTENTION))
def test_attention_computes_the_same(case):
    options, call = ATTENTION[case]
    model = nn.MultiheadAttention(6, 2, **options)
    sizes = (6, options.get("kdim", 6), options.get("vdim", 6))
    shape = (2, 4) if options.get("batch_first") else (4, 2)
    rows = assert_same_outputs(model, *(torch.randn(*shape, s) for s in sizes), **call)
    layers = [row for row in rows if row.preconditioner == "K-FAC-expand"]
    assert len(layers) == 4  # query, key, value, output
    assert {row.sharing for row in layers} <= {"4 positions", "2 positions"}
    assert {row.name for row in rows} - {row.name for row in layers} <= {"bias_k", "bias_v"}
    bias = int(options.get("bias", True))
    sides = sorted(f"{size + bias} x 6" for size in (*sizes, 6))
    assert sorted(row.sides for row in layers) == sides


def test_unbatched_attention_computes_the_same():
    model = nn.MultiheadAttention(6, 2, batch_first=True)
    assert_same_outputs(model, *(torch.randn(4, 6) for _ in range(3)))


RECURRENT = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {"batch_first": True}),
    "tanh": (nn.RNN, {"bias": False}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "deep both ways": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "dropout": 0.4}),
    "gru both ways": (nn.GRU, {"bidirectional": True, "batch_first": True}),
}


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("case", list(RECURRENT))
def test_recurrent_layers_compute_the_same(case, state):
    layer, options = RECURRENT[case]
    model = layer(3, 4, **options).eval()
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    hidden = torch.randn(count, 2, 4)
    hx = ((hidden, torch.randn(count, 2, 4)) if layer is nn.LSTM else hidden) if state else None
    shape = (2, 5, 3) if options.get("batch_first") else (5, 2, 3)
    rows = assert_same_outputs(model, torch.randn(shape), hx)
    assert {row.preconditioner for row in rows} == {"K-FAC-expand"}
    both_ways = 2 if options.get("bidirectional") else 1
    assert len(rows) == 2 * both_ways * options.get("num_layers", 1)
    for row in rows:
        assert "5 positions" in row.sharing


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("sorted_lengths", [True, False])
def test_packed_sequences(layer, sorted_lengths):
    model = layer(3, 4, bidirectional=True, batch_first=True)
    lengths = torch.tensor([5, 3, 1] if sorted_lengths else [3, 5, 1])
    packed = pack_padded_sequence(
        torch.randn(3, 5, 3), lengths, batch_first=True, enforce_sorted=sorted_lengths
    )
    assert_same_outputs(model, packed)


class Last(nn.Module):
    """A recurrent layer read at its last step, or at all steps of packed sequences."""

    def __init__(self, layer, lengths=None):
        super().__init__()
        self.layer, self.lengths = layer, lengths
        self.head = nn.Linear(layer.hidden_size, 2)

    def forward(self, x):
        if self.lengths is None:
            return self.head(self.layer(x)[0][:, -1])
        packed = pack_padded_sequence(x, self.lengths, batch_first=True)
        return self.head(pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0].sum(1))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_padding_of_packed_sequences_does_not_count(layer, kfac_approx):
    model = Last(layer(3, 2, batch_first=True), torch.tensor([3, 3]))
    short, options = torch.randn(2, 3, 3), {"likelihood": "gaussian", "kfac_approx": kfac_approx}
    expected = curvature(model, short, fisher_type="type-2", **options)
    long = torch.cat([short, torch.full((2, 2, 3), 9.0)], 1)
    for name, block in curvature(model, long, fisher_type="type-2", **options).items():
        torch.testing.assert_close(block.input_covariance, expected[name].input_covariance)
        torch.testing.assert_close(block.gradient_covariance, expected[name].gradient_covariance)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_one_step_of_a_recurrent_layer_is_exact(layer):
    assert_one_step_is_exact(Last(layer(3, 2, batch_first=True)), ("ih", "hh"))


def test_one_step_of_an_lstm_with_projections_is_exact():
    model = Last(nn.LSTM(3, 4, proj_size=2, batch_first=True))
    model.head = nn.Linear(2, 2)
    assert_one_step_is_exact(model, ("ih", "hh", "hr"))


def assert_one_step_is_exact(model, maps):
    """Of one example: a product of vectors."""
    x = torch.randn(1, 1, 3)
    blocks = curvature(model, x, likelihood="gaussian", kfac_approx="reduce", fisher_type="type-2")
    for which in maps:
        name = f"layer.weight_{which}_l0"
        names = [name] if which == "hr" else [name, name.replace("weight", "bias")]
        truth = exact_ggn(model, names, (x,), lambda f: F.mse_loss(f, torch.zeros_like(f)))
        rows, columns = model.get_parameter(name).shape
        index = torch.arange(truth.shape[0])
        order = index[: rows * columns].reshape(rows, columns)
        if len(names) == 2:
            order = torch.cat([order, index[rows * columns :, None]], 1)
        order = order.flatten()
        assert relative_error(blocks[name].to_dense(), truth[order][:, order]) <= 1e-12


class Attend(nn.Module):
    """Attention followed by a mean; value projection alone is linear in the output."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0].mean(1)


def projections(blocks):
    """Of query, key and value."""
    found = [block for name, block in blocks.items() if name.startswith("attention.in_proj")]
    assert len(found) == 3
    return found


def test_attention_of_one_token_is_exact_for_value_and_output():
    # One token attends to itself with weight one: value and output projections are linear layers.
    model, x = Attend(), torch.randn(5, 1, 4)
    blocks = curvature(model, x, likelihood="gaussian", kfac_approx="reduce", fisher_type="type-2")
    truth = exact_ggn(
        model,
        ["attention.in_proj_weight", "attention.in_proj_bias"],
        (x,),
        lambda f: F.mse_loss(f, torch.zeros_like(f)),
    )
    weight = torch.arange(48).reshape(12, 4)[8:]
    order = torch.cat([weight, 48 + torch.arange(8, 12)[:, None]], 1).flatten()
    query, key, value = projections(blocks)
    assert relative_error(value.to_dense(), truth[order][:, order]) <= 1e-12
    assert query.gradient_covariance.norm() < 1e-12
    assert key.gradient_covariance.norm() < 1e-12


def test_gradients_of_slices_are_written_to_their_rows():
    model, x = Attend(), torch.randn(5, 3, 4)
    kfac = Preconditioner(model, KFACConfig(damping=0.1, damping_kind="both_factors"))
    with kfac.record():
        out = model(x)
    kfac.update(out, "gaussian")
    out.square().mean().backward()
    weight = model.attention.in_proj_weight.grad.clone()
    bias = model.attention.in_proj_bias.grad.clone()
    kfac.precondition()
    for i, block in enumerate(projections(kfac.curvature())):
        a, b = (
            f + 0.1 * torch.eye(len(f)) for f in (block.input_covariance, block.gradient_covariance)
        )
        rows = slice(4 * i, 4 * i + 4)
        joint = torch.cat([weight[rows], bias[rows, None]], 1)
        expected = torch.linalg.solve(b, joint) @ torch.linalg.inv(a)
        torch.testing.assert_close(model.attention.in_proj_weight.grad[rows], expected[:, :-1])
        torch.testing.assert_close(model.attention.in_proj_bias.grad[rows], expected[:, -1])


def test_transformer_encoder_layers_have_no_parameter_left_over():
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    x = torch.randn(3, 5, 4)
    blocks = curvature(model, x, likelihood="gaussian", kfac_approx="expand")
    inputs = [name for name in blocks if name.startswith("self_attn.in_proj")]
    assert len(inputs) == 3  # query, key, value
    assert set(blocks) - set(inputs) == {
        "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2",
    }  # fmt: skip
    sides = [(blocks[name].input_covariance, blocks[name].gradient_covariance) for name in inputs]
    assert [(a.shape, b.shape) for a, b in sides] == [((5, 5), (4, 4))] * 3


# ---- models that use fused modules in unusual ways ----------------------------------------------


class Recurring(nn.Module):
    """A recurrent layer, inside an activation checkpoint or not, and a head on the mean."""

    def __init__(self, kind, checkpointed):
        super().__init__()
        self.layer, self.head = kind(4, 4, batch_first=True), nn.Linear(4, 3)
        self.checkpointed = checkpointed

    def forward(self, x):
        if self.checkpointed:
            h = checkpoint(lambda z: self.layer(z)[0], x, use_reentrant=False)
        else:
            h = self.layer(x)[0]
        return self.head(h.mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_inside_a_checkpoint_a_fused_module_stays_as_it_is(kind, caplog):
    model, plain = Recurring(kind, True), Recurring(kind, False)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 3, 4)
    kfac = Preconditioner(model, KFACConfig("reduce", fisher_type="type-2"))
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "categorical")
    logits.square().sum().backward()
    plain(x).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    rows = {row.name: row.preconditioner for row in kfac.report()}
    assert rows["layer.weight_ih_l0"] == "diagonal"
    assert rows["head"] == "K-FAC-reduce"
    assert "layer.weight_ih_l0" in caplog.text


class Attending(nn.Module):
    """Linear, attention, recurrent layer; positions before examples, or after them."""

    def __init__(self, batch_first):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.recurrent = nn.GRU(4, 4, batch_first=batch_first)
        self.head = nn.Linear(4, 3)
        self.time = 1 if batch_first else 0

    def forward(self, x):
        x = self.inner(x)
        x = self.recurrent(self.attention(x, x, x)[0])[0]
        return self.head(x.mean(self.time))


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_a_rule_for_positions_before_examples_holds_inside_fused_modules(kfac_approx):
    model, same = Attending(False), Attending(True)
    same.load_state_dict(model.state_dict())
    x = torch.randn(7, 5, 4)
    options = {"likelihood": "categorical", "kfac_approx": kfac_approx, "fisher_type": "type-2"}
    rule = {"": Positions(batch_dim=1), "head": Positions()}
    found = curvature(model, x, sharing=rule, **options)
    expected = curvature(same, x.transpose(0, 1), **options)
    assert found.keys() == expected.keys()
    for name, block in expected.items():
        assert relative_error(found[name].to_dense(), block.to_dense()) < 1e-12


def test_a_mask_of_positions_reaches_every_time_step():
    mask = torch.tensor([[True, True, True], [True, False, False]])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.RNN(3, 2, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0]

    found = curvature(
        Net(), torch.randn(2, 3, 3), likelihood="gaussian", kfac_approx="expand",
        fisher_type="type-2", sharing=Positions(mask=mask), mask=mask.unsqueeze(-1).expand(2, 3, 2),
    )  # fmt: skip
    ones = found["layer.weight_ih_l0"].input_covariance[-1, -1]
    assert float(ones) == pytest.approx(1.0)
    assert float(found["layer.weight_hh_l0"].input_covariance[-1, -1]) == pytest.approx(1.0)


@pytest.mark.parametrize("logits_of", [lambda h: h.mean(1), lambda h: h])
def test_the_setting_is_detected_with_fused_modules(logits_of):
    model = Attending(True)
    model.forward = lambda x: model.head(logits_of(model.attention(x, x, x)[0]))
    kfac = Preconditioner(model, KFACConfig("auto", fisher_type="type-2"))
    x = torch.randn(5, 3, 4)
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "categorical")
    logits.square().sum().backward()
    kfac.precondition()
    approx = "expand" if logits.dim() == 3 else "reduce"
    assert {row.preconditioner for row in kfac.report() if "attention" in row.name} == {
        f"K-FAC-{approx}"
    }
    expected = curvature(
        model, x, likelihood="categorical", kfac_approx=approx, fisher_type="type-2"
    )
    for name, block in kfac.curvature().items():
        if name.startswith("attention"):
            # In reduce the keys have no curvature at all but for rounding.
            torch.testing.assert_close(
                block.to_dense(), expected[name].to_dense(), rtol=1e-12, atol=1e-25
            )


class First(nn.Module):
    """The first output of a module, averaged over positions, times a number."""

    def __init__(self, layer, scale=1.0):
        super().__init__()
        self.layer, self.scale = layer, scale

    def forward(self, x):
        arguments = (x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else (x,)
        return self.scale * self.layer(*arguments)[0].mean(1)


def reasons_after_a_step(model, x):
    """Name of a block without factors -> why."""
    expected = model(x)
    kfac = Preconditioner(model, KFACConfig())
    with kfac.record():
        logits = model(x)
    torch.testing.assert_close(logits, expected)
    kfac.update(logits, "gaussian")
    logits.square().sum().backward()
    kfac.precondition()
    return {row.name: row.reason for row in kfac.report() if row.reason}


@pytest.mark.parametrize(
    ("layer", "weight"),
    [
        (lambda: nn.MultiheadAttention(4, 2, batch_first=True), "in_proj_weight"),
        (lambda: nn.GRU(4, 4), "weight_hh_l0"),
    ],
    ids=["attention", "recurrent"],
)
def test_a_weight_norm_is_a_weight_that_is_computed(layer, weight):
    model = First(nn.utils.parametrizations.weight_norm(layer(), weight))
    x, originals = torch.randn(5, 3, 4), f"layer.parametrizations.{weight}.original"
    reasons = reasons_after_a_step(model, x)
    blocks = curvature(model, x, likelihood="gaussian", kfac_approx="expand", fisher_type="type-2")
    for name in (originals + "0", originals + "1"):
        assert "used in torch's `weight_norm`" in reasons[name]
        truth = exact_ggn(model, [name], (x,), lambda f: F.mse_loss(f, torch.zeros_like(f)))
        torch.testing.assert_close(blocks[name].diagonal.flatten(), truth.diagonal())


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_a_forward_that_was_replaced_is_seen_through(kfac_approx):
    plain, patched = First(nn.GRU(4, 4), scale=2.0), First(nn.GRU(4, 4))
    patched.load_state_dict(plain.state_dict())
    original = patched.layer.forward
    replacement = lambda *args: (2 * original(*args)[0], None)  # noqa: E731
    patched.layer.forward = replacement
    x = torch.randn(5, 3, 4)
    options = {"likelihood": "gaussian", "kfac_approx": kfac_approx, "fisher_type": "type-2"}
    expected = curvature(plain, x, **options)
    assert expected.keys() == {"layer.weight_ih_l0", "layer.weight_hh_l0"}
    for name, block in curvature(patched, x, **options).items():
        torch.testing.assert_close(block.to_dense(), expected[name].to_dense())
    assert patched.layer.forward is replacement


class Cells(nn.Module):
    """A cell, step by step; positions are the second dimension."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state, outputs = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("cell", "layer"),
    [
        (nn.LSTMCell, nn.LSTM),
        (nn.GRUCell, nn.GRU),
        (nn.RNNCell, nn.RNN),
        (
            lambda *sizes: nn.RNNCell(*sizes, nonlinearity="relu"),
            lambda *sizes, **k: nn.RNN(*sizes, nonlinearity="relu", **k),
        ),
    ],
    ids=["lstm", "gru", "tanh", "relu"],
)
def test_cells_have_the_factors_of_their_layer(cell, layer, kfac_approx):
    model, whole = Cells(cell(3, 4)), nn.Sequential(layer(3, 4, batch_first=True), Output())
    for name, parameter in model.cell.named_parameters():
        whole[0].get_parameter(name + "_l0").data.copy_(parameter.data)
    x = torch.randn(5, 6, 3)
    torch.testing.assert_close(model(x), whole(x))
    options = {"likelihood": "gaussian", "kfac_approx": kfac_approx, "fisher_type": "type-2"}
    found, expected = (curvature(m, x, **options) for m in (model, whole))
    assert found.keys() == {"cell.weight_ih", "cell.weight_hh"}
    for name, block in found.items():
        same = expected[name.replace("cell", "0") + "_l0"]
        torch.testing.assert_close(block.input_covariance, same.input_covariance)
        torch.testing.assert_close(block.gradient_covariance, same.gradient_covariance)


class Output(nn.Module):
    """Of a recurrent layer, without its state."""

    def forward(self, outputs):
        return outputs[0]


def test_modules_that_are_excluded_run_as_they_are():
    model, x = Attending(True), torch.randn(2, 3, 4)
    kfac, outputs = Preconditioner(model, KFACConfig(exclude=("recurrent",))), []
    model.recurrent.register_forward_hook(lambda module, args, out: outputs.append((args, out[0])))
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "categorical")
    logits.square().sum().backward()
    kfac.precondition()
    ((args, recorded),) = outputs
    assert torch.equal(recorded, type(model.recurrent).forward(model.recurrent, *args)[0])
    assert "forward" not in vars(model.attention)
    rows = {row.name: row for row in kfac.report()}
    inside = [row for name, row in rows.items() if name.startswith("recurrent")]
    assert sum(row.parameters for row in inside) == sum(
        p.numel() for p in model.recurrent.parameters()
    )
    assert not any(row.preconditioner.startswith("K-FAC") for row in inside)
    assert all(row.reason for row in inside)
    attention = [row for name, row in rows.items() if name.startswith("attention")]
    assert {row.preconditioner for row in attention} == {"K-FAC-expand"}


def test_a_recurrent_layer_that_is_called_later_becomes_a_layer_then():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head, self.used = (
                nn.GRU(3, 3, batch_first=True),
                nn.Linear(3, 2),
                False,
            )

        def forward(self, x):
            return self.head((self.layer(x)[0] if self.used else x).mean(1))

    model = Late()
    kfac = Preconditioner(
        model, KFACConfig(factor_update_steps=1, inverse_update_steps=1, factor_decay=0.5)
    )
    for step in range(5):
        model.used = step >= 2
        model.zero_grad()
        with kfac.record():
            logits = model(torch.randn(4, 5, 3))
        kfac.update(logits, "categorical")
        logits.square().sum().backward()
        kfac.precondition()
    assert kfac.failures == {"statistics": 0, "inverse": 0, "memory": 0}
    rows = {row.name: row.preconditioner for row in kfac.report()}
    assert rows["layer.weight_ih_l0"] == "K-FAC-expand"


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("frozen", [
    ("weight_hh_l0",), ("weight_ih_l0",), ("weight_ih_l0", "bias_ih_l0"),
    ("weight_ih_l0", "bias_ih_l0", "weight_hh_l0"),
], ids=str)  # fmt: skip
def test_a_recurrent_layer_with_frozen_weights_is_as_its_steps_by_hand(frozen, approx):
    class Net(nn.Module):
        def __init__(self, by_hand):
            super().__init__()
            self.rnn, self.head = nn.RNN(3, 4, batch_first=True), nn.Linear(4, 3)
            self.by_hand = by_hand
            for name in frozen:
                getattr(self.rnn, name).requires_grad_(False)

        def forward(self, x):
            if not self.by_hand:
                return self.head(self.rnn(x)[0].mean(1))
            rnn, h, outputs = self.rnn, x.new_zeros(len(x), 4), []
            for t in range(x.shape[1]):
                from_hidden = F.linear(h, rnn.weight_hh_l0, rnn.bias_hh_l0)
                h = (F.linear(x[:, t], rnn.weight_ih_l0, rnn.bias_ih_l0) + from_hidden).tanh()
                outputs.append(h)
            return self.head(torch.stack(outputs, 1).mean(1))

    found = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        model, x = Net(by_hand).double(), torch.randn(6, 5, 3, dtype=torch.float64)
        kfac = Preconditioner(model, KFACConfig(kfac_approx=approx, fisher_type="type-2"))
        with kfac.record():
            loss = F.cross_entropy(model(x), torch.arange(6) % 3)
        loss.backward()
        kfac.precondition()
        found.append(kfac.curvature())
    assert set(found[0]) == set(found[1])
    for name, one in found[0].items():
        for which, value in vars(one).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, getattr(found[1][name], which))
