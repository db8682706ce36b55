"""The faulty optimizers of ``mutants.py``: without a fault they are right, and each fault shows where it should."""

from __future__ import annotations

import copy
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import mutants
import numpy as np
import pytest
import torch
from float64_rules import adam64, adam_bounds
from helpers import assert_same_bits, differing, digest, threads, wild
from mutants import MUTATIONS, AdamW
from test_accuracy import (
    ADAM_KEYS,
    ADAM_OPTIONS,
    COMMON_OPTIONS,
    SHARES,
    disagreement,
    gradients,
    history,
    rounded_once,
    steps_of,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from adamfused.spec import Spec

Make = Callable[..., Optimizer]
Change = Callable[[Tensor], Tensor]
NAMES = sorted(MUTATIONS)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def same(t: Tensor) -> Tensor:
    return t


# ---- without a fault -----------------------------------------------------------------------------


def worst(make: Make, dtype: torch.dtype = torch.float32, **wrong: Any) -> float:
    """The largest |error| / bound of one float32 step from equal state, against float64 of the same rule.

    ``wrong`` changes settings of the float64 rule only.
    """
    settings: Any = {"lr": 1e-2, "wd": 0.1, "decoupled": True}
    ratio = 0.0
    grads = gradients(20, 8192)
    for t, g, (p, *states), after in steps_of(
        make, {"lr": 1e-2, "weight_decay": 0.1}, ADAM_KEYS, grads, dtype
    ):
        exact = adam64(p, g, *states, t, **(settings | wrong))
        for got, wanted, limit in zip(
            after, exact, adam_bounds(p, g, *states, t, **settings), strict=True
        ):
            ratio = max(ratio, float(np.max(np.abs(got - wanted) / limit)))
    return ratio


def test_a_float32_step_is_within_the_sum_of_its_roundings() -> None:
    assert worst(AdamW) <= 1.0


def test_a_float64_step_is_as_exact_as_float64() -> None:
    """Its roundings are 2^29 times smaller, and the rule that it is compared with makes as many."""
    assert worst(AdamW, torch.float64) <= 2 * 2.0**-29
    assert worst(partial(AdamW, mutation="float64_in_float32"), torch.float64) > 2 * 2.0**-29


@pytest.mark.parametrize("wrong", [{"eps": 1.01e-8}, {"wd": 0.1001}, {"beta2": 0.9990001}])
def test_control_the_bounds_notice_another_rule(wrong: dict[str, Any]) -> None:
    assert worst(AdamW, **wrong) > 1.2


@SHARES
def test_a_16_bit_step_is_the_exact_one_rounded_once(dtype: torch.dtype, share: float) -> None:
    def make(params: Any, state_dtype: None, mutation: str | None = None, **options: Any) -> AdamW:
        return AdamW(params, mutation=mutation, **options)

    right, error = rounded_once(make, dtype, state_dtype=None)
    assert right >= share and error <= 1.0
    fault = "bfloat16_in_bfloat16" if dtype == torch.bfloat16 else "float16_in_float16"
    right, error = rounded_once(partial(make, mutation=fault, eps=1e-6), dtype, state_dtype=None)
    assert right < share and not error <= 1.0


def test_twenty_steps_agree_with_torch_in_every_setting() -> None:
    options = ADAM_OPTIONS | COMMON_OPTIONS
    for values in product(*options.values()):
        kwargs = {"lr": 1e-2, "eps": 1e-6} | dict(zip(options, values, strict=True))
        theirs = history(torch.optim.AdamW, kwargs | {"foreach": False})
        assert disagreement(history(AdamW, kwargs), theirs) <= 1.0, kwargs


IN_GROUPS = [
    "first_group_only",
    "first_group_lr",
    "group_decay_ignored",
    "lr_frozen",
    "shared_step",
]


@pytest.mark.parametrize("fault", [None, *IN_GROUPS, "first_parameter_only", "missing_as_zero"])
def test_groups_ages_and_schedules_agree_with_torch(fault: str | None) -> None:
    """Two groups, of which the second has a tensor lr; it halves, and a parameter misses a step."""
    histories = []
    for make in (partial(AdamW, mutation=fault), partial(torch.optim.AdamW, foreach=False)):
        params = [Parameter(normal(i, 1000)) for i in range(4)]
        lr = torch.tensor(1e-2)
        second = {"params": params[2:], "lr": lr, "weight_decay": 0.5}
        optimizer = make([{"params": params[:2]}, second], lr=3e-2, weight_decay=0.1, eps=1e-6)
        rows = [torch.cat([*params]).tolist()]
        for t in range(6):
            for i, p in enumerate(params):
                p.grad = None if (t, i) == (2, 1) else normal(10 * t + i, 1000)
            optimizer.step()
            lr *= 0.5
            rows.append(torch.cat([*params]).tolist())
        histories.append(np.array(rows))
    assert (disagreement(*histories) <= 1.0) == (fault is None)


@pytest.mark.parametrize(
    "options",
    [{}, {"eps": 0.0}, {"betas": (0.0, 0.0)}, {"amsgrad": True}, {"lr": 0.0, "weight_decay": 0.0}],
)
def test_nan_and_infinity_are_where_torch_has_them(options: dict[str, Any]) -> None:
    def places(make: Make) -> str:
        rng = np.random.default_rng(0)
        start, *grads = (wild(rng, 4096, torch.float32, specials=0.1) for _ in range(6))
        p = Parameter(start)
        optimizer = make([p], **options)
        for p.grad in grads:
            optimizer.step()
        return digest([p.isnan().half(), p.isinf() * p.sign().nan_to_num()])

    torchs = places(partial(torch.optim.AdamW, foreach=False))
    assert places(AdamW) == torchs
    assert places(partial(AdamW, mutation="nan_dropped")) != torchs


LAYOUTS: dict[str, Change] = {
    "contiguous": same,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
}


def of_layouts(make: Make, parameter: str, gradient: str, dtype: torch.dtype) -> Tensor:
    p = Parameter(LAYOUTS[parameter](normal(0, 2, 3, 4, 5, dtype=dtype)))
    optimizer = make([p])
    for t in (1, 2):
        p.grad = LAYOUTS[gradient](normal(t, *p.shape, dtype=dtype))
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("parameter, gradient", list(product(LAYOUTS, LAYOUTS)))
def test_strides_do_not_matter(parameter: str, gradient: str, dtype: torch.dtype) -> None:
    right = of_layouts(AdamW, "contiguous", "contiguous", dtype)
    assert_same_bits(of_layouts(AdamW, parameter, gradient, dtype), right)
    wrong = partial(AdamW, mutation="lost_copy" if parameter == "transposed" else "memory_order")
    if parameter == "transposed" or {parameter, gradient} == {"contiguous", "channels_last"}:
        assert differing(of_layouts(wrong, parameter, gradient, dtype), right)


def test_complex_numbers_are_pairs_of_real_ones() -> None:
    start, grad = (normal(i, 50, dtype=torch.complex64) for i in (0, 1))

    def moved(p: Tensor, grad: Tensor, mutation: str | None = None) -> Tensor:
        p = Parameter(p.clone())
        p.grad = grad
        AdamW([p], amsgrad=True, maximize=True, mutation=mutation).step()
        return p.detach()

    pairs = moved(torch.view_as_real(start), torch.view_as_real(grad.conj().resolve_conj()))
    assert_same_bits(torch.view_as_real(moved(start, grad.conj())), pairs)
    assert differing(torch.view_as_real(moved(start, grad.conj(), "complex_modulus")), pairs)


@pytest.mark.parametrize("fault, kept", [(None, 1e-43), ("subnormals_flushed", 0.0)])
def test_a_small_square_is_subnormal_and_not_lost(fault: str | None, kept: float) -> None:
    p = Parameter(torch.ones(1))
    p.grad = torch.full((1,), 1e-20)
    optimizer = AdamW([p], mutation=fault)
    optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].item() == pytest.approx(kept, abs=2.0**-149)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_scalars_and_empty_tensors_are_moved(shape: tuple[int, ...]) -> None:
    p = Parameter(torch.ones(shape))
    p.grad = torch.ones(shape)
    AdamW([p], lr=0.5, weight_decay=0.0).step()
    assert torch.equal(p, torch.full(shape, 0.5))


@pytest.mark.parametrize(
    "grad", [normal(0, 4, 4).to_sparse(), normal(0, 4, 4, dtype=torch.complex64), normal(0, 4)]
)
def test_a_gradient_that_does_not_fit_is_refused_before_anything_moves(grad: Tensor) -> None:
    def moved(mutation: str | None) -> bool:
        first, second = (Parameter(torch.zeros(4, 4)) for _ in range(2))
        first.grad, second.data = torch.ones(4, 4), torch.zeros_like(grad.to_dense())
        second.grad = grad
        second.data = torch.zeros(4, 4)
        optimizer = AdamW([first, second], mutation=mutation)
        with pytest.raises(RuntimeError, match="expected"):
            optimizer.step()
        return bool(first.any()) or bool(optimizer.state)

    assert not moved(None)
    assert moved("refused_too_late")


def test_states_keep_their_dtypes_in_a_checkpoint_and_are_copies() -> None:
    assert loaded(AdamW) == loaded(AdamW, by_checkpoint=False)
    saved = AdamW([p := Parameter(torch.ones(3))])
    p.grad = torch.ones(3)
    saved.step()
    (other := AdamW([p])).load_state_dict(saved.state_dict())
    other.step()
    assert float(saved.state[p]["step"]) == 1


def test_a_step_leaves_the_gradient_and_is_noticed_by_autograd() -> None:
    def stepped(mutation: str | None = None) -> Tensor:
        p = Parameter(normal(0, 4))
        p.grad = normal(1, 4)
        loss = (p * p).sum()
        AdamW([p], mutation=mutation).step()
        assert_same_bits(p.grad, normal(1, 4))
        return loss

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stepped().backward()
    stepped("version_kept").backward()
    with pytest.raises(AssertionError):
        stepped("gradient_zeroed")


# ---- with one ------------------------------------------------------------------------------------


def steps(
    make: Make,
    shapes: Sequence[Sequence[int]] = ((4, 12),),
    dtype: torch.dtype = torch.float32,
    parameter: Change = same,
    gradient: Change = same,
    n: int = 3,
    **options: Any,
) -> list[Any]:
    """All that can be seen after ``n`` steps of parameters, each ``parameter(memory)`` of a memory of one shape."""
    memories = [normal(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    params = [Parameter(parameter(t)) for t in memories]
    optimizer = make(params, **{"lr": 1e-2, "weight_decay": 0.1} | options)
    for t in range(n):
        for i, p in enumerate(params):
            p.grad = gradient(normal(100 * t + i, *p.shape, dtype=dtype))
        optimizer.step()
    return [digest(memories), *seen(optimizer)]


def seen(optimizer: Optimizer) -> list[Any]:
    """Bits of parameters, gradients and moments; the step counts; which parameters were written."""
    facts: list[Any] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            moments = [t for key, t in sorted(state.items()) if key != "step"]
            facts += [[t.dtype for t in moments], float(state.get("step", 0)), p._version > 0]
            facts.append(digest([p, *moments, *([] if p.grad is None else [p.grad])]))
    return facts


def with_value(value: float) -> Change:
    def change(g: Tensor) -> Tensor:
        return g.view(-1).index_fill(0, torch.tensor([1]), value).view(g.shape)

    return change


def two_groups(make: Make, **of_second: Any) -> list[Any]:
    params = [Parameter(normal(i, 16)) for i in range(2)]
    optimizer = make([{"params": params[:1]}, {"params": params[1:]} | of_second], lr=1e-2)
    for i, p in enumerate(params):
        p.grad = normal(i + 2, 16)
    optimizer.step()
    return seen(optimizer)


def scheduled(make: Make, lr: float | Tensor) -> list[Any]:
    """The lr changes after the first step; a tensor one in place, as torch's schedulers change it."""
    p = Parameter(normal(0, 16))
    optimizer = make([p], lr=lr)
    for t in range(2):
        p.grad = normal(t + 1, 16)
        optimizer.step()
        if isinstance(lr, Tensor):
            lr.fill_(1e-3)
        else:
            optimizer.param_groups[0]["lr"] = 1e-3
    return seen(optimizer)


def one_gradient_missing(make: Make) -> list[Any]:
    params = [Parameter(normal(i, 16)) for i in range(2)]
    optimizer = make(params)
    for t in range(3):
        params[0].grad, params[1].grad = normal(t + 2, 16), normal(t + 9, 16) if t != 1 else None
        optimizer.step()
    return seen(optimizer)


def loaded(make: Make, by_checkpoint: bool = True) -> list[Any]:
    """Two steps, save, load, a step with another gradient."""
    p = Parameter(normal(0, 16).bfloat16())
    optimizer = make([p])
    for t in range(3):
        p.grad = normal(t + 1, 16).bfloat16()
        if t == 2 and by_checkpoint:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = make([p])
            optimizer.load_state_dict(saved)
        optimizer.step()
    return seen(optimizer)


def closed(make: Make) -> list[Any]:
    p = Parameter(normal(0, 16))
    optimizer = make([p])

    def closure() -> float:
        loss = (p * p).sum()
        loss.backward()
        return loss.item()

    try:
        return [optimizer.step(closure), *seen(optimizer)]
    except RuntimeError as error:
        return [str(error)]


def one_gradient_sparse(make: Make) -> list[Any]:
    params = [Parameter(normal(i, 4, 4)) for i in range(2)]
    optimizer = make(params)
    params[0].grad, params[1].grad = normal(2, 4, 4), normal(3, 4, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    return [len(optimizer.state), digest(params)]


def on_two_threads(make: Make) -> list[Any]:
    with threads(2):
        return steps(make, shapes=((4096,),))


SHOWS: dict[str, Callable[[Make], list[Any]]] = {
    "lr_zero_decays": partial(steps, lr=0.0),
    "beta_zero_kept": partial(steps, betas=(0.0, 0.99)),
    "beta_zero_default": partial(steps, betas=(0.9, 0.0)),
    "eps_zero_default": partial(steps, eps=0.0, gradient=lambda g: 1e-9 * g),
    "maximize_ignored": partial(steps, maximize=True),
    "gradient_negated": partial(steps, maximize=True),
    "amsgrad_unused": partial(steps, amsgrad=True, betas=(0.9, 0.5)),
    "amsgrad_of_corrected": partial(steps, amsgrad=True, betas=(0.9, 0.5)),
    "float64_in_float32": partial(steps, dtype=torch.float64),
    "bfloat16_in_bfloat16": partial(steps, dtype=torch.bfloat16),
    "float16_in_float16": partial(steps, dtype=torch.float16),
    "complex_modulus": partial(steps, dtype=torch.complex64),
    "nan_dropped": partial(steps, gradient=with_value(float("nan"))),
    "infinity_clamped": partial(steps, gradient=with_value(float("inf"))),
    "skipped_if_not_finite": partial(steps, gradient=with_value(float("inf"))),
    "subnormals_flushed": partial(steps, gradient=with_value(1e-20)),
    "lost_tail": partial(steps, shapes=((5, 7),)),
    "beyond_65536": partial(steps, shapes=((65_552,),)),
    "lost_copy": partial(steps, parameter=Tensor.t),
    "strides_ignored": partial(steps, parameter=lambda t: t[:, ::2]),
    "one_past_the_end": partial(steps, parameter=lambda t: t.view(-1)[:32]),
    "memory_order": partial(steps, gradient=lambda g: g.t().contiguous().t()),
    "expanded_misread": partial(steps, gradient=lambda g: g[0].expand(g.shape)),
    "first_parameter_only": partial(steps, shapes=((16,), (16,))),
    "first_group_only": two_groups,
    "first_group_lr": partial(two_groups, lr=1e-3),
    "group_decay_ignored": partial(two_groups, weight_decay=0.5),
    "lr_frozen": partial(scheduled, lr=1e-2),
    "tensor_lr_frozen": lambda make: scheduled(make, lr=torch.tensor(1e-2)),
    "missing_as_zero": one_gradient_missing,
    "shared_step": one_gradient_missing,
    "step_in_bfloat16": partial(steps, n=260),
    "step_lost_on_load": loaded,
    "states_lost_on_load": loaded,
    "moments_cast_on_load": loaded,
    "loss_lost": closed,
    "closure_without_grad": closed,
    "refused_too_late": one_gradient_sparse,
    "noise_of_threads": on_two_threads,
    "noise_at_random": partial(steps, shapes=((4096,),)),
}
"""Where a fault shows that does not show in three steps of one small parameter with the usual options."""

END_THE_PROCESS = {"crash_on_empty": (0,), "hang_on_scalar": ()}


def test_there_is_a_mutation_for_each_place() -> None:
    assert len(MUTATIONS) >= 28 and {*SHOWS, *END_THE_PROCESS} <= set(MUTATIONS)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in END_THE_PROCESS])
def test_each_fault_shows(name: str) -> None:
    look = SHOWS.get(name, steps)
    right = look(AdamW)
    assert look(AdamW) == right
    assert look(partial(AdamW, mutation=name)) != right


@pytest.mark.parametrize("name", sorted({*SHOWS, *END_THE_PROCESS} - {"noise_at_random"}))
def test_a_narrow_fault_shows_nowhere_else(name: str) -> None:
    """Else what finds it need not look where it is."""
    with threads(1):
        assert steps(partial(AdamW, mutation=name)) == steps(AdamW)


CHILD = """
import sys, torch
from adamfused.spec import Spec
p = torch.nn.Parameter(torch.ones(eval(sys.argv[2])))
p.grad = torch.ones_like(p)
optimizer = Spec.parse(sys.argv[1]).make([p])
print("ready", flush=True)
optimizer.step()
"""


@pytest.mark.parametrize("name", END_THE_PROCESS)
def test_what_ends_or_holds_up_a_process(name: str) -> None:
    path = Path(mutants.__file__)
    specs = [f"{path}:AdamW[mutation={fault!r}]" for fault in (name, None)]
    shape = str(END_THE_PROCESS[name])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, spec, shape],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for spec in specs
    ]
    try:
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        faulty, right = children
        assert right.wait(60) == 0
        if name == "crash_on_empty":
            assert faulty.wait(60) == -signal.SIGABRT
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                faulty.wait(1)
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_a_fault_survives_copies_and_goes_by_name() -> None:
    spec = f"{mutants.__file__}:AdamW[mutation='no_bias_correction']"
    p = Parameter(torch.ones(3))
    named = Spec.parse(spec).make([p])
    assert type(named).__doc__ == MUTATIONS["no_bias_correction"]
    optimizer = AdamW([p], mutation="no_bias_correction")
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(other) is type(optimizer) is mutants.no_bias_correction
