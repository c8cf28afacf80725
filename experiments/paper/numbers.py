"""The numbers of the paper's tables, to stand beside ours.

Source: Eschenhagen et al., NeurIPS 2023, arXiv 2311.00636. Those of Figures 3 to 5 are in
`steps_to_target.paper`. Pairs are mean and standard error.
"""

from __future__ import annotations

UPDATE_STEP_SECONDS: dict[str, dict[int, tuple[float, float] | None]] = {
    # Tables 1 and 3: Wide ResNet 16-4 on CIFAR-10, one V100, over 10 epochs; None: out of memory.
    "expand": {
        128: (0.24, 0.01),
        256: (0.38, 0.02),
        512: (0.75, 0.03),
        1024: (1.36, 0.05),
        2048: None,
    },
    "reduce": {
        128: (0.17, 0.01),
        256: (0.24, 0.02),
        512: (0.43, 0.03),
        1024: (0.63, 0.04),
        2048: (1.17, 0.08),
    },
}

# Table 4: K-FAC GGN of GPT-2 (nanoGPT) over all of DART, over 3 runs; and percent of expand's.
GGN_MINUTES = {"expand": (9.55, 0.13), "reduce": (6.68, 0.04)}
GGN_PERCENT = {"expand": 100, "reduce": 70}

# Tables 2 and 5: Wide ResNet 16-4 with Fixup on CIFAR-10, over 3 seeds; by (method, augmented).
TEST_NLL = {
    ("expand", False): (0.422, 0.013),
    ("expand", True): (0.244, 0.004),
    ("reduce", False): (0.703, 0.012),
    ("reduce", True): (0.352, 0.008),
}
TEST_ACCURACY_PERCENT = {
    ("expand", False): (88.89, 0.24),
    ("expand", True): (92.52, 0.12),
    ("reduce", False): (86.71, 0.13),
    ("reduce", True): (93.50, 0.06),
}
# One update of the weight decays, on an A100; and percent of expand's.
UPDATE_SECONDS = {"expand": (196, 22), "reduce": (99, 23)}
UPDATE_PERCENT = {"expand": 100.0, "reduce": 50.5}


def shown(pair: tuple[float, float] | None, digits: int = 2) -> str:
    """'0.24 ± 0.01', or OOM."""
    return "OOM" if pair is None else f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"
