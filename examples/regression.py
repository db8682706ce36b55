"""Fit a line to noisy points with adamfused.Adam, and compare it with the least-squares line.

python examples/regression.py
"""

import numpy as np
import torch
from torch import nn

import adamfused

torch.manual_seed(0)
x = torch.linspace(-1, 1, 100).unsqueeze(1)  # (100, 1)
y = 3 * x + 2 + 0.5 * torch.randn_like(x)

line = nn.Linear(1, 1)
optimizer = adamfused.Adam(line.parameters(), lr=0.1)
for step in range(501):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(line(x), y)
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step:3}: loss {loss.item():.4f}")

slope, intercept = np.polyfit(x.squeeze().numpy(), y.squeeze().numpy(), 1)
print(f"fitted:        y = {line.weight.item():.4f} x + {line.bias.item():.4f}")
print(f"least squares: y = {slope:.4f} x + {intercept:.4f}")
