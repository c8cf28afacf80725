"""Makes helper modules beside the tests importable by their plain name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent / "kfac"))
