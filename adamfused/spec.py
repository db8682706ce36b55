"""Optimizers by name: ``module:Class[option=value,...]``, for the tools that take any optimizer, ours or not."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

FAMILIES = ("SGD", "Adagrad", "Adadelta", "RMSprop", "Adam", "AdamW", "NAdam", "RAdam", "Lion")
"""The rules that the tools know in float64. Adam has coupled (L2) weight decay, AdamW decoupled."""

# What apex, DeepSpeed and torch call the switch between Adam and AdamW.
_DECOUPLED = ("adam_w_mode", "adamw_mode", "decoupled_weight_decay")

# Optimizers with Adam in their name and another rule.
_OTHERS = ("NAdam", "RAdam", "Adamax", "SparseAdam", "ScheduleFree", "Mini")

# The others are known by the whole name, because much is called SGD or Lion.
_NAMED = re.compile(
    r"(?:DeepSpeed|Fused|CPU|Paged)*(SGD|Adagrad|Adadelta|NAdam|RAdam|Lion)(?:\d+bit|Fp8)?",
    re.IGNORECASE,
)


class Unsupported(Exception):
    """An optimizer cannot do what it was asked to, and said so. The message is one line."""


@dataclass(frozen=True)
class Spec:
    """One optimizer to be measured or tested.

    Args:
        name: what it is called in tables: the text that it was made from, or a given name.
        make_with: called as ``make_with(params, **hyper)``; a class or any callable that returns a
            ``torch.optim.Optimizer``.
        options: keyword arguments that every instance gets.
        family: one of :data:`FAMILIES`, or ``None`` where it was not said and cannot be told from the class's name.

    Example:
        >>> from adamfused.spec import Spec
        >>> spec = Spec.parse("torch.optim:AdamW[fused=True]")
        >>> spec.family, spec.options
        ('AdamW', {'fused': True})
        >>> type(spec.make([torch.nn.Parameter(torch.ones(3))], lr=0.1)).__name__
        'AdamW'
    """

    name: str
    make_with: Callable[..., Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    family: str | None = None

    @classmethod
    def parse(cls, text: str, family: str | None = None) -> Spec:
        """Reads ``module:Class[option=value,...]``. The module may be a path to a file, ``dir/mine.py:Class``.

        Values are Python literals, or dtypes such as ``torch.bfloat16``.

        Raises:
            ValueError: if the text cannot be read, or the module or class is not there.
        """
        target, bracket, rest = text.partition("[")
        module_name, colon, class_name = target.strip().rpartition(":")
        if not colon or not module_name or not class_name or (bracket and not rest.endswith("]")):
            raise ValueError(
                f"{text!r} does not name an optimizer; expected module:Class or "
                "module:Class[option=value,...], such as torch.optim:AdamW[fused=True]"
            )
        options = _read_options(rest[:-1], text) if bracket else {}
        module = _load(module_name)
        made = getattr(module, class_name, None)
        if not callable(made):
            here = [n for n, v in vars(module).items() if _is_optimizer(v)]
            raise ValueError(
                f"{module_name} has no {class_name}; the optimizers in it: {', '.join(here) or 'none'}"
            )
        return cls.of(made, text.strip(), options, family)

    @classmethod
    def of(
        cls,
        what: Spec | str | Callable[..., Optimizer],
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
        family: str | None = None,
    ) -> Spec:
        """A spec from a spec, its text, an optimizer class, or a function that makes one from parameters.

        Raises:
            ValueError: if ``what`` is a text that cannot be read, or ``family`` is unknown.
        """
        if family is not None and family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
        if isinstance(what, Spec):
            return what if family is None else Spec(what.name, what.make_with, what.options, family)
        if isinstance(what, str):
            return cls.parse(what, family)
        if not callable(what):
            raise ValueError(
                f"expected module:Class or an optimizer class; got {type(what).__name__} {what!r}"
            )
        known = dict(options or {})
        name = name or str(getattr(what, "__qualname__", repr(what)))
        return cls(name, what, known, family or _family_of(what, known))

    @cached_property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        """The arguments that it takes, by name; one called ``**`` takes any name."""
        try:
            parameters = inspect.signature(self.make_with).parameters
        except (TypeError, ValueError):
            return {"**": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}
        return {
            "**" if p.kind is p.VAR_KEYWORD else name: p
            for name, p in parameters.items()
            if p.kind is not p.VAR_POSITIONAL
        }

    @property
    def package(self) -> str:
        """The package that it is from, with its version where it tells, such as ``"torch 2.13.0"``."""
        name = str(getattr(self.make_with, "__module__", "?")).partition(".")[0]
        version = getattr(sys.modules.get(name), "__version__", "")
        return f"{name} {version}".strip()

    def takes(self, name: str) -> bool:
        """Whether it has an argument of that name."""
        return name in self.arguments or "**" in self.arguments

    def make(self, params: Iterable[Any], **hyper: Any) -> Optimizer:
        """An optimizer of these parameters.

        Args:
            params: as ``torch.optim`` takes them.
            hyper: hyper-parameters by torch's names. One that it does not take is left out where it has the value
                that its absence stands for (no decay, no momentum, ...).

        Raises:
            Unsupported: if it does not take one of ``hyper``, or its constructor refuses them.
        """
        given = {k: v for k, v in hyper.items() if k not in self.options}
        lacking = [
            k for k, v in given.items() if not self.takes(k) and v not in (0, 0.0, False, None)
        ]
        if lacking:
            raise Unsupported(f"it takes no {', '.join(lacking)}")
        # Off is what a switch is that nobody names, and some classes refuse names that they do not know.
        off = {k for k, v in given.items() if v is False and k not in self.arguments}
        given = {k: v for k, v in given.items() if self.takes(k) and k not in off}
        try:
            return self.make_with(params, **{**given, **self.options})
        except (Exception, SystemExit) as error:
            raise Unsupported(f"{type(error).__name__}: {first_line(error)}") from error

    def __str__(self) -> str:
        return self.name


def parse_list(text: str) -> list[Spec]:
    """Reads specs with commas between them; commas in brackets belong to the spec.

    Raises:
        ValueError: if one of them cannot be read.
    """
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[(") - (c in "])")
        if c == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    parts.append(text[begin:])
    specs = [Spec.parse(part.strip()) for part in parts if part.strip()]
    if not specs:
        raise ValueError(
            f"{text!r} names no optimizer; expected module:Class, several with commas between"
        )
    return specs


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return (str(error).strip().splitlines() or ["no message"])[0]


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer


def _load(name: str) -> Any:
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = Path(name).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ImportError("there is no such file")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)  # where pickle and dataclasses look it up
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{name} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error


def _read_options(text: str, whole: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("expected name=value")
        return {str(k.arg): _value(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"the options of {whole!r} cannot be read; expected name=value with commas between, "
            "each value a Python literal or a dtype, such as [fused=True,betas=(0.9,0.95)]"
        ) from None


def _value(node: ast.expr) -> Any:
    if (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ):
        if isinstance(value := getattr(torch, node.attr, None), torch.dtype):
            return value
    return ast.literal_eval(node)


def _family_of(made: Any, options: Mapping[str, Any]) -> str | None:
    # A subclass of torch's class is of its family, whatever it is called.
    for base in getattr(made, "__mro__", ()):
        if base.__module__.startswith(("torch.optim.", "adamfused.")) and base.__name__ in FAMILIES:
            decoupled = base.__name__ == "Adam" and options.get("decoupled_weight_decay")
            return "AdamW" if decoupled else str(base.__name__)
    name = str(getattr(made, "__name__", ""))
    if found := _NAMED.fullmatch(name):
        return next(f for f in FAMILIES if f.lower() == found[1].lower())
    if "rmsprop" in name.lower():
        return "RMSprop"
    if "adam" not in name.lower() or any(other in name for other in _OTHERS):
        return None
    try:
        known = dict(inspect.signature(made).parameters)
    except (TypeError, ValueError):
        known = {}
    for switch in _DECOUPLED:
        if switch in options:
            return "AdamW" if options[switch] else "Adam"
        if switch in known and known[switch].default is True:
            return "AdamW"
    return "AdamW" if "adamw" in name.lower() else "Adam"
