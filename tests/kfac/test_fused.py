"""Fused modules: the unrolled forward computes the same, and its factors are the exact ones."""

import pytest
import torch
import torch.nn.functional as F
from ggn import exact_ggn, relative_error
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from submission.kfac import KFAC, KFACConfig, Positions, curvature
from submission.kfac.capture import Recording
from submission.kfac.partition import partition


def record(model, *args, **kwargs):
    """Outputs of a model while it is recorded, and the recording."""
    parts = partition(model, approx="expand", max_factor_side=100).parts
    recording = Recording(model, parts)
    with recording:
        output = model(*args, **kwargs)
    return output, recording


def flat_tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for item in output if item is not None for t in flat_tensors(item)]


def assert_same_outputs(model, *args, **kwargs):
    torch.manual_seed(5)
    expected = flat_tensors(model(*args, **kwargs))
    torch.manual_seed(5)
    recorded, recording = record(model, *args, **kwargs)
    got = flat_tensors(recorded)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert "forward" not in vars(model)
    return recording


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
    recording = assert_same_outputs(model, *(torch.randn(*shape, s) for s in sizes), **call)
    assert set(recording.calls) == {"in_proj.q", "in_proj.k", "in_proj.v", "out_proj"}
    assert set(recording.calls.values()) == {1}


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
    recording = assert_same_outputs(model, torch.randn(shape), hx)
    assert recording.calls["weight_ih_l0"] == 1
    assert recording.calls["weight_hh_l0"] == 5


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
    model = Last(layer(3, 2, batch_first=True))
    x = torch.randn(1, 1, 3)
    blocks = curvature(model, x, likelihood="gaussian", kfac_approx="reduce", fisher_type="type-2")
    for which in ("ih", "hh"):
        name = f"layer.weight_{which}_l0"
        names = [name, name.replace("weight", "bias")]
        truth = exact_ggn(model, names, (x,), lambda f: F.mse_loss(f, torch.zeros_like(f)))
        rows, columns = model.get_parameter(name).shape
        index = torch.arange(truth.shape[0])
        order = torch.cat(
            [index[: rows * columns].reshape(rows, columns), index[rows * columns :, None]], 1
        ).flatten()
        assert relative_error(blocks[name].to_dense(), truth[order][:, order]) <= 1e-12


class Attend(nn.Module):
    """Attention followed by a mean; value projection alone is linear in the output."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0].mean(1)


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
    value = blocks["attention.in_proj.v"].to_dense()
    assert relative_error(value, truth[order][:, order]) <= 1e-12
    assert blocks["attention.in_proj.q"].gradient_covariance.norm() < 1e-12


def test_gradients_of_slices_are_written_to_their_rows():
    model, x = Attend(), torch.randn(5, 3, 4)
    kfac = KFAC(model, KFACConfig(damping=0.1, damping_kind="both_factors"))
    with kfac.record():
        out = model(x)
    kfac.update(out, "gaussian")
    out.square().mean().backward()
    weight = model.attention.in_proj_weight.grad.clone()
    bias = model.attention.in_proj_bias.grad.clone()
    kfac.precondition()
    for i, name in enumerate("qkv"):
        block = kfac.curvature()[f"attention.in_proj.{name}"]
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
    assert set(blocks) == {
        "self_attn.in_proj.q", "self_attn.in_proj.k", "self_attn.in_proj.v", "self_attn.out_proj",
        "linear1", "linear2", "norm1", "norm2",
    }  # fmt: skip


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
    kfac = KFAC(model, KFACConfig("reduce", fisher_type="type-2"))
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
    kfac = KFAC(model, KFACConfig("auto", fisher_type="type-2"))
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


def weight_normed(module, name):
    return nn.utils.parametrizations.weight_norm(module, name)


def patched(module):
    original = module.forward
    module.forward = lambda *a, **k: (original(*a, **k)[0] * 2, None)
    return module


UNUSUAL = {
    "projections": (lambda: nn.LSTM(4, 4, proj_size=2, batch_first=True), "projections"),
    "weight norm, recurrent": (
        lambda: weight_normed(nn.GRU(4, 4), "weight_hh_l0"), "parametrisation",
    ),
    "weight norm, attention": (
        lambda: weight_normed(nn.MultiheadAttention(4, 2), "in_proj_weight"), "parametrisation",
    ),
    "forward of the instance": (lambda: patched(nn.GRU(4, 4)), "replaced on the instance"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(UNUSUAL))
def test_fused_modules_that_are_not_handled_run_as_they_are(case):
    make, reason = UNUSUAL[case]
    module = make()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = module

        def forward(self, x):
            arguments = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
            return self.layer(*arguments)[0].mean(1)

    model, x = Net(), torch.randn(5, 3, 4)
    own_forward = vars(module).get("forward")
    expected = model(x)
    kfac = KFAC(model, KFACConfig())
    with kfac.record():
        logits = model(x)
    torch.testing.assert_close(logits, expected)
    assert vars(module).get("forward") is own_forward
    kfac.update(logits, "gaussian")
    logits.square().sum().backward()
    kfac.precondition()
    assert any(reason in row.reason for row in kfac.report())


def test_modules_that_are_excluded_are_not_unrolled():
    model = Attending(True)
    kfac = KFAC(model, KFACConfig(exclude=("recurrent",)))
    with kfac.record():
        assert "forward" not in vars(model.recurrent)
        assert "forward" in vars(model.attention)
        model(torch.randn(2, 3, 4))
    assert "forward" not in vars(model.attention)


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
    kfac = KFAC(model, KFACConfig(factor_update_steps=1, inverse_update_steps=1, factor_decay=0.5))
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
