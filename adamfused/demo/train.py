"""What a demo trains, and the training run that every demo uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

SCORE_CHUNK = 500  # test examples in one forward pass, so that a big test set needs little memory


class DataError(Exception):
    """The data of a demo is missing or malformed; the message says what to do about it."""


class UsageError(Exception):
    """Options that do not go together; the message names them."""


def all_parameters(model: nn.Module) -> list[Any]:
    """Return the model's parameters, as one group."""
    return list(model.parameters())


@dataclass(frozen=True)
class Task:
    """A model and its data.

    `train` and `test` are (inputs, targets) with the examples in dimension 0. `loss` takes
    (outputs, targets) and returns the batch's mean as a 0-d tensor; `score` takes the outputs and
    targets of the whole test set and returns one number in `score_unit`. `groups` gives an
    optimizer what it is to train.
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
    groups: Callable[[nn.Module], list[Any]] = all_parameters


@dataclass(frozen=True)
class Settings:
    """How a task is trained; two runs with equal settings see the same weights and batches."""

    batch_size: int
    seed: int
    device: torch.device


def steps_per_epoch(task: Task, settings: Settings) -> int:
    """Return the number of batches in a pass over the training set, the last of them maybe short."""
    return -(-len(task.train[0]) // settings.batch_size)


def equal_parts(steps: int, at_most: int) -> int:
    """Return into how many equal parts, at most so many, the steps of a training can be divided."""
    return max(parts for parts in range(1, at_most + 1) if steps % parts == 0)


def batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield index tensors of up to `batch_size` of `count` examples, reshuffled every pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.split(torch.randperm(count, generator=generator), batch_size)


class Run:
    """One training run of a task from the settings' seed, taken a step at a time.

    ``losses``, ``rates`` (the learning rate) and ``step_seconds`` (the time in
    ``optimizer.step()``) have one entry a step, ``epoch_losses`` (means) and ``scores`` one an epoch.
    """

    def __init__(
        self,
        task: Task,
        settings: Settings,
        optimizer_of: Callable[[list[Any]], torch.optim.Optimizer],
        schedule_of: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    ) -> None:
        """Make the model, with ``optimizer_of`` its parameters the optimizer, and its schedule if any."""
        self.task, self.settings = task, settings
        torch.manual_seed(settings.seed)
        self.model = task.model().to(settings.device)
        self.optimizer = optimizer_of(task.groups(self.model))
        self.schedule = schedule_of(self.optimizer) if schedule_of else None
        self.inputs, self.targets = (t.to(settings.device) for t in task.train)
        self.order = batches(len(self.inputs), settings.batch_size, settings.seed)
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.step_seconds: list[float] = []
        self.epoch_losses: list[float] = []
        self.scores: list[float] = []

    def step(self) -> None:
        """Train on the next batch."""
        # Random numbers that the model draws must not depend on what other runs drew before.
        torch.manual_seed(self.settings.seed + len(self.losses))
        chosen = next(self.order).to(self.settings.device)
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model(self.inputs[chosen]), self.targets[chosen])
        loss.backward()
        self.rates.append(float(self.optimizer.param_groups[0]["lr"]))
        self.step_seconds.append(timed_step(self.optimizer, self.settings.device))
        if self.schedule is not None:
            self.schedule.step()
        self.losses.append(loss.item())

    def end_epoch(self) -> None:
        """Take the mean loss since the last epoch's end, and score the model on the test set."""
        epoch_steps = len(self.losses) // (len(self.scores) + 1)
        self.epoch_losses.append(fmean(self.losses[-epoch_steps:]))
        self.scores.append(evaluate(self.task, self.model, self.settings.device))

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the model's parameters by name, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}

    def median_us(self) -> float:
        """Return the median time in ``optimizer.step()``, microseconds."""
        return median(self.step_seconds) * 1e6

    def state_bytes(self) -> float:
        """Return the bytes that the optimizer keeps for each weight, step counts left out."""
        kept = sum(
            value.nbytes
            for state in self.optimizer.state.values()
            for name, value in state.items()
            if isinstance(value, Tensor) and name != "step"
        )
        return kept / sum(p.numel() for p in self.model.parameters())


class Watcher(Protocol):
    """Is told of each step and of each epoch of the runs."""

    def step(self) -> None:
        """Hear that every run took a step."""

    def epoch(self) -> None:
        """Hear that every run ended an epoch."""


def train(runs: Iterable[Run], epochs: int, epoch_steps: int, watcher: Watcher) -> None:
    """Train the runs, which take turns step by step.

    So whatever else the machine does slows down all of them alike.
    """
    runs = list(runs)
    for _ in range(epochs):
        for _ in range(epoch_steps):
            for run in runs:
                run.step()
            watcher.step()
        for run in runs:
            run.end_epoch()
        watcher.epoch()


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
    outputs = torch.cat(
        [model(chunk.to(device)).cpu() for chunk in torch.split(inputs, SCORE_CHUNK)]
    )
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
    size: int


def differences(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[Difference]:
    """Return the float32 tensors of two runs' weights that differ in any bit, in model order."""
    found = []
    for name, tensor in left.items():
        differ = int((tensor.view(torch.int32) != right[name].view(torch.int32)).sum())
        if differ:
            found.append(Difference(name, differ, tensor.numel()))
    return found
