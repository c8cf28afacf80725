"""Makes the packages, and the helper modules beside the engine's tests, importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent / "kfac"))
