"""Each fast path against the plain one, on random shapes."""

import pytest
import torch
from nets import geometry_of
from observed import state_tensors
from torch import nn
from torch.utils.checkpoint import checkpoint

from submission.kfac import KFACConfig, Positions, Preconditioner, curvature, tuning
from submission.kfac.linalg import moments
from submission.kfac.linalg.convolution import correlations, patches, shifted_products
from submission.kfac.linalg.low_rank import most_rows
from submission.kfac.linalg.precision import products_in


def random_convolution(seed):
    """A random stride-1 convolution with zero padding, and an input for it."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    dims = pick(1, 2)
    kernel = [pick(1, 4) for _ in range(dims)]
    dilation = [pick(1, 2) for _ in range(dims)]
    padding = [pick(0, d * (k - 1)) for k, d in zip(kernel, dilation, strict=True)]
    groups = pick(1, 2)
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + pick(0, 5)
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    layer = (nn.Conv1d, nn.Conv2d)[dims - 1](
        3 * groups, 2 * groups, kernel, padding="same" if pick(0, 3) == 0 else padding,
        dilation=dilation, groups=groups,
    )  # fmt: skip
    return layer, torch.randn(pick(1, 4), 3 * groups, *size, generator=generator)


@pytest.fixture(params=[False, True], ids=["products", "transform"])
def way(request, monkeypatch):
    """By which way all correlations are had."""
    monkeypatch.setattr(correlations, "prefers_transform", lambda *args: request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("seed", range(60))
def test_shifted_products_are_the_second_moment_of_the_patches(seed):
    layer, x = random_convolution(seed)
    geometry = geometry_of(layer)
    assert shifted_products.is_applicable(geometry)
    plain = patches.patch_second_moment(x, geometry, layer.groups)
    fast = shifted_products.second_moment(x, geometry, layer.groups)
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_correlations_from_fourier_transforms_are_those_of_products(seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    n, channels, height, width = (int(k) for k in torch.randint(1, 9, (4,), generator=generator))
    x = torch.randn(n, channels, height, width, generator=generator)
    down, right = (int(k) for k in torch.randint(0, 6, (2,), generator=generator))
    shifts = [(dy, dx) for dy in range(down + 1) for dx in range(-right, right + 1)]
    shifts = [(dy, dx) for dy, dx in shifts if dy > 0 or dx >= 0]
    monkeypatch.setattr(tuning, "SPECTRUM_CHUNK_ELEMENTS", 10 ** (1 + seed % 4))
    expected = torch.zeros(len(shifts), channels, channels)
    padded = nn.functional.pad(x, (right, right, 0, down))
    for (dy, dx), total in zip(shifts, expected, strict=True):
        there = padded[:, :, dy : dy + height, right + dx : right + dx + width]
        total += torch.einsum("nchw,ndhw->cd", x, there)
    for way in (correlations.by_products, correlations.by_transform):
        torch.testing.assert_close(way(x, shifts), expected, rtol=1e-11, atol=1e-12)


def test_the_transform_is_for_many_examples_and_shifts():
    few, many = [(0, 0), (0, 1)], [(dy, dx) for dy in range(3) for dx in range(-2, 3)]
    for shape, shifts, expected in (
        ((128, 64, 32, 32), many, True),
        ((128, 64, 32, 32), few, False),
        ((1, 64, 32, 32), many, False),
        ((128, 4, 224, 224), many, False),
    ):
        assert correlations.prefers_transform(shape, shifts) == expected


@pytest.mark.parametrize("way", ["products", "transform"])
@pytest.mark.parametrize("seed", range(10))
def test_shifted_products_are_as_accurate_as_float32_allows(seed, way, monkeypatch):
    monkeypatch.setattr(correlations, "prefers_transform", lambda *args: way == "transform")
    torch.manual_seed(seed)
    x = torch.randn(16, 8, 12, 12).relu() + torch.randn(8, 1, 1)
    layer = nn.Conv2d(8, 4, 3, padding=1)
    geometry = geometry_of(layer)
    truth = patches.patch_second_moment(x, geometry, 1)
    found = shifted_products.second_moment(x.float(), geometry, 1)
    plain = patches.patch_second_moment(x.float(), geometry, 1)
    error, usual = ((m.double() - truth).abs().max() for m in (found, plain))
    if way == "transform":
        assert error < max(10 * usual, 1e-6 * truth.abs().max())
        return
    # One product over all pixels, whose order is the BLAS's: some add up one after the other, with
    # an error of up to u n Σ |x||y| for n terms (u = eps / 2).
    terms = len(x) * 13 * 14  # pixels, and the zeros between the rows
    sums = patches.patch_second_moment(x.abs(), geometry, 1)
    assert error < torch.finfo(torch.float32).eps / 2 * terms * sums.max()


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"padding": 3},  # more padding than the kernel reaches over
    ],
)
def test_shifted_products_say_what_they_are_not_for(options):
    geometry = geometry_of(nn.Conv2d(2, 2, 3, **options))
    assert not shifted_products.is_applicable(geometry)


@pytest.mark.parametrize("most_joint_counts", [0, 1 << 14])
@pytest.mark.parametrize("seed", range(20))
def test_sums_of_patches_are_made_without_patches(seed, most_joint_counts, monkeypatch):
    monkeypatch.setattr(tuning, "MOST_JOINT_COUNTS", most_joint_counts)
    layer, x = random_convolution(seed)
    geometry = geometry_of(layer)
    rows = patches.patches(x, geometry).sum(-1)
    expected = rows.reshape(len(x), layer.groups, -1).movedim(1, 0)
    torch.testing.assert_close(patches.patch_sum(x, geometry, layer.groups), expected)


def test_patches_are_chunked_without_a_difference(monkeypatch):
    layer, x = nn.Conv2d(3, 2, 3, stride=2), torch.randn(7, 3, 9, 9)
    geometry = geometry_of(layer)
    whole = patches.patch_second_moment(x, geometry, 1)
    monkeypatch.setattr(tuning, "PATCH_CHUNK_ELEMENTS", 500)
    torch.testing.assert_close(patches.patch_second_moment(x, geometry, 1), whole)


@pytest.mark.parametrize("side", [5, 64, 101])
def test_symmetric_products_add_to_what_is_there(side, monkeypatch):
    monkeypatch.setattr(tuning, "PANEL_WIDTH", {"cpu": 16})
    monkeypatch.setattr(tuning, "FEWEST_SPLIT_ROWS", 5)
    rows, before = torch.randn(7, side), torch.randn(3, side)
    moment = before.T @ before
    moments.add_outer_products(moment.view(side, side), rows)
    torch.testing.assert_close(moment, before.T @ before + rows.T @ rows)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_fresh_moment_has_nothing_of_the_memory_that_it_is_written_to(
    groups, n, precision, monkeypatch
):
    monkeypatch.setattr(tuning, "PANEL_WIDTH", {"cpu": 16})
    monkeypatch.setattr(tuning, "FEWEST_SPLIT_ROWS", 5)
    rows = torch.randn(groups, n, 40, dtype=torch.float32)
    close = {"rtol": 0.1, "atol": 0.2} if precision == "bfloat16" else {}
    used = torch.full((groups, 40, 40), float("nan"), dtype=torch.float32)
    with products_in(precision):
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *shape: used)
        moment = moments.outer_products(rows, False)
    assert moment is used
    torch.testing.assert_close(moment, rows.mT @ rows, **close)
    torch.testing.assert_close(moments.outer_products(rows, True), rows.square().sum(1))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("seed", range(20))
def test_a_fault_of_an_input_shows_on_the_diagonal_of_shifted_products(seed, value):
    layer, x = random_convolution(seed)
    geometry = geometry_of(layer)
    for index in torch.randint(x.numel(), (5,), generator=torch.Generator().manual_seed(seed)):
        faulty = x.clone()
        faulty.flatten()[index] = value
        moment = shifted_products.second_moment(faulty, geometry, layer.groups)
        assert not moment.isfinite().all()
        assert not moment.diagonal(dim1=-2, dim2=-1).isfinite().all()


def preconditioned(model, kfac, x, likelihood):
    """The gradients of one step by layer, joint, before and after."""
    model.zero_grad()
    with kfac.record():
        logits = model(x)
    kfac.update(logits, likelihood)
    logits.square().mean().backward()

    def joint():
        return {
            name: torch.cat([module.weight.grad, module.bias.grad[:, None]], 1)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }

    plain = joint()
    kfac.precondition()
    return plain, joint()


@pytest.mark.parametrize("uses", [1, 1000])
def test_a_factor_that_cannot_be_factorised_costs_its_neighbours_nothing(uses, monkeypatch):
    """Those of equal sides are factorised together."""
    layers = [nn.Linear(5, 5) for _ in range(3)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    kfac = Preconditioner(
        model,
        KFACConfig(damping=0.1, damping_kind="both_factors", factor_update_steps=uses,
                   inverse_update_steps=uses, factor_decay=0.5),
    )  # fmt: skip
    original, failed = torch.linalg.cholesky_ex, []

    def one_fails(matrix, *args, **options):
        found, info = original(matrix, *args, **options)
        wrong = matrix.diagonal(dim1=-2, dim2=-1).amax(-1) > 1e3  # A of the first layer
        failed.append(bool(wrong.any()))
        found = torch.where(wrong[..., None, None], torch.nan, found)
        return found, torch.where(wrong, 1, info).to(info.dtype)

    preconditioned(model, kfac, torch.randn(20, 5), "categorical")
    before = kfac.curvature()
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky_ex", one_fails)
        plain, after = preconditioned(model, kfac, 100 * torch.randn(20, 5), "categorical")
    assert any(failed)
    assert kfac.failures == {"statistics": 0, "inverse": 1, "memory": 0}
    for name, gradient in plain.items():
        block = before[name] if name == "0" else kfac.curvature()[name]
        a, b = (
            f + 0.1 * torch.eye(len(f)) for f in (block.input_covariance, block.gradient_covariance)
        )
        expected = torch.linalg.solve(b, gradient) @ torch.linalg.inv(a)
        torch.testing.assert_close(after[name], expected, rtol=1e-9, atol=1e-11)


def test_an_inverse_of_few_rows_does_not_return_noise():
    """A damping below what float32 knows of the factor is raised to it, as for dense factors."""
    model, x = nn.Sequential(nn.Linear(50, 3)).float(), torch.randn(4, 50, dtype=torch.float32)
    settings = {"damping_kind": "both_factors", "fisher_type": "type-2"}
    kfac = Preconditioner(model, KFACConfig(damping=1e-12, **settings))
    plain, after = preconditioned(model, kfac, x, "gaussian")
    block = kfac.curvature()["0"]
    b, ones = block.gradient_covariance.double(), torch.ones(4, 1)
    rows = torch.cat([x.double(), ones], 1)
    pseudo_inverse = torch.linalg.pinv(rows.T @ rows / 4, rtol=1e-9)
    expected = torch.linalg.solve(b, plain["0"].double()) @ pseudo_inverse
    assert (after["0"].double() - expected).norm() < 0.5 * expected.norm()


# ---- factors that are kept as rows --------------------------------------------------------------


@pytest.mark.parametrize("damping_kind", ["both_factors", "pi"])
@pytest.mark.parametrize("uses", [1, 10])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_that_stand_for_a_factor_precondition_as_the_factor(
    kfac_approx, bias, uses, damping_kind
):
    """They do where there is no moving average, and take less memory."""
    mask = torch.tensor([[True, True, False], [True, False, False]])

    def gradients(decay):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 40, bias), nn.Tanh(), nn.Linear(40, 25, bias))
        x, inputs = torch.randn(2, 3, 30), []
        model[0].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        kfac = Preconditioner(
            model,
            KFACConfig(kfac_approx, damping=0.01, damping_kind=damping_kind, factor_decay=decay,
                       factor_update_steps=uses, inverse_update_steps=uses),
        )  # fmt: skip
        kept = x.clone()
        for _ in range(2):  # two micro-batches
            with kfac.record(Positions(mask=mask)):
                logits = model(x)
            kfac.update(logits, "gaussian", mask=mask.unsqueeze(-1).expand(2, 3, 25))
            logits.square().sum().backward()
        assert all(torch.equal(given, kept) for given in inputs)
        kfac.precondition()
        assert all(torch.equal(given, kept) for given in inputs)  # rows may be views of them
        size = sum(tensor.numel() for tensor in state_tensors(kfac))
        return [p.grad for p in model.parameters()], size

    (rows, small), (dense, large) = gradients(0.0), gradients(0.5)
    assert small < large
    for a, b in zip(rows, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_rows_are_kept_where_they_are_the_cheaper_form():
    assert 0 < most_rows(1537, 384) < 1537  # used once: a ViT's tokens, fewer than the side
    assert most_rows(1537, 384) > most_rows(1537, 50 * 384)  # used often: only if very few
    assert most_rows(1537, 10**9) < 1537 / 2
    assert most_rows(1, 1) <= 1


# ---- precision of the products -------------------------------------------------------------------


def factors_in(precision, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 500)).to(dtype)
    x = torch.randn(3000, 20, dtype=dtype)
    kfac = Preconditioner(model, KFACConfig(factor_precision=precision, factor_decay=0.5))
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "categorical")
    logits.sum().backward()
    kfac.precondition()
    return kfac.curvature()


def test_bfloat16_products_have_the_error_of_their_entries_only():
    exact, rounded = factors_in("float32"), factors_in("bfloat16")
    for name, block in exact.items():
        for key in ("input_covariance", "gradient_covariance"):
            truth, found = getattr(block, key), getattr(rounded[name], key)
            assert found.dtype == torch.float32
            error = (found - truth).norm() / truth.norm()
            assert 1e-6 < error < 2**-7


def test_the_precision_changes_neither_float64_nor_what_others_compute():
    for name, block in factors_in("bfloat16", torch.float64).items():
        assert torch.equal(
            block.input_covariance, factors_in("float32", torch.float64)[name].input_covariance
        )
    new = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    name, off, on = ("fp32_precision", "ieee", "tf32") if new else ("allow_tf32", False, True)
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, name)
    try:
        for outside in (before, on):
            setattr(matmul, name, outside)
            for precision, inside in (("float32", off), ("bfloat16", off), ("tf32", on)):
                with products_in(precision):
                    assert getattr(matmul, name) == inside
                assert getattr(matmul, name) == outside
                factors_in(precision)
                assert getattr(matmul, name) == outside
    finally:
        setattr(matmul, name, before)
    rows = torch.randn(64, 40, dtype=torch.float32)
    plain = moments.outer_products(rows[None], False)
    with products_in("bfloat16"):
        assert not torch.equal(moments.outer_products(rows[None], False), plain)
    assert torch.equal(moments.outer_products(rows[None], False), plain)
    with pytest.raises(ValueError, match="factor_precision must be one of"):
        KFACConfig(factor_precision="float8")


# ---- factors that are formed late ---------------------------------------------------------------


class Images(nn.Module):
    """A convolution called twice, a linear layer of positions, an embedding tied to the head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.conv, self.outer = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 9)
        self.outer.weight = self.embedding.weight

    def forward(self, x):
        h = self.inner(self.embedding(x)).tanh().mT
        return self.outer(self.conv(self.conv(h).tanh()).mT)


def assert_the_mean_of_single_examples(model, x, layers, **options):
    """Factors of few examples are large beside their inputs, and may be formed late."""
    whole = curvature(model, x, **options)
    targets = options.pop("targets", None)
    for name in layers:
        blocks = [
            curvature(
                model, x[n : n + 1], targets=None if targets is None else targets[n : n + 1],
                **options,
            )[name]
            for n in range(len(x))
        ]  # fmt: skip
        for key in ("input_covariance", "gradient_covariance"):
            mean = torch.stack([getattr(block, key) for block in blocks]).mean(0)
            torch.testing.assert_close(getattr(whole[name], key), mean, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("joint_bias", [True, False])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_factors_of_a_batch_are_the_mean_of_those_of_its_examples(fisher_type, joint_bias):
    model, x = Images(), torch.randint(9, (50, 5))
    assert_the_mean_of_single_examples(
        model, x, ["conv", "inner"], likelihood="categorical", kfac_approx="expand",
        fisher_type=fisher_type, bias="joint" if joint_bias else "separate",
        targets=torch.randint(9, (50, 5)),
    )  # fmt: skip


class Dilated(nn.Module):
    """One convolution that is called with several dilations, or one for each."""

    def __init__(self, padding, modules):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(4, 4, 3, padding=padding, dilation=1 if modules == 1 else dilation)
            for dilation in (1, 2, 3)[:modules]
        )

    def forward(self, x):
        for dilation in (1, 2, 3):
            conv = self.convs[dilation - 1 if len(self.convs) > 1 else 0]
            conv.dilation = (dilation,)
            x = conv(x).tanh()
        return x.flatten(1)


@pytest.mark.parametrize("n", [2, 50])
@pytest.mark.parametrize("padding", [0, "same"])
def test_a_call_counts_as_the_module_was_then(padding, n):
    model, apart, x = Dilated(padding, 1), Dilated(padding, 3), torch.randn(n, 4, 16)
    for conv in apart.convs:
        conv.load_state_dict(model.convs[0].state_dict())
    torch.testing.assert_close(model(x), apart(x), rtol=0, atol=0)
    options = {"likelihood": "gaussian", "kfac_approx": "expand", "fisher_type": "type-2"}
    (found,), blocks = (curvature(m, x, **options).values() for m in (model, apart))
    rows = [n * length for length in ((14, 10, 4) if padding == 0 else (16, 16, 16))]
    a = sum(r * block.input_covariance for r, block in zip(rows, blocks, strict=True)) / sum(rows)
    b = sum(block.gradient_covariance for block in blocks)
    torch.testing.assert_close(found.input_covariance, a, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.gradient_covariance, b, rtol=1e-12, atol=1e-15)


def test_shapes_are_had_on_the_meta_device():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to("meta")
    x = torch.randn(6, 4, device="meta")
    options = {"likelihood": "gaussian", "kfac_approx": "expand", "fisher_type": "type-2"}
    found = curvature(model, x, **options)["0"]
    assert found.input_covariance.is_meta
    assert found.gradient_covariance.shape == (5, 5)


@pytest.mark.parametrize("how", ["plain", "checkpoint", "hooks", "autocast", "padded", "strided"])
def test_an_input_that_is_written_into_gives_no_other_factor(how):
    """Statistics come from the backward pass: an input that is no longer there is refused."""
    mode = "circular" if how == "padded" else "zeros"
    conv = nn.Conv1d(4, 4, 3, padding=1, padding_mode=mode).float()
    x = torch.randn(5, 4, 7, dtype=torch.float32)
    x = x.mT.contiguous().mT if how == "strided" else x

    def step(spoils):
        kfac = Preconditioner(conv, KFACConfig(kfac_approx="expand", factor_decay=0.9, damping=0.1))
        given = x.clone(memory_format=torch.preserve_format)
        conv.zero_grad()
        with kfac.record():
            if how == "checkpoint":
                logits = checkpoint(conv, given, use_reentrant=False)
            elif how == "hooks":
                with torch.autograd.graph.save_on_cpu():
                    logits = conv(given)
            else:
                with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                    logits = conv(given)
            logits = logits.flatten(1)
        if spoils:
            given.zero_()
        kfac.update(logits.float(), "gaussian")
        kfac.precondition()
        return kfac.curvature()[""].input_covariance

    expected = step(False)
    if how == "padded":  # a copy
        torch.testing.assert_close(step(True), expected)
    else:
        with pytest.raises(RuntimeError, match=r"written into|modified by an inplace operation"):
            step(True)
