"""Properties that hold for every model and batch, over random architectures and shapes."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from nets import geometry_of, padded
from torch import nn

from submission.kfac import (
    Bernoulli,
    Categorical,
    Gaussian,
    KFACConfig,
    Positions,
    Preconditioner,
    Segments,
    curvature,
    tuning,
)
from submission.kfac.linalg.convolution import patches

LIKELIHOODS = {"categorical": Categorical, "bernoulli": Bernoulli, "gaussian": Gaussian}
APPROXES = ("expand", "reduce")
FISHER_TYPES = ("mc", "type-2", "empirical")
FILLINGS = (float("nan"), float("inf"), 1e30)

seeds = st.integers(0, 2**31 - 1)
widths = st.integers(1, 5)
approxes = st.sampled_from(APPROXES)
likelihoods = st.sampled_from(sorted(LIKELIHOODS))


def examples(count):
    """The same examples in every run; conftest's fixture need not be renewed for each of them."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


class Pooled(nn.Module):
    """Mean over the positions that a mask [N, R] keeps; the others may hold anything."""

    def __init__(self):
        super().__init__()
        self.mask = None

    def forward(self, x):
        mask = x.new_ones(x.shape[:2], dtype=torch.bool) if self.mask is None else self.mask
        kept = torch.where(mask.unsqueeze(-1), x, 0).sum(1)
        return kept / mask.sum(1, keepdim=True).clamp(min=1)


class SegmentPool(nn.Module):
    """Sum over the rows of each segment; padding rows go to the padding segment."""

    def __init__(self):
        super().__init__()
        self.segments = None

    def forward(self, x):
        total = x.new_zeros(self.segments.num_segments, x.shape[-1])
        return total.index_add(0, self.segments.ids, x)


class Mixing(nn.Module):
    """Positions of one example interact, as in attention, with no parameter of its own."""

    def forward(self, x):
        if x.dim() < 3:
            return x
        rows = x.flatten(1, -2)
        weights = (rows @ rows.mT / rows.shape[-1] ** 0.5).softmax(-1)
        return (weights @ rows).view_as(x)


@st.composite
def dense_problems(draw):
    """(model, input): linear layers, norms and interacting positions over 2-d to 4-d inputs."""
    torch.manual_seed(draw(seeds))
    n, sharing = draw(st.integers(2, 5)), draw(st.lists(st.integers(1, 3), max_size=2))
    sizes = draw(st.lists(widths, min_size=3, max_size=4))
    modules = []
    for before, after in pairwise(sizes[:-1]):
        modules += [nn.Linear(before, after, draw(st.booleans())), nn.Tanh()]
        if draw(st.booleans()):
            modules.append(nn.LayerNorm(after))
    if draw(st.booleans()):
        modules.append(Mixing())
    if sharing and draw(st.booleans()):
        modules += [nn.Flatten(1, -2), Pooled()]
    modules.append(nn.Linear(sizes[-2], sizes[-1], draw(st.booleans())))
    return nn.Sequential(*modules), torch.randn(n, *sharing, sizes[0])


@st.composite
def geometries(draw, dims=None, transposed=None, stride=None):
    """(class, options, spatial sizes) of a legal convolution."""
    dims = draw(st.integers(1, 3)) if dims is None else dims
    transposed = draw(st.booleans()) if transposed is None else transposed

    def per_dimension(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    largest = 6 if dims < 3 else 4
    spatial = per_dimension(3, largest)
    options = {
        "kernel_size": per_dimension(1, 3),
        "stride": per_dimension(1, 3),
        "dilation": per_dimension(1, 2),
        "groups": draw(st.sampled_from([1, 2])),
        "bias": draw(st.booleans()),
    }
    if transposed:
        options["padding"] = per_dimension(0, 1)
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1))
            for s, d in zip(options["stride"], options["dilation"], strict=True)
        )
        layers = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    else:
        options["padding_mode"] = draw(
            st.sampled_from(["zeros", "reflect", "replicate", "circular"])
        )
        options["padding"] = per_dimension(0, 2)
        if draw(st.booleans()):
            options |= {"padding": "same", "stride": (1,) * dims}
        layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return layers[dims - 1], options, spatial


@st.composite
def convolution_layers(draw, **kwargs):
    """(convolution, input [N, C, *spatial]) with at least one output position."""
    layer, options, spatial = draw(geometries(**kwargs))
    torch.manual_seed(draw(seeds))
    groups = options["groups"]
    module = layer(groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), **options)
    x = torch.randn(draw(st.integers(1, 3)), module.in_channels, *spatial)
    try:
        positions = module(x).shape[2:].numel()
    except RuntimeError:  # kernel larger than the padded input, padding larger than the input
        positions = 0
    assume(positions > 0)
    return module, x


@st.composite
def convolution_problems(draw):
    """(model, input): a random convolution, perhaps a norm, then pooled or flattened."""
    module, x = draw(convolution_layers())
    positions = module(x).shape[2:].numel()
    modules = [module]
    if draw(st.booleans()):
        modules.append(nn.GroupNorm(1, module.out_channels))
    modules.append(nn.Tanh())
    if draw(st.booleans()):
        modules += [nn.Flatten(), nn.Linear(module.out_channels * positions, 2)]
    else:
        modules += [nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    return nn.Sequential(*modules), torch.cat([x, x.flip(-1) + 1])


@st.composite
def token_problems(draw):
    """(model, input): embedding, perhaps with a padding index, and a linear layer per token."""
    torch.manual_seed(draw(seeds))
    vocabulary, width = draw(st.integers(2, 5)), draw(widths)
    modules = [
        nn.Embedding(vocabulary, width, padding_idx=draw(st.sampled_from([None, 0]))),
        Mixing(),
        nn.Linear(width, draw(widths)),
    ]
    if draw(st.booleans()):
        modules.append(Pooled())
    return nn.Sequential(*modules), torch.randint(
        vocabulary, (draw(st.integers(2, 4)), draw(st.integers(1, 3)))
    )


problems = st.one_of(dense_problems(), convolution_problems(), token_problems())


def targets_of(likelihood, logits):
    if likelihood == "categorical":
        return torch.randint(logits.shape[-1], logits.shape[:-1])
    return torch.rand(logits.shape)


def tensors(block):
    return {k: v for k, v in vars(block).items() if isinstance(v, torch.Tensor)}


def assert_same(blocks, expected, rtol=1e-10):
    """All tensors of all blocks agree, up to rounding in the largest of their entries."""
    assert blocks.keys() == expected.keys()
    for name, block in blocks.items():
        for key, value in tensors(block).items():
            other = tensors(expected[name])[key]
            atol = rtol * float(other.abs().max()) + 1e-300
            torch.testing.assert_close(value, other, rtol=rtol, atol=atol, msg=f"{name}.{key}")


def assert_psd(matrices):
    torch.testing.assert_close(matrices, matrices.mT, rtol=1e-12, atol=1e-300)
    values = torch.linalg.eigvalsh(matrices)
    largest = values.abs().amax(-1, keepdim=True)
    assert bool((values >= -1e-12 * largest).all())


# ---- symmetric positive semi-definite ---------------------------------------------------------


@examples(50)
@given(problems, approxes, st.sampled_from(FISHER_TYPES), likelihoods, st.booleans())
def test_every_block_is_symmetric_positive_semidefinite(
    problem, kfac_approx, fisher_type, likelihood, joint_bias
):
    model, x = problem
    blocks = curvature(
        model,
        x,
        likelihood=likelihood,
        kfac_approx=kfac_approx,
        fisher_type=fisher_type,
        mc_samples=2 if fisher_type == "mc" else 1,
        targets=targets_of(likelihood, model(x)),
        bias="joint" if joint_bias else "separate",
    )
    assert blocks
    for block in blocks.values():
        for key, value in tensors(block).items():
            assert bool(value.isfinite().all())
            if key == "diagonal" or getattr(block, f"diagonal_{key.split('_')[0]}", False):
                assert bool((value >= 0).all())
            else:
                assert_psd(value)


# ---- what must not change anything ------------------------------------------------------------


@examples(30)
@given(problems, approxes, st.sampled_from(["type-2", "empirical"]), likelihoods, seeds)
def test_the_order_of_examples_changes_nothing(problem, kfac_approx, fisher_type, likelihood, seed):
    model, x = problem
    torch.manual_seed(seed)
    targets, order = targets_of(likelihood, model(x)), torch.randperm(len(x))
    options = {
        "likelihood": likelihood,
        "kfac_approx": kfac_approx,
        "fisher_type": fisher_type,
    }
    assert_same(
        curvature(model, x[order], targets=targets[order], **options),
        curvature(model, x, targets=targets, **options),
    )


@st.composite
def ragged_problems(draw):
    """(model, rows, sizes): rows of graphs, linear and norm, a sum over each graph, linear."""
    torch.manual_seed(draw(seeds))
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    assume(sum(sizes))
    inner, hidden, outer = draw(widths), draw(st.integers(2, 4)), draw(widths)
    model = nn.Sequential(
        nn.Linear(inner, hidden), nn.LayerNorm(hidden), nn.Tanh(), SegmentPool(),
        nn.Tanh(), nn.Linear(hidden, outer),
    )  # fmt: skip
    return model, torch.randn(sum(sizes), inner), sizes


def ragged_curvature(model, rows, sizes, graph_mask=None, **options):
    segments = Segments.from_sizes(torch.tensor(sizes), segment_mask=graph_mask)
    graphs = Segments(torch.arange(len(sizes)), len(sizes), graph_mask)
    model = copy.deepcopy(model)
    model[3].segments = segments
    return curvature(model, rows, sharing={"": segments, "5": graphs}, mask=graph_mask, **options)


RAGGED = {"likelihood": likelihoods, "kfac_approx": approxes} | {
    "fisher_type": st.sampled_from(["type-2", "empirical"]),
    "ragged_scaling": st.sampled_from(["sqrt", "mean_sum", "sum_mean"]),
}


@examples(30)
@given(ragged_problems(), st.fixed_dictionaries(RAGGED), seeds)
def test_the_order_of_graphs_and_of_their_rows_changes_nothing(problem, options, seed):
    model, rows, sizes = problem
    torch.manual_seed(seed)
    targets = targets_of(options["likelihood"], torch.empty(len(sizes), model[5].out_features))
    order = torch.randperm(len(sizes)).tolist()
    pieces = rows.split(sizes)
    shuffled = torch.cat([pieces[i][torch.randperm(sizes[i])] for i in order])
    assert_same(
        ragged_curvature(
            model, shuffled, [sizes[i] for i in order], targets=targets[order], **options
        ),
        ragged_curvature(model, rows, sizes, targets=targets, **options),
    )


@examples(30)
@given(
    ragged_problems(),
    st.fixed_dictionaries(RAGGED),
    st.integers(0, 4),
    st.integers(0, 4),
    st.sampled_from(FILLINGS),
    seeds,
)
def test_padding_graphs_change_nothing(problem, options, place, padding, filling, seed):
    model, rows, sizes = problem
    torch.manual_seed(seed)
    targets = targets_of(options["likelihood"], torch.empty(len(sizes), model[5].out_features))
    expected = ragged_curvature(model, rows, sizes, targets=targets, **options)
    place = min(place, len(sizes))
    pieces = list(rows.split(sizes))
    pieces.insert(place, rows.new_full((padding, rows.shape[1]), filling))
    mask = torch.ones(len(sizes) + 1, dtype=torch.bool)
    mask[place] = False
    padded = ragged_curvature(
        model,
        torch.cat(pieces),
        [*sizes[:place], padding, *sizes[place:]],
        graph_mask=mask,
        targets=torch.cat([targets[:place], targets[:1], targets[place:]]),
        **options,
    )
    assert_same(padded, expected)


@st.composite
def masked_problems(draw):
    """(model, input [N, R, d], mask [N, R]) with at least one real position."""
    torch.manual_seed(draw(seeds))
    n, r = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    mask = torch.rand(n, r) < 0.6
    assume(bool(mask.any()))
    sizes = draw(st.lists(st.integers(2, 4), min_size=3, max_size=3))
    modules = [nn.Linear(sizes[0], sizes[1]), nn.LayerNorm(sizes[1]), nn.Tanh()]
    if draw(st.booleans()):
        modules.append(Pooled())
    return nn.Sequential(*modules, nn.Linear(*sizes[1:])), torch.randn(n, r, sizes[0]), mask


def masked_curvature(model, x, mask, **options):
    """The pooled net has a row per example behind the pool, the other one only masked rows."""
    model = copy.deepcopy(model)
    pooled = isinstance(model[-2], Pooled)
    some = mask.any(1)
    sharing = {"": Positions(mask=mask)}
    if pooled:
        model[-2].mask = mask
        sharing[str(len(model) - 1)] = Positions(mask=some.unsqueeze(1))
    return curvature(model, x, sharing=sharing, mask=some if pooled else mask, **options)


@examples(30)
@given(masked_problems(), st.fixed_dictionaries(RAGGED), st.sampled_from(FILLINGS), seeds)
def test_padding_positions_change_nothing_whatever_they_hold(problem, options, filling, seed):
    model, x, mask = problem
    torch.manual_seed(seed)
    targets = targets_of(options["likelihood"], model(x))
    expected = masked_curvature(model, x, mask, targets=targets, **options)
    filled = torch.where(mask.unsqueeze(-1), x, filling)
    assert_same(masked_curvature(model, filled, mask, targets=targets, **options), expected)


@examples(30)
@given(masked_problems(), st.fixed_dictionaries(RAGGED), st.integers(1, 3), seeds)
def test_longer_padding_and_padding_examples_change_nothing(problem, options, extra, seed):
    model, x, mask = problem
    torch.manual_seed(seed)
    targets = targets_of(options["likelihood"], model(x))
    expected = masked_curvature(model, x, mask, targets=targets, **options)

    def pad(tensor, value, dims):
        for dim in range(dims):
            shape = list(tensor.shape)
            shape[dim] = extra
            tensor = torch.cat([tensor, tensor.new_full(shape, value)], dim)
        return tensor

    pooled = isinstance(model[-2], Pooled)
    padded = masked_curvature(
        model,
        pad(x, float("nan"), 2),
        pad(mask, False, 2),
        targets=pad(targets, 0, 1 if pooled else 2),
        **options,
    )
    assert_same(padded, expected)


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("likelihood", sorted(LIKELIHOODS))
def test_padding_of_nan_leaves_factors_finite_and_positive(likelihood, fisher_type):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    x = torch.where(mask.unsqueeze(-1), torch.randn(3, 3, 3), float("nan"))
    for kfac_approx in APPROXES:
        blocks = masked_curvature(
            model,
            x,
            mask,
            likelihood=likelihood,
            kfac_approx=kfac_approx,
            fisher_type=fisher_type,
            targets=targets_of(likelihood, torch.empty(3, 3, 3)),
        )
        for block in blocks.values():
            assert_psd(block.input_covariance)
            assert_psd(block.gradient_covariance)
            assert float(block.gradient_covariance.trace()) > 0


@examples(30)
@given(
    dense_problems(),
    approxes,
    likelihoods,
    st.sampled_from(["mean_sum", "sqrt", "sum_mean"]),
    seeds,
)
def test_segments_of_equal_size_are_explicit_positions(
    problem, kfac_approx, likelihood, scaling, seed
):
    # Rows of one example as a segment: A by √R, or R, larger in reduce (and B smaller) where the
    # scaling says so; the product is the same.
    model, x = problem
    torch.manual_seed(seed)
    logits = model(x)
    options = {"likelihood": likelihood, "kfac_approx": kfac_approx, "fisher_type": "type-2"}
    n, positions = len(x), x.shape[1:-1].numel()

    def ids(rows):
        return Segments(torch.arange(n).repeat_interleave(rows), n)

    pooled = any(isinstance(module, Pooled) for module in model)
    sharing = {"": ids(positions), str(len(model) - 1): ids(1 if pooled else positions)}
    assert logits.shape[0] == n
    expected = curvature(model, x, **options)
    ragged = curvature(model, x, sharing=sharing, ragged_scaling=scaling, **options)
    power = {"mean_sum": 0, "sqrt": 1, "sum_mean": 2}[scaling]
    for name, block in ragged.items():
        if not hasattr(block, "input_covariance"):
            continue
        scale = 1.0
        if kfac_approx == "reduce":
            scale = float(1 if pooled and name == str(len(model) - 1) else positions) ** power
        torch.testing.assert_close(
            block.input_covariance, expected[name].input_covariance * scale, rtol=1e-10, atol=1e-13
        )
        torch.testing.assert_close(
            block.gradient_covariance,
            expected[name].gradient_covariance / scale,
            rtol=1e-10,
            atol=1e-13,
        )
    norms = [name for name in ragged if not hasattr(ragged[name], "input_covariance")]
    assert_same({k: ragged[k] for k in norms}, {k: expected[k] for k in norms})


@examples(20)
@given(approxes, st.integers(2, 4), seeds)
def test_the_rows_of_a_padding_index_do_not_exist(kfac_approx, width, seed):
    # The weight has no part in them: the same factors as if they were marked as padding.
    torch.manual_seed(seed)
    padded = nn.Sequential(nn.Embedding(5, width, padding_idx=1), Mixing(), nn.Linear(width, 3))
    plain = nn.Sequential(nn.Embedding(5, width), Mixing(), nn.Linear(width, 3))
    plain.load_state_dict(padded.state_dict())
    x = torch.randint(5, (4, 3))
    x[0, 0] = 1
    options = {"likelihood": "categorical", "kfac_approx": kfac_approx, "fisher_type": "type-2"}
    own = curvature(padded, x, **options)["0"]
    marked = curvature(plain, x, sharing={"0": Positions(mask=x != 1)}, **options)["0"]
    assert float(own.input_covariance[1].abs().max()) == 0
    assert_same({"0": own}, {"0": marked})


# ---- additivity -------------------------------------------------------------------------------


@examples(30)
@given(problems, approxes, likelihoods, st.booleans(), seeds)
def test_two_parts_of_a_batch_average_to_the_whole(problem, kfac_approx, likelihood, masked, seed):
    # A by the number of rows or examples, everything of gradients by the number of terms.
    model, x = problem
    assume(all(getattr(module, "padding_idx", None) is None for module in model))  # fewer rows
    torch.manual_seed(seed)
    logits = model(x)
    first = int(torch.randint(1, len(x), ()))
    shape = LIKELIHOODS[likelihood]().term_shape(logits)
    mask = torch.rand(shape) + 0.1 if masked else torch.ones(shape)
    options = {"likelihood": likelihood, "kfac_approx": kfac_approx, "fisher_type": "type-2"}
    whole = curvature(model, x, mask=mask, **options)
    pieces = [
        curvature(model, x[s], mask=mask[s], **options)
        for s in (slice(0, first), slice(first, len(x)))
    ]
    examples_share = first / len(x)
    terms_share = float(mask[:first].sum() / mask.sum())
    for name, block in whole.items():
        for key, value in tensors(block).items():
            share = examples_share if key == "input_covariance" else terms_share
            parts = [tensors(piece[name])[key] for piece in pieces]
            average = share * parts[0] + (1 - share) * parts[1]
            atol = 1e-12 * float(value.abs().max()) + 1e-25  # squares of roundings of zero
            torch.testing.assert_close(average, value, rtol=1e-10, atol=atol)


@examples(30)
@given(problems, approxes, st.sampled_from(FISHER_TYPES), likelihoods, st.floats(1e-3, 1e3))
def test_the_scale_of_the_loss_scales_the_curvature_linearly(
    problem, kfac_approx, fisher_type, likelihood, scale
):
    model, x = problem
    options = {"kfac_approx": kfac_approx, "fisher_type": fisher_type}
    options["targets"] = targets_of(likelihood, model(x))
    plain = curvature(model, x, likelihood=LIKELIHOODS[likelihood](), **options)
    scaled = curvature(model, x, likelihood=LIKELIHOODS[likelihood](scale=scale), **options)
    for name, block in plain.items():
        for key, value in tensors(block).items():
            factor = 1.0 if key == "input_covariance" else scale
            atol = 1e-12 * factor * float(value.abs().max()) + 1e-300
            torch.testing.assert_close(
                tensors(scaled[name])[key], factor * value, rtol=1e-10, atol=atol
            )


@examples(15)
@given(problems, approxes, st.sampled_from(FISHER_TYPES), likelihoods, seeds)
def test_the_reduction_of_the_loss_plays_no_role(
    problem, kfac_approx, fisher_type, likelihood, seed
):
    model, x = problem
    torch.manual_seed(seed)
    targets = targets_of(likelihood, model(x))
    losses = {
        "categorical": lambda f, reduction: F.cross_entropy(
            f.flatten(0, -2), targets.flatten(), reduction=reduction
        ),
        "bernoulli": lambda f, reduction: F.binary_cross_entropy_with_logits(
            f, targets, reduction=reduction
        ),
        "gaussian": lambda f, reduction: F.mse_loss(f, targets, reduction=reduction),
    }
    blocks = {}
    for reduction in ("mean", "sum"):
        config = KFACConfig(
            kfac_approx=kfac_approx,
            fisher_type=fisher_type,
            factor_update_steps=1,
            inverse_update_steps=1,
        )
        copied = copy.deepcopy(model)
        kfac = Preconditioner(copied, config)
        with kfac.record():
            logits = copied(x)
        kfac.update(logits, likelihood, targets=targets)
        losses[likelihood](logits, reduction).backward()
        kfac.precondition()
        blocks[reduction] = kfac.curvature()
    assert_same(blocks["sum"], blocks["mean"], rtol=1e-14)
    direct = curvature(
        model,
        x,
        likelihood=likelihood,
        kfac_approx=kfac_approx,
        fisher_type=fisher_type,
        targets=targets,
    )
    assert_same(blocks["mean"], direct)


# ---- convolutions: patches against torch's own ------------------------------------------------


@examples(50)
@given(convolution_layers())
def test_patches_times_the_weight_are_the_convolution(problem):
    module, x = problem
    rows = patches.patches(padded(module, x), geometry_of(module))
    groups = module.groups
    weight = module.weight
    if module.transposed:  # [C_in, C_out / groups, *kernel]
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    weight = weight.reshape(groups, module.out_channels // groups, -1)
    rows = rows.reshape(len(x), groups, weight.shape[-1], rows.shape[-1])
    out = torch.einsum("god,ngdr->ngor", weight, rows)
    out = out.reshape(len(x), module.out_channels, -1)
    if module.bias is not None:
        out = out + module.bias.unsqueeze(-1)
    torch.testing.assert_close(out, module(x).flatten(2))


@examples(50)
@given(convolution_layers(), st.sampled_from([1, 1 << 23]))
def test_fast_paths_agree_with_plain_patches(problem, chunk):
    module, x = problem
    x, geometry, groups = padded(module, x), geometry_of(module), module.groups
    rows = patches.patches(x, geometry)
    assert rows.shape[-1] == patches.output_positions(geometry, x.shape[2:])
    rows = rows.reshape(len(x), groups, -1, rows.shape[-1])
    torch.testing.assert_close(patches.patch_sum(x, geometry, groups), rows.sum(-1).movedim(1, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "PATCH_CHUNK_ELEMENTS", chunk)
        moment = patches.patch_second_moment(x, geometry, groups)
    torch.testing.assert_close(moment, torch.einsum("ngdr,nger->gde", rows, rows))


@examples(50)
@given(convolution_layers(dims=2, transposed=False))
def test_two_dimensional_patches_are_those_of_unfold(problem):
    module, x = problem
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    expected = F.unfold(
        F.pad(x, padding, mode=mode),
        module.kernel_size,
        dilation=module.dilation,
        stride=module.stride,
    )
    geometry, x = geometry_of(module), padded(module, x)
    torch.testing.assert_close(patches.patches(x, geometry), expected, rtol=0, atol=0)
    per_group = expected.unflatten(1, (module.groups, -1))
    torch.testing.assert_close(
        patches.patch_sum(x, geometry, module.groups), per_group.sum(-1).movedim(1, 0)
    )
    torch.testing.assert_close(
        patches.patch_second_moment(x, geometry, module.groups),
        torch.einsum("ngdr,nger->gde", per_group, per_group),
    )
