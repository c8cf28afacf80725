import pytest

from workloads_overrides.errors import LaunchError
from workloads_overrides.properties import override_properties, parse_settings


class Workload:
    """Has a property of every type that AlgoPerf's workloads have."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    @property
    def step_hint(self) -> int:
        return 100

    @property
    def validation_target_value(self) -> float:
        return 0.5

    @property
    def use_glu(self) -> bool:
        return False

    @property
    def activation_fn_name(self) -> str:
        return "relu"

    @property
    def scale_ratio_range(self) -> tuple[float, float]:
        return (0.08, 1.0)

    @property
    def train_mean(self) -> float:
        raise NotImplementedError

    @property
    def doubled(self) -> int:
        return 2 * self.step_hint

    def loss_fn(self) -> float:
        return 0.0


def test_settings_are_read_as_python_literals_and_the_last_one_wins():
    texts = ["a=3", "b=0.5", "c=True", "d=(0.5, 1.0)", "e=gelu", "a=80_000"]
    assert parse_settings(texts) == {
        "a": 80_000,
        "b": 0.5,
        "c": True,
        "d": (0.5, 1.0),
        "e": "gelu",
    }


@pytest.mark.parametrize("text", ["step_hint", "=3", "two words=3", "1x=2", ""])
def test_a_setting_of_another_form_is_refused(text):
    with pytest.raises(LaunchError, match="PROPERTY=VALUE"):
        parse_settings([text])


def test_a_subclass_has_the_new_values_and_keeps_everything_else():
    overridden = override_properties(Workload, {"step_hint": 7, "train_mean": 0.1})
    workload = overridden(factor=3)
    assert isinstance(workload, Workload)
    assert overridden.__name__ == "Workload"
    assert (workload.step_hint, workload.doubled, workload.factor) == (7, 14, 3)
    assert workload.train_mean == 0.1
    assert Workload(factor=3).step_hint == 100


def test_a_whole_number_will_do_for_a_float():
    assert override_properties(Workload, {"validation_target_value": 1})(1)


@pytest.mark.parametrize("name", ["step_hnit", "loss_fn", "factor", "__class__"])
def test_an_unknown_property_is_refused_by_name(name):
    with pytest.raises(LaunchError, match=f"--set {name}.*Workload has no property"):
        override_properties(Workload, {name: 1})


def test_a_misspelt_property_gets_a_suggestion():
    with pytest.raises(LaunchError, match="nearest: step_hint"):
        override_properties(Workload, {"step_hnit": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step_hint", 1.5),
        ("step_hint", "many"),
        ("step_hint", True),
        ("step_hint", -1),
        ("validation_target_value", "high"),
        ("validation_target_value", float("nan")),
        ("use_glu", 1),
        ("activation_fn_name", 3),
        ("scale_ratio_range", 0.5),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name, value):
    with pytest.raises(LaunchError, match=f"--set {name}=.*the value must be"):
        override_properties(Workload, {name: value})
