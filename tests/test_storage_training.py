"""Training in fewer bytes ends where training in float32 does: with split weights bit for bit, with 8-bit moments as
near as another seed would."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, threads
from torch import Tensor, nn

from adamfused import AdamW, backend, fp32_weights
from adamfused.demo import charlm
from adamfused.formats import BLOCK

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import int8_codes  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.native,
    pytest.mark.skipif(backend.native() is None, reason="the extension is not loaded"),
]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So that sums have one order."""
    with threads(1):
        yield


# ---- split weights -------------------------------------------------------------------------------

Losses = list[float]
CONTEXT = 24


def small_gpt(context: int = CONTEXT) -> nn.Module:
    return charlm.GPT(len(charlm.manual().alphabet), context, layers=2, width=64)


def train_bfloat16(make: Callable[..., Any], steps: int = 100) -> tuple[nn.Module, Any, Losses]:
    """A GPT of 110,000 bfloat16 parameters on Python's manual; ``make`` the optimizer from its parameters."""
    torch.manual_seed(0)
    model = small_gpt().bfloat16()
    optimizer = make(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for inputs, targets in islice(charlm.batches(charlm.manual().train, 8, CONTEXT, 0), steps):
        optimizer.zero_grad()
        loss = charlm.loss_of(model, inputs, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


class ByHand:
    """Float32 weights beside a bfloat16 model, as they are kept by hand: gradients go there, rounded weights come
    back."""

    def __init__(self, params: Iterator[nn.Parameter], **options: Any) -> None:
        self.params = list(params)
        self.weights = [nn.Parameter(p.detach().float()) for p in self.params]
        self.inner = AdamW(self.weights, **options)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p, weight in zip(self.params, self.weights, strict=True):
            weight.grad = p.grad.float()
        self.inner.step()
        for p, weight in zip(self.params, self.weights, strict=True):
            # To nearest, as everywhere, but ties away from zero, of which there is one in 65,536.
            p.view(torch.int16).copy_(weight.view(torch.int32) + 0x8000 >> 16)


def test_split_weights_train_as_float32_ones_bit_for_bit() -> None:
    """Every loss of 100 steps, and every weight after them; a whole master likewise."""
    model, by_hand, losses = train_bfloat16(ByHand)
    assert fmean(losses[-10:]) < fmean(losses[:10]) - 0.5, "it has to learn something"
    for kind in ("split16", "fp32"):
        split, optimizer, split_losses = train_bfloat16(partial(AdamW, master_weights=kind))
        assert split_losses == losses
        weights = list(fp32_weights(split, optimizer).values())
        for p, q, weight, expected in zip(
            split.parameters(), model.parameters(), weights, by_hand.weights, strict=True
        ):
            assert_same_bits(p.detach(), q.detach())
            assert_same_bits(weight, expected.detach())
    model = train_bfloat16(ByHand, 20)[0]
    # The comparison can fail. That of so few losses, in 8 bits, need not.
    for kind in ("split8", None):
        other = train_bfloat16(partial(AdamW, master_weights=kind), 20)[0]
        pairs = zip(other.parameters(), model.parameters(), strict=True)
        assert not all(torch.equal(p, q) for p, q in pairs)


def test_24_bits_stay_as_near_as_24_bits_can() -> None:
    """Given the same gradients. Each step rounds a weight by less than 2^-16 of it, and float32's own arithmetic rounds
    weights and moves, which are less than 0.004 here, by less than 2^-22. Decay makes what was off smaller. So what is
    off is at most the sum of these."""
    start = [p.detach() for p in small_gpt().bfloat16().parameters()]
    kinds = ("split16", "split8", None)
    params = {kind: [p.clone() for p in start] for kind in kinds}
    optimizers = {
        kind: AdamW(map(nn.Parameter, its), lr=1e-3, weight_decay=0.1, master_weights=kind)
        for kind, its in params.items()
    }
    generator = torch.Generator().manual_seed(0)

    def weights(kind: str | None) -> Tensor:
        its = optimizers[kind].param_groups[0]["params"]
        named = nn.ParameterDict({str(i): p for i, p in enumerate(its)})
        found = fp32_weights(named, optimizers[kind]) if kind else named
        return torch.cat([found[str(i)].detach().float().flatten() for i in range(len(its))])

    allowed, is_near = torch.zeros(()), {"split8": True, None: True}
    for _ in range(50):
        grads = [torch.randn(p.shape, generator=generator).to(BF16) for p in start]
        for optimizer in optimizers.values():
            for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                p.grad = g
            optimizer.step()
        right, found = weights("split16").double(), weights("split8").double()
        before_rounding = found.abs() * (1 + 2.0**-15)
        allowed = allowed + 2.0**-16 * before_rounding + 2.0**-22 * (before_rounding + 0.004)
        for kind in is_near:
            is_near[kind] &= bool(((weights(kind).double() - right).abs() <= allowed).all())
    assert is_near == {"split8": True, None: False}  # of 16 bits alone it is not true
    assert not torch.equal(right, found)


# ---- 8-bit moments -------------------------------------------------------------------------------


def characters(make: int8_codes.Make, seed: int, steps: int) -> float:
    """The demo's GPT, at half its width and depth, on half its context."""
    torch.manual_seed(seed)
    text, context = charlm.manual(), charlm.CONTEXT // 2
    model = small_gpt(context)
    optimizer = make(charlm.groups(model), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    pairs = charlm.batches(text.train, charlm.BATCH, context, seed)
    held_out = islice(charlm.batches(text.validation, 128, context, 0), 4)
    return int8_codes.fit(model, optimizer, pairs, steps, held_out)


TASKS: dict[str, tuple[Callable[..., float], int]] = {
    "a convolutional network on digits": (int8_codes.digits, 40),
    "a GPT on characters": (characters, 80),
    "an embedding with rare rows": (int8_codes.words, 120),
}
int8 = partial(AdamW, state_dtype="int8")
SEEDS = 5


class Linear(AdamW):
    """Simulates a second moment in 8 bits that space it evenly: small ones of a block become zero."""

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        for state in self.state.values():
            v = state["exp_avg_sq"]
            if v.numel() >= 4096:
                flat = nn.functional.pad(v.flatten(), (0, -v.numel() % BLOCK)).view(-1, BLOCK)
                unit = flat.amax(1, keepdim=True).clamp(min=1e-30) / 255
                v.copy_(((flat / unit).round() * unit).flatten()[: v.numel()].view(v.shape))


@cache
def float32_losses(task: str) -> Losses:
    train, steps = TASKS[task]
    return [train(AdamW, seed, steps) for seed in range(SEEDS)]


def assert_as_good(task: str, make: Any, seeds: int = 2) -> None:
    """The loss on what was held out is that of float32 moments and the same seed, to two standard deviations of what
    float32 has with other seeds."""
    right = float32_losses(task)
    train, steps = TASKS[task]
    found = [train(make, seed, steps) for seed in range(seeds)]
    for x, y in zip(found, right, strict=False):
        assert abs(x - y) <= 2 * stdev(right), f"{found} against {right}"


@pytest.mark.parametrize("task", TASKS)
def test_8_bit_moments_train_as_well_as_float32_ones(task) -> None:
    assert_as_good(task, int8)


@pytest.mark.parametrize("task", TASKS)
def test_an_evenly_spaced_second_moment_does_not(task) -> None:
    with pytest.raises(AssertionError, match="against"):
        assert_as_good(task, Linear, seeds=1)


def test_torchao_s_8_bit_adamw_ends_there_too() -> None:
    """Where it is installed: the same bound for another code of 8 bits."""
    torchao = pytest.importorskip("torchao.optim")
    assert_as_good("an embedding with rare rows", torchao.AdamW8bit, seeds=1)
