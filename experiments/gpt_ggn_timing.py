"""Table 4: time of the K-FAC GGN approximation of a GPT over a whole text corpus.

For every batch of the corpus: forward pass, one Fisher pass (sampled labels), A and B of all linear
layers of the blocks; the factors of all batches are averaged. Expand and reduce take turns on each
batch, so that whatever else the machine does meets both alike. The embedding and the output layer
tied to it are left out: their factor has the vocabulary's side.

Shapes are nanoGPT's: `cpu` (its preset for laptops), `character` (its Shakespeare model) and `gpt2`
(124 million parameters). Texts are taken as bytes; `--tokens` reads a file of nanoGPT's data
preparation instead.

The paper's size, on a GPU: --preset gpt2 --text DART.json --batch-size 8 --repeats 3
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from experiments import corpus, pictures, results
from experiments.models.gpt import GPT, GPTShape
from experiments.tables import Table, mean_and_error, plus_minus
from quickstart.errors import QuickstartError
from submission.kfac import KroneckerFactors, kronecker_factors

SMALL = ["--characters", "100000", "--repeats", "2"]
PAPER = """
The paper's Table 4 has a GPT-2 of nanoGPT on DART, on a GPU, where reduce takes about 70 % of
expand's time; its seconds were not available. At its size: `./run.sh experiments gpt_ggn_timing
--preset gpt2 --text dart-v1.1.1-full-train.json --batch-size 8`
"""

APPROXES = ("expand", "reduce")
PRESETS = {
    "cpu": GPTShape(corpus.BYTES, block_size=64, layers=4, heads=4, width=128),
    "character": GPTShape(corpus.BYTES, block_size=256, layers=6, heads=6, width=384),
    "gpt2": GPTShape(50304, block_size=1024, layers=12, heads=12, width=768),
}

Sums = dict[str, tuple[Tensor, Tensor]]


def make_model(shape: GPTShape, device: torch.device) -> nn.Module:
    """The decoder, whose linear layers in blocks alone are trainable."""
    torch.manual_seed(0)
    model = GPT(shape).to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("blocks.") and "norm" not in name)
    return model


def add_factors(sums: Sums, factors: dict[str, KroneckerFactors], share: float) -> None:
    """sums += share · factors, in place; missing layers begin with zero."""
    for name, block in factors.items():
        both = (block.input_covariance * share, block.gradient_covariance * share)
        if name in sums:
            for total, extra in zip(sums[name], both, strict=True):
                total += extra
        else:
            sums[name] = both


def one_batch(model: nn.Module, tokens: Tensor, approx: str, sums: Sums, share: float) -> float:
    """Adds a batch's share of the average factors; returns the seconds that it took."""
    results.synchronize(tokens.device)
    start = time.perf_counter()
    factors = kronecker_factors(
        model, tokens, likelihood="categorical", kfac_approx=approx, fisher_type="mc"
    )
    add_factors(sums, factors, share)
    results.synchronize(tokens.device)
    return time.perf_counter() - start


def one_pass(model: nn.Module, data: Tensor, batch_size: int) -> dict[str, tuple[float, Sums]]:
    """Seconds and average factors of one pass over the corpus, by approximation."""
    seconds = dict.fromkeys(APPROXES, 0.0)
    sums: dict[str, Sums] = {approx: {} for approx in APPROXES}
    batches = torch.split(data, batch_size)
    for number, batch in enumerate(batches):
        order = APPROXES if number % 2 else APPROXES[::-1]
        for approx in order:
            share = len(batch) / len(data)
            seconds[approx] += one_batch(model, batch, approx, sums[approx], share)
    return {approx: (seconds[approx], sums[approx]) for approx in APPROXES}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes, data, device."""
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="cpu", help="nanoGPT's shapes (default: cpu)")
    add("--batch-size", type=int, default=32, help="blocks of text in a batch (default: 32)")
    add("--repeats", type=int, default=3, help="passes over the corpus (default: 3)")
    add("--characters", type=int, default=200_000,
        help="length of the default corpus (default: 200000)")  # fmt: skip
    add("--text", type=Path, help="a text file, or DART's JSON, taken whole")
    add("--tokens", type=Path, help="a file of 16-bit tokens, taken whole")
    add("--device", default=results.default_device())


def run(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Times both approximations on the same corpus."""
    del folder
    if min(options.batch_size, options.repeats, options.characters) < 1:
        raise QuickstartError("--batch-size, --repeats and --characters must be 1 or more")
    shape = PRESETS[options.preset]
    tokens, name = _corpus(options)
    if int(tokens.max(initial=0)) >= shape.vocabulary:
        raise QuickstartError(
            f"{name} has token {int(tokens.max())}, preset {options.preset} has only "
            f"{shape.vocabulary} tokens: use --preset gpt2"
        )
    device = torch.device(options.device)
    data = torch.from_numpy(corpus.blocks(tokens, shape.block_size)).to(device)
    model = make_model(shape, device)
    for approx in APPROXES:  # not counted: the first call of everything is slower
        one_batch(model, data[: options.batch_size], approx, {}, 1.0)
    seconds: dict[str, list[float]] = {approx: [] for approx in APPROXES}
    passes = range(options.repeats)
    for _ in track(passes, "passes over the corpus", console=console, transient=True):
        for approx, (taken, _sums) in one_pass(model, data, options.batch_size).items():
            seconds[approx].append(taken)
    return {"corpus": name, "tokens": data.numel(), "blocks": len(data), "seconds": seconds}


def _corpus(options: argparse.Namespace) -> tuple[corpus.Tokens, str]:
    if options.text and options.tokens:
        raise QuickstartError("--text and --tokens exclude each other")
    if options.tokens:
        return corpus.read_tokens(options.tokens), options.tokens.name
    if options.text:
        return corpus.tokenize(corpus.read_text(options.text)), options.text.name
    archive = corpus.fetch_archive(results.DEFAULT_DATA_DIR / "downloads")
    text = corpus.read_archive(archive)[: options.characters]
    return corpus.tokenize(text), f"the first {len(text):,} characters of the King James Bible"


def tables(result: dict[str, Any]) -> list[Table]:
    """Seconds of a pass, and relative to expand."""
    expand = mean_and_error(result["seconds"]["expand"])[0]
    rows = tuple(
        (f"K-FAC-{a}", plus_minus(seconds, 2), f"{mean_and_error(seconds)[0] / expand:.0%}")
        for a, seconds in result["seconds"].items()
    )
    title = f"Seconds for one pass, mean ± s.e. ({result['corpus']}, {result['tokens']:,} tokens)"
    return [Table(title, ("", "seconds", "of expand's time"), rows)]


def draw(result: dict[str, Any], path: Path) -> bool:
    """Both times as bars."""
    picture, axes = pictures.figure(1, 1, 5, 2)
    axis = axes[0][0]
    for approx in APPROXES[::-1]:
        mean, error = mean_and_error(result["seconds"][approx])
        bars = axis.barh(f"K-FAC-{approx}", mean, xerr=error, color=pictures.COLOURS[approx])
        axis.bar_label(bars, fmt="%.1f s", padding=4)
    axis.margins(x=0.15)
    axis.set_xlabel("seconds for one pass over the corpus")
    pictures.save(picture, path)
    return True
