"""A character-level GPT whose clipping, AdamW and weight averaging are one pass over the weights.

It learns the text of Python's own manual, which every Python carries (``help("assert")`` shows a page of it), and then
writes some. 825,856 parameters; 500 steps take about 80 seconds on two CPU cores.

    python examples/charlm.py [--steps 500] [--seed 0] [--optimizer adamfused.AdamW] [--plot charlm.png]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import adamfused
from adamfused import report
from adamfused.demo import count, seed

CONTEXT = 64  # characters that the model sees
BATCH = 32
ROW = 25  # steps between two rows of the table
MAX_GRAD_NORM = 1.0
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamfused.AdamW": partial(adamfused.AdamW, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1),
    "adamfused.Adam": partial(adamfused.Adam, lr=3e-3, betas=(0.9, 0.99)),
    "adamfused.RMSprop": partial(adamfused.RMSprop, lr=1e-3),
}

# ---- The text ----------------------------------------------------------------------------------


class Text(NamedTuple):
    """Numbered characters: ``train`` and ``validation``, (N,) int64, are places in ``alphabet``."""

    alphabet: str
    train: Tensor
    validation: Tensor

    def spell(self, numbers: Tensor) -> str:
        """Return the characters that ``numbers`` (N,) stand for."""
        return "".join(self.alphabet[i] for i in numbers.tolist())


def manual() -> Text:
    """Return Python's manual, about 465,000 characters; the last tenth of it is for validation."""
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = "".join(sorted(set(text)))
    place = {character: i for i, character in enumerate(alphabet)}
    numbers = torch.tensor([place[character] for character in text])
    cut = len(numbers) * 9 // 10
    return Text(alphabet, numbers[:cut], numbers[cut:])


def batches(text: Tensor, size: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for ever, random pieces of ``text`` and the character that follows each of theirs.

    Both are (size, context) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - context, (size, 1), generator=generator)
        pieces = text[starts + torch.arange(context + 1)]
        yield pieces[:, :-1], pieces[:, 1:]


# ---- The model ---------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention to the characters before, then a perceptron: each adds to what it reads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, characters, width) to the same shape."""
        by_head = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = by_head.permute(2, 0, 3, 1, 4)  # each (batch, heads, characters, width / heads)
        found = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(found.transpose(1, 2).flatten(-2))
        return x + self.perceptron(self.norm2(x))


class GPT(nn.Module):
    """Maps characters, (batch, at most ``context``) int64, to logits of the next: (..., alphabet)."""

    def __init__(
        self, alphabet: int, context: int, layers: int = 4, width: int = 128, heads: int = 4
    ) -> None:
        super().__init__()
        self.context = context
        self.character = nn.Embedding(alphabet, width)
        self.place = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, alphabet, bias=False)

    def forward(self, characters: Tensor) -> Tensor:
        """Return the logits."""
        x = self.character(characters) + self.place.weight[: characters.shape[-1]]
        return self.head(self.norm(self.blocks(x)))

    @torch.no_grad()
    def write(self, text: Tensor, more: int, generator: torch.Generator) -> Tensor:
        """Return ``text`` (N,) int64 and ``more`` characters, each drawn after all before it."""
        for _ in range(more):
            logits = self(text[None, -self.context :])[0, -1]
            drawn = torch.multinomial((logits / 0.7).softmax(0), 1, generator=generator)
            text = torch.cat([text, drawn])
        return text


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the model's mean surprise at the targets, in nats a character."""
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters in two groups: matrices decay, biases and the gains of norms do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


# ---- Training ----------------------------------------------------------------------------------


class Row(NamedTuple):
    """What a row of the table says: losses in nats a character, and the time since the start."""

    step: int
    train: float  # the mean since the row before
    weights: float  # on the validation text, with the weights as they are
    average: float  # the same, with their moving average
    norm: float  # of the gradient before clipping, the mean since the row before
    clipped: float  # the share of steps, in percent, whose gradient was clipped
    seconds: float


HEAD = """\
         training    validation loss    gradient   steps
 step        loss  weights   average        norm clipped  time, s"""


def train(model: nn.Module, text: Text, steps: int, seed: int, optimizer: Any) -> list[Row]:
    """Take the steps, print a row every ``ROW`` of them, and return the rows."""
    begin = time.perf_counter()
    checks = list(islice(batches(text.validation, 4 * BATCH, CONTEXT, seed), 2))
    rows: list[Row] = []
    losses: list[float] = []
    norms: list[float] = []

    @torch.no_grad()
    def validate() -> float:
        return fmean(loss_of(model, *check).item() for check in checks)

    tqdm = report.optional("tqdm") if sys.stdout.isatty() else None
    say = tqdm.tqdm.write if tqdm else partial(print, flush=True)
    numbers = tqdm.trange(1, steps + 1, leave=False, ncols=72) if tqdm else range(1, steps + 1)
    say(HEAD)
    for step, (inputs, targets) in zip(
        numbers, batches(text.train, BATCH, CONTEXT, seed), strict=False
    ):
        optimizer.zero_grad()
        loss = loss_of(model, inputs, targets)
        loss.backward()
        optimizer.step()  # clips, moves the weights and their average

        losses.append(loss.item())
        norms.append(optimizer.grad_norm.item())
        if step % ROW == 0 or step == steps:
            weights = validate()
            with optimizer.swap_ema():
                average = validate()
            clipped = 100 * fmean(norm > MAX_GRAD_NORM for norm in norms)
            seconds = time.perf_counter() - begin
            row = Row(step, fmean(losses), weights, average, fmean(norms), clipped, seconds)
            say("{:5} {:>11.3f} {:>8.3f} {:>9.3f} {:>11.2f} {:>5.0f} % {:>9.1f}".format(*row))
            rows.append(row)
            losses, norms = [], []
    return rows


def picture(path: Path, rows: Sequence[Row]) -> str:
    """Draw the rows into ``path`` and return the line to print about it."""
    figure = report.figure(7, 3.6)
    if figure is None:
        return f"No picture: matplotlib is not here ({report.TOOLS_HINT})."
    axes = figure.add_subplot(
        xlabel="step",
        ylabel="loss, nats a character",
        title="Character-level GPT on Python's manual",
    )
    lines = {
        "train": f"training, mean of {ROW} steps",
        "weights": "validation, weights as they are",
        "average": "validation, their average",
    }
    for (name, label), colour, style in zip(
        lines.items(), report.COLOURS, report.LINESTYLES, strict=False
    ):
        axes.plot(
            [row.step for row in rows],
            [getattr(row, name) for row in rows],
            color=colour,
            linestyle=style,
            label=label,
        )
    axes.grid(alpha=0.3)
    axes.legend()
    report.save(figure, path)
    return f"Curves: {path}"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, draw, and let the average of the weights write."""
    parser = argparse.ArgumentParser(description="Train a character-level GPT on Python's manual.")
    shown = "(default: %(default)s)"
    parser.add_argument("--steps", metavar="N", type=count, default=500, help=shown)
    parser.add_argument("--seed", metavar="N", type=seed, default=0, help=shown)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamfused.AdamW", help=shown)
    parser.add_argument("--plot", metavar="FILE", type=Path, help="picture to draw (default: none)")
    args = parser.parse_args(argv)
    try:
        report.check_outputs(args, ["plot"])
    except ValueError as error:
        parser.error(str(error))

    torch.manual_seed(args.seed)
    text = manual()
    model = GPT(len(text.alphabet), CONTEXT)
    optimizer = OPTIMIZERS[args.optimizer](
        groups(model), max_grad_norm=MAX_GRAD_NORM, ema_decay=0.99
    )
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text.train):,} characters "
        f"to train on, {len(text.validation):,} to validate; {args.optimizer}\n"
    )
    rows = train(model, text, args.steps, args.seed, optimizer)
    if args.plot is not None:
        print(f"\n{picture(args.plot, rows)}")
    print("\nWritten with the averaged weights:\n")
    with optimizer.swap_ema():
        start = text.validation[:CONTEXT]
        print(text.spell(model.write(start, 400, torch.Generator().manual_seed(args.seed))))


if __name__ == "__main__":
    main()
