"""What is stepped: one tensor of some size, many small ones, or a model's list of parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Shapes = list[tuple[int, ...]]

MOST_TENSORS = 10**6


def gpt2(layers: int = 12, d: int = 768) -> Shapes:
    """GPT-2 (Radford et al. 2019), tied embeddings; by default the small one."""
    norm: Shapes = [(d,), (d,)]
    attention: Shapes = [(d, 3 * d), (3 * d,), (d, d), (d,)]
    mlp: Shapes = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(layers * (norm + attention + norm + mlp)), *norm]


def bert_base() -> Shapes:
    """BERT-base-uncased (Devlin et al. 2018), with the pooler."""
    d = 768
    norm: Shapes = [(d,), (d,)]
    linear: Shapes = [(d, d), (d,)]
    mlp: Shapes = [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    layer = 4 * linear + norm + mlp + norm
    return [(30522, d), (512, d), (2, d), *norm, *(12 * layer), *linear]


def resnet50() -> Shapes:
    """ResNet-50 (He et al. 2015) for 1,000 classes."""

    def conv(out: int, into: int, side: int) -> Shapes:
        return [(out, into, side, side), (out,), (out,)]  # the batch norm after it has two

    shapes = conv(64, 3, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(width, into, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            if block == 0:
                shapes += conv(4 * width, into, 1)  # the shortcut, where the width changes
            into = 4 * width
    return [*shapes, (1000, into), (1000,)]


def llama(layers: int, d: int, kv: int, ff: int, tied: bool) -> Shapes:
    """Llama 3 (Dubey et al. 2024): ``kv`` is the width of keys and values, ``ff`` of the feed-forward part."""
    attention: Shapes = [(d, d), (kv, d), (kv, d), (d, d)]
    layer = [*attention, (ff, d), (ff, d), (d, ff), (d,), (d,)]
    return [(128256, d), *(layers * layer), (d,), *([] if tied else [(128256, d)])]


MODELS: dict[str, Callable[[], Shapes]] = {
    "gpt2": gpt2,
    "bert-base": bert_base,
    "resnet50": resnet50,
    "llama-1b": lambda: llama(16, 2048, 512, 8192, tied=True),
}


@dataclass(frozen=True)
class Case:
    """A list of parameters to step.

    Args:
        name: what tables call it.
        shapes: of its tensors.

    Example:
        >>> Case.parse("1000x16").numel
        16000
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Case:
        """Reads ``1e7`` (one tensor of so many elements), ``1000x16`` (tensors x elements) or a model's name.

        Raises:
            ValueError: if the text is none of these.
        """
        if text in MODELS:
            return cls(text, tuple(MODELS[text]()))
        count, times, elements = text.rpartition("x")
        try:
            tensors, numel = _number(count if times else "1", MOST_TENSORS), _number(elements)
        except ValueError:
            raise ValueError(
                f"{text!r} is no size; expected a number of elements such as 1e7, tensors x elements such as "
                f"1000x16 (at most {MOST_TENSORS:,} tensors), or a model: {', '.join(MODELS)}"
            ) from None
        return cls(text, tensors * ((numel,),))

    @property
    def numel(self) -> int:
        """Elements in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)


def parse_cases(text: str) -> Iterator[Case]:
    """Reads cases with commas between; ``1e3..1e8`` stands for one a decade.

    Raises:
        ValueError: if one of them cannot be read.
    """
    for part in filter(None, (part.strip() for part in text.split(","))):
        sweep = re.fullmatch(r"1e(\d+)\.\.1e(\d+)", part)
        if ".." in part and not (sweep and int(sweep[1]) <= int(sweep[2])):
            raise ValueError(
                f"{part!r} is no sweep; expected powers of ten, the smaller first, such as 1e3..1e8"
            )
        names = [part] if not sweep else [f"1e{i}" for i in range(int(sweep[1]), int(sweep[2]) + 1)]
        yield from map(Case.parse, names)


def _number(text: str, most: float = math.inf) -> int:
    value = float(text)
    if not (value.is_integer() and 1 <= value <= most):
        raise ValueError(text)
    return int(value)
