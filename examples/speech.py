"""Tell nine speakers apart with a GRU, adamfused.Adam and one of torch's learning-rate schedulers.

pip install --no-deps aeon        # the recordings
python examples/speech.py
"""

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import adamfused
from adamfused.demo import vowels
from adamfused.demo.speech import Listener

EPOCHS, BATCH = 42, 30

torch.manual_seed(0)
recordings = vowels.load()
sounds, speakers = recordings.train  # (270, 29, 12) float32 with NaN after the end, (270,) int64
model = Listener(coefficients=12, speakers=9)
optimizer = adamfused.Adam(model.parameters(), lr=5e-3)
scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=EPOCHS // 3)  # two restarts

for epoch in range(1, EPOCHS + 1):
    model.train()
    for chosen in torch.randperm(len(sounds)).split(BATCH):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(sounds[chosen]), speakers[chosen])
        loss.backward()
        optimizer.step()
    rate = scheduler.get_last_lr()[0]
    scheduler.step()
    if epoch % 7 == 0:
        model.eval()
        with torch.no_grad():
            guesses = model(recordings.test[0]).argmax(1)
        right = (guesses == recordings.test[1]).float().mean().item()
        print(f"epoch {epoch:2}: lr {rate:.5f}, loss {loss.item():.4f}, accuracy {right:.1%}")
