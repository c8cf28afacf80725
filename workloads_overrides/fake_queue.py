"""AlgoPerf's own test of a submission (fake input queues), watched: times, losses, memory.

    python -m workloads_overrides.fake_queue --clone=ALGOPERF --out=RESULT.json --workload=ogbg \
        --submission_path=submission/submission.py --tuning_search_space=POINT.json \
        --global_batch_size=4 --num_train_steps=3

Runs `tests/reference_algorithm_tests.py` of an AlgoPerf clone as it is; all flags but `--clone`,
`--out` and `--short_decoding` are its own. What is added, in memory: `update_params` is timed, the
losses of the training steps are noted, and a registered variant (`ogbg_gelu`) may be named, which
gets the fake batches of its base workload. Works without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KIB_PER_MIB = 1024
SHORT_DECODING = 4  # tokens; the fake tokenizer's sentence does not depend on them


class Watch:
    """What is noted of a test while it runs.

    Attributes:
        seconds: of each call of `update_params`.
        losses: mean loss of each training forward pass, the first of a step only.
        memory: resident MiB before the optimizer's state was made, and at most after.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.memory_before = 0.0
        self._in_step = False

    def watch_submission(self, module: Any) -> None:
        """Times the submission's steps."""
        update_params, init_optimizer_state = module.update_params, module.init_optimizer_state

        def timed(**kwargs: Any) -> Any:
            self._in_step = True
            start = time.perf_counter()
            try:
                return update_params(**kwargs)
            finally:
                self.seconds.append(time.perf_counter() - start)
                self._in_step = False

        def measured(*args: Any, **kwargs: Any) -> Any:
            self.memory_before = resident_now()
            return init_optimizer_state(*args, **kwargs)

        module.update_params, module.init_optimizer_state = timed, measured

    def watch_workload(self, workload_class: type) -> type:
        """The class with its training losses noted."""
        watch = self

        class Watched(workload_class):  # type: ignore[misc]
            def loss_fn(self, *args: Any, **kwargs: Any) -> Any:
                result = super().loss_fn(*args, **kwargs)
                if watch._in_step and len(watch.losses) == len(watch.seconds):
                    mean = result["summed"].detach() / result["n_valid_examples"]
                    watch.losses.append(float(mean))
                return result

        Watched.__name__ = workload_class.__name__
        return Watched


def resident_now() -> float:
    """Resident memory of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the test; returns 0 if it passed."""
    parser = argparse.ArgumentParser(prog="workloads_overrides.fake_queue", allow_abbrev=False)
    parser.add_argument("--clone", required=True, type=Path, help="folder of AlgoPerf's repository")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--workload", required=True, help="a workload or registered variant")
    parser.add_argument(
        "--short_decoding",
        action="store_true",
        help=f"translate at most {SHORT_DECODING} tokens in evaluations (saves minutes)",
    )
    own, flags = parser.parse_known_args(argv)
    out = own.out.resolve()
    result = run(own.clone.resolve(), own.workload, flags, own.short_decoding)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1))
    os.replace(partial, out)
    return 0 if result["passed"] else 1


def run(clone: Path, workload: str, flags: Sequence[str], short_decoding: bool) -> dict[str, Any]:
    """The test's outcome as plain values."""
    import_triton_first()
    importlib.import_module("algoperf")  # as installed: a clone lacks what installation generates
    sys.path.insert(0, str(clone))
    test: Any = importlib.import_module("tests.reference_algorithm_tests")
    watch = Watch()
    base = name_variant(test.submission_runner.WORKLOADS, workload, test._EXPECTED_METRIC_NAMES)
    watch_imports(test, watch)
    if short_decoding:
        shorten_decoding()
    outcome: dict[str, Any] = {"workload": workload, "passed": False, "error": None}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.pkl"
        test.FLAGS(
            ["test", f"--workload={base}", "--framework=pytorch", f"--log_file={log}", *flags]
        )
        start = time.perf_counter()
        try:
            test.ReferenceSubmissionTest("test_submission").debug()
            outcome["passed"] = True
        except Exception as error:  # whatever the submission raised is the result
            traceback.print_exc()
            outcome["error"] = f"{type(error).__name__}: {error}"
        outcome["seconds"] = time.perf_counter() - start
        outcome["evaluations"] = read_evaluations(log)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIB_PER_MIB
    outcome |= {
        "step_seconds": watch.seconds,
        "losses": watch.losses,
        "memory_before": watch.memory_before,
        "memory_peak": peak,
    }
    return outcome


def import_triton_first() -> None:
    """triton and TensorFlow carry clashing copies of LLVM: triton must come first."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return


def name_variant(registry: dict[str, Any], workload: str, bases: Sequence[str]) -> str:
    """Puts a variant under its base's name, for which the test has fake batches; returns that.

    Raises:
        ValueError: the workload is not registered, or no base has fake batches.
    """
    if workload not in registry:
        raise ValueError(f"AlgoPerf has no workload '{workload}'; it has {', '.join(registry)}")
    fits = [base for base in bases if workload == base or workload.startswith(base + "_")]
    if not fits:
        raise ValueError(f"AlgoPerf's test has no fake batches for '{workload}'")
    base = max(fits, key=len)
    registry[base] = registry[workload]
    return base


def watch_imports(test: Any, watch: Watch) -> None:
    """Watches the workload and the submission as the test imports them."""
    import_workload, import_module = test.workloads.import_workload, importlib.import_module

    def watched_workload(*args: Any, **kwargs: Any) -> Any:
        return watch.watch_workload(import_workload(*args, **kwargs))

    class Importlib:
        """What the test calls of importlib."""

        @staticmethod
        def import_module(name: str) -> Any:
            module = import_module(name)
            if hasattr(module, "update_params"):
                watch.watch_submission(module)
            return module

    test.workloads.import_workload = watched_workload
    test.importlib = Importlib


def shorten_decoding() -> None:
    """Makes the translation workload's evaluations decode a few tokens only."""
    module: Any = importlib.import_module("algoperf.workloads.wmt.wmt_pytorch.workload")
    translate = module.WmtWorkload.translate_and_calculate_bleu

    def shortened(self: Any, *args: Any, max_predict_length: int, **kwargs: Any) -> Any:
        shorter = min(max_predict_length, SHORT_DECODING)
        return translate(self, *args, max_predict_length=shorter, **kwargs)

    module.WmtWorkload.translate_and_calculate_bleu = shortened


def read_evaluations(log: Path) -> list[dict[str, float]]:
    """The evaluations that the test's logger has pickled, as plain floats."""
    import pickle

    if not log.exists():
        return []
    with log.open("rb") as file:
        logged = pickle.load(file)
    return [{k: float(v) for k, v in row.items()} for row in logged["eval_results"]]


if __name__ == "__main__":
    sys.exit(main())
