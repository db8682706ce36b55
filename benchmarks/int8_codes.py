"""Which 8-bit code may the moments of AdamW rest in? A study of errors, then of training; docs/int8.md has the outcome.

    python benchmarks/int8_codes.py [--quick] [--only NAME ...] [--json FILE]

Everything is computed in float32. After each step both moments are put into a code and taken out again. On one machine
and torch the figures are the same in every run. ``digits``, ``characters`` and ``words`` train with any optimizer.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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

import adamfused
from adamfused import machine
from adamfused.demo import charlm, data
from adamfused.demo.mnist import small_cnn
from adamfused.demo.train import batches
from adamfused.formats import CODES, Random, get, place_key, put, scales_shape

CPU = torch.device("cpu")
SMALL = 4096  # parameters of fewer elements keep float32 moments

# ---- Dither: 32 random bits an element, by which a number is rounded up or down ----------------


Dither = Callable[[Random, int], Tensor]
"""Of a tensor and step, and the number of elements: words, int64 in 0..2^32-1."""
GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio
ROOT_2 = 0x6A09E667  # 2^32 times the root of 2
PLANE = 0xC13FA9A9, 0x91E10DA5  # 2^32 over 1.3247, the root of x^3 = x + 1, and over its square


def nearest(random: Random, n: int) -> Tensor:
    """No dither: halves go up."""
    return torch.full((n,), 0x80000000)


def fresh(random: Random, n: int) -> Tensor:
    """Another hash of the element in each step."""
    return random.words(n, CPU)


def golden(random: Random, n: int) -> Tensor:
    """No hash: each step adds the golden ratio, each element the root of 2; the same for all states, and for elements
    of a block that are 32 apart."""
    return random.dither(n, CPU)


def each(random: Random, n: int) -> Tensor:
    """The same, but others for all elements."""
    return (torch.arange(n) * ROOT_2 + random.t * GOLDEN + random.key) & 0xFFFFFFFF


def hashed(random: Random, n: int) -> Tensor:
    """One hash of the element and state for all steps; each step adds the golden ratio to it."""
    return (random._replace(t=0).words(n, CPU) + random.t * GOLDEN) & 0xFFFFFFFF


def plane(random: Random, n: int) -> Tensor:
    """No hash: the two numbers that fill a plane evenly; the same for all states."""
    return (torch.arange(n) * PLANE[0] + random.t * PLANE[1]) & 0xFFFFFFFF


# ---- Codes: what 8 bits can tell of a number ---------------------------------------------------

Coder = Callable[[Tensor, bool, Random], Tensor]
"""Of numbers, and whether they may be negative: what comes back, of the same shape."""


def by_block(x: Tensor, block: int) -> Tensor:
    """(blocks, block), the last filled up with zeros."""
    flat = x.reshape(-1)
    return pad(flat, (0, -len(flat) % block)).view(-1, block)


def as_before(blocks: Tensor, x: Tensor) -> Tensor:
    """The numbers of ``by_block`` in the shape of ``x``."""
    return blocks.reshape(-1)[: x.numel()].view(x.shape)


def log_linear(
    mantissa: int,
    dither: Dither = golden,
    block: int = 128,
    power: bool = True,
    zero: bool = False,
) -> Coder:
    """The codes of formats.py, of any number of bits of mantissa.

    Args:
        mantissa: bits.
        dither: of the rounding.
        block: numbers that share a scale.
        power: the scale is a power of two, not the largest number.
        zero: what has no sign is even near zero too, which has a code; but what is above it stays so.
    """
    shift, most = 23 - mantissa, 2 - 2.0 ** (1 - mantissa)

    def back(x: Tensor, signed: bool, random: Random) -> Tensor:
        numbers, top = by_block(x, block), 126 if signed else 254
        c = 2.0 ** (1 - ((128 if signed else 256) >> mantissa))
        base, added = int(torch.tensor(c).view(torch.int32)), c * (signed or zero)
        largest = numbers.abs().amax(1, keepdim=True).clamp(min=2.0**-90)
        if power:
            scale = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
            scale = torch.where(largest / scale + added > most, 2 * scale, scale)
        else:
            scale = largest / (most - added)
        y = (numbers.abs() / scale + added).clamp(min=c)
        up = (dither(random, y.numel()) >> 32 - shift).to(torch.int32).view(y.shape)
        number = (y.view(torch.int32) - base + up >> shift).clamp(max=top)
        if zero and not signed:
            number = torch.where(numbers > 0, number.clamp(min=1), number)
        y = ((number << shift) + base).view(torch.float32) - added
        y = torch.where(numbers.any(1, keepdim=True), y, 0.0)
        return as_before((y * scale).copysign(numbers), x)

    return back


def even(dither: Dither = nearest, root: bool = False, soft: bool = False) -> Coder:
    """Evenly spaced parts of a block's largest number.

    Args:
        dither: of the rounding.
        root: of what has no sign the square root, which stays above zero where it is.
        soft: the same without that, 2x / (1 + |x|) of what has a sign, and blocks of 32 with float16 scales.
    """

    def back(x: Tensor, signed: bool, random: Random) -> Tensor:
        top, roots, bend = 127 if signed else 255, (root or soft) and not signed, soft and signed
        numbers = by_block(x.sqrt() if roots else x, 32 if soft else 128)
        scale = numbers.abs().amax(1, keepdim=True)
        y = numbers / scale.clamp(min=2.0**-120)
        y = 2 * y / (1 + y.abs()) if bend else y
        up = dither(random, y.numel()).float().view(y.shape) * 2.0**-32
        z = (y * top + up).floor().clamp(-top, top) / top
        if roots and not soft:
            z = torch.where(numbers > 0, z.clamp(min=1 / top), z)
        z = (z / (2 - z.abs()) if bend else z) * (scale.half().float() if soft else scale)
        return as_before(z * z if roots else z, x)

    return back


@cache
def book(signed: bool) -> Tensor:
    """256 numbers up to 1: 0, 1 and, in each of seven decades, twice as many evenly spaced ones as in that below."""
    numbers = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        middles = [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / count) for j in range(count)]
        numbers += middles + [-x for x in middles if signed]
    return torch.tensor(sorted(numbers))


def dynamic(x: Tensor, signed: bool, random: Random) -> Tensor:
    """The nearest number of the code book times the largest of 256 numbers."""
    numbers, codes = by_block(x, 256), book(signed)
    scale = numbers.abs().amax(1, keepdim=True)
    y = numbers / scale.clamp(min=2.0**-120)
    return as_before(codes[torch.bucketize(y, (codes[1:] + codes[:-1]) / 2)] * scale, x)


def exact(x: Tensor, signed: bool, random: Random) -> Tensor:
    """No code."""
    return x


Candidate = tuple[Coder, Coder]
"""Of the first moment and of the second."""


def coded(candidate: Candidate, m: Tensor, v: Tensor, place: int, t: int) -> tuple[Tensor, Tensor]:
    """Both moments of the tensor at a place among all, as they come back after step ``t``."""
    random = Random.at_step(place_key(0, place), t)
    return candidate[0](m, True, random.of(2)), candidate[1](v, False, random.of(3))


def ours(m: int, v: int, *how: Any, **more: Any) -> Candidate:
    """Both log-linear, with so many bits of mantissa."""
    return log_linear(m, *how, **more), log_linear(v, *how, **more)


CANDIDATES: dict[str, Candidate] = {
    "float32": (exact,) * 2,
    "m3 v3": ours(3, 3),
    "m3 v3, each": ours(3, 3, each),
    "m3 v3, plane": ours(3, 3, plane),
    "m3 v3, hashed": ours(3, 3, hashed),
    "m3 v3, fresh": ours(3, 3, fresh),
    "m3 nearest, v3": (log_linear(3, nearest), log_linear(3)),
    "m3, v3 nearest": (log_linear(3), log_linear(3, nearest)),
    "m3, v3 with a zero": (log_linear(3), log_linear(3, zero=True)),
    "m3 v3, largest": ours(3, 3, power=False),
    "m3 v3, largest, fresh": ours(3, 3, fresh, power=False),
    "m3 v3, largest, nearest": ours(3, 3, nearest, power=False),
    "m3 v3, blocks of 32": ours(3, 3, block=32),
    "m3 v3, blocks of 64": ours(3, 3, block=64),
    "m3 v3, blocks of 256": ours(3, 3, block=256),
    "m2 v3": ours(2, 3),
    "m4 v3": ours(4, 3),
    "m3 v4": ours(3, 4),
    "m4 v4": ours(4, 4),
    "m3 v5": ours(3, 5),
    "m3, v float32": (log_linear(3), exact),
    "m float32, v3": (exact, log_linear(3)),
    "absmax": (even(),) * 2,
    "absmax, golden": (even(golden),) * 2,
    "roots": (even(root=True),) * 2,
    "roots, golden": (even(golden, root=True),) * 2,
    "softsign": (even(soft=True),) * 2,
    "softsign, golden": (even(golden, soft=True),) * 2,
    "dynamic": (dynamic,) * 2,
}
"""Dithered by ``golden`` and in blocks of 128, unless they say otherwise."""

# ---- Errors: the same gradients, with float32 moments and with coded ones ----------------------

ELEMENTS = 4096  # of a scenario
SPAN = 100  # steps of a way; and after which gradients change, where they do
SCENARIOS = {
    "plain": "a mean of 0.2 and a deviation of 1",
    "1e-9": "that times 1e-9",
    "1e3": "that times 1e3",
    "t scales": "each element times a size of its own, Student's t of 2 degrees of freedom",
    "t noise": "the noise is Student's t of 3 degrees of freedom",
    "rows 1e3": "every other row of 16 times 1e-3",
    "rare": "rows of 64 that have a gradient in one step of 100",
    "mixed": "every other row of 32 has a gradient in one step of 100",
    "sparse": "each element has a gradient in one step of 50",
    "shrink": "every other element's is ten times less after 100 steps",
    "stops": "every other row of 32 has none after 100 steps",
}
NAMES = list(SCENARIOS)
LARGEST = "largest step, learning rates"
STOPPED = "a step of rows that stopped, beta1 0.99, learning rates"


def gradients(steps: int) -> Iterator[Tensor]:
    """Yields (scenarios, ELEMENTS), the same in each call."""
    generator = torch.Generator().manual_seed(1)
    draw, chance = (partial(make, generator=generator) for make in (torch.randn, torch.rand))
    i, shape, at = torch.arange(ELEMENTS), (len(NAMES), ELEMENTS), NAMES.index
    odd = i // 32 % 2 == 1
    size = torch.ones(shape)
    size[at("1e-9")], size[at("1e3")] = 1e-9, 1e3
    size[at("t scales")] = draw(ELEMENTS).abs() / draw(2, ELEMENTS).square().mean(0).sqrt()
    size[at("rows 1e3"), i // 16 % 2 == 1] = 1e-3
    mean = 0.2 * draw(shape)
    for t in range(1, steps + 1):
        noise = draw(shape)
        noise[at("t noise")] /= draw(3, ELEMENTS).square().mean(0).sqrt()
        g = size * (mean + noise)
        g[at("rare")] *= (chance(ELEMENTS // 64) < 0.01).repeat_interleave(64)
        g[at("mixed")] *= (chance(ELEMENTS // 32) < 0.01).repeat_interleave(32) | ~odd
        g[at("sparse")] *= chance(ELEMENTS) < 0.02
        if t > SPAN:
            g[at("shrink"), i % 2 == 1] *= 0.1
            g[at("stops"), odd] = 0.0
        yield g


class Walk(NamedTuple):
    """Each (scenarios, ELEMENTS): the way of the weights in the first and the last ``SPAN`` steps, in learning rates,
    both moments at the end, and the largest single step."""

    first: Tensor
    last: Tensor
    m: Tensor
    v: Tensor
    largest: Tensor


@cache
def walk(name: str, steps: int, beta1: float = 0.9, beta2: float = 0.999) -> Walk:
    """Steps of a candidate, without decay, eps 1e-8."""
    m, v, p, first, before, largest = (torch.zeros(len(NAMES), ELEMENTS) for _ in range(6))
    for t, g in enumerate(gradients(steps), 1):
        m = m + (1 - beta1) * (g - m)
        v = v + (1 - beta2) * (g * g - v)
        d = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        p, largest = p - d, torch.maximum(largest, d.abs())
        m, v = coded(CANDIDATES[name], m, v, 0, t)
        first = p if t == SPAN else first
        before = p if t == steps - SPAN else before
    return Walk(first, p - before, m, v, largest)


def errors(name: str, steps: int) -> dict[str, list[float]]:
    """The figures of a candidate: for each one number a scenario, or one number."""
    right, found = walk("float32", steps), walk(name, steps)
    m, v = coded(CANDIDATES[name], right.m, right.v, 1, 1)
    stopped = walk(name, steps, beta1=0.99).last[NAMES.index("stops")].view(-1, 2, 32)[:, 1]

    def nmse(x: Tensor, right: Tensor) -> list[float]:
        return ((x - right).square().sum(1) / right.square().sum(1)).tolist()

    def cosine(x: Tensor, right: Tensor) -> list[float]:
        return torch.cosine_similarity(x.double(), right.double(), dim=1).tolist()

    def ratio(x: Tensor) -> Tensor:
        return torch.where(right.v > 0, x / right.v, 1.0)

    return {
        "m, coded once, NMSE": nmse(m, right.m),
        "v, coded once, relative": (ratio(v) - 1).square().mean(1).sqrt().tolist(),
        "way of the first 100 steps, NMSE": nmse(found.first, right.first),
        "way of the first 100 steps, cosine": cosine(found.first, right.first),
        "way of the last 100 steps, NMSE": nmse(found.last, right.last),
        "way of the last 100 steps, cosine": cosine(found.last, right.last),
        "v at the end, median ratio": ratio(found.v).median(1).values.tolist(),
        "v at the end, relative": (ratio(found.v) - 1).square().mean(1).sqrt().tolist(),
        LARGEST: found.largest.amax(1).tolist(),
        STOPPED: [stopped.abs().mean().item() / SPAN],
    }


def shipped(candidate: Candidate) -> bool:
    """Whether formats.py codes both moments in the candidate's way, bit for bit."""
    x = next(gradients(1))
    for dtype, coder, slot in zip(CODES, candidate, (2, 3), strict=True):
        random, x = Random.at_step(0, 1).of(slot), x if dtype.is_signed else x.abs()
        codes, scale = torch.empty_like(x, dtype=dtype), torch.empty(scales_shape(x.shape))
        put(x, codes, scale, random)
        if not get(codes, torch.float32, scale).equal(coder(x, dtype.is_signed, random)):
            return False
    return True


# ---- Training ----------------------------------------------------------------------------------

Make = Callable[..., Optimizer]
"""Of parameters, lr, betas and weight_decay, as torch.optim.AdamW."""
Pairs = Iterator[tuple[Tensor, Tensor]]


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
                moments = state["exp_avg"], state["exp_avg_sq"]
                back = coded(self.candidate, *moments, place, int(state["step"]))
                torch._foreach_copy_(moments, back)
        return loss


def fit(model: nn.Module, optimizer: Optimizer, pairs: Pairs, steps: int, held_out: Pairs) -> float:
    """Trains with gradients clipped to 1, and returns the mean loss on what was held out, in nats."""

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(inputs).flatten(0, -2), targets.flatten())

    for pair in islice(pairs, steps):
        optimizer.zero_grad()
        loss(*pair).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return fmean(loss(*pair).item() for pair in held_out)


def digits(make: Make, seed: int, steps: int) -> float:
    """The demo's network on its handwritten digits, batches of 64; 421,642 parameters."""
    torch.manual_seed(seed)
    (images, labels), test = data.load()[1:3]
    model = small_cnn()
    optimizer = make(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    pairs = ((images[i], labels[i]) for i in batches(len(images), 64, seed))
    return fit(model, optimizer, pairs, steps, iter([test]))


def characters(make: Make, seed: int, steps: int) -> float:
    """The demo's GPT on Python's manual; 825,856 parameters."""
    torch.manual_seed(seed)
    text = charlm.manual()
    model = charlm.GPT(len(text.alphabet), charlm.CONTEXT)
    optimizer = make(charlm.groups(model), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    pairs = charlm.batches(text.train, charlm.BATCH, charlm.CONTEXT, seed)
    held_out = islice(charlm.batches(text.validation, 128, charlm.CONTEXT, 0), 4)
    return fit(model, optimizer, pairs, steps, held_out)


def words(make: Make, seed: int, steps: int) -> float:
    """The manual's next word after four: a row of 32 numbers for each of 3,594 words, of which most are rare."""
    torch.manual_seed(seed)
    found = re.findall(r"\w+|[^\w\s]", " ".join(topics[name] for name in sorted(topics)).lower())
    number = {word: i for i, (word, _) in enumerate(Counter(found).most_common())}
    text, cut, size = torch.tensor([number[x] for x in found]), len(found) * 9 // 10, len(number)
    layers = (
        nn.Embedding(size, 32),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.GELU(),
        nn.Linear(64, size),
    )
    model = nn.Sequential(*layers)
    optimizer = make(model.parameters(), lr=3e-3, betas=(0.9, 0.999), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)

    def at(starts: Tensor) -> tuple[Tensor, Tensor]:
        pieces = text[starts[:, None] + torch.arange(5)]
        return pieces[:, :4], pieces[:, 4]

    pairs = (at(torch.randint(cut - 5, (256,), generator=generator)) for _ in range(steps))
    return fit(model, optimizer, pairs, steps, iter([at(torch.arange(cut, len(text) - 5, 2))]))


TASKS: dict[str, Callable[..., float]] = {f.__name__: f for f in (digits, characters, words)}

# ---- All of it ---------------------------------------------------------------------------------


STEPS = {"errors": 1000, "digits": 150, "characters": 100, "words": 600}
QUICK = {"errors": 200, "digits": 10, "characters": 2, "words": 20}
LONG, LONG_SEEDS = 500, 5  # of ``characters``, by the kernels
SEEDS = {"float32": 5, "m3 v3": 3, "softsign": 1, "dynamic": 1, "absmax": 1}  # of who trains


def compare_errors(steps: int) -> dict[str, dict[str, list[float]]]:
    """Prints what the candidates err, and returns every figure."""
    found = {}
    print(
        "NMSE of the way of the weights in the first 100 steps, and in the last. * is the code of formats.py."
    )
    print(f"{'':25}", *(f"{name:>15}" for name in NAMES), f"{'stopped':>8} {'largest':>8}")
    for name, candidate in CANDIDATES.items():
        its = found[name] = errors(name, steps)
        first, last = (its[f"way of the {which} 100 steps, NMSE"] for which in ("first", "last"))
        cells = [f"{f'{a:.2g} {b:.2g}':>15}" for a, b in zip(first, last, strict=True)]
        ends = f"{its[STOPPED][0]:8.2g} {max(its[LARGEST]):8.2g}"
        mark = "*" if name != "float32" and shipped(candidate) else " "
        print(f"{mark}{name:24}", *cells, ends, flush=True)
    return found


def compare_training(tasks: Sequence[str], quick: bool) -> dict[str, dict[str, list[float]]]:
    """Prints how well the candidates train, and returns every loss."""
    found: dict[str, dict[str, list[float]]] = {}
    print(
        "\nLoss on what was held out, nats: mean, deviation, how far above float32's of the same seeds"
    )
    for task in tasks:
        steps = (QUICK if quick else STEPS)[task]
        losses = found[f"{task}, {steps} steps"] = {}
        for name, seeds in SEEDS.items():
            train = partial(TASKS[task], partial(Coded, candidate=CANDIDATES[name]), steps=steps)
            its = losses[name] = [train(seed) for seed in range(1 if quick else seeds)]
            above = fmean(x - y for x, y in zip(its, losses["float32"], strict=False))
            spread = f"{stdev(its):8.4f}" if len(its) > 1 else " " * 8
            print(
                f"{task:11}{steps:4} steps  {name:9}{fmean(its):8.4f} {spread} {above:+8.4f}",
                flush=True,
            )
    return found


def compare_long(steps: int, seeds: int) -> dict[str, list[float]]:
    """Prints how well the kernels train for long, and returns every loss."""
    makers: dict[str, Make] = {
        "torch's float32": partial(torch.optim.AdamW, fused=True),
        "adamfused's int8": partial(adamfused.AdamW, state_dtype="int8"),
    }
    print(f"\nThe same of characters after {steps} steps, by the kernels")
    losses: dict[str, list[float]] = {name: [] for name in makers}
    for seed in range(seeds):
        for name, make in makers.items():
            losses[name].append(characters(make, seed, steps))
            print(f"{name:17} seed {seed} {losses[name][-1]:8.4f}", flush=True)
    floats, codes = losses.values()
    above = [x - y for x, y in zip(codes, floats, strict=True)]
    spread = stdev(floats) if seeds > 1 else 0.0
    print(f"int8 above float32: {fmean(above):+.4f}; deviation of float32's: {spread:.4f}")
    return losses


def main(argv: Sequence[str] | None = None) -> None:
    """Compares, and writes what was found."""
    parser = argparse.ArgumentParser(description="Compare 8-bit codes of AdamW's moments.")
    parser.add_argument("--quick", action="store_true", help="a minute, too little to tell much")
    parts = ["errors", *TASKS]
    parser.add_argument(
        "--only", nargs="+", choices=[*parts, "long"], default=parts, metavar="NAME",
        help=f"of {', '.join(parts)} (all of these), and long, which takes 25 minutes",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums then have one order
    found: dict[str, Any] = machine.facts()
    if "errors" in args.only:
        steps = (QUICK if args.quick else STEPS)["errors"]
        found |= {"scenarios": SCENARIOS, "errors": compare_errors(steps)}
    if tasks := [task for task in TASKS if task in args.only]:
        found["losses"] = compare_training(tasks, args.quick)
    if "long" in args.only:
        found["long"] = compare_long(*((2, 2) if args.quick else (LONG, LONG_SEEDS)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
