"""Recordings of Japanese vowels: nine speakers, in the files that the package aeon carries or in the user's own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adamfused.demo.train import DataError

NAME = "JapaneseVowels"
HOW_TO_GET_VOWELS = f"""Install aeon, whose wheel holds them (2 MB; nothing of aeon is imported):
  pip install --no-deps aeon
or give --data-dir the folder with {NAME}_TRAIN.ts and {NAME}_TEST.ts
(https://timeseriesclassification.com/description.php?Dataset={NAME})."""


class Recordings(NamedTuple):
    """Recordings (N, longest, 12) float32, NaN after the end of each, and speakers (N,) int64 in 0..8.

    In the training set each of the 12 coefficients has mean 0 and standard deviation 1.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(data_dir: Path | None = None) -> Recordings:
    """Return the recordings of `data_dir`, or else of aeon."""
    folder, name = (data_dir, data_dir.name) if data_dir else (from_aeon(), "aeon")
    (train, train_speakers), (test, test_speakers) = (
        read_ts(folder / f"{NAME}_{part}.ts") for part in ("TRAIN", "TEST")
    )
    speakers = sorted(set(train_speakers))
    if unknown := set(test_speakers) - set(speakers):
        raise DataError(f"{folder}: no training data of the speakers {', '.join(sorted(unknown))}")
    every = torch.cat(train)
    mean, std = every.mean(0), every.std(0)
    longest = max(map(len, train + test))

    def padded(recordings: list[Tensor]) -> Tensor:
        table = torch.full((len(recordings), longest, every.shape[1]), torch.nan)
        for row, recording in zip(table, recordings, strict=True):
            row[: len(recording)] = (recording - mean) / std
        return table

    def numbers(names: list[str]) -> Tensor:
        return torch.tensor([speakers.index(name) for name in names])

    return Recordings(
        f"Japanese vowels from {name}",
        (padded(train), numbers(train_speakers)),
        (padded(test), numbers(test_speakers)),
    )


def from_aeon() -> Path:
    """Return the folder inside of aeon, without importing aeon."""
    spec = find_spec("aeon")
    if spec is None or spec.origin is None:
        raise DataError(f"no recordings here: aeon is not installed.\n{HOW_TO_GET_VOWELS}")
    folder = Path(spec.origin).parent / "datasets" / "data" / NAME
    if not folder.is_dir():
        raise DataError(f"no recordings here: this aeon has no {NAME}.\n{HOW_TO_GET_VOWELS}")
    return folder


def read_ts(path: Path) -> tuple[list[Tensor], list[str]]:
    """Return the recordings, each (its length, coefficients) float32, and the speaker of each.

    After "@data", a line is one recording: coefficient after coefficient, each a list of numbers with commas between
    them, then the speaker, all with colons between them.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}\n{HOW_TO_GET_VOWELS}") from error
    starts = [i for i, line in enumerate(lines, 1) if line.strip().lower() == "@data"]
    if not starts:
        raise DataError(f"{path}: no line says @data, as one does in a .ts file")
    recordings: list[Tensor] = []
    speakers: list[str] = []
    for number, line in enumerate(lines[starts[0] :], starts[0] + 1):
        if not line.strip():
            continue
        *coefficients, speaker = line.strip().split(":")
        try:
            table = np.array([series.split(",") for series in coefficients], np.float32)
            if table.ndim != 2 or (recordings and len(table) != recordings[0].shape[1]):
                raise ValueError(f"{len(coefficients)} series, expected as many as above")
            if not np.isfinite(table).all():
                raise ValueError("a number that is not finite")
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not a recording: {error}") from error
        recordings.append(torch.from_numpy(table.T.copy()))
        speakers.append(speaker)
    if not recordings:
        raise DataError(f"{path}: got 0 recordings, expected at least 1")
    return recordings, speakers
