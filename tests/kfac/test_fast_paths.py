"""Each fast path against the plain one, on random shapes."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from submission.kfac import (
    KFAC,
    KFACConfig,
    Positions,
    capture,
    collectors,
    convolution,
    correlations,
    curvature,
    factor_inverses,
    factors,
    shifted_products,
    symmetric,
)
from submission.kfac.factor_inverses import Request, invert_factors
from submission.kfac.graph import GraphError
from submission.kfac.low_rank import most_rows


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
    geometry = convolution.geometry_of(layer)
    assert shifted_products.is_applicable(geometry)
    plain = convolution.patch_second_moment(x, geometry, layer.groups)
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
    monkeypatch.setattr(correlations, "CHUNK_ELEMENTS", 10 ** (1 + seed % 4))
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


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("seed", range(10))
def test_the_transform_is_as_accurate_as_products_in_float32(seed):
    torch.manual_seed(seed)
    x = torch.randn(16, 8, 12, 12).relu() + torch.randn(8, 1, 1)
    layer = nn.Conv2d(8, 4, 3, padding=1)
    geometry = convolution.geometry_of(layer)
    truth = convolution.patch_second_moment(x, geometry, 1)
    found = shifted_products.second_moment(x.float(), geometry, 1)
    plain = convolution.patch_second_moment(x.float(), geometry, 1)
    error, usual = ((m.double() - truth).abs().max() for m in (found, plain))
    assert error < max(10 * usual, 1e-6 * truth.abs().max())


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 3},  # more padding than the kernel reaches over
    ],
)
def test_shifted_products_say_what_they_are_not_for(options):
    geometry = convolution.geometry_of(nn.Conv2d(2, 2, 3, **options))
    assert not shifted_products.is_applicable(geometry)


@pytest.mark.parametrize("most_joint_counts", [0, 1 << 14])
@pytest.mark.parametrize("seed", range(20))
def test_sums_of_patches_are_made_without_patches(seed, most_joint_counts, monkeypatch):
    monkeypatch.setattr(convolution, "MOST_JOINT_COUNTS", most_joint_counts)
    layer, x = random_convolution(seed)
    geometry = convolution.geometry_of(layer)
    rows = convolution.patches(x, geometry).sum(-1)
    expected = rows.reshape(len(x), layer.groups, -1).movedim(1, 0)
    torch.testing.assert_close(convolution.patch_sum(x, geometry, layer.groups), expected)


def test_patches_are_chunked_without_a_difference(monkeypatch):
    layer, x = nn.Conv2d(3, 2, 3, stride=2), torch.randn(7, 3, 9, 9)
    geometry = convolution.geometry_of(layer)
    whole = convolution.patch_second_moment(x, geometry, 1)
    monkeypatch.setattr(convolution, "PATCH_CHUNK_ELEMENTS", 500)
    torch.testing.assert_close(convolution.patch_second_moment(x, geometry, 1), whole)


@pytest.mark.parametrize("side", [5, 64, 101])
def test_symmetric_products_add_to_what_is_there(side, monkeypatch):
    monkeypatch.setattr(factors, "PANEL_WIDTH", {"cpu": 16})
    monkeypatch.setattr(factors, "FEWEST_SPLIT_ROWS", 5)
    rows, before = torch.randn(7, side), torch.randn(3, side)
    moment = before.T @ before
    factors.add_outer_products(moment.view(side, side), rows)
    torch.testing.assert_close(moment, before.T @ before + rows.T @ rows)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_fresh_moment_has_nothing_of_the_memory_that_it_is_written_to(
    groups, n, precision, monkeypatch
):
    monkeypatch.setattr(factors, "PANEL_WIDTH", {"cpu": 16})
    monkeypatch.setattr(factors, "FEWEST_SPLIT_ROWS", 5)
    rows = torch.randn(groups, n, 40, dtype=torch.float32)
    close = {"rtol": 0.1, "atol": 0.2} if precision == "bfloat16" else {}
    used = torch.full((groups, 40, 40), float("nan"), dtype=torch.float32)
    with factors.products_in(precision):
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *shape: used)
        moment = factors.outer_products(rows, False)
    assert moment is used
    torch.testing.assert_close(moment, rows.mT @ rows, **close)
    torch.testing.assert_close(factors.outer_products(rows, True), rows.square().sum(1))


@pytest.mark.parametrize("width", [1, 3, 7, 100])
@pytest.mark.parametrize("side", [1, 2, 10, 23])
def test_a_packed_matrix_comes_back_to_the_bit(side, width):
    edges = symmetric.panels(side, width)
    assert [end for _, end in edges[:-1]] == [first for first, _ in edges[1:]]
    assert (edges[0][0], edges[-1][1]) == (0, side)
    matrix = torch.randn(2, side, side)
    matrix += matrix.mT.clone()
    flat = symmetric.pack(matrix, width)
    assert flat.numel() <= 2 * (side * side + side * min(side, 2 * width)) / 2
    found = symmetric.unpack(flat, matrix.shape, width)
    assert torch.equal(found.triu(), matrix.triu())
    symmetric.mirror(found, edges)
    assert torch.equal(found, matrix)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("seed", range(20))
def test_a_fault_of_an_input_shows_on_the_diagonal_of_shifted_products(seed, value):
    layer, x = random_convolution(seed)
    geometry = convolution.geometry_of(layer)
    for index in torch.randint(x.numel(), (5,), generator=torch.Generator().manual_seed(seed)):
        faulty = x.clone()
        faulty.flatten()[index] = value
        moment = shifted_products.second_moment(faulty, geometry, layer.groups)
        assert not moment.isfinite().all()
        assert not moment.diagonal(dim1=-2, dim2=-1).isfinite().all()


@pytest.mark.parametrize("slow_side", [512, 5])  # by multiples of it the matrix is padded
@pytest.mark.parametrize("side", [1, 5, 40])
def test_an_inverse_is_explicit_for_many_vectors_and_is_the_same_for_few(
    side, slow_side, monkeypatch
):
    monkeypatch.setattr(factor_inverses, "SLOW_SIDE", slow_side)
    rows = torch.randn(2, 2 * side, side)
    factor, added = rows.mT @ rows, torch.tensor([0.1, 0.5])
    vectors = torch.randn(2, side, 7)
    expected = torch.linalg.solve(factor + added.reshape(2, 1, 1) * torch.eye(side), vectors)
    for count, form in ((side, "cholesky"), (2 * side, "inverse")):
        (inverse,) = invert_factors([Request(factor, added, vectors=count)])
        assert list(inverse) == [form]
        for found in (
            factor_inverses.apply_left(inverse, vectors),
            factor_inverses.apply_right(vectors.mT, inverse).mT,
        ):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_what_cannot_be_factorised_has_no_inverse():
    factor = torch.eye(3).unsqueeze(0)
    for i, j in ((0, 0), (2, 0), (2, 2)):
        faulty = factor.clone()
        faulty[0, i, j] = faulty[0, j, i] = float("nan")
        for vectors in (1, 100):
            request = Request(faulty, torch.tensor([0.1]), vectors=vectors)
            sound = Request(factor, torch.tensor([0.1]), vectors=vectors)
            before, found, after = invert_factors([sound, request, sound])
            assert found is None
            for neighbour in (before, after):
                (matrix,) = neighbour.values()
                assert matrix.isfinite().all()


@pytest.mark.parametrize("vectors", [1, 1000])
def test_factors_of_equal_side_are_inverted_together_as_alone(vectors):
    rows = [torch.randn(groups, 9, 6) for groups in (1, 3, 2)]
    requests = [
        Request(r.mT @ r, torch.full((len(r),), 0.1 * (i + 1)), vectors=vectors)
        for i, r in enumerate(rows)
    ]
    singular = torch.zeros(1, 6, 6)
    singular[0, 0, 0] = -1.0  # not positive definite: its neighbours are inverted all the same
    together = invert_factors([*requests, Request(singular, torch.tensor([0.1]), vectors=vectors)])
    assert together[-1] is None
    vector = torch.randn(6, 2)
    for request, found in zip(requests, together[:-1], strict=True):
        (alone,) = invert_factors([request])
        right_side = vector.expand(len(request.factor), 6, 2)
        torch.testing.assert_close(
            factor_inverses.apply_left(found, right_side),
            factor_inverses.apply_left(alone, right_side),
            rtol=1e-10, atol=1e-12,
        )  # fmt: skip


def test_a_low_rank_inverse_does_not_return_noise():
    """A damping below what float32 knows of the factor is raised to it, as for dense factors."""
    rows = torch.randn(4, 50, dtype=torch.float32).unsqueeze(0)
    tiny = torch.tensor([1e-12])
    (found,) = invert_factors([Request(rows, tiny, low_rank=True)])
    vector = rows.mT @ torch.randn(4, 1, dtype=torch.float32)
    result = found["scale"].reshape(-1, 1, 1) * factor_inverses.apply_left(found, vector)
    exact = torch.linalg.lstsq(rows[0].double().T @ rows[0].double(), vector[0].double()).solution
    assert (result[0].double() - exact).norm() < 0.5 * exact.norm()
    wide = rows.double()
    (unchanged,) = invert_factors([Request(wide, torch.tensor([1e-3]), low_rank=True)])
    torch.testing.assert_close(unchanged["scale"], torch.tensor([1e3]))


# ---- factors that are kept as rows --------------------------------------------------------------


@pytest.mark.parametrize("damping_kind", ["both_factors", "pi"])
@pytest.mark.parametrize("uses", [1, 10])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_that_stand_for_a_factor_precondition_as_the_factor(
    kfac_approx, bias, uses, damping_kind, monkeypatch
):
    mask = torch.tensor([[True, True, False], [True, False, False]])

    def preconditioned(rows):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 40, bias), nn.Tanh(), nn.Linear(40, 25, bias))
        x, inputs = torch.randn(2, 3, 30), []
        model[0].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        kfac = KFAC(
            model,
            KFACConfig(kfac_approx, damping=0.01, damping_kind=damping_kind,
                       factor_update_steps=uses, inverse_update_steps=uses),
        )  # fmt: skip
        with monkeypatch.context() as patch:
            if not rows:
                patch.setattr(collectors, "most_rows", lambda side, vectors: 0)
            for _ in range(2):  # two micro-batches
                with kfac.record(Positions(mask=mask)):
                    logits = model(x)
                kfac.update(logits, "gaussian", mask=mask.unsqueeze(-1).expand(2, 3, 25))
                logits.square().sum().backward()
            assert all(torch.equal(given, x) for given in inputs)
            kfac.precondition()
        kept = [key for sums in kfac.state_dict()["averages"].values() for key in sums]
        assert ("A_rows" in kept) is rows
        assert all(torch.equal(given, x) for given in inputs)  # rows are views of the inputs
        return [p.grad for p in model.parameters()]

    for a, b in zip(preconditioned(True), preconditioned(False), strict=True):
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
    kfac = KFAC(model, KFACConfig(factor_precision=precision, factor_decay=0.5))
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
    with factors.products_in("bfloat16"):
        assert factors._rounds_to_bfloat16
    new = factors._has_new_switch()
    name, on = ("fp32_precision", "tf32") if new else ("allow_tf32", True)
    before = getattr(torch.backends.cuda.matmul, name)
    with factors.products_in("tf32"):
        assert getattr(torch.backends.cuda.matmul, name) == on
    assert getattr(torch.backends.cuda.matmul, name) == before
    assert not factors._rounds_to_bfloat16
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


@pytest.fixture
def waited(monkeypatch):
    """Names of layers whose factor was formed after the Fisher pass."""
    found = []
    end = capture.Recording.end_passes

    def ended(self):
        for name, collector in self._collectors.items():
            found.extend(name for _ in getattr(collector, "_waiting", ()))
        end(self)

    monkeypatch.setattr(capture.Recording, "end_passes", ended)
    monkeypatch.setattr(collectors, "LARGE", 0.0)
    return found


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
def test_factors_that_are_formed_late_are_the_same(fisher_type, bias, waited, monkeypatch):
    model, x = Images(), torch.randint(9, (3, 5))
    options = {
        "likelihood": "categorical",
        "kfac_approx": "expand",
        "fisher_type": fisher_type,
        "bias": bias,
        "targets": torch.randint(9, (3, 5)),
    }
    late = curvature(model, x, **options)
    assert waited == ["conv"] * (bias == "joint")  # the first call's input is not contiguous
    monkeypatch.setattr(collectors, "LARGE", float("inf"))
    for name, block in curvature(model, x, **options).items():
        torch.testing.assert_close(late[name].to_dense(), block.to_dense(), rtol=1e-12, atol=0)


class Dilated(nn.Module):
    """One convolution, called with several dilations."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding="same")

    def forward(self, x):
        for dilation in (1, 2, 3):
            self.conv.dilation = (dilation,)
            x = self.conv(x).tanh()
        return x.flatten(1)


def test_a_call_counts_as_the_module_was_then(waited, monkeypatch):
    model, x = Dilated(), torch.randn(3, 4, 7)
    options = {"likelihood": "gaussian", "kfac_approx": "expand", "fisher_type": "type-2"}
    late = curvature(model, x, **options)["conv"]
    assert len(waited) == 3
    monkeypatch.setattr(collectors, "LARGE", float("inf"))
    at_once = curvature(model, x, **options)["conv"]
    torch.testing.assert_close(late.to_dense(), at_once.to_dense(), rtol=1e-12, atol=0)


def test_shapes_are_had_on_the_meta_device():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to("meta")
    x = torch.randn(6, 4, device="meta")
    options = {"likelihood": "gaussian", "kfac_approx": "expand", "fisher_type": "type-2"}
    found = curvature(model, x, **options)["0"]
    assert found.input_covariance.is_meta
    assert found.gradient_covariance.shape == (5, 5)


@pytest.mark.parametrize("how", ["plain", "checkpoint", "hooks", "autocast", "padded", "strided"])
def test_only_inputs_that_the_graph_keeps_as_they_are_stand_for_their_factor(how, waited):
    """Where it keeps something else, writing into the input afterwards is allowed."""
    if how == "hooks" and not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("this PyTorch does not tell of hooks")
    mode = "circular" if how == "padded" else "zeros"
    conv = nn.Conv1d(4, 4, 3, padding=1, padding_mode=mode).float()
    x = torch.randn(5, 4, 7, dtype=torch.float32)
    x = x.mT.contiguous().mT if how == "strided" else x
    factors_of = KFAC(conv, KFACConfig(kfac_approx="expand", factor_decay=0.9, damping=0.1))

    def forward():
        if how == "checkpoint":
            return checkpoint(conv, x, use_reentrant=False)
        if how == "hooks":
            with torch.autograd.graph.save_on_cpu():
                return conv(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return conv(x)

    with factors_of.record():
        logits = forward().flatten(1)
    if how == "plain":
        x.zero_()
        with pytest.raises(GraphError, match="'' was written into"):
            factors_of.update(logits, "gaussian")
        return
    factors_of.update(logits.float(), "gaussian")
    assert not waited
