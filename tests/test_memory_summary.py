"""What an optimizer says of its memory: the bytes of the tensors that there are, before and after they are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_storage_options import BF16, F16, F32, numbers, parameters, train

from adamfused import Adam, AdamW, RMSprop

N = 2 * 5120  # numbers in two parameters of LARGE


# dtype of the parameters, the optimizer and its options, and (bytes kept, bytes moved) for each number
CASES: dict[str, tuple[torch.dtype, Any, dict[str, Any], dict[str, tuple[float, float]]]] = {
    "AdamW as it comes": (
        F32,
        AdamW,
        {},
        {"parameter": (4, 8), "gradient": (4, 4), "exp_avg": (4, 8), "exp_avg_sq": (4, 8)},
    ),
    "clipped, averaged and copied": (
        F32,
        Adam,
        {"amsgrad": True, "max_grad_norm": 1.0, "ema_decay": 0.9, "ema_dtype": F16, "copies": True},
        {"parameter": (4, 8), "gradient": (4, 8), "copy": (2, 2), "exp_avg": (4, 8)}
        | {"exp_avg_sq": (4, 8), "max_exp_avg_sq": (4, 8), "ema": (2, 4)},
    ),
    "a whole master": (
        F16,
        RMSprop,
        {"master_weights": "fp32", "state_dtype": "param"},
        {"parameter": (2, 4), "gradient": (2, 2), "square_avg": (2, 4), "master": (4, 8)},
    ),
    "6.0625 bytes a number besides the gradient": (
        BF16,
        AdamW,
        {"master_weights": "split16", "state_dtype": "int8"},
        {"parameter": (2, 4), "gradient": (2, 2), "exp_avg": (1, 2), "exp_avg_sq": (1, 2)}
        | {"master": (2, 4), "scales": (2 * 4 / 128, 4 * 4 / 128)},
    ),
    "24 bits": (
        BF16,
        RMSprop,
        {"master_weights": "split8", "state_dtype": "int8", "momentum": 0.9},
        {"parameter": (2, 4), "gradient": (2, 2), "square_avg": (1, 2), "momentum_buffer": (1, 2)}
        | {"master": (1, 2), "scales": (2 * 4 / 128, 4 * 4 / 128)},
    ),
}


@pytest.mark.parametrize(("dtype", "make", "options", "expected"), CASES.values(), ids=CASES.keys())
def test_bytes_of_each_kind(path, dtype, make, options, expected) -> None:
    params = parameters(dtype, dtype)
    options = dict(options)
    copies = [p.detach().bfloat16() for p in params] if options.pop("copies", False) else None
    optimizer = make(params, copy_to=copies, backend=path, **options)
    summary = optimizer.memory_summary()
    assert summary.parameters == N
    assert summary.resident == {kind: kept * N for kind, (kept, _) in expected.items()}
    assert summary.moved == {kind: moved * N for kind, (_, moved) in expected.items()}
    assert summary.resident_bytes == N * sum(kept for kept, _ in expected.values())
    assert summary.moved_bytes == N * sum(moved for _, moved in expected.values())
    for p in params:
        p.grad = numbers(1, *p.shape, dtype=dtype)
    optimizer.step()
    assert optimizer.memory_summary() == summary
    tensors = [t for p in params for key, t in optimizer.state[p].items() if key != "step"]
    others = ("parameter", "gradient", "copy")
    states = sum(size for kind, size in summary.resident.items() if kind not in others)
    assert states == sum(t.numel() * t.element_size() for t in tensors)


def test_states_as_they_are_count_not_as_they_are_asked_for(path) -> None:
    p, small = parameters(F32)[0], torch.nn.Parameter(torch.ones(5))
    frozen = torch.nn.Parameter(torch.ones(7), requires_grad=False)
    optimizer = AdamW([p, small, frozen], state_dtype="int8", backend=path)
    summary = optimizer.memory_summary()
    assert summary.resident["exp_avg"] == p.numel() + 4 * small.numel()
    assert summary.resident["parameter"] == 4 * (p.numel() + 5 + 7)
    assert summary.moved["parameter"] == 8 * (p.numel() + 5)
    assert summary.resident["scales"] == 2 * 4 * 40
    half = AdamW([p], backend=path)
    half.load_state_dict(torch_state(p))
    assert half.memory_summary().resident["exp_avg"] == 2 * p.numel()


def torch_state(p: torch.nn.Parameter) -> dict[str, Any]:
    """A checkpoint of bfloat16 parameters, whose moments are bfloat16, too."""
    q = torch.nn.Parameter(p.detach().bfloat16())
    optimizer = torch.optim.AdamW([q])
    q.grad = torch.ones_like(q)
    optimizer.step()
    return optimizer.state_dict()


def test_the_table_has_a_row_a_kind_and_the_total(path) -> None:
    optimizer = train(AdamW(parameters(BF16), state_dtype="int8", backend=path), 1)
    summary = optimizer.memory_summary()
    lines = str(summary).splitlines()
    assert lines[0] == "Memory of 5,120 parameters"
    rows = {line.split()[0]: line.split()[1:] for line in lines[5:]}
    assert list(rows) == [*summary.resident, "total"]
    assert rows["parameter"] == ["2.00", "0.01", "4.00", "0.02"]
    assert rows["scales"][0] == "0.06"
    assert float(rows["total"][0]) == pytest.approx(summary.resident_bytes / 5120, abs=0.005)


def test_an_optimizer_without_numbers() -> None:
    summary = AdamW([torch.nn.Parameter(torch.ones(0))]).memory_summary()
    assert (summary.parameters, summary.resident_bytes, summary.moved_bytes) == (0, 0, 0)
    assert "total" in str(summary)
