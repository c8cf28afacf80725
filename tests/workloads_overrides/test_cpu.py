import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from workloads_overrides import cpu


@pytest.fixture
def replaced(monkeypatch):
    """The replacements for two processes, undone after the test."""
    calls = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kw: calls.append((args, kw)))
    replacements = cpu.torch_replacements(world_size=2)
    for replacement in replacements:
        monkeypatch.setattr(replacement.owner, replacement.name, replacement.value)
    return calls


def test_every_process_is_a_device(replaced):
    assert torch.cuda.device_count() == 2
    torch.cuda.set_device(1)
    torch.cuda.synchronize()


def test_nccl_becomes_gloo(replaced):
    dist.init_process_group("nccl", rank=0)
    assert replaced == [(("gloo",), {"rank": 0})]


def test_ddp_forgets_the_gpu(tmp_path):
    originals = [(r.owner, r.name, getattr(r.owner, r.name)) for r in cpu.torch_replacements(1)]
    try:
        cpu.apply_all(cpu.torch_replacements(world_size=1))
        dist.init_process_group(
            "nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
        )
        wrapped = DistributedDataParallel(torch.nn.Linear(2, 2), device_ids=[0], output_device=0)
        assert wrapped(torch.ones(1, 2)).shape == (1, 2)
        assert isinstance(wrapped, DistributedDataParallel)
    finally:
        dist.destroy_process_group()
        for owner, name, value in originals:
            setattr(owner, name, value)


class Wrapper:
    device = torch.device("cpu")

    def __init__(self, dataloader):
        self.dataloader = dataloader


def test_loading_yields_every_batch_once_as_floats():
    batches = [(torch.ones(2, 3, dtype=torch.float64), torch.tensor([0, 1])) for _ in range(3)]
    loaded = list(cpu.load_without_stream(Wrapper(batches)))
    assert len(loaded) == 3
    assert all(inputs.dtype == torch.float for inputs, _ in loaded)


def test_less_than_one_batch_is_an_error_and_no_endless_loop():
    with pytest.raises(ValueError, match="fewer examples than one batch"):
        next(cpu.load_without_stream(Wrapper([])))
