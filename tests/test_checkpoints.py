"""State dicts: those of torch.optim, both ways, bit for bit, with every dtype kept."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import adamfused

pytestmark = pytest.mark.reference

CASES = [
    pytest.param(
        adamfused.SGD,
        torch.optim.SGD,
        {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1},
        id="SGD-momentum",
    ),
    pytest.param(
        adamfused.Adagrad,
        torch.optim.Adagrad,
        {"initial_accumulator_value": 0.1, "lr_decay": 0.1},
        id="Adagrad",
    ),
    pytest.param(adamfused.Adadelta, torch.optim.Adadelta, {}, id="Adadelta"),
    pytest.param(adamfused.NAdam, torch.optim.NAdam, {"weight_decay": 0.1}, id="NAdam"),
    pytest.param(adamfused.RAdam, torch.optim.RAdam, {}, id="RAdam"),
    pytest.param(adamfused.Adam, torch.optim.Adam, {}, id="Adam"),
    pytest.param(
        adamfused.Adam, torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}, id="Adam-amsgrad"
    ),
    pytest.param(adamfused.AdamW, torch.optim.AdamW, {"maximize": True}, id="AdamW"),
    pytest.param(adamfused.RMSprop, torch.optim.RMSprop, {}, id="RMSprop"),
    pytest.param(
        adamfused.RMSprop,
        torch.optim.RMSprop,
        {"momentum": 0.9, "centered": True},
        id="RMSprop-all",
    ),
]
TORCH_LACKS = {adamfused.SGD: {"step"}}


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (), (2, 0)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def step(optimizer: torch.optim.Optimizer, params: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


def entries(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[tuple[str, Tensor]]:
    return [(key, t) for p in params for key, t in sorted(optimizer.state[p].items())]


def assert_same_state(a: list[tuple[str, Tensor]], b: list[tuple[str, Tensor]]) -> None:
    assert [key for key, _ in a] == [key for key, _ in b]
    for (key, x), (_, y) in zip(a, b, strict=True):
        assert (x.dtype, x.device, x.shape) == (y.dtype, y.device, y.shape), key
        assert torch.equal(x, y), key


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("ours", "torchs", "options"), CASES)
def test_keys_and_groups_are_those_of_torch(ours, torchs, options) -> None:
    params = parameters()
    a, b = ours(params, **options), torchs(params, **options)
    step(a, params, 1)
    step(b, params, 1)
    ours_dict, torchs_dict = a.state_dict(), b.state_dict()
    lacks = TORCH_LACKS.get(ours, set())
    assert ours_dict["state"][0].keys() - lacks == torchs_dict["state"][0].keys()
    assert ours_dict["param_groups"] == torchs_dict["param_groups"]
    assert a.defaults == b.defaults
    ours_dict = a.state_dict(format="torch")
    assert list(ours_dict["state"][0]) == list(torchs_dict["state"][0])
    assert ours_dict["param_groups"] == torchs_dict["param_groups"]
    for x, y in zip(ours_dict["state"][0].values(), torchs_dict["state"][0].values(), strict=True):
        assert (x.dtype, x.shape, x.device) == (y.dtype, y.shape, y.device)


@pytest.mark.parametrize("there_and_back", [False, True], ids=["torch to ours", "ours to torch"])
@pytest.mark.parametrize(("ours", "torchs", "options"), CASES)
def test_interchange_with_torch(ours, torchs, options, there_and_back) -> None:
    source_class, target_class = (ours, torchs) if there_and_back else (torchs, ours)
    params = parameters()
    source = source_class(params, **options)
    for seed in range(3):
        step(source, params, seed)
    target = target_class(params, **options)
    target.load_state_dict(through_a_file(source.state_dict()))
    lacks = TORCH_LACKS.get(ours, set())

    def loaded() -> list[tuple[str, Tensor]]:
        return [
            (key, t) for key, t in entries(target, params) if there_and_back or key not in lacks
        ]

    assert_same_state(entries(source, params), loaded())
    step(target, params, 9)
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_same_state(entries(source, params), loaded())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("there_and_back", [False, True], ids=["torch to ours", "ours to torch"])
def test_sgd_goes_on_from_a_checkpoint_without_counts(momentum, there_and_back) -> None:
    """Dampening tells whether the first gradient after loading is taken for the first one of all."""
    classes = adamfused.SGD, torch.optim.SGD
    source_class, target_class = classes if there_and_back else classes[::-1]
    params = parameters()
    source = source_class(params, lr=0.1, momentum=momentum, dampening=0.5)
    step(source, params, 1)
    twins = [p.detach().clone().requires_grad_() for p in params]
    target = target_class(twins, lr=0.1, momentum=momentum, dampening=0.5)
    saved = source.state_dict(**({"format": "torch"} if there_and_back else {}))
    target.load_state_dict(through_a_file(saved))
    for seed in (2, 3):
        step(source, params, seed)
        step(target, twins, seed)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)  # their roundings differ
    with pytest.raises(AssertionError):
        torch.testing.assert_close(params[0], parameters()[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("ours", "torchs", "options"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("state_dtype", [None, "param"])
def test_a_resumed_run_continues_bit_for_bit(ours, torchs, options, dtype, state_dtype) -> None:
    params = parameters(dtype)
    optimizer = ours(params, state_dtype=state_dtype, **options)
    for seed in range(3):
        step(optimizer, params, seed)
    saved = through_a_file(optimizer.state_dict())
    others = [p.detach().clone().requires_grad_() for p in params]
    other = ours(others, state_dtype=state_dtype, **options)
    other.load_state_dict(saved)
    expected = dtype if state_dtype == "param" else torch.promote_types(dtype, torch.float32)
    assert {t.dtype for key, t in entries(other, others) if key not in ("step", "mu_product")} == {
        expected
    }
    for seed in range(3, 6):
        step(optimizer, params, seed)
        step(other, others, seed)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert_same_state(entries(optimizer, params), entries(other, others))


def test_bfloat16_moments_of_a_torch_checkpoint_stay_bfloat16() -> None:
    params = parameters(torch.bfloat16)
    source = torch.optim.AdamW(params)
    step(source, params, 1)
    target = adamfused.AdamW(params)
    target.load_state_dict(source.state_dict())
    assert_same_state(entries(source, params), entries(target, params))
    step(target, params, 2)


@pytest.mark.parametrize(
    "as_type", [float, int, lambda x: torch.tensor(x, dtype=torch.float64), torch.tensor]
)
def test_step_counts_of_old_checkpoints_load(as_type) -> None:
    params = parameters()
    source = adamfused.AdamW(params)
    for seed in range(3):
        step(source, params, seed)
    saved = copy.deepcopy(source.state_dict())
    for entry in saved["state"].values():
        entry["step"] = as_type(float(entry["step"]))
    twins = [p.detach().clone().requires_grad_() for p in params]
    target = adamfused.AdamW(twins)
    target.load_state_dict(saved)
    step(source, params, 5)
    step(target, twins, 5)
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))
    assert all(float(target.state[p]["step"]) == 4 for p in twins)
    if as_type(1.0).__class__ is Tensor:
        assert target.state[twins[0]]["step"].dtype == as_type(1.0).dtype


@pytest.mark.parametrize(("ours", "torchs", "options"), CASES)
def test_dicts_and_pickles_that_lack_every_flag_load(ours, torchs, options) -> None:
    params = parameters()
    source = ours(params, **options)
    step(source, params, 1)
    old = copy.deepcopy(source.state_dict())
    needed = {"params", "lr", "betas", "alpha", "rho", "eps", "weight_decay", *options}
    needed |= {"momentum", "dampening"} if ours is adamfused.SGD else {"momentum_decay"}
    for group in old["param_groups"]:
        for key in set(group) - needed:
            del group[key]
    target = ours(params, **options)
    target.load_state_dict(old)
    step(target, params, 2)
    assert target.param_groups[0].keys() == source.param_groups[0].keys()


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "pickle"],
)
def test_copies_keep_all_options(duplicate) -> None:
    params = parameters(torch.bfloat16)
    optimizer = adamfused.AdamW(
        params, state_dtype="param", bias_correction=False, backend="reference"
    )
    step(optimizer, params, 1)
    twin = duplicate(optimizer)
    twins = twin.param_groups[0]["params"]
    assert twin.defaults == optimizer.defaults
    for seed in (2, 3):
        step(optimizer, params, seed)
        step(twin, twins, seed)
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_options_that_torch_lacks_survive_a_torch_checkpoint_and_are_not_in_others() -> None:
    params = parameters(torch.bfloat16)
    source = torch.optim.AdamW(params)
    optimizer = adamfused.AdamW(params, state_dtype="param", bias_correction=False)
    optimizer.load_state_dict(source.state_dict())
    assert optimizer.param_groups[0]["state_dtype"] == "param"
    assert optimizer.param_groups[0]["bias_correction"] is False
    plain = adamfused.AdamW(params, backend="reference").state_dict()["param_groups"][0]
    assert not {"state_dtype", "bias_correction", "backend"} & set(plain)


def test_adamw_stays_decoupled_whatever_is_loaded() -> None:
    params = parameters()
    optimizer = adamfused.AdamW(params)
    optimizer.load_state_dict(torch.optim.Adam(params).state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


def test_users_load_hooks_count() -> None:
    params = parameters()
    source = adamfused.AdamW(params)
    step(source, params, 1)
    target = adamfused.AdamW(params)
    seen = []

    def double(optimizer, state_dict):
        state = {k: v | {"exp_avg": v["exp_avg"] * 2} for k, v in state_dict["state"].items()}
        return state_dict | {"state": state}

    target.register_load_state_dict_pre_hook(double)
    target.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[params[0]]["exp_avg"].clone())
    )
    target.load_state_dict(source.state_dict())
    assert torch.equal(seen[0], source.state[params[0]]["exp_avg"] * 2)


def test_named_parameters_and_their_names_in_checkpoints() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = adamfused.AdamW(model.named_parameters())
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    other = adamfused.AdamW(model.parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
