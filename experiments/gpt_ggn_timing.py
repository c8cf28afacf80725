"""Table 4: time of the K-FAC GGN approximation of a GPT over a whole text corpus.

For every batch of the corpus: forward pass, one Fisher pass (sampled labels), A and B of all linear
layers of the blocks; the factors of all batches are averaged. Expand and reduce take turns on each
batch, so that whatever else the machine does meets both alike. The embedding and the output layer
tied to it are left out: their factor has the vocabulary's side.

Shapes are nanoGPT's: `cpu` (its preset for laptops), `character` (its Shakespeare model) and `gpt2`
(124 million parameters). Texts are taken as bytes, or by GPT-2's encoding, as nanoGPT does, with
`--encoding gpt2` (which needs the package tiktoken, and its download of the vocabulary);
`--tokens` reads a file of nanoGPT's data preparation instead.

The paper's size, on a GPU: --paper --text dart-v1.1.1-full-train.json
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
from experiments.paper import numbers
from experiments.paper.sizes import PaperSize
from experiments.tables import Table, mean_and_error, plus_minus
from quickstart.errors import QuickstartError
from quickstart.packages import fetch
from submission.kfac import KroneckerFactors, kronecker_factors

SMALL = ["--characters", "100000", "--repeats", "2"]
DART_URL = "https://github.com/Yale-LILY/dart (data/v1.1.1/dart-v1.1.1-full-train.json)"


def _missing_text(options: argparse.Namespace) -> str | None:
    path = options.text or options.tokens
    if path is None:
        return f"DART is missing: --text FILE, from {DART_URL}, or --tokens FILE"
    if not path.is_file():
        return f"{path} is missing; DART is at {DART_URL}"
    if options.text is not None and options.encoding == "gpt2" and not corpus.has_encoder():
        return "the package tiktoken is missing: pip install tiktoken, or give --encoding bytes"
    return None


PAPER_SIZE = PaperSize(
    table="Table 4: the K-FAC GGN of GPT-2 (nanoGPT) over all of DART",
    flags=("--preset=gpt2", "--encoding=gpt2", "--batch-size=8", "--repeats=3"),
    runs="2 approximations x 3 passes over the corpus, in turns",
    hardware="not told",
    time="3 x 9.55 ± 0.13 minutes for expand, 3 x 6.68 ± 0.04 for reduce",
    missing=_missing_text,
)
PAPER = """
The paper has GPT-2 in nanoGPT's form on the whole DART data set, mean ± s.e. over three passes; its
batch size (8 is ours) and GPU are not told. At its size:
`./run.sh experiments gpt_ggn_timing --paper --text dart-v1.1.1-full-train.json`
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
    add("--encoding", choices=("bytes", "gpt2"), default="bytes",
        help="of texts: bytes, or GPT-2's (default: bytes)")  # fmt: skip
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
        encode = corpus.encode_gpt2 if options.encoding == "gpt2" else corpus.tokenize
        return encode(corpus.read_text(options.text)), options.text.name
    archive = fetch(corpus.ARCHIVE, results.DEFAULT_DATA_DIR / "downloads")
    text = corpus.read_archive(archive)[: options.characters]
    return corpus.tokenize(text), f"the first {len(text):,} characters of the King James Bible"


def tables(result: dict[str, Any]) -> list[Table]:
    """Seconds of a pass, and relative to expand; the paper's beside them."""
    expand = mean_and_error(result["seconds"]["expand"])[0]
    rows = tuple(
        (f"K-FAC-{a}", plus_minus(seconds, 2), f"{mean_and_error(seconds)[0] / expand:.0%}",
         f"{numbers.shown(numbers.GGN_MINUTES[a])} min", f"{numbers.GGN_PERCENT[a]}%")
        for a, seconds in result["seconds"].items()
    )  # fmt: skip
    title = f"Seconds for one pass, mean ± s.e. ({result['corpus']}, {result['tokens']:,} tokens)"
    header = ("", "seconds", "of expand's time", "the paper's GPT-2 on DART", "of expand's time")
    return [Table(title, header, rows)]


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
