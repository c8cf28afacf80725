import pytest
import torch


@pytest.fixture(autouse=True)
def _float64_and_seed():
    """All tests of the engine compare in float64, from a fixed seed."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
