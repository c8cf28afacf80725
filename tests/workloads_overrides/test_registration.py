import sys
from types import ModuleType, SimpleNamespace

import pytest

from workloads_overrides import installation
from workloads_overrides.errors import LaunchError
from workloads_overrides.registration import register_batch_size, register_properties


class Workload:
    def __init__(self, vocabulary: str = "") -> None:
        self.vocabulary = vocabulary

    @property
    def step_hint(self) -> int:
        return 100


def fake_registry() -> SimpleNamespace:
    """AlgoPerf's registry of workloads, with one of them."""

    def import_workload(path, class_name, return_class=False, workload_init_kwargs=None):
        assert (path, class_name) == ("algoperf/workloads/toy/toy_pytorch/workload.py", "Workload")
        return Workload if return_class else Workload(**workload_init_kwargs)

    return SimpleNamespace(
        import_workload=import_workload,
        convert_filepath_to_module=lambda path: path.removesuffix(".py").replace("/", "."),
        WORKLOADS={"toy": {"workload_path": "toy/toy", "workload_class_name": "Workload"}},
        BASE_WORKLOADS_DIR="algoperf/workloads/",
    )


def test_the_runner_gets_an_overridden_workload():
    registry = fake_registry()
    register_properties(registry, {"step_hint": 7})
    workload = registry.import_workload(
        workload_path="algoperf/workloads/toy/toy_pytorch/workload.py",
        workload_class_name="Workload",
        workload_init_kwargs={"vocabulary": "words"},
    )
    assert (workload.step_hint, workload.vocabulary) == (7, "words")
    assert Workload().step_hint == 100


def test_the_batch_size_replaces_the_submissions(monkeypatch):
    submission = ModuleType("toy_submission")
    submission.get_batch_size = lambda workload_name: 512
    monkeypatch.setitem(sys.modules, "toy_submission", submission)
    runner = SimpleNamespace(
        score_submission_on_workload=lambda workload, submission_path: (
            workload,
            submission_path,
            submission.get_batch_size("toy"),
        )
    )
    register_batch_size(runner, fake_registry(), 16)
    assert runner.score_submission_on_workload("w", submission_path="toy_submission.py") == (
        "w",
        "toy_submission.py",
        16,
    )


def test_a_workload_class_is_found_by_name():
    assert installation.workload_class(fake_registry(), "toy") is Workload


def test_an_unknown_workload_is_refused_with_the_known_ones():
    with pytest.raises(LaunchError, match=r"--workload=tyo: .* it has toy"):
        installation.workload_class(fake_registry(), "tyo")


def test_a_workload_whose_packages_are_missing_is_one_clear_error():
    registry = fake_registry()

    def import_workload(*args, **kwargs):
        raise ImportError("No module named 'torchvision'")

    registry.import_workload = import_workload
    with pytest.raises(LaunchError, match=r"--workload=toy cannot be imported: .*torchvision"):
        installation.workload_class(registry, "toy")


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ([], r"not importable; install it: `\./run\.sh setup --algoperf`"),
        (["algorithmic_efficiency"], r"found AlgoPerf v0\.5 .* supports the package `algoperf`"),
        (["algoperf"], "submission_runner.py is not importable"),
    ],
)
def test_without_a_usable_algoperf_the_error_says_what_to_do(monkeypatch, present, message):
    monkeypatch.setattr(installation, "_exists", lambda module: module in present)
    with pytest.raises(LaunchError, match=message):
        installation.require_algoperf()


def test_algoperf_with_its_runner_will_do(monkeypatch):
    monkeypatch.setattr(installation, "_exists", lambda module: True)
    installation.require_algoperf()
