"""Which 8-bit code may the moments of AdamW rest in? A study of errors, then of training; docs/int8.md tells the outcome.

    python benchmarks/int8_codes.py [--effort {quick,default,long}] [--only {errors,digits,characters,words} ...] [--json FILE]

Everything is computed in float32; after each step the moments are put into a code and taken out of it again.
The numbers are the same in every run on one machine, the losses to the last digits those of its torch.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.optim import Optimizer

from adamfused import machine
from adamfused.demo import data
from adamfused.demo.mnist import small_cnn
from adamfused.demo.train import batches
from adamfused.formats import CODES, Code, Random, get, place_key, put, scales_shape

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import charlm  # noqa: E402

RESULT = Path(__file__).resolve().parent / "results" / "int8_codes.json"
SMALL = 4096  # parameters of fewer elements keep float32 moments

# ---- Dither: 32 random bits an element, which decide between the code below and the one above ------

Dither = Callable[[Random, int], Tensor]
"""Of a tensor and step, and the number of elements: words, int64 in 0..2^32-1."""
WORD = 0xFFFFFFFF
PLANE = 0xC13FA9A9, 0x91E10DA5  # 2^32 over 1.3247, the root of x^3 = x + 1, and over its square


def nearest(random: Random, n: int) -> Tensor:
    """No dither: halves go up."""
    return torch.tensor(0x80000000)


def fresh(random: Random, n: int) -> Tensor:
    """Another hash of the element in each step."""
    return random.words(n, torch.device("cpu"))


def golden(random: Random, n: int) -> Tensor:
    """One hash of the element for all steps and both moments; each step adds the golden ratio to it."""
    return random.dither(n, torch.device("cpu"))


def apart(random: Random, n: int) -> Tensor:
    """The same, with a hash for each moment."""
    return golden(random._replace(key=random.key + random.slot, slot=0), n)


def lattice(random: Random, n: int) -> Tensor:
    """No hash: the element times one number plus the step times another."""
    return (torch.arange(n) * PLANE[0] + random.t * PLANE[1] + random.slot * (WORD // 3)) & WORD


def upper(bits: int, dither: Dither) -> Dither:
    """The upper bits of a dither alone."""
    return lambda random, n: dither(random, n) & ~(WORD >> bits)


# ---- Codes: from a number to one that 8 bits can tell ----------------------------------------------

Coder = Callable[[Tensor, bool, Callable[[int], Tensor]], Tensor]
"""Of numbers, whether they have signs, and what gives ``n`` words: what comes back, of the same shape."""


def by_block(x: Tensor, block: int) -> Tensor:
    """(blocks, block), the last filled up with zeros."""
    flat = x.reshape(-1)
    return pad(flat, (0, -len(flat) % block)).view(-1, block)


def as_before(blocks: Tensor, x: Tensor) -> Tensor:
    return blocks.reshape(-1)[: x.numel()].view(x.shape)


@cache
def code_of(mantissa: int, signed: bool) -> Code:
    """The code of formats.py with that many bits of mantissa, as wide as 8 bits make it."""
    octaves = (128 if signed else 256) >> mantissa
    return Code(2.0**-octaves, mantissa, 127 if signed else 254, -128 if signed else 255)


def log_linear(mantissa: int, block: int = 128, power: bool = True) -> Coder:
    """Codes as formats.py has them; ``power``: a block's scale is a power of two, not its largest number's."""

    def coded(x: Tensor, signed: bool, words: Callable[[int], Tensor]) -> Tensor:
        code = code_of(mantissa, signed)
        numbers = by_block(x, block)
        largest = numbers.abs().amax(1, keepdim=True).clamp(min=2.0**-120)
        if power:
            largest = (largest.view(torch.int32) + 0x7FFFFF & 0x7F800000).view(torch.float32)
        y = numbers.abs() * (torch.full_like(largest, code.largest) / largest)
        dither = (words(y.numel()) >> 32 - code.shift).to(torch.int32)
        bits = (y + code.c).view(torch.int32) - code.base
        number = (bits + (dither.view(y.shape) if dither.dim() else dither)) >> code.shift
        number = number.clamp(max=code.top)
        if not signed:
            number = torch.where(numbers > 0, number.clamp(min=1), number)
        back = ((number << code.shift) + code.base).view(torch.float32) - code.c
        return as_before((back * (largest * (1.0 / code.largest))).copysign(numbers), x)

    return coded


def even(
    block: int = 128,
    root: bool = False,
    floor: bool = False,
    soft: bool = False,
    half: bool = False,
) -> Coder:
    """Evenly spaced parts of the block's largest.

    Args:
        block: numbers that have one scale.
        root: spaces the roots of what has no sign.
        floor: tells what has no sign from zero.
        soft: spaces 2x / (1 + |x|) where there are signs.
        half: rounds the scale to float16.
    """

    def coded(x: Tensor, signed: bool, words: Callable[[int], Tensor]) -> Tensor:
        top = 127 if signed else 255
        numbers = by_block(x.sqrt() if root and not signed else x, block)
        scale = numbers.abs().amax(1, keepdim=True)
        y = numbers / scale.clamp(min=2.0**-120)
        if soft and signed:
            y = 2 * y / (1 + y.abs())
        up = words(y.numel()).float() * 2.0**-32
        number = (y * top + (up.view(y.shape) if up.dim() else up)).floor().clamp(-top, top)
        if floor and not signed:
            number = torch.where(numbers > 0, number.clamp(min=1), number)
        z = number / top
        if soft and signed:
            z = z / (2 - z.abs())
        z = z * (scale.half().float() if half else scale)
        return as_before(z * z if root and not signed else z, x)

    return coded


@cache
def book(signed: bool) -> Tensor:
    """256 numbers up to 1: 0, 1 and, in each of seven decades, twice as many evenly spaced ones as in that below."""
    numbers = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        middles = [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / count) for j in range(count)]
        numbers += middles + [-x for x in middles if signed]
    return torch.tensor(sorted(numbers))


def dynamic(x: Tensor, signed: bool, words: Callable[[int], Tensor]) -> Tensor:
    """The nearest number of a code book that spends its bits on the exponent as it needs them; blocks of 256."""
    numbers, codes = by_block(x, 256), book(signed)
    scale = numbers.abs().amax(1, keepdim=True)
    y = numbers / scale.clamp(min=2.0**-120)
    return as_before(codes[torch.bucketize(y, (codes[1:] + codes[:-1]) / 2)] * scale, x)


def exact(x: Tensor, signed: bool, words: Callable[[int], Tensor]) -> Tensor:
    return x


class Candidate(NamedTuple):
    """How both moments rest."""

    m: Coder
    v: Coder
    dither: Dither

    def coded(self, m: Tensor, v: Tensor, place: int, t: int) -> tuple[Tensor, Tensor]:
        """Both moments of the tensor at a place, as they come back after step ``t``."""
        random = Random.at_step(place_key(0, place), t)
        words = [partial(self.dither, random.of(slot)) for slot in (2, 3)]
        return self.m(m, True, words[0]), self.v(v, False, words[1])


def ours(m: int, v: int, dither: Dither, block: int = 128, power: bool = True) -> Candidate:
    return Candidate(log_linear(m, block, power), log_linear(v, block, power), dither)


def both(coder: Coder, dither: Dither = nearest) -> Candidate:
    return Candidate(coder, coder, dither)


SOFT = even(32, root=True, soft=True, half=True)
ROOT = even(root=True, floor=True)
CANDIDATES: dict[str, Candidate] = {
    "float32": both(exact),
    "m3 v3, golden": ours(3, 3, golden),
    "m3 v3, golden, a hash each": ours(3, 3, apart),
    "m3 v3, golden, 16 bits": ours(3, 3, upper(16, golden)),
    "m3 v3, golden, 8 bits": ours(3, 3, upper(8, golden)),
    "m3 v3, lattice": ours(3, 3, lattice),
    "m3 v3, fresh": ours(3, 3, fresh),
    "m3 v3, nearest": ours(3, 3, nearest),
    "m3 v3, golden, largest exact": ours(3, 3, golden, power=False),
    "m3 v3, fresh, largest exact": ours(3, 3, fresh, power=False),
    "m3 v3, nearest, largest exact": ours(3, 3, nearest, power=False),
    "m3 v3, golden, blocks of 32": ours(3, 3, golden, 32),
    "m3 v3, golden, blocks of 64": ours(3, 3, golden, 64),
    "m3 v3, golden, blocks of 256": ours(3, 3, golden, 256),
    "m2 v3, golden": ours(2, 3, golden),
    "m4 v3, golden": ours(4, 3, golden),
    "m3 v4, golden": ours(3, 4, golden),
    "m4 v4, golden": ours(4, 4, golden),
    "m3 v4, fresh, largest exact": ours(3, 4, fresh, power=False),
    "m3 v5, golden": ours(3, 5, golden),
    "m3 alone, golden": Candidate(log_linear(3), exact, golden),
    "v3 alone, golden": Candidate(exact, log_linear(3), golden),
    "absmax, nearest": both(even()),
    "absmax, golden": both(even(), golden),
    "roots, floor, nearest": both(ROOT),
    "roots, floor, golden": both(ROOT, golden),
    "softsign, groups of 32": both(SOFT),
    "softsign, golden": both(SOFT, golden),
    "dynamic, blocks of 256": both(dynamic),
}

# ---- Errors: the same gradients, with float32 moments and with coded ones --------------------------

ELEMENTS = 4096  # of a scenario
TURN = 100  # steps after which gradients change, where they do; and steps of a displacement
SCENARIOS = {
    "plain": "a mean of 0.2 and a deviation of 1",
    "1e-9": "that times 1e-9",
    "1e3": "that times 1e3",
    "t scales": "times a size of its own for each element, Student's t of 2 degrees of freedom",
    "t noise": "the noise is Student's t of 3 degrees of freedom",
    "rows 1e3": "every other row of 16 times 1e-3",
    "rare": "rows of 64 that have a gradient in one step of 100",
    "mixed": "every other row of 32 has a gradient in one step of 100",
    "sparse": "each element has a gradient in one step of 50",
    "shrink": "every other element's is ten times less after 100 steps",
    "stops": "every other row of 32 has none after 100 steps",
}
NAMES = tuple(SCENARIOS)
DRIFT = "rows that stopped, beta1 0.99, learning rates a step"


def gradients(steps: int) -> Iterator[Tensor]:
    """Yields (scenarios, ELEMENTS), the same in each call."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator)
    chance = partial(torch.rand, generator=generator)
    n, i = ELEMENTS, torch.arange(ELEMENTS)
    rows = {name: NAMES.index(name) for name in NAMES}
    odd = i // 32 % 2 == 1
    size = torch.ones(len(NAMES), n)
    size[rows["1e-9"]], size[rows["1e3"]] = 1e-9, 1e3
    size[rows["t scales"]] = draw(n).abs() / draw(2, n).square().mean(0).sqrt()
    size[rows["rows 1e3"], i // 16 % 2 == 1] = 1e-3
    mean = 0.2 * draw(len(NAMES), n)
    for t in range(1, steps + 1):
        noise = draw(len(NAMES), n)
        noise[rows["t noise"]] /= draw(3, n).square().mean(0).sqrt()
        g = size * (mean + noise)
        g[rows["rare"]] *= (chance(n // 64) < 0.01).repeat_interleave(64)
        g[rows["mixed"]] *= (chance(n // 32) < 0.01).repeat_interleave(32) | ~odd
        g[rows["sparse"]] *= chance(n) < 0.02
        if t > TURN:
            g[rows["shrink"], i % 2 == 1] *= 0.1
            g[rows["stops"], odd] = 0.0
        yield g


class Walk(NamedTuple):
    """What a walk leaves, each (scenarios, ELEMENTS) or (scenarios,).

    Args:
        first: how far the weights went in the first 100 steps, in learning rates.
        last: and in the last.
        m: the moments at the end.
        v: the same.
        worst: the largest single step.
    """

    first: Tensor
    last: Tensor
    m: Tensor
    v: Tensor
    worst: Tensor


def walk(candidate: Candidate, steps: int, beta1: float = 0.9, beta2: float = 0.999) -> Walk:
    """AdamW without decay, eps 1e-8."""
    m, v, p, before, worst = (torch.zeros(len(NAMES), ELEMENTS) for _ in range(5))
    for t, g in enumerate(gradients(steps), 1):
        m = m + (1 - beta1) * (g - m)
        v = v + (1 - beta2) * (g * g - v)
        d = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        p, worst = p - d, torch.maximum(worst, d.abs())
        m, v = candidate.coded(m, v, 0, t)
        if t == TURN:
            first = p
        if t == steps - TURN:
            before = p
    return Walk(first, p - before, m, v, worst.amax(1))


def nmse(x: Tensor, right: Tensor) -> Tensor:
    return (x - right).square().sum(1) / right.square().sum(1)


def cosine(x: Tensor, right: Tensor) -> Tensor:
    return torch.cosine_similarity(x.double(), right.double(), dim=1)


def errors(candidate: Candidate, steps: int) -> dict[str, list[float]]:
    """By figure, one number a scenario."""
    right, found = _right(steps), walk(candidate, steps)
    m, v = candidate.coded(right.m, right.v, 1, 1)
    some = right.v > 0
    ratio = torch.where(some, found.v / right.v, 1.0)
    once = torch.where(some, v / right.v, 1.0)
    drift = walk(candidate, steps, beta1=0.99).last[NAMES.index("stops")].view(-1, 2, 32)[:, 1]
    return {
        "m, one code, NMSE": nmse(m, right.m).tolist(),
        "v, one code, relative": (once - 1).square().mean(1).sqrt().tolist(),
        "first 100 steps, NMSE": nmse(found.first, right.first).tolist(),
        "first 100 steps, cosine": cosine(found.first, right.first).tolist(),
        "last 100 steps, NMSE": nmse(found.last, right.last).tolist(),
        "last 100 steps, cosine": cosine(found.last, right.last).tolist(),
        "v at the end, median of the ratio": ratio.median(1).values.tolist(),
        "v at the end, relative": (ratio - 1).square().mean(1).sqrt().tolist(),
        "largest step": found.worst.tolist(),
        DRIFT: [drift.abs().mean().item() / TURN],
    }


@cache
def _right(steps: int) -> Walk:
    return walk(CANDIDATES["float32"], steps)


def shipped(candidate: Candidate) -> bool:
    """Whether formats.py codes both moments in the candidate's way, bit for bit."""
    x, random = next(gradients(1)), Random.at_step(12345, 1)
    for dtype, coder in zip(CODES, candidate[:2], strict=True):
        x = x if dtype.is_signed else x.abs()
        codes, scale = torch.empty_like(x, dtype=dtype), torch.empty(scales_shape(x.shape))
        put(x, codes, scale, random)
        words = partial(candidate.dither, random)
        if not get(codes, torch.float32, scale).equal(coder(x, dtype.is_signed, words)):
            return False
    return True


# ---- Training --------------------------------------------------------------------------------------

Make = Callable[..., Optimizer]
"""Of parameters, lr, betas and weight_decay, as torch.optim.AdamW."""


class Coded(torch.optim.AdamW):
    """AdamW whose moments go through a code after each step."""

    def __init__(self, params: Any, candidate: Candidate, **settings: Any) -> None:
        super().__init__(params, fused=True, **settings)
        self.candidate = candidate

    def step(self, closure: Any = None) -> Any:
        """Makes a step."""
        loss = super().step(closure)
        for place, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if p.numel() >= SMALL:
                state = self.state[p]
                m, v = state["exp_avg"], state["exp_avg_sq"]
                for new, old in zip(
                    self.candidate.coded(m, v, place, int(state["step"])), (m, v), strict=True
                ):
                    old.copy_(new)
        return loss


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    pieces: Iterator[tuple[Tensor, Tensor]],
    held_out: Sequence[tuple[Tensor, Tensor]],
    steps: int,
) -> float:
    """Trains on so many pieces, gradients clipped to 1, and returns the mean loss on what was held out, in nats."""

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(inputs).flatten(0, -2), targets.flatten())

    for piece in islice(pieces, steps):
        optimizer.zero_grad()
        loss(*piece).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return fmean(loss(*piece).item() for piece in held_out)


def digits(make: Make, seed: int, steps: int = 300) -> float:
    """The demo's network on its handwritten digits, batches of 64: 421,642 parameters."""
    torch.manual_seed(seed)
    found = data.load()
    model = small_cnn()
    optimizer = make(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    images, labels = found.train
    order = batches(len(images), 64, seed)
    return fit(model, optimizer, ((images[i], labels[i]) for i in order), [found.test], steps)


def characters(make: Make, seed: int, steps: int = 150) -> float:
    """The GPT of examples/charlm.py on Python's manual: 825,856 parameters."""
    torch.manual_seed(seed)
    text = charlm.manual()
    model = charlm.GPT(len(text.alphabet), charlm.CONTEXT)
    optimizer = make(charlm.groups(model), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    pieces = charlm.batches(text.train, charlm.BATCH, charlm.CONTEXT, seed)
    held_out = islice(charlm.batches(text.validation, 128, charlm.CONTEXT, 0), 4)
    return fit(model, optimizer, pieces, list(held_out), steps)


@cache
def _words() -> tuple[Tensor, int]:
    """The manual's words in their order, numbered by how frequent they are, and how many different ones there are."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(topics[name] for name in sorted(topics)).lower())
    number = {word: i for i, (word, _) in enumerate(Counter(words).most_common())}
    return torch.tensor([number[word] for word in words]), len(number)


def words(make: Make, seed: int, steps: int = 400) -> float:
    """The next word after four, by rows of 32 numbers a word, of which most have a gradient in few steps."""
    torch.manual_seed(seed)
    text, size = _words()
    cut = len(text) * 9 // 10
    model = nn.Sequential(
        nn.Embedding(size, 32), nn.Flatten(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, size)
    )
    optimizer = make(model.parameters(), lr=3e-3, betas=(0.9, 0.999), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)

    def at(starts: Tensor) -> tuple[Tensor, Tensor]:
        found = text[starts[:, None] + torch.arange(5)]
        return found[:, :4], found[:, 4]

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield at(torch.randint(cut - 5, (256,), generator=generator))

    return fit(model, optimizer, pieces(), [at(torch.arange(cut, len(text) - 5, 2))], steps)


TASKS: dict[str, Callable[..., float]] = {
    "digits": digits,
    "characters": characters,
    "words": words,
}
OURS = "m3 v3, golden"
TRAINED = (
    "float32",
    OURS,
    "m3 v3, nearest",
    "absmax, nearest",
    "softsign, groups of 32",
    "dynamic, blocks of 256",
)


class Effort(NamedTuple):
    """How much is tried.

    Args:
        walk: steps of a walk.
        steps: of each task.
        trained: the candidates that train.
        seeds: of float32, and of the others.
    """

    walk: int = 1000
    steps: Mapping[str, int] = {"digits": 100, "characters": 60, "words": 300}
    trained: Sequence[str] = TRAINED
    seeds: tuple[int, int] = (5, 2)


EFFORTS = {
    "quick": Effort(250, {"digits": 20, "characters": 4, "words": 40}, TRAINED, (2, 1)),
    "default": Effort(),
    "long": Effort(1000, {"digits": 300, "characters": 500, "words": 1000}, TRAINED[:2], (5, 5)),
}

# ---- Tables ----------------------------------------------------------------------------------------


def number(x: float) -> str:
    return f"{x:.2g}" if math.isfinite(x) else str(x)


def compare_errors(effort: Effort) -> dict[str, dict[str, list[float]]]:
    """Prints a line a candidate and scenario, and returns every figure."""
    found: dict[str, dict[str, list[float]]] = {}
    heads = " ".join(f"{name:>15}" for name in NAMES)
    print(
        "NMSE of the way of the weights in the first and last 100 steps; * is what formats.py does"
    )
    print(f"{'':32}{heads} {'stopped':>8} {'largest':>8}")
    for name, candidate in CANDIDATES.items():
        its = found[name] = errors(candidate, effort.walk)
        first, last = its["first 100 steps, NMSE"], its["last 100 steps, NMSE"]
        cells = [f"{number(a) + ' ' + number(b):>15}" for a, b in zip(first, last, strict=True)]
        ends = [its[DRIFT][0], max(its["largest step"])]
        mark = "*" if name != "float32" and shipped(candidate) else " "
        print(
            f"{mark}{name:31}{' '.join(cells)} {number(ends[0]):>8} {number(ends[1]):>8}",
            flush=True,
        )
    return found


def compare_training(tasks: Sequence[str], effort: Effort) -> dict[str, dict[str, list[float]]]:
    """Prints a line a task and candidate, and returns every loss."""
    found: dict[str, dict[str, list[float]]] = {}
    print(
        "\nLoss on what was held out, nats: mean, deviation, and what it is beyond that of float32"
    )
    for task in tasks:
        steps = effort.steps[task]
        losses = found[f"{task}, {steps} steps"] = {}
        for name in effort.trained:
            make = partial(Coded, candidate=CANDIDATES[name])
            seeds = effort.seeds[name != "float32"]
            its = losses[name] = [TASKS[task](make, seed, steps) for seed in range(seeds)]
            beyond = fmean(x - y for x, y in zip(its, losses["float32"], strict=False))
            spread = f"{stdev(its):.4f}" if len(its) > 1 else ""
            print(
                f"{task:12}{steps:5} steps  {name:24}{fmean(its):8.4f} {spread:>8} {beyond:+8.4f}",
                flush=True,
            )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Compares, and writes what was found."""
    parser = argparse.ArgumentParser(description="Compare 8-bit codes of AdamW's moments.")
    parser.add_argument("--effort", choices=EFFORTS, default="default")
    parser.add_argument("--only", nargs="+", choices=["errors", *TASKS], default=["errors", *TASKS])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure")
    args = parser.parse_args(argv)
    effort = EFFORTS[args.effort]
    torch.set_num_threads(1)  # so that sums have one order, and others may use the machine
    found: dict[str, Any] = machine.facts()
    if "errors" in args.only:
        found["scenarios"] = SCENARIOS
        found["errors"] = compare_errors(effort)
    found["losses"] = compare_training([task for task in TASKS if task in args.only], effort)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
