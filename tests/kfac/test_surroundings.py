"""What users put around the engine is right, or refused (see `surroundings`)."""

from pathlib import Path

import pytest
from surroundings import KINDS, REFUSED, SURROUNDINGS

PAGE = Path(__file__).parents[2] / "docs/surroundings.md"


@pytest.mark.parametrize("name", list(SURROUNDINGS))
def test_a_surrounding_is_supported_or_refused(name):
    said = SURROUNDINGS[name]()
    assert (said is not None) == (name in REFUSED)
    row = f"| {KINDS[name]} | {name} | {'supported' if said is None else f'refused: {said}'} |"
    assert row in PAGE.read_text().splitlines()
