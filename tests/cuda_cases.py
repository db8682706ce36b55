"""Steps that the CUDA kernels make on the CPU, and the oracle: the cases of ``test_cuda_on_host.py``."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from cuda_formats import (
    BF16,
    BF16_AT_RANDOM,
    CODE,
    F16,
    F16_AT_RANDOM,
    F32,
    F64,
    MASTER_BF16,
    MASTER_F16,
    SPLIT8,
    SPLIT16,
    UNSIGNED,
    Format,
    wrong_numbers,
)
from cuda_library import (
    COPY,
    DOUBLES,
    FLOATS,
    HALVES,
    MASTER,
    PARTS,
    SCALE,
    STORED,
    Job,
    Kernels,
    Kind,
    Memory,
    Place,
    Recipe,
    Rule,
    Span,
    numbers_of_nothing,
)
from helpers import wild
from torch import Tensor

from adamfused import formats, rules


class Group(NamedTuple):
    hyper: tuple[float, ...]
    lr: float
    lr_dtype: torch.dtype | None = None  # of the learning rate on the device; None: on the host
    ema_decay: float = 0.0


class Item(NamedTuple):
    numel: int
    formats: tuple[Format, ...]  # of the parameter, the gradient and the states; see `formats_of`
    shifts: tuple[int, ...] = (0,) * PARTS  # elements past a multiple of 16 bytes; the copy's last
    count: int = 0  # steps made before
    on_device: bool = False  # the count
    group: int = 0
    copy: Format | None = None
    first: int = 0  # its first element's place in the whole parameter, of which it may be a shard


STATES = {"sgd": "", "sgd_momentum": "buf", "adagrad": "sum"}
STATES |= {"rmsprop": "v", "rmsprop_momentum": "v buf", "rmsprop_centered": "v mean"}
STATES |= {"rmsprop_centered_momentum": "v buf mean", "adadelta": "v u", "lion": "m"}
STATES |= {"adam": "m v", "amsgrad": "m v top", "nadam": "m v", "radam": "m v"}
NEVER_NEGATIVE = ("v", "top", "sum", "u")
RULES = [Rule(name, averaged) for averaged in (False, True) for name in STATES]
ADAM, AVERAGED_ADAM = Rule("adam"), Rule("adam", averaged=True)
AVERAGED_NADAM = Rule("nadam", averaged=True)
SGD_GROUPS = [
    Group((0.0, 0.9, 0.0, 0.0, 0.0), 1e-2, None, 0.999),
    Group((0.1, 0.3, 0.0, 1.0, 1.0), 0.1, torch.float32, 0.3),
    Group((0.01, 0.9, 0.3, 0.0, 0.0), 1e-3, torch.float64, 0.75),
]
ADAGRAD_GROUPS = [
    Group((0.0, 1e-10, 0.0, 0.0), 1e-2, None, 0.999),
    Group((0.1, 1e-6, 0.1, 1.0), 0.1, torch.float32, 0.3),
    Group((0.01, 0.0, 0.01, 0.0), 1e-3, torch.float64, 0.75),
]
ADADELTA_GROUPS = [
    Group((0.9, 1e-6, 0.0, 0.0), 1.0, None, 0.999),
    Group((0.3, 1e-3, 0.1, 1.0), 0.1, torch.float32, 0.3),
    Group((1.0, 1e-6, 0.01, 0.0), 1e-2, torch.float64, 0.75),
]
LION_GROUPS = [
    Group((0.9, 0.99, 0.0, 0.0), 1e-3, None, 0.999),
    Group((0.3, 0.4, 0.1, 1.0), 0.1, torch.float32, 0.3),
    Group((0.95, 0.98, 1.0, 0.0), 1e-2, torch.float64, 0.75),
]
RMSPROP_GROUPS = [
    Group((0.99, 1e-8, 0.0, 0.9, 0.0), 1e-2, None, 0.999),
    Group((0.3, 1e-6, 0.1, 0.2, 1.0), 0.1, torch.float32, 0.3),
    Group((0.9, 0.0, 0.01, 0.6, 0.0), 1e-3, torch.float64, 0.75),
]
ADAM_GROUPS = [
    Group((0.9, 0.999, 1e-8, 0.01, 1.0, 0.0, 1.0), 1e-3, None, 0.999),
    Group((0.3, 0.95, 1e-8, 0.1, 0.0, 1.0, 1.0), 0.1, torch.float32, 0.3),
    Group((0.9, 0.99, 0.0, 0.1, 1.0, 0.0, 0.0), 1e-2, torch.float64, 0.75),
]
RADAM_GROUPS = [group._replace(hyper=group.hyper[:-1]) for group in ADAM_GROUPS]
NADAM_GROUPS = [
    group._replace(hyper=(*group.hyper[:-1], 0.96**decay))
    for group, decay in zip(ADAM_GROUPS, (4e-3, 0.1, 0.0), strict=True)
]
GROUPS = {"sgd": SGD_GROUPS, "sgd_momentum": SGD_GROUPS, "adagrad": ADAGRAD_GROUPS}
GROUPS |= {"adadelta": ADADELTA_GROUPS, "lion": LION_GROUPS, "radam": RADAM_GROUPS}
GROUPS |= {"adam": ADAM_GROUPS, "amsgrad": ADAM_GROUPS, "nadam": NADAM_GROUPS}
FACTOR = 0.37  # exact in no format


def groups_of(rule: Rule) -> list[Group]:
    return GROUPS.get(rule.name, RMSPROP_GROUPS)


@functools.cache
def carried_at(rule: str, hyper: tuple[float, ...], t: int) -> float:
    """What a rule that carries a number has after t steps, kept in float32."""
    if t == 0 or rule not in rules.CARRIED:
        return 1.0
    before = carried_at(rule, hyper, t - 1)
    return float(np.float32(rules.CARRIED[rule](hyper, float(t), before)))


def parts_of(rule: Rule) -> list[str]:
    return ["p", "g", *STATES[rule.name].split(), *(["e"] if rule.averaged else [])]


def formats_of(rule: Rule, several: Sequence[Format]) -> list[tuple[str, Format]]:
    """Of each part. Codes of states that are never negative have no sign, and averages of weights have no codes."""
    pairs = zip(parts_of(rule), several, strict=False)
    codes = {k: UNSIGNED if k in NEVER_NEGATIVE else F32 if k == "e" else CODE for k, _ in pairs}
    return [(k, codes[k] if f is CODE else f) for k, f in zip(codes, several, strict=False)]


@functools.cache
def numbers(specials: float) -> Tensor:
    return wild(np.random.default_rng(0), 1 << 18, torch.float64, specials)


class Part(NamedTuple):
    """Where a part of a tensor lies."""

    name: str
    format: Format
    rest: Place
    beside: Place | None

    def of(self, memory: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.rest.of(memory), self.beside and self.beside.of(memory)


def move(
    rule: Rule,
    hyper: Sequence[float],
    now: rules.Now,
    parts: Sequence[tuple[Format, Tensor, Tensor | None]],
    copy: Tensor | None,
    random: formats.Random,
) -> None:
    """What the oracle makes of a parameter, a gradient and states."""
    arithmetic = torch.float64 if parts[0][0] is F64 else torch.float32
    made = rules.Averaged(rule.name, hyper, now, rules.round_to(arithmetic))
    moved = (made if rule.averaged else made.rule)(
        *(formats.get(rest, arithmetic, beside) for _, rest, beside in parts)
    )
    for slot, x in zip([0, *range(2, len(parts))], moved, strict=True):
        format, rest, beside = parts[slot]
        formats.put(x, rest, beside, random.of(slot) if format.by_chance else None)
    if copy is not None:
        formats.put(moved[0], copy)


class Case:
    """Tensors in one piece of memory, which exists twice: the kernels move one, the oracle the other.

    Args:
        factor: of the gradients, on the device; or None for one that is not there.
        found_inf: at each step, what says on the device that the step is not to be made (not 0); or None for nothing.
    """

    def __init__(
        self,
        rule: Rule,
        items: Sequence[Item],
        found_inf: Sequence[float | None] = (None,),
        factor: float | None = None,
        pages: str = "",
    ) -> None:
        self.rule, self.items = rule, items
        self.groups = groups_of(rule)
        self.in_double = items[0].formats[0] is F64
        self.factor, self.found_inf = factor, found_inf
        self.memory = Memory(pages)
        place = self.memory.place
        self.parts = [self.places_of(item) for item in items]
        self.copies = [place(i.numel, i.copy.rest, i.shifts[-1]) if i.copy else None for i in items]
        self.counts = [place(1, torch.float32) if i.on_device else None for i in items]
        carries = rule.name in rules.CARRIED
        self.carried = [place(1, torch.float32) if i.on_device and carries else None for i in items]
        self.rates = [place(1, g.lr_dtype) if g.lr_dtype else None for g in self.groups]
        self.factor_place, self.found_inf_place = place(1, torch.float64), place(1, torch.float32)
        self.keys = [formats.place_key(0, i) for i in range(len(items))]

        self.start = self.memory.rubbish()
        rng = np.random.default_rng(0)
        for item, parts, count, carried in zip(
            items, self.parts, self.counts, self.carried, strict=True
        ):
            for part in parts:
                several = numbers(0.002 if part.beside else 0.02)
                begin = int(rng.integers(len(several) - item.numel))
                x = several[begin : begin + item.numel]
                part.format.fill(
                    x.abs() if part.name in NEVER_NEGATIVE else x, *part.of(self.start)
                )
            if count:
                count.of(self.start).fill_(item.count)
            if carried:
                carried.of(self.start).fill_(self.carried_by(item, item.count))
        for group, rate in zip(self.groups, self.rates, strict=True):
            if rate:
                rate.of(self.start).fill_(group.lr)
        if factor is not None:
            self.factor_place.of(self.start).fill_(factor)
        self.expected = self.moved_by_the_oracle()

    def places_of(self, item: Item) -> list[Part]:
        parts = []
        several = zip(formats_of(self.rule, item.formats), item.shifts, strict=False)
        for (name, format), shift in several:
            rest = self.memory.place(item.numel, format.rest, shift)
            beside = None
            if format.beside:
                beside = self.memory.place(format.numel_beside(item.numel), format.beside, shift)
            parts.append(Part(name, format, rest, beside))
        return parts

    def carried_by(self, item: Item, t: int) -> float:
        return carried_at(self.rule.name, self.groups[item.group].hyper, t)

    def made_there(self, item: Item) -> bool:
        """Whether the rule of a tensor is made on the device."""
        return item.on_device or self.factor is not None

    def moved_by_the_oracle(self) -> Tensor:
        memory = self.memory.copy_of(self.start)
        several = zip(
            self.items, self.parts, self.copies, self.counts, self.carried, self.keys, strict=True
        )
        for item, places, copy, count, beside, key in several:
            parts = [(part.format, *part.of(memory)) for part in places]
            group, rate = self.groups[item.group], self.rates[item.group]
            lr = float(rate.of(memory)) if rate and self.made_there(item) else group.lr
            for steps, overflow in enumerate(self.found_inf):
                if overflow:
                    continue
                t = float(count.of(memory).add_(1)) if count else item.count + steps + 1
                carried = self.carried_by(item, int(t))
                if beside:
                    beside.of(memory).fill_(carried)
                factor = 1.0 if self.factor is None else self.factor
                now = rules.Now(lr, t, factor, group.ema_decay, carried)
                random = formats.Random.at_step(key, t, item.first)
                move(self.rule, group.hyper, now, parts, copy and copy.of(memory), random)
        if self.found_inf[-1] is not None:
            self.found_inf_place.of(memory).fill_(self.found_inf[-1])
        return memory

    def step(self, kernels: Kernels, memory: Tensor, steps: int) -> str | None:
        """The step that comes after as many: what the launch says."""
        base = memory.data_ptr()
        spans = (Span * len(self.items))()
        ctypes.memset(spans, 0xAB, ctypes.sizeof(spans))
        made: dict[tuple[int, float], int] = {}  # (group, count): index of a rule made on the host
        recipes: dict[tuple[int, float], int] = {}  # the same, of those made on the device
        for span, item, parts, copy, count, carried, key in zip(
            *(spans, self.items, self.parts, self.copies, self.counts, self.carried, self.keys),
            strict=True,
        ):
            span.data[:] = [None] * len(span.data)
            for k, part in enumerate(parts):
                span.data[k], span.format[k] = base + part.rest.begin, part.format.number
                if part.beside:
                    span.data[SCALE + k - 2 if k else MASTER] = base + part.beside.begin
            if copy:
                assert item.copy
                span.data[COPY], span.format[COPY] = base + copy.begin, item.copy.number
            else:
                span.format[COPY] = F32.number if item.numel % 2 else 0xAB  # a format, or none
            used = [*(part.rest for part in parts), parts[0].beside, copy]
            span.aligned = all(place.begin % 16 == 0 for place in used if place)
            span.numel, span.key, span.first = item.numel, key, item.first
            span.step = base + count.begin if count else None
            span.carried = base + carried.begin if carried else None
            t = 1e6 if count else item.count + steps + 1  # the count on the device holds
            span.t = int(t)
            known = recipes if self.made_there(item) else made
            span.recipe = known.setdefault((item.group, t), len(known))
        size = kernels.about(self.rule, DOUBLES if self.in_double else FLOATS).size
        prepared = ctypes.create_string_buffer(size * len(made) + 1)
        for (j, t), i in made.items():
            hyper, lr, _, ema_decay = self.groups[j]
            to = ctypes.byref(prepared, size * i)
            now = rules.Now(lr, t, 1.0, ema_decay, carried_at(self.rule.name, hyper, int(t)))
            kernels.make(self.rule, self.in_double, hyper, now, to)
        job = Job(
            rule=self.rule.number,
            averaged=self.rule.averaged,
            in_double=self.in_double,
            spans=spans,
            count=len(spans),
            rules=ctypes.addressof(prepared),
            recipes=(Recipe * len(recipes))(*(self.recipe(j, t, base) for j, t in recipes)),
        )
        if self.factor is not None:
            job.factor = base + self.factor_place.begin
        if (found_inf := self.found_inf[steps]) is not None:
            self.found_inf_place.of(memory).fill_(found_inf)
            job.found_inf = base + self.found_inf_place.begin
        return kernels.run(job)

    def recipe(self, group: int, t: float, base: int) -> Recipe:
        hyper, lr, dtype, ema_decay = self.groups[group]
        rate = self.rates[group]
        recipe = Recipe(lr=1e30 if rate else lr, t=t, ema_decay=ema_decay, carried=1e30)
        if t < 1e6:
            recipe.carried = carried_at(self.rule.name, hyper, int(t))
        recipe.hyper[: len(hyper)] = hyper
        recipe.lr_on_device = base + rate.begin if rate else None
        recipe.lr_is_double = dtype is torch.float64
        return recipe

    def problems(self, kernels: Kernels) -> list[str]:
        """In what the kernels' memory differs from the oracle's: nothing, if all is well."""
        got = self.memory.copy_of(self.start)
        with self.memory.closed(got):
            for steps in range(len(self.found_inf)):
                if error := self.step(kernels, got, steps):
                    return [f"the launch failed: {error}"]
        other = (got != self.expected).numpy()
        found = []
        several = zip(self.items, self.parts, self.copies, self.counts, self.carried, strict=True)
        for item, parts, copy, count, carried in several:
            places = [(part.name, part.rest) for part in parts]
            places += [(f"what lies beside {part.name}", part.beside) for part in parts]
            for what, place in [
                *places,
                *(("the copy", copy), ("the count", count), ("what is carried", carried)),
            ]:
                if place is None:
                    continue
                wrong = other[place.begin : place.end]
                if wrong.any() and (n := wrong_numbers(place.of(got), place.of(self.expected))):
                    found.append(f"{n} wrong in {what} of {item}")
                wrong[:] = False
        if n := int(other.sum()):
            found.append(f"{n} bytes have changed that belong to no tensor")
        return found

    def share_of_numbers(self) -> float:
        """How many of what the oracle has left are neither NaN nor infinite."""
        parts = (part.of(self.expected) for part in itertools.chain(*self.parts))
        left = [formats.get(rest, torch.float64, beside).isfinite() for rest, beside in parts]
        return float(torch.cat(left).double().mean())


# By kernel: the formats of tensors that share a launch, and those of copies.
KINDS: dict[Kind, list[tuple[Format, ...]]] = {
    DOUBLES: [
        (F64,) * 6,
        (F64, BF16, F32, F64, F16, BF16),
        (F64, F32, CODE, CODE, CODE, CODE),
        (F64, F64, BF16_AT_RANDOM, CODE, F16_AT_RANDOM, F32),
    ],
    FLOATS: [(F32,) * 6, (F32, F64, F32, F64, F32, F64)],
    HALVES: [
        (BF16, BF16, F32, F32, F32, F32),
        (F16,) * 6,
        (F32, F32, BF16, F32, F64, F16),
        (F32,) * 6,
    ],
    STORED: [
        (SPLIT8, BF16, CODE, CODE, CODE, CODE),
        (SPLIT16, BF16, BF16_AT_RANDOM, F32, BF16_AT_RANDOM, BF16),
        (F32, F32, CODE, CODE, F32, CODE),
        (BF16_AT_RANDOM, BF16, BF16_AT_RANDOM, CODE, CODE, BF16_AT_RANDOM),
        (MASTER_F16, F16, F32, BF16, F32, F32),
        (F32,) * 6,
        (F16_AT_RANDOM, F64, CODE, F16_AT_RANDOM, F16, F32),
        (MASTER_BF16, F32, BF16, CODE, F64, F16),
        (SPLIT16, F32, CODE, CODE, CODE, F32),
    ],
}
COPIES: dict[Kind, list[Format | None]] = {
    DOUBLES: [None, F64, BF16, F32, F16],
    FLOATS: [F32, None, F64],
    HALVES: [BF16, None, F32, F16, F64],
    STORED: [None, BF16, F64, None, F16, F32],
}
COUNTS = {"host": (False,), "device": (True,), "mixed": (True, False, False, True)}
FIRST = [0, 2**32 - 130, 1000 * formats.BLOCK, 0]


@functools.lru_cache(8)
def seams(
    rule: Rule, kind: Kind, tile: int, counts: str, factor: float | None = None, pages: str = ""
) -> Case:
    """Every size at which something changes, with all parts aligned, none, or all but one."""
    sizes = [0, 1, 15, 16, 17, 127, 128, 129, 257, tile - 1, tile, tile + 1, 2 * tile + 129]
    shifts = [(0,) * PARTS, (1,) * PARTS, (0, 1, 0, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0, 1)]
    which, first = itertools.cycle(KINDS[kind]), itertools.cycle(FIRST)
    on_device, copies = itertools.cycle(COUNTS[counts]), itertools.cycle(COPIES[kind])
    several = [(n, next(which), s) for n in sizes for s in shifts[: 1 if pages else 4] * 2]
    several += [(50_003, KINDS[kind][-1], s) for s in shifts[:2] if not pages]
    items = [
        Item(*one, i % 3, next(on_device), i % 3, next(copies), next(first))
        for i, one in enumerate(several)
    ]
    return Case(rule, items, factor=factor, pages=pages)


@functools.lru_cache(8)
def many(
    rule: Rule,
    kind: Kind,
    entries: int,
    counts: str,
    factor: float | None = None,
    found_inf: Sequence[float | None] = (None,),
) -> Case:
    """Small tensors for two launches; some are empty: the first, the last and those about a launch's limit. The second
    launch brings new step counts, and one is common to both."""
    n = entries + 37
    sizes = itertools.cycle([1, 7, 0, 129, 53])
    on_device, copies = itertools.cycle(COUNTS[counts]), itertools.cycle(COPIES[kind])
    empty = {0, 1, entries - 1, entries, entries + 1, n - 1}
    which = KINDS[kind]
    items = [
        Item(
            next(sizes) * (i not in empty),
            which[i % len(which)],
            (int(i % 3 == 1),) * PARTS,
            i // 2 % 4 * (1 + i // 99),
            next(on_device),
            i % 3,
            next(copies),
        )
        for i in range(n)
    ]
    return Case(rule, items, found_inf, factor)


@functools.lru_cache(8)
def ages(rule: Rule, kind: Kind, different: int, factor: float | None = None) -> Case:
    """Tensors of so many different step counts, which come again in later launches. Some counts are on the device."""
    items = [
        Item(
            7 + i % 3,
            KINDS[kind][i % 2],
            count=i % different,
            on_device=i % 11 == 5,
            group=i % 3 * (i % 7 == 0),
        )
        for i in range(3 * different)
    ]
    return Case(rule, items, factor=factor)


HugePart = tuple[Format, Tensor, Tensor | None]


def problems_of_a_huge_tensor(
    kernels: Kernels, kind: Kind, several: Sequence[Format], shift: int
) -> list[str]:
    """Of more than 2^32 elements only the last tiles run; what lies before them has addresses but no memory."""
    n, tile = 2**32 + 12_345, kernels.tile(kind)
    run = n % tile + tile  # the last two tiles
    rule, rng = AVERAGED_ADAM, np.random.default_rng(0)
    random = formats.Random(key=7, t=3, first=5)

    def tensor(numel: int, dtype: torch.dtype) -> Tensor:
        size = dtype.itemsize
        return numbers_of_nothing((numel + shift) * size)[shift * size :].view(dtype)

    def end(part: HugePart, numel: int) -> HugePart:
        format, rest, beside = part
        return (
            format,
            rest[-numel:],
            None if beside is None else beside[-format.numel_beside(numel) :],
        )

    got: list[HugePart] = []
    for name, format in [*formats_of(rule, several), ("copy", several[-1])]:
        beside = tensor(format.numel_beside(n), format.beside) if format.beside else None
        got.append((format, tensor(n, format.rest), beside))
        x = wild(rng, run + formats.BLOCK, torch.float64)  # and a look at what lies before
        format.fill(x.abs() if name in NEVER_NEGATIVE else x, *end(got[-1], len(x))[1:])
    seen = [end(part, run + formats.BLOCK) for part in got]
    want = [
        (format, rest.clone(), beside if beside is None else beside.clone())
        for format, rest, beside in seen
    ]
    hyper, lr, _, ema_decay = ADAM_GROUPS[0]
    now = rules.Now(lr, random.t, 1.0, ema_decay)
    *parts, (_, copy, _) = (end(part, run) for part in want)
    move(rule, hyper, now, parts, copy, random)

    made = ctypes.create_string_buffer(kernels.about(rule, kind).size)
    kernels.make(rule, False, hyper, now, made)
    span = Span(numel=n, aligned=shift == 0, key=random.key, t=random.t, first=random.first)
    for k, (format, rest, beside) in enumerate(got):
        slot = k if k < len(parts) else COPY
        span.data[slot], span.format[slot] = rest.data_ptr(), format.number
        if beside is not None:
            span.data[SCALE + k - 2 if k else MASTER] = beside.data_ptr()
    job = Job(
        rule=rule.number,
        averaged=True,
        spans=ctypes.pointer(span),
        count=1,
        rules=ctypes.addressof(made),
    )
    with kernels.set(first_block=-(-n // tile) - 2):
        if error := kernels.run(job):
            return [error]
    pairs = itertools.chain(
        *(zip(x[1:], y[1:], strict=True) for x, y in zip(seen, want, strict=True))
    )
    wrong = [wrong_numbers(x, y) for x, y in pairs if x is not None]
    return [f"{wrong} wrong in a huge tensor"] if any(wrong) else []
