"""How far AdamW in float32 is from AdamW in float64 after many steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim import Optimizer


def drifts(
    *makes: Callable[..., Optimizer], numel: int = 1024, steps: int = 3000
) -> list[list[float]]:
    """Lets AdamW classes and a float64 computation run freely from the same weights and gradients.

    Weights are 0.02 times and gradients once a normal distribution; lr 1e-3, weight decay 0.01.

    Returns:
        For each class the root mean square errors of the parameters, relative to the length of the
        path that each went, and of the second moments, relative to themselves.
    """
    generator = torch.Generator().manual_seed(0)
    start = 0.02 * torch.randn(numel, generator=generator)
    params = [torch.nn.Parameter(start.clone()) for _ in makes]
    optimizers = [
        make([q], lr=1e-3, weight_decay=0.01) for make, q in zip(makes, params, strict=True)
    ]
    p, m, v = start.double(), torch.zeros(numel).double(), torch.zeros(numel).double()
    path = torch.zeros(numel).double()
    for t in range(1, steps + 1):
        g = torch.randn(numel, generator=generator)
        for q, optimizer in zip(params, optimizers, strict=True):
            q.grad = g
            optimizer.step()
        m = 0.9 * m + 0.1 * g.double()
        v = 0.999 * v + 0.001 * g.double() ** 2
        move = 1e-5 * p + 1e-3 * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        p, path = p - move, path + move.abs()
    errors = []
    for q, optimizer in zip(params, optimizers, strict=True):
        second = optimizer.state[q]["exp_avg_sq"].double()
        both = (q.detach().double() - p) / path, second / v - 1
        errors.append([float(e.square().mean().sqrt()) for e in both])
    return errors
