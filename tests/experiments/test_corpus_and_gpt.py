import argparse
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from experiments import corpus
from experiments import gpt_ggn_timing as timing
from experiments.models.gpt import GPT, GPTShape
from quickstart.errors import QuickstartError
from submission.kfac import kronecker_factors

SHAPE = GPTShape(vocabulary=5, block_size=6, layers=2, heads=2, width=8)


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    timing.add_flags(parser)
    return parser.parse_args(["--device=cpu", *flags])


def test_a_later_token_does_not_change_earlier_logits() -> None:
    torch.manual_seed(0)
    model = GPT(SHAPE).double()
    tokens = torch.randint(5, (2, 6))
    before = model(tokens)
    tokens[:, 4] = (tokens[:, 4] + 1) % 5
    after = model(tokens)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:])


def test_shapes_are_those_of_gpt2() -> None:
    with torch.device("meta"):
        model = GPT(timing.PRESETS["gpt2"])
    # 124,439,808 with a vocabulary of 50,257.
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 + (50_304 - 50_257) * 768
    with pytest.raises(ValueError, match="3 heads do not divide a width of 8"):
        GPTShape(17, 6, 2, 3, 8)


@pytest.mark.parametrize("approx", timing.APPROXES)
def test_batches_add_up_to_the_factors_of_the_corpus(
    approx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timing.make_model(SHAPE, torch.device("cpu")).double()
    data = torch.randint(5, (7, 6), generator=torch.Generator().manual_seed(0))
    # Sampled labels depend on the batches; the exact GGN does not.
    exact = {"likelihood": "categorical", "kfac_approx": approx, "fisher_type": "type-2"}
    whole = kronecker_factors(model, data, **exact)

    def exact_factors(model: torch.nn.Module, tokens: torch.Tensor, **given: object) -> object:
        assert given["kfac_approx"] in timing.APPROXES
        return kronecker_factors(model, tokens, **{**given, "fisher_type": "type-2"})

    monkeypatch.setattr(timing, "kronecker_factors", exact_factors)
    seconds, sums = timing.one_pass(model, data, batch_size=3)[approx]
    assert seconds > 0
    assert sums.keys() == whole.keys()
    assert len(sums) == 4 * SHAPE.layers  # embeddings, norms and the tied head are left out
    for name, (a, b) in sums.items():
        torch.testing.assert_close(a, whole[name].input_covariance)
        torch.testing.assert_close(b, whole[name].gradient_covariance)


def test_run_on_a_text_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.PRESETS, "cpu", GPTShape(corpus.BYTES, 6, 1, 1, 4))
    path = tmp_path / "text.txt"
    path.write_text("in the beginning was the word" * 3)
    result = timing.run(options("--text", str(path), "--repeats=2"), tmp_path, Console(quiet=True))
    assert result["tokens"] == 84
    (table,) = timing.tables(result)
    assert "text.txt" in table.title
    assert table.rows[0][2] == "100%"
    assert timing.draw(result, tmp_path / "picture.png")


def test_tokens_of_a_file_must_fit_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    np.array([3, 50_000] * 100, dtype=np.uint16).tofile(path)
    with pytest.raises(QuickstartError, match="token 50000, preset cpu has only 256"):
        timing.run(options("--tokens", str(path)), tmp_path, Console(quiet=True))
    with pytest.raises(QuickstartError, match="exclude each other"):
        timing.run(options("--tokens=a", "--text=b"), tmp_path, Console(quiet=True))


def test_dart_becomes_lines(tmp_path: Path) -> None:
    entry = {
        "tripleset": [["Mars Hill", "JOINED", "1973"], ["Mars Hill", "LOCATION", "Carolina"]],
        "annotations": [{"source": "x", "text": "It joined in 1973."}],
    }
    path = tmp_path / "dart.json"
    path.write_text(json.dumps([entry]))
    assert corpus.read_text(path) == (
        "Mars Hill : JOINED : 1973 | Mars Hill : LOCATION : Carolina || It joined in 1973."
    )
    path.write_text('[{"text": 1}]')
    with pytest.raises(QuickstartError, match="is not DART's JSON"):
        corpus.read_text(path)


def test_blocks_and_bytes() -> None:
    tokens = corpus.tokenize("abcdé")
    assert tokens.tolist() == [97, 98, 99, 100, 195, 169]
    assert corpus.blocks(tokens, 4).tolist() == [[97, 98, 99, 100]]
    with pytest.raises(QuickstartError, match="6 tokens do not fill one block of 7"):
        corpus.blocks(tokens, 7)


def test_archive_is_read_and_damage_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "archive.tar.gz"
    lines = b'{"text": "In the beginning"}\n{"text": "And the earth"}\n'
    with tarfile.open(path, "w:gz") as content:
        member = tarfile.TarInfo(corpus.MEMBER)
        member.size = len(lines)
        content.addfile(member, io.BytesIO(lines))
    assert corpus.read_archive(path) == "In the beginning\nAnd the earth"
    path.write_bytes(b"no archive")
    with pytest.raises(QuickstartError, match=r"archive\.tar\.gz is damaged"):
        corpus.read_archive(path)
