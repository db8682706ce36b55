"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest

import pytest

import adamfused.adam
import adamfused.rmsprop

pytestmark = pytest.mark.reference


@pytest.mark.parametrize("module", [adamfused.adam, adamfused.rmsprop])
def test_docstring_examples(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted >= 6
    assert result.failed == 0


@pytest.mark.parametrize("cls", [adamfused.Adam, adamfused.AdamW, adamfused.RMSprop])
def test_every_argument_is_in_the_docstring(cls) -> None:
    text = cls.__doc__ + (adamfused.Adam.__doc__ if issubclass(cls, adamfused.Adam) else "")
    missing = [
        name for name in cls.__init__.__annotations__ if name != "return" and f"{name}:" not in text
    ]
    assert missing == []
