"""Steps inside the backward pass: the bits of the plain loop, the memory of one gradient, and what is refused.

Both loops are one function here, `train`: they differ only in how the optimizer was made.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REAL_DTYPES, assert_same_bits, assert_same_result
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from adamfused import Adam, AdamW, RMSprop, backend, step_in_backward

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

pytestmark = pytest.mark.reference
PATHS = [
    "reference",
    pytest.param(
        "native",
        marks=[
            pytest.mark.native,
            pytest.mark.skipif(backend.native() is None, reason="the extension is not loaded"),
        ],
    ),
]


class Net(torch.nn.Module):
    """Its first and last layers share their weight; one parameter gets no gradient, and one is frozen."""

    def __init__(self, dtype: torch.dtype = torch.float32, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(5, 8, dtype=dtype, sparse=sparse)
        self.norm = torch.nn.LayerNorm(8, dtype=dtype)
        self.inner = torch.nn.Linear(8, 8, dtype=dtype)
        self.head = torch.nn.Linear(8, 5, bias=False, dtype=dtype)
        if not sparse:
            self.head.weight = self.embed.weight
        self.unused = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        self.frozen = torch.nn.Parameter(torch.ones(8, dtype=dtype), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.inner(self.norm(x)).tanh() * self.frozen)


def loss(model: torch.nn.Module, seed: int = 0) -> Tensor:
    tokens = torch.randint(0, 5, (4, 3), generator=torch.Generator().manual_seed(seed))
    return model(tokens).square().mean()


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    iterations: Iterable[int],
    passes: int = 1,
    scheduler: Any = None,
) -> None:
    for t in iterations:
        for k in range(passes):
            loss(model, 10 * t + k).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def two_groups(named: Any, make: Any = AdamW, lr: float = 0.01, **options: Any) -> Any:
    """Matrices decay; the others do not, and have a learning rate of their own."""
    matrices = [(name, p) for name, p in named if p.ndim >= 2]
    others = [(name, p) for name, p in named if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 3 * lr}]
    return make(groups, lr=lr, weight_decay=0.0, **options)


def plain(model: torch.nn.Module, groups: Any = two_groups, **options: Any) -> Any:
    return groups([(n, p) for n, p in model.named_parameters() if p.requires_grad], **options)


def moves(optimizer: torch.optim.Optimizer, *params: Tensor) -> list[int]:
    """How often each parameter has moved."""
    return [int(optimizer.state.get(p, {}).get("step", 0)) for p in params]


# ---- the bits of the plain loop ------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"make": Adam, "amsgrad": True},
        {"make": AdamW, "ema_decay": 0.9},
        {"make": RMSprop, "momentum": 0.9, "centered": True},
    ],
    ids=lambda options: options["make"].__name__,
)
def test_two_groups_and_a_scheduler(options, dtype, path) -> None:
    model, twin, other = (Net(dtype) for _ in range(3))
    options = options | {"backend": path}
    handle = step_in_backward(model, lambda named: two_groups(named, **options))
    of_twin, of_other = plain(twin, **options), plain(other, **options | {"lr": 0.011})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the scheduler, if it missed step()
        for m, optimizer in ((model, handle.optimizer), (twin, of_twin), (other, of_other)):
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            train(m, optimizer, range(5), scheduler=scheduler)
    assert_same_result(handle.optimizer, of_twin)
    with pytest.raises(AssertionError):
        assert_same_result(handle.optimizer, of_other)


def test_parameters_move_in_backward_and_gradients_are_freed() -> None:
    model = Net()
    handle = step_in_backward(model, two_groups)
    before = model.inner.weight.detach().clone()
    loss(model).backward()
    assert not torch.equal(model.inner.weight, before)
    assert all(p.grad is None for p in model.parameters())
    shared, unused = model.embed.weight, model.unused
    assert moves(handle.optimizer, shared, unused) == [1, 0]
    handle.optimizer.step()  # there is nothing left to move
    assert moves(handle.optimizer, shared, unused) == [1, 0]


@pytest.mark.parametrize("path", PATHS)
def test_weights_in_two_formats(path) -> None:
    copies: list[list[Tensor]] = []

    def with_copies(named: Any) -> Any:
        copies.append([torch.zeros_like(p, dtype=torch.bfloat16) for _, p in named])
        return AdamW(named, lr=0.01, copy_to=copies[-1], backend=path)

    model, twin = Net(), Net()
    handle, of_twin = step_in_backward(model, with_copies), plain(twin, groups=with_copies)
    train(model, handle.optimizer, range(3))
    train(twin, of_twin, range(3))
    assert_same_result(handle.optimizer, of_twin)
    for p, a, b in zip(of_twin.param_groups[0]["params"], *copies, strict=True):
        assert_same_bits(a, torch.zeros_like(a) if p is twin.unused else p.detach().bfloat16())
        assert_same_bits(a, b)


@pytest.mark.parametrize("segments", ["plain", "checkpointed", "compiled"])
def test_however_the_graph_is_made(segments) -> None:
    """Segments that are computed again in backward find weights that have not moved, shared ones too."""

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(8, 8)
            self.last = torch.nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                if segments == "checkpointed":
                    x = checkpoint(self.layer, x.tanh(), use_reentrant=False)
                else:
                    x = self.layer(x.tanh())
            return self.last(x)

    optimizers = []
    for in_backward in (True, False):
        model = Twice()
        run = torch.compile(model, backend="aot_eager") if segments == "compiled" else model
        if in_backward:
            optimizer = step_in_backward(model, lambda named: AdamW(named, lr=0.1)).optimizer
        else:
            optimizer = AdamW(model.named_parameters(), lr=0.1)
        for t in range(4):
            run(torch.full((3, 8), 0.1 * t)).square().sum().backward()
            assert (model.layer.weight.grad is None) == in_backward
            optimizer.step()
            optimizer.zero_grad()
        optimizers.append(optimizer)
    assert_same_result(*optimizers)


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    model, twin = Net(), Net()
    handle, of_twin = step_in_backward(model, two_groups), plain(twin)
    for t in range(3):
        for m, optimizer in ((model, handle.optimizer), (twin, of_twin)):

            def closure(m: Any = m, optimizer: Any = optimizer, t: int = t) -> Tensor:
                optimizer.zero_grad()
                value = loss(m, t)
                value.backward()
                return value

            assert optimizer.step(closure).item() > 0
    assert_same_result(handle.optimizer, of_twin)


# ---- accumulation --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_accumulated_gradients(path) -> None:
    model, twin, other = Net(), Net(), Net()
    handle = step_in_backward(model, lambda named: two_groups(named, backend=path), accumulate=3)
    of_twin, of_other = plain(twin, backend=path), plain(other, backend=path)
    train(model, handle.optimizer, range(4), passes=3)
    train(twin, of_twin, range(4), passes=3)
    train(other, of_other, range(4), passes=2)
    assert_same_result(handle.optimizer, of_twin)
    with pytest.raises(AssertionError):
        assert_same_result(handle.optimizer, of_other)


def test_accumulated_gradients_move_with_the_last_pass() -> None:
    model = Net()
    handle = step_in_backward(model, two_groups, accumulate=3)
    for t, (moved, kept) in enumerate([(0, True), (0, True), (1, False)]):
        loss(model, t).backward()
        assert moves(handle.optimizer, model.embed.weight) == [moved]
        assert (model.embed.weight.grad is not None) == kept


def test_an_early_step_moves_what_has_been_added_up() -> None:
    """As at the end of the data, and for a parameter that only some of the passes use."""
    model, twin = Net(), Net()
    handle, of_twin = step_in_backward(model, two_groups, accumulate=3), plain(twin)
    for m, optimizer in ((model, handle.optimizer), (twin, of_twin)):
        train(m, optimizer, range(2), passes=2)
        loss(m).backward()
        m.inner(torch.ones(8)).sum().backward()
        m.inner(torch.ones(8)).sum().backward()
        optimizer.step()
        assert (m.embed.weight.grad is None) == (m is model)
        optimizer.zero_grad()
        train(m, optimizer, range(2), passes=3)
    assert_same_result(handle.optimizer, of_twin)


def test_zero_grad_begins_anew() -> None:
    model, twin = Net(), Net()
    handle, of_twin = step_in_backward(model, two_groups, accumulate=2), plain(twin)
    for m, optimizer in ((model, handle.optimizer), (twin, of_twin)):
        loss(m, 99).backward()
        optimizer.zero_grad()
        train(m, optimizer, range(2), passes=2)
    assert_same_result(handle.optimizer, of_twin)


def test_accumulation_without_its_number_is_an_error() -> None:
    model = Net()
    handle = step_in_backward(model, two_groups)
    loss(model).backward()
    with pytest.raises(RuntimeError, match=r"gradient of 'inner.bias' came again.*accumulate=N"):
        loss(model).backward()
    moved = moves(handle.optimizer, *model.parameters())
    assert max(moved) == 1
    handle.optimizer.step()  # ends the iteration: the second pass has moved nothing
    assert moves(handle.optimizer, *model.parameters()) == moved
    train(model, handle.optimizer, range(2))
    assert max(moves(handle.optimizer, *model.parameters())) == 3


def test_one_pass_too_many_is_an_error() -> None:
    model = Net()
    handle = step_in_backward(model, two_groups, accumulate=2)
    loss(model).backward()
    loss(model).backward()
    with pytest.raises(RuntimeError, match=r"came again after .* \(accumulate=2\)"):
        loss(model).backward()
    handle.optimizer.step()
    assert max(moves(handle.optimizer, *model.parameters())) == 1


def test_reentrant_checkpoints_that_share_a_parameter_are_an_error() -> None:
    layer = torch.nn.Linear(2, 2)
    step_in_backward(layer, AdamW)
    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        x = checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        x.sum().backward()


# ---- the optimizer is an optimizer ---------------------------------------------------------------


@pytest.mark.parametrize("first_in_backward", [True, False])
def test_checkpoints_of_one_loop_continue_in_the_other(first_in_backward) -> None:
    whole = Net()
    of_whole = plain(whole)
    train(whole, of_whole, range(6))
    first, second = Net(), Net()
    in_backward, by_step = (first, second) if first_in_backward else (second, first)
    optimizers = {
        in_backward: step_in_backward(in_backward, two_groups).optimizer,
        by_step: plain(by_step),
    }
    train(first, optimizers[first], range(3))
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizers[first].state_dict()], file)
    file.seek(0)
    of_model, of_optimizer = torch.load(file, weights_only=True)
    train(second, optimizers[second], range(1))  # to be overwritten
    second.load_state_dict(of_model)
    optimizers[second].load_state_dict(of_optimizer)
    train(second, optimizers[second], range(3, 6))
    assert_same_result(optimizers[second], of_whole)


def test_edits_of_the_groups_are_seen() -> None:
    """A new option, a parameter that goes to another group, groups in another order, a new group."""
    model, twin = Net(), Net()
    handle, of_twin = step_in_backward(model, two_groups), plain(twin)
    for m, optimizer in ((model, handle.optimizer), (twin, of_twin)):
        train(m, optimizer, range(2))
        first, second = optimizer.param_groups
        first["lr"], second["betas"] = 0.2, (0.5, 0.9)
        train(m, optimizer, range(2))
        first["params"].append(second["params"].pop(0))
        optimizer.param_groups.reverse()
        train(m, optimizer, range(2))
        m.frozen.requires_grad_()  # moved by step(): it had no gradients when the handle was made
        optimizer.add_param_group({"params": [("frozen", m.frozen)], "lr": 0.3})
        train(m, optimizer, range(2))
    assert_same_result(handle.optimizer, of_twin)
    assert moves(handle.optimizer, model.frozen, model.norm.bias) == [2, 8]


def test_an_option_set_too_late_is_an_error() -> None:
    """Not silently the next iteration's, as the plain loop would have used it now."""
    model = Net()
    handle = step_in_backward(model, two_groups)
    group = handle.optimizer.param_groups[1]
    group["lr"] = 0.5  # in time
    loss(model).backward()
    group["lr"] = float("0.5")  # no change
    handle.optimizer.step()
    group["lr"] = 0.4  # in time
    handle.optimizer.step()
    group["lr"] = 0.5
    loss(model).backward()
    group["lr"] = 0.25
    with pytest.raises(RuntimeError, match=r"'lr' of group 1 went from 0.5 to 0.25 after backward"):
        handle.optimizer.step()


def test_hooks_of_the_user() -> None:
    """Those of step() run once a step(), those of gradients before the move: here they clip."""
    model, twin = Net(), Net()
    handle, of_twin = step_in_backward(model, two_groups), plain(twin)
    calls: list[str] = []
    for m, optimizer in ((model, handle.optimizer), (twin, of_twin)):
        for p in m.parameters():
            if p.requires_grad:
                p.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        train(m, optimizer, range(3))
        assert calls == 3 * ["before", "after"]
        calls.clear()
    assert_same_result(handle.optimizer, of_twin)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_that_a_hook_drops_moves_nothing(accumulate) -> None:
    model = Net()
    model.norm.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    handle = step_in_backward(model, two_groups, accumulate=accumulate)
    train(model, handle.optimizer, range(2), passes=accumulate)
    assert moves(handle.optimizer, model.norm.weight, model.norm.bias) == [0, 2]


def test_copies_of_the_model_and_of_the_optimizer_are_plain() -> None:
    model = Net()
    handle = step_in_backward(model, two_groups)
    train(model, handle.optimizer, range(2))
    both = copy.deepcopy((model, handle.optimizer))
    loss(both[0], 20).backward()
    assert both[0].norm.weight.grad is not None
    both[1].step()
    train(model, handle.optimizer, [2])
    assert_same_result(handle.optimizer, both[1])


@pytest.mark.parametrize("path", PATHS)
def test_the_plain_loop_goes_on_after_remove(path) -> None:
    model, twin = Net(), Net()
    of_twin = plain(twin, backend=path)
    with step_in_backward(model, lambda named: two_groups(named, backend=path)) as handle:
        train(model, handle.optimizer, range(3))
    loss(model, 30).backward()
    assert moves(handle.optimizer, model.norm.weight) == [3]
    handle.optimizer.step()
    assert model.norm.weight.grad is not None
    handle.optimizer.zero_grad()
    train(model, handle.optimizer, range(4, 6))
    train(twin, of_twin, range(6))
    assert_same_result(handle.optimizer, of_twin)
    handle.remove()  # once more does nothing
    step_in_backward(model, two_groups)


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_is_lower_by_the_gradients() -> None:
    """One gradient of 100 is there at a time; another 2 % are left for 1.6 MB that come and go in the process. More
    than all of them cannot be saved. Where gradients are kept (`accumulate=2`), nothing is."""
    from backward_memory import peaks

    size, found = peaks(20_000_000)
    saved = {loop: (found["plain"] - its) / size for loop, its in found.items()}
    assert 0.97 <= saved["in backward"] <= 1.02
    assert abs(saved["in backward, accumulate=2"]) <= 0.02


def test_model_and_optimizer_are_freed() -> None:
    model = Net()
    handle = step_in_backward(model, two_groups)
    optimizer, weight = handle.optimizer, weakref.ref(model.inner.weight)
    del handle
    gc.collect()
    train(model, optimizer, range(2))  # the optimizer keeps the handle
    assert moves(optimizer, model.inner.weight) == [2]
    del model
    gc.collect()
    assert weight() is not None
    del optimizer
    gc.collect()
    assert weight() is None


def test_without_handle_and_optimizer_nothing_moves_and_that_is_said() -> None:
    model = Net()
    step_in_backward(model, two_groups)
    gc.collect()
    before = model.norm.weight.detach().clone()
    with pytest.warns(UserWarning, match="the handle and its optimizer are gone"):
        loss(model).backward()
    assert torch.equal(model.norm.weight, before) and model.norm.weight.grad is not None
    step_in_backward(model, two_groups)


# ---- errors, interruptions, threads --------------------------------------------------------------


def test_a_refused_gradient_leaves_its_parameter_whole() -> None:
    """The gradient of the embedding comes last; all others have moved. The iteration ends without it."""
    model, twin = Net(sparse=True), Net(sparse=True)
    handle, of_twin = step_in_backward(model, two_groups), plain(twin)
    with pytest.raises(RuntimeError, match=r"\('embed.weight'\): its gradient is sparse"):
        loss(model, 0).backward()
    handle.optimizer.step()
    loss(twin, 0).backward()
    twin.embed.weight.grad = None
    of_twin.step()
    of_twin.zero_grad()
    for m, optimizer in ((model, handle.optimizer), (twin, of_twin)):
        m.embed.sparse = False
        train(m, optimizer, range(1, 3))
    assert_same_result(handle.optimizer, of_twin)
    assert moves(handle.optimizer, model.embed.weight, model.head.weight) == [2, 3]


def test_an_interrupted_parameter_moves_once() -> None:
    """Ctrl-C right after the move: step() must not find the gradient again."""

    class Interrupted(AdamW):
        interrupt = True

        def _eager_step(self, *args: Any) -> None:
            super()._eager_step(*args)
            if self.interrupt:
                self.interrupt = False
                raise KeyboardInterrupt

    model, twin = Net(), Net()
    handle = step_in_backward(model, lambda named: two_groups(named, Interrupted))
    of_twin = plain(twin)
    with pytest.raises(KeyboardInterrupt):
        loss(model).backward()
    handle.optimizer.step()
    first = [name for name, p in model.named_parameters() if handle.optimizer.state.get(p)]
    assert len(first) == 1
    train(twin, of_twin, [0])
    assert_same_bits(model.get_parameter(first[0]), twin.get_parameter(first[0]))
    train(model, handle.optimizer, range(2))
    assert moves(handle.optimizer, model.get_parameter(first[0]), model.norm.bias) == [3, 2]


class Parts(torch.nn.Module):
    """Models that are trained by one optimizer, each in a thread."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(Net() for _ in range(count))

    def backward_at_once(self, iteration: int) -> None:
        threads = [
            threading.Thread(target=lambda part=part: loss(part, iteration).backward())
            for part in self.parts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("path", PATHS)
def test_backward_in_several_threads(path) -> None:
    model, twin = Parts(4), Parts(4)
    handle = step_in_backward(model, lambda named: two_groups(named, backend=path))
    of_twin = plain(twin, backend=path)
    for t in range(4):
        model.backward_at_once(t)
        handle.optimizer.step()
        for part in twin.parts:
            loss(part, t).backward()
        of_twin.step()
        of_twin.zero_grad()
    assert_same_result(handle.optimizer, of_twin)


@pytest.mark.parametrize("locked", [True, False])
def test_parameters_move_one_at_a_time(locked) -> None:
    """However many threads autograd has; without the lock they overlap."""

    class Slow(AdamW):
        def _eager_step(self, *args: Any) -> None:
            together.append(me := threading.get_ident())
            most.append(len(together))
            end = time.monotonic() + (0.01 if locked else 1.0)
            while max(most) == 1 and time.monotonic() < end:  # time for another to come
                time.sleep(1e-3)
            super()._eager_step(*args)
            together.remove(me)

    together: list[int] = []
    most: list[int] = []

    model = Parts(4)
    handle = step_in_backward(model, lambda named: two_groups(named, Slow))
    if not locked:
        handle._lock = contextlib.nullcontext()  # type: ignore[assignment]
    model.backward_at_once(0)
    assert (max(most) == 1) == locked


# ---- what cannot work ----------------------------------------------------------------------------


def stranger() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda named: AdamW(named, max_grad_norm=1.0), ValueError,
         "AdamW has max_grad_norm=1.0, but the first parameter moves before the norm of all gradients is known"),
        (lambda named: AdamW(named, fused_unscale=False), ValueError,
         "has fused_unscale=False, for a GradScaler that unscales after backward"),
        (lambda named: torch.optim.AdamW(named), TypeError,
         "returned is of type torch.optim.adamw.AdamW; expected an optimizer of adamfused"),
        (lambda named: None, TypeError, "returned is of type builtins.NoneType; expected an optimizer of adamfused"),
        (AdamW([stranger()]), TypeError, "make_optimizer is of type AdamW; expected a function"),
        (lambda named: AdamW(named[1:]), ValueError, "AdamW lacks 'unused' of the model"),
        (lambda named: AdamW(named[-1:]), ValueError,
         "lacks 'unused', 'embed.weight', 'norm.weight' and 2 more of the model"),
        (lambda named: AdamW([*named, ("other", stranger())]), ValueError,
         r"parameter 6 of group 0 \('other'\) is not the model's"),
    ],
    ids=["max_grad_norm", "fused_unscale", "torch's", "none", "no function", "one lacks", "many lack", "stranger"],
)  # fmt: skip
def test_optimizers_that_cannot_work_are_refused(make, error, message) -> None:
    model = Net()
    with pytest.raises(error, match=message):
        step_in_backward(model, make)
    step_in_backward(model, AdamW)  # nothing was left behind


def test_frozen_parameters_may_be_the_optimizers() -> None:
    model = Net()
    optimizer = step_in_backward(model, lambda named: AdamW(model.parameters())).optimizer
    train(model, optimizer, range(2))
    assert moves(optimizer, model.norm.weight, model.frozen) == [2, 0]


@pytest.mark.parametrize("accumulate", [0, -1, 1.0, True, None])
def test_numbers_of_passes_that_mean_nothing_are_refused(accumulate) -> None:
    with pytest.raises(ValueError, match=f"accumulate is {accumulate}; expected the number"):
        step_in_backward(Net(), AdamW, accumulate=accumulate)


def test_a_second_handle_is_refused() -> None:
    model = Net()
    handle = step_in_backward(model, AdamW)
    with pytest.raises(ValueError, match="'weight' moves in backward already"):
        step_in_backward(model.norm, AdamW)
    handle.remove()
    step_in_backward(model.norm, AdamW)


def test_clipping_that_is_switched_on_later_is_refused() -> None:
    model = Net()
    handle = step_in_backward(model, AdamW)
    handle.optimizer.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="AdamW has max_grad_norm=1.0"):
        loss(model).backward()
    assert moves(handle.optimizer, *model.parameters()) == [0] * len(list(model.parameters()))


def test_a_parameter_that_left_the_groups_is_refused() -> None:
    model = Net()
    handle = step_in_backward(model, two_groups)
    handle.optimizer.param_groups[0]["params"].pop()
    with pytest.raises(RuntimeError, match="'inner.weight' is no longer in any group"):
        loss(model).backward()
    handle.optimizer.step()
    model.inner.weight.requires_grad_(False)
    train(model, handle.optimizer, range(2))


@pytest.mark.parametrize("unscales_first", [False, True])
def test_a_grad_scaler_is_refused(unscales_first) -> None:
    """When it first shows itself to the optimizer. After that, the loop without it works."""
    model = Net()
    handle = step_in_backward(model, two_groups)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss(model)).backward()
    if unscales_first:
        scaler.unscale_(handle.optimizer)
    with pytest.raises(RuntimeError, match="a GradScaler is to unscale the gradients now"):
        scaler.step(handle.optimizer)
    handle.optimizer.step()
    train(model, handle.optimizer, range(2))
    assert moves(handle.optimizer, model.norm.weight) == [3]


def test_a_disabled_grad_scaler_does_nothing() -> None:
    model, twin = Net(), Net()
    handle, of_twin = step_in_backward(model, two_groups), plain(twin)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for t in range(2):
        scaler.scale(loss(model, 10 * t)).backward()
        scaler.step(handle.optimizer)
        scaler.update()
    train(twin, of_twin, range(2))
    assert_same_result(handle.optimizer, of_twin)


def test_a_list_of_parameters_is_refused() -> None:
    model: Any = list(Net().parameters())
    with pytest.raises(TypeError, match="model is of type list; expected a torch.nn.Module"):
        step_in_backward(model, AdamW)


@pytest.fixture
def one_rank(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_distributed_data_parallel_is_refused(one_rank) -> None:
    model = DistributedDataParallel(torch.nn.Linear(3, 2))
    with pytest.raises(ValueError, match="the model is a DistributedDataParallel, which reduces"):
        step_in_backward(model, AdamW)
    with pytest.raises(ValueError, match="module '0' is a DistributedDataParallel"):
        step_in_backward(torch.nn.Sequential(model), AdamW)


def test_distributed_data_parallel_around_the_model_is_noticed(one_rank) -> None:
    """It sets gradients after backward: of zeros, as it found none."""
    model = torch.nn.Linear(3, 2)
    handle = step_in_backward(model, AdamW)
    around = DistributedDataParallel(model)
    around(torch.ones(3)).sum().backward()
    with pytest.raises(RuntimeError, match="'weight' had a gradient again after it had moved"):
        handle.optimizer.step()


def test_the_first_fully_sharded_data_parallel_is_refused() -> None:
    """Its ``__init__`` wants an accelerator, so here it has none of its own."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    torch.nn.Module.__init__(model)
    with pytest.raises(ValueError, match="the model is a FullyShardedDataParallel"):
        step_in_backward(model, AdamW)


def test_fully_sharded_parameters(one_rank) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    twin = copy.deepcopy(model)
    fully_shard(model[0], mesh=one_rank)
    fully_shard(model, mesh=one_rank)
    handle = step_in_backward(model, lambda named: AdamW(named, lr=0.1))
    of_twin = AdamW(twin.parameters(), lr=0.1)
    for t in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(t))
        model(x).square().sum().backward()
        assert all(p.grad is None for p in model.parameters())
        handle.optimizer.step()
        twin(x).square().sum().backward()
        of_twin.step()
        of_twin.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert isinstance(p, DTensor)
        assert_same_bits(p.full_tensor(), q)
    saved = get_optimizer_state_dict(model, handle.optimizer)["state"]
    assert_same_bits(
        saved["0.weight"]["exp_avg"].full_tensor(), of_twin.state[twin[0].weight]["exp_avg"]
    )
