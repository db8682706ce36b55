"""What torch.optim promises of an optimizer, asked of ours: its own table of inputs and errors, groups, closures,
hooks, schedulers, GradScaler, tensor lr, steps in backward, sharded wrappers."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from typing import Any

import pytest
import torch
from helpers import EVERY_OPTIMIZER, give_gradient
from torch import Tensor

import adamfused
import adamfused.formats

pytestmark = pytest.mark.reference

PAIRS = [
    (adamfused.SGD, torch.optim.SGD),
    (adamfused.Adagrad, torch.optim.Adagrad),
    (adamfused.Adadelta, torch.optim.Adadelta),
    (adamfused.NAdam, torch.optim.NAdam),
    (adamfused.RAdam, torch.optim.RAdam),
    (adamfused.Adam, torch.optim.Adam),
    (adamfused.AdamW, torch.optim.AdamW),
    (adamfused.RMSprop, torch.optim.RMSprop),
]
pairs = pytest.mark.parametrize(("ours", "torchs"), PAIRS, ids=lambda c: c.__module__.split(".")[0])
OURS = pytest.mark.parametrize("ours", [ours for ours, _ in PAIRS])


def parameter(*values: float) -> Tensor:
    p = torch.tensor(values or (1.0, 2.0, 3.0), requires_grad=True)
    p.grad = torch.ones_like(p)
    return p


@pairs
def test_every_argument_of_torch_in_the_same_place_with_the_same_default(ours, torchs) -> None:
    mine = inspect.signature(ours.__init__).parameters
    for name, theirs in inspect.signature(torchs.__init__).parameters.items():
        assert name in mine
        assert (mine[name].kind, mine[name].default) == (theirs.kind, theirs.default), name
    positional = [n for n, p in mine.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [
        n
        for n, p in inspect.signature(torchs.__init__).parameters.items()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]


def optim_info(torchs: type) -> Any:
    pytest.importorskip(
        "expecttest", reason="torch's own table of optimizer cases needs expecttest"
    )
    from torch.testing._internal.common_optimizers import optim_db

    return next(info for info in optim_db if info.optim_cls is torchs)


@pairs
def test_torchs_own_table_of_inputs(ours, torchs) -> None:
    """Within fp32 rounding of torch over 8 steps: each of their roundings is within 1e-7 of how far they go, or of the
    parameter. A wrong term would be off by a good part of it."""
    for case in optim_info(torchs).optim_inputs_func(device=torch.device("cpu")):
        options = {k: v for k, v in case.kwargs.items() if k != "differentiable"}
        torch.manual_seed(0)
        start = torch.randn(7, 3)
        results = []
        for cls in (ours, torchs):
            p = start.clone().requires_grad_()
            optimizer = cls([p], **options)
            for seed in range(8):
                p.grad = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed))
                optimizer.step()
            results.append(p.detach())
        moved = float((results[1] - start).abs().max())
        assert moved > 0, case.desc
        torch.testing.assert_close(
            results[0], results[1], rtol=1e-6, atol=1e-5 * moved, msg=case.desc
        )


@pairs
def test_torchs_own_table_of_errors(ours, torchs) -> None:
    for case in optim_info(torchs).optim_error_inputs_func(
        device=torch.device("cpu"), dtype=torch.float32
    ):
        given = case.optimizer_error_input
        if "foreach=True" in case.error_regex or "differentiable" in given.kwargs:
            continue  # foreach is ignored here, so nothing is wrong with a tensor lr beside it
        if case.error_on.name != "CONSTRUCTION_ERROR":
            continue
        if "betas must be either both floats or both Tensors" in case.error_regex:
            ours([parameter()], **given.kwargs)  # mixed ones are no problem here
            continue
        with pytest.raises(case.error_type, match=case.error_regex):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # torch warns of duplicates; here they are an error
                try:
                    ours(given.params, **given.kwargs)
                except ValueError as error:
                    if case.error_type is UserWarning and "once more" in str(error):
                        raise UserWarning(
                            "optimizer contains a parameter group with duplicate parameters"
                        ) from error
                    raise


@OURS
def test_closure_runs_with_gradients_and_its_loss_comes_back(ours) -> None:
    p = parameter()
    optimizer = ours([p])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    with torch.no_grad():
        assert float(optimizer.step(closure)) == 14.0
    assert optimizer.step() is None
    assert not torch.equal(p, before)


@OURS
def test_no_gradient_no_state_no_count(ours) -> None:
    p, q = parameter(), parameter()
    q.grad = None
    optimizer = ours([{"params": [p]}, {"params": [q]}, {"params": []}])
    optimizer.step()
    assert q not in optimizer.state and optimizer.state[p]["step"] == 1
    p.grad = None
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before) and optimizer.state[p]["step"] == 1


@OURS
def test_counts_are_of_each_parameter(ours) -> None:
    """A gradient once missing: the parameter then moves as if it had stood alone."""
    p, q, alone = parameter(), parameter(), parameter()
    together, single = ours([p, q], lr=0.1), ours([alone], lr=0.1)
    for t in range(6):
        q.grad = torch.full((3,), 0.1 * t) if t % 2 else None
        together.step()
        if t % 2:
            alone.grad = torch.full((3,), 0.1 * t)
            single.step()
    assert torch.equal(q, alone) and not torch.equal(p, q)
    assert together.state[q]["step"] == 3 and together.state[p]["step"] == 6


@OURS
def test_version_counters_move_so_that_a_stale_backward_is_an_error(ours) -> None:
    p = parameter()
    y = (p * p).sum()
    optimizer = ours([p])
    before = p._version
    optimizer.step()
    assert p._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@OURS
def test_gradients_are_not_written(ours) -> None:
    p = parameter()
    grad = p.grad
    ours([p], weight_decay=0.1, maximize=True).step()
    assert p.grad is grad and torch.equal(grad, torch.ones(3))


@OURS
def test_hooks_run_once(ours) -> None:
    seen = []
    optimizer = ours([parameter()])
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"]


@OURS
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, 0.1, total_steps=10, cycle_momentum=not {"momentum", "betas"}.isdisjoint(o.defaults)
        ),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    ],
    ids=["StepLR", "CosineAnnealingWarmRestarts", "OneCycleLR", "LambdaLR"],
)
def test_schedulers(ours, make, tensor_lr) -> None:
    """A tensor lr keeps its identity and moves the parameters as the float does, to float32's rounding of lr."""
    results = []
    for kind in (float, torch.tensor) if tensor_lr else (float,):
        p = parameter()
        lr = kind(0.1)
        optimizer = ours([p], lr=lr, **({"momentum": 0.9} if ours is adamfused.RMSprop else {}))
        scheduler = make(optimizer)
        for _ in range(6):
            optimizer.step()
            scheduler.step()
        if kind is torch.tensor:
            assert optimizer.param_groups[0]["lr"] is lr
        if "betas" in optimizer.param_groups[0]:
            assert isinstance(optimizer.param_groups[0]["betas"], tuple)
        results.append(p.detach())
    torch.testing.assert_close(results[0], results[-1], rtol=1e-5, atol=1e-6)


@OURS
def test_grad_scaler_on_the_cpu(ours) -> None:
    """The scaler unscales, and skips a step whose gradients overflowed: nothing moves, no count advances."""
    p, plain = parameter(), parameter()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer, other = ours([p]), ours([plain])
    scaler.scale((p * p).sum()).backward()
    p.grad -= 1.0  # parameter() began with ones
    scaler.step(optimizer)
    scaler.update()
    plain.grad = 2 * plain.detach()
    other.step()
    assert torch.equal(p, plain)
    before = p.detach().clone()
    p.grad = torch.full((3,), float("inf"))
    scaler.step(optimizer)
    assert torch.equal(p, before) and optimizer.state[p]["step"] == 1


@OURS
def test_step_in_backward(ours) -> None:
    model, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    each = {p: ours([p]) for p in model.parameters()}

    def hook(p: Tensor) -> None:
        each[p].step()
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    whole = ours(twin.parameters())
    for seed in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        whole.zero_grad()
        twin(x).square().sum().backward()
        whole.step()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("make", [torch.optim.SGD, adamfused.SGD], ids=["torch", "ours"])
def test_a_group_is_the_users_own_dict(make) -> None:
    """What is written into it later counts."""
    groups = [{"params": parameter(1.0), "lr": 1.0}, {"params": iter([parameter(1.0)]), "lr": 1.0}]
    optimizer = make(groups[:1])
    optimizer.add_param_group(groups[1])
    for group, its in zip(groups, optimizer.param_groups, strict=True):
        assert its is group
        group["lr"] = 0.5
        give_gradient(group["params"][0], torch.ones(1))
    optimizer.step()
    assert [group["params"][0].item() for group in groups] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("more", "message"),
    [({}, "more than one parameter group"), ({"lr": -1.0}, "Invalid learning rate")],
    ids=str,
)
def test_a_group_that_is_refused_is_as_it_was(more, message) -> None:
    p = parameter(1.0)
    optimizer = adamfused.SGD([p])
    group = {"params": p, **more}
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert group == {"params": p, **more} and len(optimizer.param_groups) == 1


@OURS
def test_count_keeps_going_under_a_bfloat16_default_dtype(ours) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        p = parameter()
        optimizer = ours([p])
        for _ in range(300):
            optimizer.step()
        assert optimizer.state[p]["step"] == 300
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def one_rank(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@OURS
def test_fully_sharded_parameters(ours, one_rank) -> None:
    """FSDP2: states are DTensors, the bits those of the plain model, and distributed checkpoints come back."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    fully_shard(model, mesh=one_rank)
    optimizer, plain = ours(model.parameters()), ours(twin.parameters())
    for seed in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        for m, o in ((model, optimizer), (twin, plain)):
            o.zero_grad()
            m(x).square().sum().backward()
            o.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert isinstance(a, DTensor) and torch.equal(a.full_tensor(), b)
        assert all(isinstance(t, DTensor) for t in optimizer.state[a].values() if t.dim() > 0)
    saved = get_optimizer_state_dict(model, optimizer)
    fresh = ours(model.parameters())
    set_optimizer_state_dict(model, fresh, saved)
    for p in model.parameters():
        for key, t in optimizer.state[p].items():
            other = fresh.state[p][key]
            assert torch.equal(
                getattr(t, "_local_tensor", t), getattr(other, "_local_tensor", other)
            ), key


@pytest.mark.parametrize("option", [{"max_grad_norm": 1.0}, {"ema_decay": 0.9}], ids=str)
def test_zero_redundancy_optimizer_is_told_what_it_cannot_have(option, one_rank) -> None:
    """It gives its arguments to the constructor, too, so that advice would be of no use."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    ((key, value),) = option.items()
    with pytest.raises(ValueError) as refusal:
        ZeroRedundancyOptimizer([parameter(1.0)], optimizer_class=adamfused.SGD, lr=0.1, **option)
    assert str(refusal.value) == (
        f"SGD: a parameter group has {key}={value}, which is an option of the whole optimizer; expected it as an "
        "argument of the constructor alone; ZeroRedundancyOptimizer, which makes its arguments keys of groups, cannot "
        "have it"
    ) + (
        ": each rank has some of the parameters only; call torch.nn.utils.clip_grad_norm_ before step()"
        if key == "max_grad_norm"
        else ""
    )
    ZeroRedundancyOptimizer([parameter(1.0)], optimizer_class=adamfused.SGD, lr=0.1)


def test_adagrad_shares_its_sums() -> None:
    """What another process adds is seen here."""
    p = parameter(1.0, 2.0)
    optimizer = adamfused.Adagrad([p], initial_accumulator_value=0.5)
    optimizer.share_memory()
    total = optimizer.state[p]["sum"]
    assert total.is_shared() and torch.equal(total, torch.full((2,), 0.5))
    if (child := os.fork()) == 0:
        total += 1
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(total, torch.full((2,), 1.5))
    optimizer.step()
    assert torch.equal(total, torch.full((2,), 2.5))


def test_adagrad_shares_all_that_a_sum_of_8_bits_needs(path: str) -> None:
    """Codes without their scales would mean something else in each process; a step count is each one's own."""
    p = torch.nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
    options = {"state_dtype": "int8", "master_weights": "split16", "ema_decay": 0.9}
    optimizer = adamfused.Adagrad([p], lr=0.1, backend=path, **options)
    optimizer.share_memory()
    shared = {key for key, state in optimizer.state[p].items() if state.is_shared()}
    assert shared == {"sum", "sum_scale", "master", "ema"}
    for expected in (0.25, 0.5):
        give_gradient(p, torch.full_like(p, 0.5))
        optimizer.step()
        state = optimizer.state[p]
        assert all(state[key].is_shared() for key in shared), "a step keeps them where they are"
        total = adamfused.formats.get(state["sum"], torch.float32, state["sum_scale"])
        # codes are at most 1/8 apart
        assert torch.allclose(total, torch.full_like(total, expected), rtol=0.13)


@pytest.mark.parametrize("make", EVERY_OPTIMIZER, ids=lambda c: c.__name__)
def test_a_step_under_capture_asks_for_capturable(make, monkeypatch) -> None:
    """In torch's words. A group that has no such key, as SGD's, is one that is not capturable: copied ones, too."""
    p = parameter(1.0, 2.0)
    copies, optimizer = copy.deepcopy(([p], make([p], lr=0.1)))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    give_gradient(copies[0], torch.ones(2))
    optimizer.step()
    before = copies[0].detach().clone()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="Attempting CUDA graph capture of step.*capturable is"):
        optimizer.step()
    assert torch.equal(copies[0], before)
    make([p], lr=0.1, capturable=True).step()


@pytest.mark.parametrize("make", EVERY_OPTIMIZER, ids=lambda c: c.__name__)
def test_a_step_under_capture_asks_for_counts_on_the_device(make, monkeypatch) -> None:
    """Those of steps that were made before the group became capturable are on the host."""
    p = torch.nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = make([parameter(1.0), p])
    optimizer.state[p]["step"] = torch.tensor(3.0)
    optimizer.param_groups[0]["capturable"] = True
    p.grad = torch.zeros_like(p)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError) as refusal:
        optimizer.step()
    assert str(refusal.value) == (
        f"{make.__name__}: parameter 1 of group 0: state 'step' is on cpu; expected the parameter's device meta in a "
        "CUDA graph; load the optimizer's own state_dict() before the capture, which moves it there"
    )
    p.grad = None
    optimizer.step()
