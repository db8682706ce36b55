"""The parity tool for every family: its rules are the textbooks', right optimizers pass, each seeded fault is found."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import family_mutants
import numpy as np
import pytest
import textbook
import torch
from helpers import EVERY_OPTIMIZER
from test_parity import quick_names

from adamfused import parity, spec
from adamfused.parity import agrees, exact
from adamfused.parity.arithmetic import SINGLE
from adamfused.spec import Spec

pytestmark = pytest.mark.reference

OTHERS = [make.__name__ for make in EVERY_OPTIMIZER if make.__name__ not in ("Adam", "AdamW")]


def failed(candidate: Any, without: Collection[str] = (), **options: Any) -> dict[str, str]:
    """The cases that failed, of all but the slow ones, with what they said."""
    family = Spec.of(candidate).family
    assert family is not None
    names = quick_names(family, getattr(torch, options.get("dtype", "float32"))).split(",")
    cases = ",".join(name for name in names if name not in without)
    report = parity(candidate, cases=cases, isolated=False, **options)
    assert report.passed or report.failures
    return {r.case: r.detail for r in report.failures}


# ---- the rules -----------------------------------------------------------------------------------

# The same options by torch's names and by those of textbook.py.
SETTINGS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "SGD": [
        ({}, {}),
        ({"momentum": 0.8}, {"mu": 0.8}),
        ({"momentum": 0.8, "dampening": 0.3}, {"mu": 0.8, "dampening": 0.3}),
        ({"momentum": 0.8, "nesterov": True}, {"mu": 0.8, "nesterov": True}),
    ],
    "Adagrad": [({"eps": 1e-3, "lr_decay": 0.2}, {"eps": 1e-3, "lr_decay": 0.2})],
    "Adadelta": [({"rho": 0.7, "eps": 1e-3}, {"rho": 0.7, "eps": 1e-3})],
    "RMSprop": [
        ({"alpha": 0.8, "eps": 1e-3}, {"alpha": 0.8, "eps": 1e-3}),
        ({"momentum": 0.8, "centered": True}, {"mu": 0.8, "centered": True}),
    ],
    "Adam": [({"betas": (0.8, 0.9), "eps": 1e-3}, {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3})],
    "AdamW": [({}, {"decoupled": True})],
    "NAdam": [
        ({"momentum_decay": 0.1, "eps": 1e-3}, {"psi": 0.1, "eps": 1e-3}),
        ({"decoupled_weight_decay": True}, {"decoupled": True}),
    ],
    "RAdam": [({}, {}), ({"decoupled_weight_decay": True}, {"decoupled": True})],
    "Lion": [({"betas": (0.8, 0.9)}, {"beta1": 0.8, "beta2": 0.9})],
}


def numbers(family: str, n: int = 2000) -> tuple[np.ndarray, np.ndarray, exact.Parts]:
    rng = np.random.default_rng(0)
    p, g = rng.standard_normal((2, n))
    parts = {"param": p}
    for name in exact.FAMILIES[family].states:
        squares = name in ("exp_avg_sq", "square_avg", "acc_delta", "sum")
        parts[name] = 1 + rng.random(n) if squares else 0.5 * rng.standard_normal(n)
    return p, g, parts


@pytest.mark.parametrize("t", [1, 3, 7, 300])
@pytest.mark.parametrize("family", exact.FAMILIES)
def test_the_exact_rules_are_the_textbooks(family: str, t: int) -> None:
    p, g, parts = numbers(family)
    rule = getattr(textbook, "adam" if family == "AdamW" else family.lower())
    names = [name for name in exact.FAMILIES[family].states if name != "max_exp_avg_sq"]
    for ours, theirs in SETTINGS[family]:
        h = exact.Hyper(**{"lr": 0.1, "weight_decay": 0.3} | ours)
        mine = exact.step(family, h, t, g, parts)
        wanted = rule(t, p, g, *(parts[name] for name in names), lr=0.1, wd=0.3, **theirs)
        for name, expected in zip(("param", *names), wanted, strict=True):
            used = {"momentum_buffer": h.momentum, "grad_avg": h.centered}
            if used.get(name, True):  # the textbook's go on all the same
                # float64's own rounding, also of a power with an exponent of 300
                np.testing.assert_allclose(mine[name], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("family", exact.FAMILIES)
def test_bounds_are_a_few_roundings(family: str) -> None:
    """Float32 results differ from exact ones by at least half a unit where they lie between two numbers: bounds must
    allow that, and not much more where nothing cancels."""
    _, g, parts = numbers(family)
    for ours, _ in SETTINGS[family]:
        h = exact.Hyper(**{"lr": 1e-3, "weight_decay": 0.1} | ours | {"centered": False})
        after = exact.step(family, h, 7, g, parts)
        limits = exact.bounds(family, h, 7, g, parts, SINGLE)
        for name, limit in limits.items():
            if np.array_equal(after[name], parts[name]):
                continue  # not used
            ulps = limit / SINGLE.ulp(after[name])
            assert ulps.min() >= 0.49 and np.median(ulps) < 6, (name, ours, np.median(ulps))


def test_every_family_is_known_by_its_name() -> None:
    assert set(exact.FAMILIES) == set(spec.FAMILIES) == {m.__name__ for m in EVERY_OPTIMIZER}
    for name, family in exact.FAMILIES.items():
        made = Spec.parse(f"adamfused:{name}")
        assert made.family == name
        assert set(family.rates) <= set(family.fields) <= set(exact.Hyper.__dataclass_fields__)
        assert all(made.takes(field) for field in family.fields), name


# ---- right optimizers pass, and faults are found -------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", [name for name in OTHERS if name != "RMSprop"])
def test_ours_pass_every_case(name: str, dtype: str) -> None:
    assert failed(f"adamfused:{name}", dtype=dtype) == {}


@pytest.mark.parametrize(
    "candidate, dtype",
    [
        ("adamfused:AdamW[state_dtype='int8']", "float32"),
        ("adamfused:AdamW[state_dtype=torch.bfloat16]", "float32"),
        ("adamfused:AdamW[master_weights='split16']", "bfloat16"),
        ("adamfused:AdamW[master_weights='split16',state_dtype='int8']", "bfloat16"),
        ("adamfused:SGD[master_weights='split8',momentum=0.9]", "bfloat16"),
        ("adamfused:Lion[master_weights='fp32',state_dtype='int8']", "float16"),
    ],
)
def test_stored_formats_move_parameters_exactly_from_what_they_keep(
    candidate: str, dtype: str
) -> None:
    """The joined weight is judged as a float32, the decoded states are where a step begins."""
    report = parity(
        candidate, cases="defaults,groups,missing_gradients", dtype=dtype, isolated=False
    )
    assert report.passed, [(r.case, r.detail) for r in report.failures]
    assert all(r.ratio is not None and not r.detail for r in report.results)


def test_rounding_at_random_is_not_to_nearest() -> None:
    found = failed("adamfused:AdamW[stochastic_rounding=True]", dtype="bfloat16")
    assert "are the nearest to the exact one" in found["defaults"]


# What the plain ones do not look for: they raise when they have already moved another parameter, and torch's
# load_state_dict rounds their states to the dtype of the parameters.
NOT_LOOKED_FOR = ("wrong_shape", "sparse_gradient", "save_and_load_bfloat16")


@pytest.mark.parametrize("name", OTHERS)
def test_an_independent_one_passes(name: str) -> None:
    assert failed(f"{family_mutants.__file__}:{name}", NOT_LOOKED_FOR) == {}


@pytest.mark.parametrize(
    "name, mutation", [(name, m) for name, ms in family_mutants.MUTATIONS.items() for m in ms]
)
def test_every_fault_is_found(name: str, mutation: str) -> None:
    faulty = f"{family_mutants.__file__}:{name}[mutation={mutation!r}]"
    assert failed(faulty, NOT_LOOKED_FOR, stop_early=True)


@pytest.mark.parametrize("name", OTHERS)
def test_what_torchs_own_do_wrong_is_told(name: str) -> None:
    """In float32 torch's loops compute the right thing; a refusal may come late."""
    if name == "Lion":
        pytest.skip("torch.optim has no Lion")
    found = set(failed(f"torch.optim:{name}"))
    # With 16-bit parameters their states are of 16 bits, too, and each operation is rounded.
    assert found <= {
        "bfloat16", "float16", "mixed_dtypes", "save_and_load_bfloat16", "sparse_gradient",
        "wrong_shape", "added_group",  # of Adagrad, before torch 2.13
    }  # fmt: skip
    assert {"bfloat16", "float16"} <= found


def test_torchs_fused_sgd_does_not_move_16_bit_parameters() -> None:
    """On the CPU, torch 2.13. No loss of a short test shows it: the last elements move."""
    found = failed("torch.optim:SGD[fused=True]", dtype="bfloat16")
    assert {"defaults", "large_tensor"} <= set(found)
    p = torch.ones(100, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.5, fused=True).step()
    assert (p == 1.0).sum() == 96


def test_agrees_knows_every_family() -> None:
    for name in OTHERS:
        assert agrees(f"adamfused:{name}") is None
        worst = family_mutants.MUTATIONS[name][0]
        assert agrees(f"{family_mutants.__file__}:{name}") is None, worst
    for fault in ("Lion[mutation='coupled_decay']", "RAdam[mutation='uncorrected_mean']"):
        assert agrees(f"{family_mutants.__file__}:{fault}") is not None, fault
