"""``torch.amp.GradScaler``: the step unscales, in float32, and an overflow moves nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import EVERY_OPTIMIZER, OF_TORCH, assert_same_bits, assert_same_result, differing
from test_refusals import facts
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from adamfused import SGD, AdamW, Lion, RMSprop, grad_norm

INF, NAN = float("inf"), float("nan")
OURS = pytest.mark.parametrize("ours", EVERY_OPTIMIZER)


SHAPES = [(3,), (5, 7), ()]


def make(
    ours: type[Optimizer], path: str | None, dtype: torch.dtype = torch.float32, **options: Any
) -> Optimizer:
    source = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=source).to(dtype) for s in SHAPES]
    if path is not None:
        options["backend"] = path
    return ours([torch.nn.Parameter(w) for w in weights], lr=0.1, **options)


def gradients(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(s, generator=source)).to(dtype) for s in SHAPES]


def give(optimizer: Optimizer, grads: list[Tensor]) -> None:
    for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        p.grad = g.clone()


def scaler_of(scale: float, **options: Any) -> GradScaler:
    scaler = GradScaler("cpu", init_scale=scale, **options)
    scaler.scale(torch.zeros(()))  # makes the scale
    return scaler


# ---- the scale is taken off ----------------------------------------------------------------------


@OURS
@pytest.mark.parametrize("scale", [1.0, 2.0**16, 2.0**-3])
def test_a_power_of_two_changes_no_bit(path, ours, scale) -> None:
    scaled, plain = make(ours, path), make(ours, path)
    scaler = scaler_of(scale)
    for seed in range(4):
        give(scaled, gradients(seed, scale))
        give(plain, gradients(seed))
        scaler.step(scaled)
        scaler.update()
        plain.step()
        assert_same_result(scaled, plain)


@OURS
def test_any_scale_is_taken_off_as_the_scaler_itself_does(path, ours) -> None:
    """Both round 1 / scale to float32 and multiply: bit for bit."""
    results = []
    for fused in (True, False, None):
        optimizer = make(ours, path, fused_unscale=bool(fused))
        scaler = scaler_of(3000.7)
        for seed in range(4):
            give(optimizer, gradients(seed, 3000.7 if fused is not None else 3000.8))
            scaler.step(optimizer)
            scaler.update()
        results.append(optimizer)
    fused, unfused, other = results
    assert_same_result(fused, unfused)
    if ours is not Lion:  # which takes only signs
        assert differing(*(o.param_groups[0]["params"][1] for o in (fused, other)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_16_bits_are_unscaled_in_float32(path, dtype) -> None:
    """A scaler that unscales them in place would lose these, if it did not refuse float16."""
    scale, p = 2.0**16, torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    p.grad = torch.tensor([1.0, -(2.0**-9)], dtype=dtype)
    optimizer = AdamW([p], backend=path)
    scaler_of(scale).step(optimizer)
    expected = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    expected.grad_dtype = torch.float32
    expected.grad = p.grad.float() / scale
    plain = AdamW([expected], backend=path)
    plain.step()
    assert_same_result(optimizer, plain)
    assert float(optimizer.state[p]["exp_avg"][1]) != 0
    assert dtype == torch.bfloat16 or float((p.grad / scale)[1]) == 0


def test_control_the_scaler_refuses_to_unscale_float16_itself(path) -> None:
    optimizer = make(AdamW, path, torch.float16, fused_unscale=False)
    give(optimizer, gradients(0, dtype=torch.float16))
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler_of(4.0).step(optimizer)


def test_gradients_stay_scaled(path) -> None:
    optimizer, grads = make(AdamW, path), gradients(0, 2.0**10)
    give(optimizer, grads)
    scaler_of(2.0**10).step(optimizer)
    for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        assert_same_bits(p.grad, g)


@pytest.mark.parametrize("scale", [2.0**10, 3000.7])
def test_clipping_is_by_the_unscaled_norm(path, scale) -> None:
    """The norm is off by the rounding of the scaled gradients, 2^-24, and its own to float32; if it were that of the
    scaled ones, it would be 1,000 times too large."""
    clipped, plain = (make(AdamW, path, max_grad_norm=0.5) for _ in range(2))
    give(clipped, gradients(0, scale))
    give(plain, gradients(0))
    scaler_of(scale).step(clipped)
    plain.step()
    assert float(plain.grad_norm) > 5
    torch.testing.assert_close(clipped.grad_norm, plain.grad_norm, rtol=2**-22, atol=0)
    if scale == 2.0**10:
        assert_same_result(clipped, plain)
        assert_same_bits(clipped.grad_norm, plain.grad_norm)


def test_a_norm_that_is_given_is_that_of_the_scaled_gradients(path) -> None:
    """As adamfused.grad_norm tells it before the scaler's step."""
    one, two = (make(RMSprop, path, max_grad_norm=0.5) for _ in range(2))
    for optimizer in (one, two):
        give(optimizer, gradients(0, 2.0**10))
    scaler = scaler_of(2.0**10)
    norm = grad_norm([one])
    scaler.step(one, grad_norm=norm)
    scaler.step(two)
    assert_same_result(one, two)
    assert_same_bits(one.grad_norm, two.grad_norm)
    assert_same_bits(one.grad_norm, (norm / 2**10).float())


def test_unscaled_by_hand_before_the_step(path) -> None:
    """As in the recipe for clipping: the scaler then hands over no scale, but still says whether there was an
    overflow."""
    seen: list[Any] = []
    optimizer, plain = make(AdamW, path), make(AdamW, path)
    optimizer.register_step_pre_hook(lambda o, *_: seen.append((o.grad_scale, o.found_inf)))
    scaler = scaler_of(2.0**10)
    for grads in (gradients(0, 2.0**10), gradients(1, INF)):
        give(optimizer, grads)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)
        scaler.step(optimizer)
        scaler.update()
    give(plain, gradients(0))
    torch.nn.utils.clip_grad_norm_(plain.param_groups[0]["params"], 0.5)
    plain.step()
    assert_same_result(optimizer, plain)
    assert seen == [(None, torch.tensor(0.0)), (None, torch.tensor(1.0))]


# ---- an overflow ---------------------------------------------------------------------------------


def with_everything(path: str, **options: Any) -> tuple[Optimizer, list[Tensor]]:
    copies = [torch.zeros(s, dtype=torch.bfloat16) for s in SHAPES]
    return make(AdamW, path, max_grad_norm=1.0, ema_decay=0.9, copy_to=copies, **options), copies


@pytest.mark.parametrize("fused_unscale", [True, False])
@pytest.mark.parametrize("steps", [0, 2], ids=["at the first step", "later"])
@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_an_overflow_moves_nothing(path, special, steps, fused_unscale) -> None:
    """Weights, moments, averages, copies and counts are as they were, and states are not even made."""
    optimizer, copies = with_everything(path, fused_unscale=fused_unscale)
    scaler = scaler_of(4.0)
    for seed in range(steps):
        give(optimizer, gradients(seed, 4.0))
        scaler.step(optimizer)
        scaler.update()
    grads = gradients(9, 4.0)
    grads[1][2, 3] = special
    give(optimizer, grads)
    state = [optimizer.param_groups, optimizer.state, copies]
    before = facts(state)
    scaler.step(optimizer)
    scaler.update()
    assert facts(state) == before and len(optimizer.state) == (3 if steps else 0)
    assert scaler.get_scale() == 2.0
    give(optimizer, gradients(9, 2.0))
    scaler.step(optimizer)
    assert facts(state) != before, "the comparison can fail"


@pytest.mark.parametrize("ours", OF_TORCH)
def test_the_scale_grows_and_backs_off_as_with_torch(path, ours) -> None:
    """One overflow in the middle, two in a row, and growth after three good steps."""
    histories = []
    for optimizer in (make(ours, path), make(getattr(torch.optim, ours.__name__), None)):
        scaler, history = scaler_of(2.0**8, growth_interval=3), []
        for seed, overflow in enumerate([0, 0, 1, 0, 0, 0, 1, 1, 0, 0]):
            grads = gradients(seed, scaler.get_scale())
            grads[0][0] = INF if overflow else grads[0][0]
            give(optimizer, grads)
            scaler.step(optimizer)
            scaler.update()
            first = optimizer.state.get(optimizer.param_groups[0]["params"][0])
            steps = float(first["step"]) if first and "step" in first else 0.0
            history.append((scaler.state_dict(), None if ours is SGD else steps))
        histories.append(history)
    assert histories[0] == histories[1]
    assert [entry["scale"] for entry, _ in histories[0]][-3:] == [64.0, 64.0, 64.0]


def test_an_overflow_is_no_error_for_error_if_nonfinite(path) -> None:
    optimizer = make(AdamW, path, max_grad_norm=1.0, error_if_nonfinite=True)
    give(optimizer, gradients(0, INF))
    scaler = scaler_of(4.0)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0 and not optimizer.state
    with pytest.raises(RuntimeError, match="is non-finite"):
        optimizer.step()


@pytest.mark.parametrize("found", [torch.tensor(1.0), torch.tensor([1.0]), torch.tensor(2.0), 1])
def test_any_found_inf_that_is_not_0_is_an_overflow(path, found) -> None:
    optimizer = make(AdamW, path)
    give(optimizer, gradients(0))
    before = facts(optimizer.param_groups)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), found
    optimizer.step()
    assert facts(optimizer.param_groups) == before and not optimizer.state


@pytest.mark.parametrize("found", [torch.tensor(0.0), torch.tensor([0.0]), 0, None], ids=str)
@pytest.mark.parametrize(
    "scale", [torch.tensor(8.0), torch.tensor([8.0]), torch.tensor(8.0).double()], ids=str
)
def test_any_shape_of_scale_and_found_inf(path, scale, found) -> None:
    optimizer, plain = make(AdamW, path, max_grad_norm=0.5), make(AdamW, path, max_grad_norm=0.5)
    give(optimizer, gradients(0, 8.0))
    give(plain, gradients(0))
    optimizer.grad_scale, optimizer.found_inf = scale, found
    optimizer.step()
    plain.step()
    assert_same_result(optimizer, plain)
    assert optimizer.grad_norm.shape == ()


# ---- what the scaler and others look at ----------------------------------------------------------


@pytest.mark.reference
@OURS
def test_attributes_are_there_only_while_the_scaler_steps(ours) -> None:
    """Fabric and others ask for them: an attribute of the class would count as a scale that is set."""
    optimizer = make(ours, None)
    assert isinstance(ours._step_supports_amp_scaling, property)
    assert optimizer._step_supports_amp_scaling is True
    give(optimizer, gradients(0))
    for _ in range(2):
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
        scaler_of(4.0).step(optimizer)


DUPLICATES: dict[str, Callable[[Optimizer], Optimizer]] = {
    "as made": lambda o: o,
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "after load_state_dict": lambda o: o.load_state_dict(make(type(o), None).state_dict()) or o,
}


@pytest.mark.reference
@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES.keys())
@pytest.mark.parametrize("fused_unscale", [True, False])
def test_fused_unscale_is_kept(duplicate, fused_unscale) -> None:
    optimizer = duplicate(make(AdamW, None, fused_unscale=fused_unscale))
    assert optimizer._step_supports_amp_scaling is fused_unscale
    give(optimizer, gradients(0, 4.0))
    scaler_of(4.0).step(optimizer)
    first = optimizer.param_groups[0]["params"][0].grad
    assert torch.equal(first, gradients(0, 4.0 if fused_unscale else 1.0)[0])


def test_one_scaler_for_two_optimizers_of_which_one_overflows(path) -> None:
    good, bad = make(AdamW, path), make(RMSprop, path)
    scaler = scaler_of(4.0)
    give(good, gradients(0, 4.0))
    give(bad, gradients(0, NAN))
    scaler.step(good)
    scaler.step(bad)
    scaler.update()
    assert len(good.state) == 3 and not bad.state
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("enabled", [True, False])
def test_a_loop_with_autocast_trains(path, enabled) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = AdamW(model.parameters(), lr=0.1, max_grad_norm=1.0, backend=path)
    scaler, x = GradScaler("cpu", enabled=enabled), torch.randn(64, 4)
    y, losses = x.sum(1, keepdim=True), []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = torch.nn.functional.mse_loss(model(x), y)
        scaler.scale(loss.float()).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_after_a_refused_step_the_next_has_the_right_scale(path) -> None:
    optimizer, plain = make(AdamW, path), make(AdamW, path)
    give(optimizer, gradients(0, 4.0))
    give(plain, gradients(0))
    scaler, last = scaler_of(4.0), optimizer.param_groups[0]["params"][2]
    optimizer.state[last] = {"step": torch.tensor(NAN)}
    with pytest.raises(RuntimeError, match="parameter 2 of group 0: state"):
        scaler.step(optimizer)
    del optimizer.state[last]
    scaler.step(optimizer)
    plain.step()
    assert_same_result(optimizer, plain)
