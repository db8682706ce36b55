"""Train a character-level GPT, with clipping, AdamW and an average of the weights in one pass over them.

It learns the text of Python's own manual, which every Python carries, and writes some with the averaged weights.

    python examples/charlm.py [STEPS]
"""

import sys
from itertools import islice

import torch

import adamfused
from adamfused.demo.charlm import GPT, batches, groups, loss_of, manual, write

CONTEXT, BATCH = 64, 32
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 500

torch.manual_seed(0)
text = manual()
model = GPT(len(text.alphabet), CONTEXT)
optimizer = adamfused.AdamW(
    groups(model),  # matrices decay; biases and the gains of norms do not
    lr=3e-3,
    betas=(0.9, 0.99),
    weight_decay=0.1,
    max_grad_norm=1.0,
    ema_decay=0.99,
)
check = next(batches(text.validation, 256, CONTEXT, seed=0))


@torch.no_grad()
def validate() -> float:
    return loss_of(model, *check).item()


print(" step   loss  gradient norm   validation: weights  average")
for step, (inputs, targets) in enumerate(
    islice(batches(text.train, BATCH, CONTEXT, seed=0), STEPS), 1
):
    optimizer.zero_grad()
    loss = loss_of(model, inputs, targets)
    loss.backward()
    optimizer.step()  # clips, moves the weights and their average
    if step % 50 == 0 or step == STEPS:
        weights = validate()
        with optimizer.swap_ema():
            average = validate()
        norm = optimizer.grad_norm.item()
        print(
            f"{step:5} {loss.item():6.3f} {norm:14.2f} {weights:21.3f} {average:8.3f}", flush=True
        )

with optimizer.swap_ema():
    print(text.spell(write(model, text.read("The statement "), 400, CONTEXT, seed=0)))
