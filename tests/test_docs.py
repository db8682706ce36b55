"""Every example in a docstring and in the documentation runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from helpers import EVERY_OPTIMIZER

import adamfused

pytestmark = pytest.mark.reference

MODULES = (
    "adadelta",
    "adagrad",
    "adam",
    "average",
    "backward",
    "checkpoints",
    "clip",
    "lion",
    "master",
    "nadam",
    "optimizer",
    "radam",
    "rmsprop",
    "sgd",
    "spec",
    "info",
    "report",
    "parity",
    "bench.interval",
    "bench.case",
    "bench.measure",
)
PAGES = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"adamfused.{name}"))
    assert result.attempted >= 1
    assert result.failed == 0


@pytest.mark.skipif(not PAGES, reason="the documentation is not beside these tests")
def test_examples_in_the_documentation() -> None:
    results = [doctest.testfile(str(page), module_relative=False) for page in PAGES]
    assert sum(result.attempted for result in results) >= 8
    assert sum(result.failed for result in results) == 0


@pytest.mark.parametrize("cls", EVERY_OPTIMIZER)
def test_every_argument_is_in_the_docstring(cls) -> None:
    text = cls.__doc__ + (adamfused.Adam.__doc__ if issubclass(cls, adamfused.Adam) else "")
    missing = [name for name in inspect.signature(cls).parameters if f"{name}:" not in text]
    assert missing == []


@pytest.mark.parametrize("cls", EVERY_OPTIMIZER)
def test_a_keyword_that_no_class_knows_is_an_error_of_python(cls) -> None:
    with pytest.raises(
        TypeError, match=rf"^{cls.__name__}.__init__\(\) got an unexpected keyword argument 'lrr'$"
    ):
        cls([torch.nn.Parameter(torch.ones(1))], lrr=0.1)
