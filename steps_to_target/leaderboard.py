"""Published entries of AlgoPerf's leaderboards, as rows beside one's own runs.

Steps and submission seconds to the validation target of the entries that reached it. Sources: the
leaderboard of 2026 (self-tuning ruleset, 4 A100; names as there), and of the earlier one (external
tuning, 8 V100) the best entries on the paper's two workloads.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """What one entry took on one workload.

    Attributes:
        label: name in tables, with the hardware.
        steps, seconds: to the validation target; seconds of submission time.
    """

    label: str
    steps: float
    seconds: float


_A100, _V100 = "4 A100", "8 V100"

# workload -> (entry, hardware, steps, seconds), fewest steps first
_ENTRIES: dict[str, tuple[tuple[str, str, int, float], ...]] = {
    "criteo1tb": (
        ("muon_torch", _A100, 7_716, 7_141.6),
        ("schedule_free_adamw_v2", _A100, 7_951, 7_480.6),
        ("nadamw", _A100, 8_286, 7_492.7),
        ("ademamix", _A100, 8_371, 7_839.2),
        ("nadamw_baselinev05", _A100, 9_145, 8_206.1),
        ("schedule_free_adamw", _A100, 10_346, 10_337.7),
    ),
    "fastmri": (
        ("nadamw_baselinev05", _A100, 6_648, 1_620.5),
        ("muon", _A100, 8_801, 1_869.8),
        ("nadamw", _A100, 9_924, 1_800.8),
        ("ademamix", _A100, 10_206, 1_517.7),
        ("schedule_free_adamw", _A100, 10_599, 1_188.9),
        ("schedule_free_adamw_v2", _A100, 12_431, 1_128.8),
    ),
    "finewebedu_lm": (
        ("muon_torch", _A100, 39_220, 15_471.9),
        ("muon", _A100, 40_724, 20_594.0),
        ("ademamix", _A100, 44_503, 18_025.9),
        ("nadamw_baselinev05", _A100, 47_039, 20_589.9),
        ("nadamw", _A100, 58_784, 25_733.8),
    ),
    "imagenet_vit": (
        ("CASPR", _V100, 77_824, 44_673.0),
        ("Shampoo", _V100, 81_682, 33_094.0),
        ("muon", _A100, 151_926, 77_162.9),
        ("nadamw", _A100, 152_461, 72_015.6),
    ),
    "librispeech_conformer": (
        ("ademamix", _A100, 67_706, 48_894.9),
        ("schedule_free_adamw_v2", _A100, 83_184, 55_846.4),
    ),
    "librispeech_deepspeech": (
        ("schedule_free_adamw_v2", _A100, 78_669, 41_911.2),
        ("schedule_free_adamw", _A100, 90_588, 40_463.4),
    ),
    "ogbg": (
        ("CASPR", _V100, 6_654, 2_192.0),
        ("muon_torch", _A100, 7_711, 1_833.5),
        ("schedule_free_adamw", _A100, 15_853, 3_640.1),
        ("nadamw_baselinev05", _A100, 20_879, 4_089.8),
        ("ademamix", _A100, 27_247, 6_330.0),
        ("schedule_free_adamw_v2", _A100, 28_449, 6_325.4),
    ),
    "wmt": (
        ("schedule_free_adamw_v2", _A100, 73_222, 10_325.5),
        ("muon_torch", _A100, 97_224, 14_214.8),
        ("ademamix", _A100, 112_742, 17_399.6),
        ("nadamw_baselinev05", _A100, 118_600, 14_865.8),
        ("schedule_free_adamw", _A100, 133_517, 19_957.7),
    ),
}


def leaderboard_rows(workload: str) -> list[Entry]:
    """The entries that reached a workload's target, fewest steps first."""
    return [
        Entry(f"{name} ({hardware})", steps, seconds)
        for name, hardware, steps, seconds in _ENTRIES.get(workload, ())
    ]
