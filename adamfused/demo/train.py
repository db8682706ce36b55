"""What a demo trains, and the one training loop that every demo uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

SCORE_CHUNK = 500  # test examples in one forward pass, so that a big test set needs little memory


class DataError(Exception):
    """The data of a demo is missing or malformed; the message says what to do about it."""


@dataclass(frozen=True)
class Task:
    """A model and its data.

    `train` and `test` are (inputs, targets) with the examples in dimension 0. `loss` takes
    (outputs, targets) and returns the batch's mean as a 0-d tensor; `score` takes the outputs and
    targets of the whole test set and returns one number in `score_unit`.
    """

    data: str
    model_name: str
    model: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    loss_unit: str
    score: Callable[[Tensor, Tensor], float]
    score_name: str
    score_unit: str


@dataclass(frozen=True)
class Settings:
    """How a task is trained; two runs with equal settings see the same weights and batches."""

    batch_size: int
    seed: int
    device: torch.device


class Progress(Protocol):
    """What `train` tells of a run while it goes on."""

    def step(self) -> None:
        """Count one more step."""

    def epoch(self, number: int, loss: float, score: float) -> None:
        """Tell of the end of epoch `number` (from 1) with its mean loss and its test score."""


@dataclass
class Run:
    """One training run.

    `losses` and `step_seconds` have one entry a step, `epoch_losses` (means) and `scores` one an
    epoch. `weights` are the final ones, on the CPU.
    """

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    epoch_losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def median_us(self) -> float:
        """The median time in `step()`, microseconds."""
        return median(self.step_seconds) * 1e6


def steps_per_epoch(task: Task, settings: Settings) -> int:
    """Return the number of batches in one pass over the training set; the last may be short."""
    return -(-len(task.train[0]) // settings.batch_size)


def batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield index tensors of up to `batch_size` of `count` examples, reshuffled every pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(batch_size)


def train(
    task: Task,
    settings: Settings,
    optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    steps: int,
    progress: Progress | None = None,
) -> Run:
    """Train the task's model from the settings' seed for `steps` steps.

    With `progress` the model is scored on the test set after each epoch; without, never.
    """
    device = settings.device
    torch.manual_seed(settings.seed)
    model = task.model().to(device)
    optimizer = optimizer_of(list(model.parameters()))
    inputs, targets = (t.to(device) for t in task.train)
    per_epoch = steps_per_epoch(task, settings)
    order = batches(len(inputs), settings.batch_size, settings.seed)
    run = Run()
    for step in range(1, steps + 1):
        chosen = next(order).to(device)
        optimizer.zero_grad()
        loss = task.loss(model(inputs[chosen]), targets[chosen])
        loss.backward()
        run.step_seconds.append(timed_step(optimizer, device))
        run.losses.append(loss.item())
        if progress is None:
            continue
        progress.step()
        if step % per_epoch == 0:
            run.epoch_losses.append(fmean(run.losses[-per_epoch:]))
            run.scores.append(evaluate(task, model, device))
            progress.epoch(len(run.scores), run.epoch_losses[-1], run.scores[-1])
    run.weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    return run


def timed_step(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Take one step and return the seconds it took, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    optimizer.step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, device: torch.device) -> float:
    """Return the model's score on the whole test set, in the task's unit."""
    inputs, targets = task.test
    model.eval()
    outputs = torch.cat([model(chunk.to(device)).cpu() for chunk in inputs.split(SCORE_CHUNK)])
    model.train()
    return task.score(outputs, targets)


@contextmanager
def deterministic() -> Iterator[None]:
    """Have torch use deterministic algorithms inside the block, and warn where it has none."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


class Difference(NamedTuple):
    """One tensor that is not bit-identical: how many of its values differ."""

    name: str
    differing: int
    count: int


def differences(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[Difference]:
    """Return the float32 tensors of two runs' weights that differ in any bit, in model order."""
    found = []
    for name, tensor in left.items():
        differ = int((tensor.view(torch.int32) != right[name].view(torch.int32)).sum())
        if differ:
            found.append(Difference(name, differ, tensor.numel()))
    return found
