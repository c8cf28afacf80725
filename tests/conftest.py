"""Makes the packages, and the helper modules beside the tests, importable.

Ctrl-C works in the processes that tests start even where the tests themselves run in the background
of a shell, which makes them, and what they start, ignore it. One thread each: sums of floats depend
on the number of threads, and runs in this process are compared bit for bit with runs in others.
"""

import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported
sys.path.insert(0, str(Path(__file__).parents[1]))
for folder in ("kfac", "submission"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
