"""The float32 weights of a model with masters: out, in, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import EVERY_OPTIMIZER, assert_same_bits, assert_same_result
from test_refusals import everything, facts
from test_storage_options import BF16, F32, numbers, train
from torch import Tensor

from adamfused import AdamW, fp32_weights, load_fp32_weights

KINDS = pytest.mark.parametrize("kind", ["split16", "split8", "fp32"])


class Net(torch.nn.Module):
    """Two layers of bfloat16 with one weight for both, a norm of float32, and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(6, 6).bfloat16()
        self.second = torch.nn.Linear(6, 6).bfloat16()
        self.second.weight = self.first.weight
        self.norm = torch.nn.BatchNorm1d(6)


def optimizer_of(model: Net, kind: str | None, path: str, make: Any = AdamW, **options: Any) -> Any:
    halves = [p for p in model.parameters() if p.dtype == BF16]
    others = [p for p in model.parameters() if p.dtype != BF16]
    groups = [{"params": halves, "master_weights": kind}, {"params": others}]
    return make(groups, lr=1e-3, backend=path, **options)


@KINDS
@pytest.mark.parametrize("make", EVERY_OPTIMIZER)
def test_what_has_a_master_is_float32_and_the_rest_is_as_it_is(path, make, kind) -> None:
    model = Net()
    optimizer = train(optimizer_of(model, kind, path, make), 3)
    weights, plain = fp32_weights(model, optimizer), model.state_dict()
    assert list(weights) == list(plain)
    for name, value in weights.items():
        if name.startswith("norm"):
            assert value.data_ptr() == plain[name].data_ptr()
        else:
            assert value.dtype == F32
            assert int((value != plain[name]).sum()) > 0.5 * value.numel()
            # bfloat16 has 8 bits, and the split rounds ties away: half of an ulp is 2^-8 of the number at most.
            torch.testing.assert_close(value, plain[name].float(), rtol=2.0**-8, atol=0.0)
    assert_same_bits(weights["first.weight"], weights["second.weight"])


def test_before_the_first_step_they_are_the_parameters(path) -> None:
    model = Net()
    weights = fp32_weights(model, optimizer_of(model, "split16", path))
    assert weights["first.weight"].dtype == F32
    assert torch.equal(weights["first.weight"], model.first.weight.float())


def test_without_masters_it_is_the_state_dict(path) -> None:
    model = Net()
    optimizer = train(optimizer_of(model, None, path), 1)
    weights, plain = fp32_weights(model, optimizer), model.state_dict()
    assert list(weights) == list(plain)
    assert all(weights[name].data_ptr() == plain[name].data_ptr() for name in plain)


@KINDS
@pytest.mark.parametrize("steps", [0, 2], ids=["no states yet", "with states"])
def test_there_and_back(path, kind, steps) -> None:
    """Another model with the weights and the optimizer's checkpoint goes on bit for bit."""
    model, twin = Net(), Net(1)
    optimizer = train(optimizer_of(model, kind, path), 3)
    other = train(optimizer_of(twin, kind, path), steps)
    weights = copy.deepcopy(fp32_weights(model, optimizer))
    load_fp32_weights(twin, other, weights)
    for name, value in fp32_weights(twin, other).items():
        assert_same_bits(value.float(), weights[name].float(), name)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert float(other.state[q]["step"]) == steps if q.dtype == BF16 else True
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_result(optimizer, other)
    train(optimizer, 2)
    train(other, 2)
    assert_same_result(optimizer, other)


def test_any_weights_are_split(path) -> None:
    """float32 and float64 ones, as from a model that was trained in them."""
    for dtype in (F32, torch.float64):
        model = Net()
        optimizer = optimizer_of(model, "split16", path)
        weights = {
            name: numbers(i, *value.shape, dtype=dtype) if value.is_floating_point() else value
            for i, (name, value) in enumerate(model.state_dict().items())
        }
        weights["second.weight"] = weights["first.weight"]
        load_fp32_weights(model, optimizer, weights)
        for name, value in fp32_weights(model, optimizer).items():
            assert torch.equal(value, weights[name].to(value.dtype)), name


def test_a_state_that_is_made_begins_its_average_with_the_weight(path) -> None:
    model = Net()
    optimizer = optimizer_of(model, "split16", path, ema_decay=0.9)
    weights = {name: value + 0.3 for name, value in fp32_weights(model, optimizer).items()}
    load_fp32_weights(model, optimizer, weights)
    assert_same_bits(optimizer.state[model.first.bias]["ema"], weights["first.bias"])
    before = copy.deepcopy(optimizer.state[model.first.bias]["ema"])
    load_fp32_weights(model, optimizer, Net(1).state_dict())
    assert_same_bits(optimizer.state[model.first.bias]["ema"], before)


def test_a_model_state_dict_that_is_loaded_alone_counts(path) -> None:
    """Visible weights that have changed since: a whole master follows them, a split one to half of an ulp."""
    for kind in ("fp32", "split16"):
        model = Net()
        optimizer = train(optimizer_of(model, kind, path), 2)
        model.load_state_dict(Net(1).state_dict())
        found, wanted = fp32_weights(model, optimizer)["first.weight"], Net(1).first.weight.float()
        if kind == "fp32":
            assert torch.equal(found, wanted)
        else:
            torch.testing.assert_close(found, wanted, rtol=2.0**-8, atol=0.0)


# ---- what is refused -----------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]
OF_ANOTHER = "they are of another model"
NAMES = f"expected the names of model.state_dict(); {OF_ANOTHER}"
BAD: dict[str, tuple[Change, str]] = {
    "missing": (lambda w: w.pop("second.bias"), f"weights lack 'second.bias'; {NAMES}"),
    "many missing": (
        lambda w: [w.pop(name) for name in list(w)[:5]],
        f"weights lack 'first.weight', 'first.bias', 'second.weight' and 2 more; {NAMES}",
    ),
    "unknown": (
        lambda w: w.update(third=torch.ones(1)),
        f"weights have unknown 'third'; {NAMES}",
    ),
    "shape": (
        lambda w: w.update({"second.bias": torch.ones(6, 1)}),
        f"weights['second.bias'] has shape (6, 1); expected (6,), sharded as in the model; {OF_ANOTHER}",
    ),
    "shape of a buffer": (
        lambda w: w.update({"norm.running_var": torch.ones(7)}),
        f"weights['norm.running_var'] has shape (7,); expected (6,), sharded as in the model; {OF_ANOTHER}",
    ),
    "list": (
        lambda w: w.update({"second.bias": [0.0] * 6}),
        "weights['second.bias']: got list; expected a tensor of floating dtype",
    ),
    "integers": (
        lambda w: w.update({"second.bias": torch.ones(6, dtype=torch.int16)}),
        "weights['second.bias']: got dtype torch.int16; expected a tensor of floating dtype",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_it_is_refused_and_nothing_is_written(path, change, message) -> None:
    model = Net()
    optimizer = train(optimizer_of(model, "split16", path), 2)
    weights = {name: value + 1 for name, value in fp32_weights(model, optimizer).items()}
    change(weights)
    before = everything(optimizer), facts(list(model.buffers()))
    with pytest.raises(ValueError) as refusal:
        load_fp32_weights(model, optimizer, weights)
    assert str(refusal.value) == message
    assert (everything(optimizer), facts(list(model.buffers()))) == before


def test_an_optimizer_of_torch_is_refused() -> None:
    optimizer: Any = torch.optim.AdamW((model := Net()).parameters())
    words = "optimizer is of type torch.optim.adamw.AdamW; expected an optimizer of adamfused"
    with pytest.raises(TypeError, match=f"^fp32_weights: {words}"):
        fp32_weights(model, optimizer)
    with pytest.raises(TypeError, match=f"^load_fp32_weights: {words}"):
        load_fp32_weights(model, optimizer, model.state_dict())


@pytest.mark.parametrize("function", ["fp32_weights", "load_fp32_weights"])
def test_another_model_and_averaged_weights_are_refused(path, function) -> None:
    model = Net()
    optimizer = train(optimizer_of(model, "split16", path, ema_decay=0.9), 2)
    weights: dict[str, Tensor] = fp32_weights(model, optimizer)

    def call(of: torch.nn.Module) -> None:
        fp32_weights(of, optimizer) if function == "fp32_weights" else load_fp32_weights(
            of, optimizer, weights
        )

    with pytest.raises(ValueError, match="none of the 6 parameters of the model is one of this"):
        call(Net())
    with (
        optimizer.swap_ema(),
        pytest.raises(RuntimeError, match=rf"^{function}\(\) inside of swap"),
    ):
        call(model)
    call(model)
