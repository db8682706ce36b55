"""Handwritten digits, learnt by a small convolutional network."""

from __future__ import annotations

import argparse
from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adamfused.demo import data
from adamfused.demo.train import Task


def small_cnn() -> nn.Module:
    """Return the network: images (N, 1, 28, 28) to the logits (N, 10) of the ten digits."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 32, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            dense1=nn.Linear(64 * 7 * 7, 128),
            relu3=nn.ReLU(),
            dense2=nn.Linear(128, 10),
        )
    )


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the percentage of the rows of `logits` (N, 10) whose largest is at `labels` (N,)."""
    return 100 * int((logits.argmax(1) == labels).sum()) / len(labels)


def load(args: argparse.Namespace) -> Task:
    """Return the task, on the digits of `--data-dir` or of a package."""
    digits = data.load(args.data_dir, args.limit)
    for note in digits.notes:
        print(f"note: {note}")
    return Task(
        data=digits.name,
        model_name="Small CNN",
        model=small_cnn,
        train=digits.train,
        test=digits.test,
        loss=cross_entropy,
        loss_unit="nats",
        score=accuracy,
        score_name="test accuracy",
        score_unit="%",
    )
