"""What an optimizer's class tells of a parameter group: how it moves."""

from __future__ import annotations

from typing import NamedTuple


class Plan(NamedTuple):
    """How a parameter group moves.

    Args:
        rule: its name in :data:`adamfused.rules.RULES`.
        keys: the names of its states, in the rule's order.
        hyper: its numbers, in the order of its ``Hyper`` struct in ``csrc/rules.h``.
        carried: the name of the number that it carries from step to step, if it does: `_carried` of the class.
    """

    rule: str
    keys: tuple[str, ...]
    hyper: list[float]
    carried: str | None = None
