"""What users put around the engine is right, or refused (see `surroundings`)."""

from pathlib import Path

import pytest
import torch
from surroundings import KINDS, REFUSED, SHARDS, SHARDS_RUN_ON_CPU, SURROUNDINGS

PAGE = Path(__file__).parents[2] / "docs/surroundings.md"


@pytest.mark.parametrize("name", list(SURROUNDINGS))
def test_a_surrounding_is_supported_or_refused(name):
    if name == SHARDS and not SHARDS_RUN_ON_CPU:
        pytest.skip("FSDP2 needs CUDA before PyTorch 2.6")
    said = SURROUNDINGS[name]()
    assert (said is not None) == (name in REFUSED)
    if name == "`torch.compile` of the whole step" and not hasattr(torch.compiler, "set_stance"):
        return  # PyTorch 2.5 itself refuses, in its own words
    row = f"| {KINDS[name]} | {name} | {'supported' if said is None else f'refused: {said}'} |"
    assert row in PAGE.read_text().splitlines()
