import pytest
import torch

from experiments.models.wide_resnet import WideResNet
from submission.kfac import KroneckerFactors, UnitwiseCurvature, curvature


def test_wide_resnet_16_4_has_the_known_layers_and_widths() -> None:
    model = WideResNet(16, 4)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 13 + 3  # 16 layers with the classifier, but three shortcuts more
    assert [c.out_channels for c in convolutions if c.kernel_size == (1, 1)] == [64, 128, 256]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="6n \\+ 4"):
        WideResNet(15, 4)


def test_fixup_starts_as_the_zero_function_and_with_identity_branches() -> None:
    model = WideResNet(10, 1)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(images), torch.zeros(2, 10))
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(model.blocks[0](x), x)


def test_convolutions_are_kronecker_and_fixup_scalars_blocks_of_their_own() -> None:
    torch.manual_seed(0)
    model = WideResNet(10, 1, fixup_zeros=False)
    blocks = curvature(
        model, torch.randn(2, 3, 8, 8), likelihood="categorical", kfac_approx="reduce"
    )
    scalars = {name for name, block in blocks.items() if isinstance(block, UnitwiseCurvature)}
    assert scalars == {n for n, p in model.named_parameters() if p.numel() == 1}
    assert isinstance(blocks["blocks.1.shortcut"], KroneckerFactors)
    assert all(blocks[name].blocks.item() > 0 for name in scalars)
