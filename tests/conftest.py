"""Makes the packages, and the helper modules beside the tests, importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
for folder in ("kfac", "submission"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
