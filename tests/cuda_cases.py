"""Steps that the CUDA kernels make on the CPU, and the oracle: the cases of ``test_cuda_on_host.py``."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from ctypes import c_void_p
from typing import NamedTuple

import numpy as np
import torch
from cuda_library import SLOTS, Job, Kernels, Memory, Recipe, Rule, Span, numbers_of_nothing
from helpers import differing, wild
from torch import Tensor

from adamfused import formats, reference, rules

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


class Group(NamedTuple):
    hyper: tuple[float, ...]
    lr: float
    lr_dtype: torch.dtype | None = None  # of the learning rate on the device; None: on the host
    ema_decay: float = 0.0


class Item(NamedTuple):
    numel: int
    dtypes: tuple[torch.dtype, ...]  # of the parameter, the gradient and the states
    shifts: tuple[int, ...] = (
        0,
    ) * SLOTS  # elements past a multiple of 16 bytes; the copy's is the last
    count: int = 0  # steps made before
    on_device: bool = False  # the count
    group: int = 0
    copy: torch.dtype | None = None


STATES = {"rmsprop": "v", "rmsprop_momentum": "v buf", "rmsprop_centered": "v mean"}
STATES |= {"rmsprop_centered_momentum": "v buf mean", "adam": "m v", "amsgrad": "m v top"}
RULES = [Rule(name, averaged) for averaged in (False, True) for name in STATES]
ADAM, AVERAGED_ADAM = Rule("adam"), Rule("adam", averaged=True)
RMSPROP_GROUPS = [
    Group((0.99, 1e-8, 0.0, 0.9, 0.0), 1e-2, None, 0.999),
    Group((0.3, 1e-6, 0.1, 0.2, 1.0), 0.1, F32, 0.3),
    Group((0.9, 0.0, 0.01, 0.6, 0.0), 1e-3, F64, 0.75),
]
ADAM_GROUPS = [
    Group((0.9, 0.999, 1e-8, 0.01, 1.0, 0.0, 1.0), 1e-3, None, 0.999),
    Group((0.3, 0.95, 1e-8, 0.1, 0.0, 1.0, 1.0), 0.1, F32, 0.3),
    Group((0.9, 0.99, 0.0, 0.1, 1.0, 0.0, 0.0), 1e-2, F64, 0.75),
]
FACTOR = 0.37  # exact in no format


def groups_of(rule: Rule) -> list[Group]:
    return ADAM_GROUPS if rule.name in ("adam", "amsgrad") else RMSPROP_GROUPS


def parts_of(rule: Rule) -> list[str]:
    return ["p", "g", *STATES[rule.name].split(), *(["e"] if rule.averaged else [])]


@functools.cache
def numbers() -> Tensor:
    return wild(np.random.default_rng(0), 1 << 18, F64, specials=0.02)


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
        self.groups, self.parts = groups_of(rule), parts_of(rule)
        self.in_double = items[0].dtypes[0] is F64
        self.factor, self.found_inf = factor, found_inf
        self.memory = Memory(pages)
        place, kinds = self.memory.place, range(len(self.parts))
        self.places = [[place(i.numel, i.dtypes[k], i.shifts[k]) for k in kinds] for i in items]
        self.copies = [place(i.numel, i.copy, i.shifts[-1]) if i.copy else None for i in items]
        self.counts = [place(1, F32) if i.on_device else None for i in items]
        self.rates = [place(1, g.lr_dtype) if g.lr_dtype else None for g in self.groups]
        self.factor_place, self.found_inf_place = place(1, F64), place(1, F32)

        self.start = self.memory.rubbish()
        rng = np.random.default_rng(0)
        for item, places, count in zip(items, self.places, self.counts, strict=True):
            for name, at in zip(self.parts, places, strict=True):
                begin = int(rng.integers(len(numbers()) - item.numel))
                x = numbers()[begin : begin + item.numel]
                at.of(self.start).copy_(x.abs() if name in ("v", "top") else x)
            if count:
                count.of(self.start).fill_(item.count)
        for group, rate in zip(self.groups, self.rates, strict=True):
            if rate:
                rate.of(self.start).fill_(group.lr)
        if factor is not None:
            self.factor_place.of(self.start).fill_(factor)
        self.expected = self.moved_by_the_oracle()

    def made_there(self, item: Item) -> bool:
        """Whether the rule of a tensor is made on the device."""
        return item.on_device or self.factor is not None

    def moved_by_the_oracle(self) -> Tensor:
        memory = self.memory.copy_of(self.start)
        parts = zip(self.items, self.places, self.copies, self.counts, strict=True)
        for item, places, copy, count in parts:
            p, g, *states = (place.of(memory) for place in places)
            group, rate = self.groups[item.group], self.rates[item.group]
            lr = float(rate.of(memory)) if rate and self.made_there(item) else group.lr
            for steps, overflow in enumerate(self.found_inf):
                if overflow:
                    continue
                t = float(count.of(memory).add_(1)) if count else item.count + steps + 1
                now = rules.Now(lr, t, 1.0 if self.factor is None else self.factor, group.ema_decay)
                to = copy and copy.of(memory)
                reference.step(self.rule.name, group.hyper, now, p, g, states, to)
        if self.found_inf[-1] is not None:
            self.found_inf_place.of(memory).fill_(self.found_inf[-1])
        return memory

    def step(self, kernels: Kernels, memory: Tensor, steps: int) -> str | None:
        """The step that comes after as many: what the launch says."""
        base, size = memory.data_ptr(), kernels.about(self.rule, self.in_double).size
        spans = (Span * len(self.items))()
        ctypes.memset(spans, 0xAB, ctypes.sizeof(spans))
        made: dict[tuple[int, float], int] = {}  # (group, count): index of a rule made on the host
        recipes: dict[tuple[int, float], int] = {}  # the same, of those made on the device
        for span, item, places, copy, count in zip(
            spans, self.items, self.places, self.copies, self.counts, strict=True
        ):
            used = [*places, *([copy] if copy else [])]
            for k, (begin, _, dtype) in enumerate(used):
                span.data[k] = base + begin
                span.format[k] = formats.FORMATS.index(dtype)
            if copy is None:
                span.data[len(places)] = None
                span.format[len(places)] = 0 if item.numel % 2 else 0xAB  # a format, or none
            span.aligned = all(place.begin % 16 == 0 for place in used)
            span.numel = item.numel
            span.step = base + count.begin if count else None
            t = 1e6 if count else item.count + steps + 1  # the count on the device holds
            known = recipes if self.made_there(item) else made
            span.recipe = known.setdefault((item.group, t), len(known))
        prepared = ctypes.create_string_buffer(size * len(made) + 1)
        for (j, t), i in made.items():
            hyper, lr, _, ema_decay = self.groups[j]
            to = ctypes.byref(prepared, size * i)
            kernels.make(self.rule, self.in_double, hyper, rules.Now(lr, t, 1.0, ema_decay), to)
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
        recipe = Recipe(lr=1e30 if rate else lr, t=t, ema_decay=ema_decay)
        recipe.hyper[: len(hyper)] = hyper
        recipe.lr_on_device = base + rate.begin if rate else None
        recipe.lr_is_double = dtype is F64
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
        names = [*self.parts, "the copy", "the count"]
        parts = zip(self.items, self.places, self.copies, self.counts, strict=True)
        for item, places, copy, count in parts:
            for what, place in zip(names, [*places, copy, count], strict=True):
                if place is None:
                    continue
                wrong = other[place.begin : place.end]
                if wrong.any() and (n := differing(place.of(got), place.of(self.expected))):
                    found.append(f"{n} wrong in {what} of {item}")
                wrong[:] = False
        if n := int(other.sum()):
            found.append(f"{n} bytes have changed that belong to no tensor")
        return found

    def share_of_numbers(self) -> float:
        """How many of what the oracle has left are neither NaN nor infinite."""
        places = itertools.chain(*self.places, filter(None, self.copies))
        everything = torch.cat([place.of(self.expected).isfinite() for place in places])
        return float(everything.double().mean())


# By the elements that a thread takes at once: the dtypes of tensors that share a launch, and those of copies.
KINDS: dict[int, list[tuple[torch.dtype, ...]]] = {
    2: [(F64,) * 6, (F64, BF16, F32, F64, F16, BF16)],
    4: [(F32,) * 6, (F32, F64, F32, F64, F32, F64)],
    8: [
        (BF16, BF16, F32, F32, F32, F32),
        (F16,) * 6,
        (F32, F32, BF16, F32, F64, F16),
        (F32,) * 6,
    ],
}
COPIES: dict[int, list[torch.dtype | None]] = {
    2: [None, F64, BF16, F32, F16],
    4: [F32, None, F64],
    8: [BF16, None, F32, F16, F64],
}
COUNTS = {"host": (False,), "device": (True,), "mixed": (True, False, False, True)}


@functools.lru_cache(8)
def seams(
    rule: Rule, each: int, tile: int, counts: str, factor: float | None = None, pages: str = ""
) -> Case:
    """Every size at which something changes, with all parts aligned, none, or all but one."""
    sizes = [0, 1, each - 1, each, each + 1, tile - 1, tile, tile + 1, 2 * tile + each + 1]
    shifts = [(0,) * SLOTS, (1,) * SLOTS, (0, 1, 0, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0, 1)]
    on_device, copies = itertools.cycle(COUNTS[counts]), itertools.cycle(COPIES[each])
    several = [
        (n, dtypes, s)
        for n in sizes
        for dtypes in KINDS[each][:2]
        for s in shifts[: 1 if pages else 4]
    ]
    several += [(50_003, KINDS[each][-1], s) for s in shifts[:2] if not pages]
    items = [
        Item(*one, i % 3, next(on_device), i % 3, next(copies)) for i, one in enumerate(several)
    ]
    return Case(rule, items, factor=factor, pages=pages)


@functools.lru_cache(8)
def many(
    rule: Rule,
    each: int,
    entries: int,
    counts: str,
    factor: float | None = None,
    found_inf: Sequence[float | None] = (None,),
) -> Case:
    """Small tensors for two launches; some are empty: the first, the last and those about a launch's limit. The second
    launch brings new step counts, and one is common to both."""
    n = entries + 37
    sizes = itertools.cycle([1, each - 1, 0, each + 1, 53])
    on_device, copies = itertools.cycle(COUNTS[counts]), itertools.cycle(COPIES[each])
    empty = {0, 1, entries - 1, entries, entries + 1, n - 1}
    dtypes = KINDS[each]
    items = [
        Item(
            next(sizes) * (i not in empty),
            dtypes[i % len(dtypes)],
            (int(i % 3 == 1),) * SLOTS,
            i // 2 % 4 * (1 + i // 99),
            next(on_device),
            i % 3,
            next(copies),
        )
        for i in range(n)
    ]
    return Case(rule, items, found_inf, factor)


@functools.lru_cache(8)
def ages(rule: Rule, each: int, different: int, factor: float | None = None) -> Case:
    """Tensors of so many different step counts, which come again in later launches. Some counts are on the device."""
    dtypes = KINDS[each]
    items = [
        Item(
            each + i % 3,
            dtypes[i % 2],
            count=i % different,
            on_device=i % 11 == 5,
            group=i % 3 * (i % 7 == 0),
        )
        for i in range(3 * different)
    ]
    return Case(rule, items, factor=factor)


def problems_of_a_huge_tensor(
    kernels: Kernels, each: int, dtype: torch.dtype, shift: int
) -> list[str]:
    """Of more than 2^32 elements only the last tiles run; what lies before them has addresses but no memory."""
    n, size, tile = 2**32 + 12_345, dtype.itemsize, kernels.tile(each)
    run = n % tile + tile  # the last two tiles
    end = run + 100  # and a look at what lies before
    rule, rng = AVERAGED_ADAM, np.random.default_rng(0)
    got = []
    for name in (*parts_of(rule), "copy"):
        got.append(numbers_of_nothing((n + shift) * size)[shift * size :].view(dtype))
        x = wild(rng, end, dtype)
        got[-1][-end:] = x.abs() if name == "v" else x
    want = [x[-end:].clone() for x in got]
    hyper, lr, _, ema_decay = ADAM_GROUPS[0]
    now = rules.Now(lr, 3, 1.0, ema_decay)
    p, g, *states, copy = (x[-run:] for x in want)
    reference.step(rule.name, hyper, now, p, g, states, copy)

    made = ctypes.create_string_buffer(kernels.about(rule, False).size)
    kernels.make(rule, False, hyper, now, made)
    span = Span((c_void_p * SLOTS)(*(x.data_ptr() for x in got)), numel=n, aligned=shift == 0)
    span.format[: len(got)] = [formats.FORMATS.index(dtype)] * len(got)
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
    wrong = [differing(x[-end:], y) for x, y in zip(got, want, strict=True)]
    return [f"{wrong} wrong in a huge tensor"] if any(wrong) else []
