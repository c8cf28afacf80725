"""Factor memory of AlgoPerf's workloads on a V100, from recorded layers."""

import json

import pytest
import torch
from torch import nn

from submission.algoperf_compat import spec
from submission.kfac import KFACConfig, Preconditioner
from submission.kfac.discovery import structure_from, trainable_parameters
from submission.kfac.report import report_rows
from workloads_overrides.factor_memory import (
    COPIES_OF_FACTORS,
    HARDWARE,
    REPORTED_COPIES,
    main,
    memory_of,
    recorded_workloads,
)
from workloads_overrides.language_model import LanguageModel, LanguageWorkload, Shape, token_batch
from workloads_overrides.model_record import RECORD, saved_bytes, skeleton, structure_of, uses_of

# What each model has, counted by AlgoPerf's own code on the real model (finewebedu_lm: by hand,
# 12 blocks of 1024 x (3072 + 1024 + 8192 + 4096) + 2 x 1024 + 1, a norm, 50,257 x 1024 tied).
PARAMETERS = {
    "mnist": 101_770, "cifar": 11_173_962, "ogbg": 3_554_176, "fastmri": 7_756_097,
    "imagenet_resnet": 25_557_032, "imagenet_vit": 22_122_472, "wmt": 133_521_408,
    "librispeech_conformer": 32_321_792, "librispeech_deepspeech": 18_393_600,
    "criteo1tb": 539_267_457,
    "finewebedu_lm": 252_815_372,
}  # fmt: skip


class Everything(nn.Module):
    """A layer of every recorded type, and parameters of the model's own."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(7, 3))
        self.blocks = nn.Sequential(
            nn.Conv2d(2, 4, (3, 1), groups=2, bias=False), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        )
        self.blocks.extra = nn.Linear(2, 2, bias=False)
        self.up = nn.ConvTranspose2d(4, 2, 2)
        self.time = nn.Conv1d(4, 4, 5)
        self.rows = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5)
        self.words = nn.Embedding(11, 3)
        self.recurrent = nn.LSTM(3, 2, bidirectional=True)
        self.scale = nn.RMSNorm(5)
        self.output = nn.Linear(3, 11)
        self.output.weight = self.words.weight


def test_a_skeleton_has_the_parameters_of_the_model():
    model = Everything()
    copy = skeleton(json.loads(json.dumps(structure_of(model))))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: tuple(p.shape) for name, p in copy.named_parameters()} == expected
    assert all(p.is_meta for p in copy.parameters())
    assert copy.output.weight is copy.words.weight


def test_saved_bytes_counts_each_tensor_once_and_no_parameter():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.zeros(16, 4)
    # The input, and the ReLU's output, which the second layer keeps as well.
    assert saved_bytes(model, lambda: model(x)) == 4 * 16 * (4 + 8)


def test_every_base_workload_is_recorded_with_its_parameters():
    assert set(recorded_workloads()) == set(PARAMETERS)
    for name, expected in PARAMETERS.items():
        memory = memory_of(name, KFACConfig())
        assert memory.parameters == expected
        assert sum(memory.shares().values()) == pytest.approx(100)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("workload", sorted(PARAMETERS))
@pytest.mark.parametrize("hardware", HARDWARE.values(), ids=HARDWARE)
def test_factors_fit_beside_everything_else(workload, approx, hardware):
    if workload in hardware.without:
        pytest.skip(f"not a workload of the rules for {hardware.name}")
    memory = memory_of(workload, KFACConfig(kfac_approx=approx), hardware)
    assert 0 < memory.factors <= memory.budget


def test_the_language_models_memory_is_that_of_the_engine_on_it():
    shape = Shape(vocabulary=3_000, width=32)
    workload, model = LanguageWorkload(), LanguageModel(shape)
    kfac = Preconditioner(model)
    batch = token_batch(shape, 0, weighted=False)
    with kfac.record():
        logits, _ = workload.model_fn(model, batch, spec.ForwardPassMode.TRAIN)
        loss = workload.loss_fn(batch["targets"], logits)["summed"]
    loss.backward()
    kfac.precondition()
    copy = skeleton(structure_of(model))
    found = structure_from(
        uses_of(copy), {}, trainable_parameters(copy), KFACConfig(), KFACConfig.kfac_approx
    )
    expected = {row.name: (row.sides, row.memory) for row in report_rows(found, KFACConfig())}
    assert {row.name: (row.sides, row.memory) for row in kfac.report()} == expected


def test_the_table_of_millions_of_rows_has_no_dense_factor():
    memory = memory_of("criteo1tb", KFACConfig())
    tables = [row for row in memory.rows if row.parameters > 10**8]
    assert len(tables) == 4
    # A value for each row, in the average and in the inverse.
    assert all(row.memory == 2 * 4 * row.parameters / 128 for row in tables)
    assert memory.fits


def test_a_lower_limit_of_the_sides_takes_less():
    full = memory_of("cifar", KFACConfig())
    small = memory_of("cifar", KFACConfig(max_factor_side=1024))
    assert small.factors < full.factors / 5
    assert any("diag 4608" in row.sides for row in small.rows)


def test_memory_is_that_of_the_engine_on_a_real_model():
    record = json.loads(RECORD.read_text())["mnist"]
    real = nn.Sequential()
    for name, _, arguments in record["modules"]:
        real.add_module(name.replace(".", "_"), nn.Linear(**arguments))
    kfac = Preconditioner(real)
    with kfac.record():
        logits = real(torch.randn(2, 784))
    kfac.update(logits, "categorical")
    reported = sum(row.memory for row in kfac.report())
    assert memory_of("mnist", KFACConfig()).factors == reported * COPIES_OF_FACTORS // (
        REPORTED_COPIES
    )


def test_the_command_says_which_workload_is_over_its_budget(capsys):
    assert main(["ogbg", "--layers"]) == 0
    printed = capsys.readouterr().out
    assert "graph_network.0.update_edge_fn.dense_0" in printed
    assert "3,554,176" in printed
    assert main(["ogbg", "cifar", "--kfac_approx", "expand"]) == 0
    assert main(["finewebedu_lm", "--hardware", "v100"]) == 1
    assert "over budget: finewebedu_lm on v100" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["ogb"])
    assert "'ogb' is not recorded; there are mnist" in capsys.readouterr().err
