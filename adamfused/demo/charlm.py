"""A character-level GPT learns the text of Python's own manual and then writes some.

It is trained three times, with fewer and fewer bytes a weight: float32; bfloat16 with split float32 weights
(master_weights="split16"); the same with moments of 8 bits (state_dtype="int8").
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from adamfused.demo import report
from adamfused.demo.options import RECIPES, add_common, add_counts, count, optimizer, settings
from adamfused.demo.train import Run, Task, equal_parts, train
from adamfused.report import Column, Table, show

HELP = "a character-level GPT on Python's manual, with 16, 14 and 8 bytes a weight"
CONTEXT = 64  # characters that the model sees
BATCH = 32
RATE = 3  # times the rate of the recipe: norms in every layer allow it, and there are few steps
ROWS = 6  # of the table that grows during training
CHECKED = 64  # pieces of the validation text that a row is measured on
PROMPT, WRITTEN = (
    "The statement ",
    300,
)  # what it is given to go on from, and for how many characters

# ---- The text ----------------------------------------------------------------------------------


class Text(NamedTuple):
    """Numbered characters: ``train`` and ``validation``, (N,) int64, are places in ``alphabet``."""

    alphabet: str
    train: Tensor
    validation: Tensor

    def read(self, string: str) -> Tensor:
        """Return the numbers of the characters of ``string``, (N,) int64."""
        return torch.tensor([self.alphabet.index(character) for character in string])

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


def pieces(text: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Return all pieces of ``text`` and the character that follows each of theirs, as views of it.

    Both are (pieces, context) int64.
    """
    windows = text.unfold(0, context + 1, 1)
    return windows[:, :-1], windows[:, 1:]


def batches(text: Tensor, size: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for ever, random pieces of ``text`` and what follows, both (size, context) int64."""
    inputs, targets = pieces(text, context)
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(inputs), (size,), generator=generator)
        yield inputs[chosen], targets[chosen]


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


class Float32Inside(nn.Module):
    """`model` with bfloat16 weights and gradients, computed in float32.

    Computing in bfloat16 as well is faster where the processor can, and several times slower where it cannot.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.bfloat16()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the model does, with its weights widened."""
        wide = {name: p.float() for name, p in self.model.named_parameters()}
        return functional_call(self.model, wide, (inputs,))


@torch.no_grad()
def write(model: nn.Module, text: Tensor, more: int, context: int, seed: int) -> Tensor:
    """Return ``text`` (N,) int64 and ``more`` characters, each drawn after the ``context`` before it."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(more):
        logits = model(text[None, -context:])[0, -1].cpu()
        drawn = torch.multinomial((logits / 0.7).softmax(0), 1, generator=generator)
        text = torch.cat([text, drawn.to(text.device)])
    return text


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean surprise at the targets, in nats a character."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the model's mean surprise at the targets, in nats a character."""
    return loss(model(inputs), targets)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters in two groups: matrices decay, biases and the gains of norms do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


# ---- The demo ----------------------------------------------------------------------------------

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "split16": {"master_weights": "split16"},
    "split16, int8": {"master_weights": "split16", "state_dtype": "int8"},
}


def load(text: Text, layers: int = 2, width: int = 128) -> Task:
    """Return the task: each example is a piece of the text, and what follows each of its characters."""
    checked = (side[:: len(side) // CHECKED][:CHECKED] for side in pieces(text.validation, CONTEXT))
    return Task(
        data="Python's manual, in pieces",
        model_name=f"GPT of {layers} layers",
        model=lambda: GPT(len(text.alphabet), CONTEXT, layers, width),
        train=pieces(text.train, CONTEXT),
        test=(next(checked), next(checked)),
        loss=loss,
        loss_unit="nats/character",
        score=lambda logits, targets: loss(logits, targets).item(),
        score_name="validation loss",
        score_unit="nats/character",
        groups=groups,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_common(parser, "charlm", ["AdamW", *(name for name in RECIPES if name != "AdamW")])
    add_counts(
        parser,
        steps=(150, "steps of each of the three"),
        batch_size=(16, "pieces of the text a step"),
    )
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=count,
        help="in place of --steps: as many as take N times as many characters as the text has",
    )


def run(args: argparse.Namespace) -> int:
    """Train in the three formats, show what each took and ended at, and let the last one write."""
    text, how = manual(), settings(args, args.batch_size)
    an_epoch = len(text.train) // (how.batch_size * CONTEXT)
    steps = args.steps if args.epochs is None else args.epochs * an_epoch
    wide = load(text)
    narrow = replace(wide, model=lambda: Float32Inside(wide.model()))
    recipe = RECIPES[args.optimizer] | {"lr": RATE * RECIPES[args.optimizer]["lr"]}
    if args.optimizer == "AdamW":
        recipe |= {"weight_decay": 0.1, "betas": (0.9, 0.99)}
    said = f"{args.optimizer}, lr {recipe['lr']:g}, batch {how.batch_size}, seed {how.seed}"
    report.header(wide, how, f"{said}, steps {steps}", args.backend)
    runs = {
        name: Run(
            narrow if formats else wide,
            how,
            optimizer(args.optimizer, backend=args.backend, **recipe, **formats),
        )
        for name, formats in FORMATS.items()
    }
    rows = equal_parts(steps, ROWS)
    row_steps = steps // rows
    unit = ("step", row_steps)
    with report.Progress(
        wide, runs, rows * row_steps, unit, ["float32", "split16", "int8"]
    ) as progress:
        train(runs.values(), rows, row_steps, progress)
    report.results(wide, runs)
    totals = memory(runs)

    panels: list[list[report.Curves | report.Bars]] = [
        [report.losses(wide, runs, unit)],
        [report.scores(wide, runs, unit)],
        [
            report.Bars("Memory", "bytes a weight, with its gradient", totals, digits=2),
            report.Bars(
                "Time in step()",
                "median, µs",
                {name: run.median_us() for name, run in runs.items()},
                digits=0,
            ),
        ],
    ]
    title = f"{wide.model_name} on Python's manual\n{said}"
    print(f"\n{report.picture(args.plot, title, panels)}")

    last, run = list(runs.items())[-1]
    start = text.read(PROMPT).to(how.device)
    print(f"\nWritten by the model of '{last}', from \"{PROMPT}\":\n")
    print(text.spell(write(run.model, start, WRITTEN, CONTEXT, how.seed)))
    more = max(2000, 4 * steps)
    print(f"\nIn {steps:,} steps it learns the look of words. To let it learn more: --steps {more}")
    return 0


def memory(runs: dict[str, Run]) -> dict[str, float]:
    """Print what the formats of the runs take, and return the bytes a weight of each."""
    columns = [Column("", left=True)]
    columns += [
        Column(name, "B/weight") for name in ("weight", "gradient", "moments", "rest", "together")
    ]
    totals, rows = {}, []
    for name, run in runs.items():
        took = run.optimizer.memory_summary()  # type: ignore[attr-defined]
        each = {kind: size / took.parameters for kind, size in took.resident.items()}
        weight, gradient = each.pop("parameter"), each.pop("gradient")
        rest = each.pop("master", 0.0) + each.pop("scales", 0.0)
        totals[name] = weight + gradient + sum(each.values()) + rest
        cells = (weight, gradient, sum(each.values()), rest, totals[name])
        rows.append([name, *(f"{cell:.2f}" for cell in cells)])
    note = "The rest: the other half of a bfloat16 weight, and the scales of 8-bit moments."
    print()
    show(Table("Memory", columns, rows, note))
    return totals
