"""Copies of the weights, made by the step: the new weights in any dtype and layout, and what cannot be a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    COMPLEX_DTYPES,
    EVERY_OPTIMIZER,
    REAL_DTYPES,
    assert_same_bits,
    assert_same_result,
    wild,
)
from test_refusals import build, everything, facts, in_inference_mode, parameter
from torch import Tensor

from adamfused import AdamW, RMSprop

# The shapes of test_refusals.build.
SHAPES = [(4,), (2, 2), (5,), (2, 3), (1,)]


def empties(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in SHAPES]


def rounded(p: Tensor, dtype: torch.dtype) -> Tensor:
    """A double goes to 16 bits by way of float32."""
    x = p.detach()
    return x.float().to(dtype) if p.dtype == torch.float64 and dtype.itemsize == 2 else x.to(dtype)


# ---- what a copy is ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *COMPLEX_DTYPES], ids=str)
def test_a_copy_has_the_new_weights_rounded_to_its_dtype(path, dtype) -> None:
    rng = np.random.default_rng(0)
    for copy_dtype in (*COMPLEX_DTYPES, torch.complex32) if dtype.is_complex else REAL_DTYPES:
        p = torch.nn.Parameter(wild(rng, 1029, dtype))
        copy = torch.full((1029,), 7.0).to(copy_dtype)
        optimizer = AdamW([p], lr=0.01, copy_to=[copy], backend=path)
        for _ in range(2):
            p.grad = wild(rng, 1029, dtype, specials=0.02)
            optimizer.step()
            assert_same_bits(copy, rounded(p, copy_dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_copy_of_16_bit_weights_is_told_of_them_before_they_are_rounded(path, dtype) -> None:
    copies = {}
    for copy_dtype in REAL_DTYPES:
        p, copies[copy_dtype] = parameter(0, 1029, dtype=dtype), torch.zeros(1029, dtype=copy_dtype)
        AdamW([p], lr=0.01, copy_to=[copies[copy_dtype]], backend=path).step()
    whole = copies[torch.float32]
    assert_same_bits(p.detach(), whole.to(dtype))
    assert int((whole != p).sum()) > 900
    for copy_dtype, copy in copies.items():
        assert_same_bits(copy, whole.to(copy_dtype))


def test_control_a_copy_that_is_a_step_behind_is_noticed(path) -> None:
    p, copy = parameter(0, 1029), torch.zeros(1029, dtype=torch.bfloat16)
    optimizer = AdamW([p], lr=0.01, copy_to=[copy], backend=path)
    optimizer.step()
    behind = copy.clone()
    optimizer.step()
    with pytest.raises(AssertionError, match="differ in bits"):
        assert_same_bits(behind, rounded(p, torch.bfloat16))


def test_copies_are_the_parameters_of_another_model(path) -> None:
    """The usual case: float32 weights here, and what runs forward and backward in bfloat16 there."""
    torch.manual_seed(0)
    masters, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).bfloat16()
    optimizer = RMSprop(masters.parameters(), lr=0.1, copy_to=model.parameters(), backend=path)
    versions = [p._version for p in model.parameters()]
    for _ in range(3):
        model.zero_grad()
        model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
        for master, p in zip(masters.parameters(), model.parameters(), strict=True):
            master.grad = p.grad.float()
        optimizer.step()
    for master, p, version in zip(masters.parameters(), model.parameters(), versions, strict=True):
        assert torch.equal(p, master.bfloat16())
        assert p.requires_grad and p.is_leaf and p._version >= version + 3


def test_what_does_not_move_is_not_copied(path) -> None:
    optimizer = build(path, 0, copy_to=(copies := empties()))
    first = optimizer.param_groups[0]["params"][0]
    first.grad = None
    optimizer.step()
    assert torch.equal(copies[0], torch.zeros(4)) and not torch.equal(copies[1], torch.zeros(2, 2))


def test_copies_change_no_bit_of_the_step(path) -> None:
    assert_same_result(build(path, 3, copy_to=empties()), build("reference", 3))


@pytest.mark.parametrize(
    "given",
    [list, tuple, iter, lambda c: (t for t in c)],
    ids=["list", "tuple", "iterator", "generator"],
)
def test_any_iterable(path, given) -> None:
    copies = empties()
    build(path, 1, copy_to=given(copies))
    assert all(bool(c.count_nonzero()) for c in copies)


def test_columns_of_one_tensor_as_two_copies(path) -> None:
    """Each lies in the holes of the other."""
    both, params = torch.zeros(6, 2), [parameter(0, 6), parameter(1, 6)]
    AdamW(params, copy_to=both.unbind(1), backend=path).step()
    assert_same_bits(both, torch.stack([p.detach() for p in params], 1))


# ---- groups --------------------------------------------------------------------------------------


def test_a_group_is_added_with_its_copies(path) -> None:
    optimizer = build(path, 1, copy_to=empties())
    more, copy = parameter(9, 3), torch.zeros(3, dtype=torch.float16)
    group = {"params": [more], "copy_to": iter([copy])}
    optimizer.add_param_group(group)
    optimizer.step()
    assert optimizer.param_groups[2] is group
    assert torch.equal(copy, more.half())
    assert "copy_to" not in optimizer.state_dict()["param_groups"][2]


def test_groups_of_the_constructor_have_their_copies(path) -> None:
    params, copies = [parameter(0, 3), parameter(1, 3)], [torch.zeros(3), torch.zeros(3)]
    groups = [{"params": [p], "copy_to": [c]} for p, c in zip(params, copies, strict=True)]
    optimizer = AdamW(groups, backend=path)
    optimizer.step()
    assert all(torch.equal(c, p) for p, c in zip(params, copies, strict=True))


WITHOUT = (
    "a group is added without copy_to, to an optimizer that has copies of its other parameters; expected a copy of "
    "each parameter or of none"
)
ADDED: dict[str, tuple[Callable[[Tensor], dict[str, Any]], str]] = {
    "none": (lambda p: {"params": [p]}, WITHOUT),
    "none for a single parameter": (lambda p: {"params": p}, WITHOUT),
    "too many": (
        lambda p: {"params": [p], "copy_to": [torch.zeros(3)] * 2},
        "copy_to has 2 tensors; expected as many as parameters, 1, in their order",
    ),
    "of another shape": (
        lambda p: {"params": [p], "copy_to": [torch.zeros(4)]},
        "copy_to[0]: it has shape (4,); expected the parameter's shape (3,); make it with torch.empty_like(param, "
        "dtype=...)",
    ),
}


@pytest.mark.parametrize("name", ADDED)
def test_a_group_that_is_added_is_refused(path, name) -> None:
    group, message = ADDED[name]
    optimizer = build(path, 1, copy_to=(copies := empties()))
    before = everything(optimizer), facts(copies)
    refused = group(parameter(9, 3))
    as_it_was = dict(refused)
    with pytest.raises(ValueError) as refusal:
        optimizer.add_param_group(refused)
    assert str(refusal.value) == message
    assert refused == as_it_was
    assert (everything(optimizer), facts(copies)) == before
    optimizer.step()
    assert facts(copies) != before[1]


@pytest.mark.parametrize("added", [False, True], ids=["in the constructor", "in add_param_group"])
def test_copies_of_a_later_group_only_are_refused(path, added) -> None:
    later = {"params": [parameter(1, 3)], "copy_to": [torch.zeros(3)]}
    groups = [{"params": [parameter(0, 3)]}, *([] if added else [later])]
    with pytest.raises(ValueError, match="copy_to"):
        optimizer = AdamW(groups, backend=path)
        if added:
            optimizer.add_param_group(later)


# ---- what cannot be a copy -----------------------------------------------------------------------

REMEDY = "make it with torch.empty_like(param, dtype=...)"
DTYPES = "float32, float64, bfloat16 or float16, or a complex dtype made of one of these"
# fmt: off
# Of a parameter of shape (2, 3).
BAD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "no tensor": (lambda p: 3.0, "it is a float; expected a tensor of shape (2, 3)"),
    "another shape": (lambda p: torch.zeros(3, 2),
        f"it has shape (3, 2); expected the parameter's shape (2, 3); {REMEDY}"),
    "one number": (lambda p: torch.zeros(()), f"it has shape (); expected the parameter's shape (2, 3); {REMEDY}"),
    "another device": (lambda p: torch.zeros(2, 3, device="meta"),
        f"it is on meta; expected the parameter's device cpu; {REMEDY}"),
    "complex": (lambda p: torch.zeros(2, 3, dtype=torch.complex64),
        f"it has dtype torch.complex64; expected a real one, as the parameter's torch.float32; {REMEDY}"),
    "integers": (lambda p: torch.zeros(2, 3, dtype=torch.int8), f"it has dtype torch.int8; expected {DTYPES}"),
    "float8": (lambda p: torch.zeros(2, 3, dtype=torch.float8_e4m3fn),
        f"it has dtype torch.float8_e4m3fn; expected {DTYPES}"),
    "sparse": (lambda p: torch.zeros(2, 3).to_sparse(),
        "it has layout torch.sparse_coo; expected a dense tensor; convert it with to_dense()"),
    "expanded": (lambda p: torch.zeros(3).expand(2, 3),
        "elements may share memory (strides (0, 1)); expected its own; clone() it"),
    "the parameter": (lambda p: p, "it lies in the same memory as the parameter; expected its own; clone() it"),
    "a part of the parameter's memory": (lambda p: torch.as_strided(p.detach(), (2, 3), (3, 1)),
        "it lies in the same memory as the parameter; expected its own; clone() it"),
    "made in inference mode": (lambda p: in_inference_mode(torch.zeros(2, 3)),
        "it was made in inference mode and cannot be written outside of it; clone() it"),
}
# fmt: on


@pytest.mark.reference
@pytest.mark.parametrize(("make", "problem"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("ours", EVERY_OPTIMIZER)
def test_it_is_refused_by_the_constructor(ours, make, problem) -> None:
    good, p = parameter(0, 4), parameter(1, 2, 3)
    with pytest.raises(ValueError) as refusal:
        ours([good, p], copy_to=[torch.zeros(4), make(p)])
    assert str(refusal.value) == f"copy_to[1]: {problem}"


@pytest.mark.reference
@pytest.mark.parametrize("n", [0, 1, 3])
def test_the_number_of_copies_is_that_of_the_parameters(n) -> None:
    with pytest.raises(ValueError) as refusal:
        AdamW([parameter(0, 4), parameter(1, 4)], copy_to=[torch.zeros(4)] * n)
    assert (
        str(refusal.value)
        == f"copy_to has {n} tensors; expected as many as parameters, 2, in their order"
    )


def shares(what: str) -> tuple[list[Tensor], list[Tensor]]:
    params = [parameter(0, 4), parameter(1, 4)]
    flat = torch.zeros(7)
    return params, {
        "one tensor twice": [flat[:4], flat[:4]],
        "overlapping parts of one": [flat[:4], flat[3:]],
        "another parameter": [params[1].detach(), flat[:4]],
    }[what]


@pytest.mark.reference
@pytest.mark.parametrize(
    "what", ["one tensor twice", "overlapping parts of one", "another parameter"]
)
def test_copies_that_share_memory_are_refused(what) -> None:
    params, copies = shares(what)
    with pytest.raises(ValueError, match=r"copy_to\[[01]\].* same memory"):
        AdamW(params, copy_to=copies)


# At the step: the copy that was given has been changed since.
SPOILED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "resized": (
        lambda c, p: c.resize_(3, 3),
        f"it has shape (3, 3); expected the parameter's shape (2, 3); {REMEDY}",
    ),
    "of another shape": (
        lambda c, p: setattr(c, "data", torch.zeros(6)),
        f"it has shape (6,); expected the parameter's shape (2, 3); {REMEDY}",
    ),
    "freed": (
        lambda c, p: c.untyped_storage().resize_(0),
        "it has lost its memory: its storage has 0 bytes, and 6 elements of 2 bytes lie in it; step while it is "
        "allocated",
    ),
    "integers": (
        lambda c, p: setattr(c, "data", c.int()),
        f"it has dtype torch.int32; expected {DTYPES}",
    ),
    "complex": (
        lambda c, p: setattr(c, "data", c.cfloat()),
        f"it has dtype torch.complex64; expected a real one, as the parameter's torch.float32; {REMEDY}",
    ),
    "on the parameter": (
        lambda c, p: setattr(c, "data", p.data),
        "it lies in the same memory as the parameter; expected its own; clone() it",
    ),
    "expanded": (
        lambda c, p: setattr(c, "data", c[:1].clone().expand(2, 3)),
        "elements may share memory (strides (0, 1)); expected its own; clone() it",
    ),
}


@pytest.mark.parametrize("steps", [0, 2], ids=["at the first step", "later"])
@pytest.mark.parametrize(("spoil", "problem"), SPOILED.values(), ids=SPOILED.keys())
def test_it_is_refused_by_the_step_and_nothing_moves(path, spoil, problem, steps) -> None:
    optimizer = build(path, steps, ema_decay=0.9, max_grad_norm=1.0, copy_to=(copies := empties()))
    spoil(copies[3], optimizer.param_groups[1]["params"][1])
    before = everything(optimizer), facts(copies)
    with pytest.raises(RuntimeError) as refusal:
        optimizer.step()
    assert str(refusal.value) == f"AdamW: parameter 1 of group 1: its copy_to: {problem}"
    assert (everything(optimizer), facts(copies)) == before
    copies[3].data = (
        torch.zeros(2, 3, dtype=torch.float64).t().contiguous().t()
    )  # another layout is no problem
    optimizer.step()
    assert_same_result(optimizer, build("reference", steps + 1, ema_decay=0.9, max_grad_norm=1.0))
    assert torch.equal(copies[3], optimizer.param_groups[1]["params"][1].double())
