"""Measures what a training loop does after the backward pass, in one call and in the passes that torch makes of it.

    python benchmarks/one_pass.py [--quick] [--json FILE] [--no-fail] [--threads N] [--elements N]

Every speed is a ratio of two times taken in turn in the same run; see README.md beside this file.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from targets import LARGE, Line, Part, arguments, around, judge, millions, report_of, seconds
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

import adamfused
from adamfused import machine
from adamfused.bench import Case, Interval, Report, Row
from adamfused.bench.case import gpt2
from adamfused.bench.contender import WARM_UP, parameters
from adamfused.bench.table import ratio, time
from adamfused.bench.turns import Copy, Turn, take_turns
from adamfused.report import Column, Table, show

RESULT = Path(__file__).resolve().parent / "results" / "one_pass.json"
CPU = torch.device("cpu")

LR = 1e-3
DECAY = 0.9  # of the average: three steps then show whether it was kept
SCALE = 2.0**16  # of the loss; a power of two, so that scaling rounds nothing

# Bytes of each float32 number, read and written.
READ = 4
REWRITE = 8
NORM = READ
ADAMW = 28  # reads p, g, m, v; writes p, m, v
EMA = REWRITE
COPY = 2  # bfloat16

TOLERANCES = {
    # In three steps torch rounds p a few times more often. Its float32 norm is up to 2e-3 off, which a gradient as
    # small as eps lets through to the update. A step that is missing, or an average that is not kept, is 1 lr off.
    "parameters": (2**-20, 5e-3 * LR),
    "averages": (2**-20, 5e-3 * LR),
    "copies": (2**-7, 5e-3 * LR),  # of parameters that differ so, rounded to bfloat16
    # Adam itself hides a clip or a scale that was left out: its update is the same for any multiple of the gradients.
    # Its moments are not. They move with the norm and its square; not to clip would double them.
    "moments": (1e-2, 0.0),
    "norm": (5e-3, 0.0),
}
"""Relative and absolute, by what is compared."""


@dataclass(frozen=True)
class Work:
    """Parameters and gradients that all sides share.

    Args:
        params: float32, with gradients.
        start: what they were at first.
        grads: what the gradients are after a backward pass, times ``scale``.
        scale: of the loss.
        max_norm: half of the norm of the unscaled gradients, so that they are clipped.
    """

    params: Sequence[Tensor]
    start: Sequence[Tensor]
    grads: Sequence[Tensor]
    scale: float
    max_norm: float

    @classmethod
    def of(cls, case: Case, scale: float = 1.0) -> Work:
        params = parameters(case, torch.float32, CPU)
        norm = sum(float(grad(p).double().square().sum()) for p in params) ** 0.5
        start = [p.detach().clone() for p in params]
        return cls(params, start, [grad(p) * scale for p in params], scale, norm / 2)

    def backward(self) -> None:
        """Gives the gradients their values back. Else those that torch shrinks in place would end as subnormals."""
        torch._foreach_copy_([grad(p) for p in self.params], self.grads)

    def warm_up(self, step: Callable[[], object]) -> None:
        """The first steps, from the start."""
        torch._foreach_copy_([p.detach() for p in self.params], self.start)
        for _ in range(WARM_UP):
            self.backward()
            step()


@dataclass(frozen=True)
class Side:
    """One way to do some work.

    Args:
        name: what tables call it.
        step: all that is timed.
        bytes: that the work needs for each number, however many its passes take.
        result: what the steps so far have made, by the names of :data:`TOLERANCES`.
    """

    name: str
    step: Callable[[], object]
    bytes: int
    result: Callable[[], Mapping[str, Sequence[Tensor]]] = dict


def grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def moments(optimizer: torch.optim.Optimizer, work: Work) -> dict[str, list[Tensor]]:
    """What an AdamW has averaged of the gradients, and the parameters."""
    states = [optimizer.state[p] for p in work.params]
    both = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
    return {"moments": both, "parameters": [p.detach() for p in work.params]}


def averages(optimizer: torch.optim.Optimizer, work: Work) -> dict[str, list[Tensor]]:
    """The same and adamfused's averages of the parameters."""
    return moments(optimizer, work) | {"averages": [optimizer.state[p]["ema"] for p in work.params]}


def scaler(work: Work) -> torch.amp.GradScaler:
    """One that has scaled a loss, and whose scale stays."""
    made = torch.amp.GradScaler("cpu", init_scale=work.scale, growth_interval=2**31 - 1)
    made.scale(torch.ones(()))
    return made


def torch_adamw(work: Work) -> torch.optim.Optimizer:
    return torch.optim.AdamW(work.params, lr=LR, fused=True)


def torch_average(work: Work) -> tuple[AveragedModel, Callable[[], None]]:
    """The averaged model and the call that moves it."""
    model = torch.nn.ParameterList(work.params)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return averaged, lambda: averaged.update_parameters(model)


# ---- the sides -----------------------------------------------------------------------------------


def whole(work: Work) -> list[Side]:
    """Unscale, clip, AdamW and an average of the parameters."""
    call, scaled = (
        adamfused.AdamW(work.params, lr=LR, max_grad_norm=work.max_norm, ema_decay=DECAY)
        for _ in range(2)
    )
    # What a GradScaler hands to a fused step.
    call.grad_scale, call.found_inf = torch.tensor(work.scale), torch.tensor(0.0)
    ours = scaler(work)

    def through_scaler() -> None:
        ours.step(
            scaled
        )  # torch looks for infinities before it calls the optimizer: a pass of its own
        ours.update()

    needed = NORM + ADAMW + EMA
    return [
        Side("adamfused, one call", call.step, needed, lambda: averages(call, work)),
        Side("adamfused by GradScaler", through_scaler, needed, lambda: averages(scaled, work)),
        torch_whole(work),
    ]


def torch_whole(work: Work) -> Side:
    """The same as PyTorch's own examples do it."""
    theirs, adamw, (averaged, average) = scaler(work), torch_adamw(work), torch_average(work)

    def passes() -> None:
        theirs.unscale_(adamw)
        clip_grad_norm_(work.params, work.max_norm, foreach=True)
        theirs.step(adamw)
        theirs.update()
        average()

    def result() -> dict[str, list[Tensor]]:
        return moments(adamw, work) | {"averages": [p.detach() for p in averaged.parameters()]}

    return Side("torch's passes", passes, NORM + ADAMW + EMA, result)


def clipped(work: Work) -> list[Side]:
    """Clip and AdamW."""
    inside = adamfused.AdamW(work.params, lr=LR, max_grad_norm=work.max_norm)
    after, theirs = adamfused.AdamW(work.params, lr=LR), torch_adamw(work)

    def clip_then(step: Callable[[], object]) -> Callable[[], None]:
        def passes() -> None:
            clip_grad_norm_(work.params, work.max_norm, foreach=True)
            step()

        return passes

    needed = NORM + ADAMW
    return [
        Side("adamfused, one call", inside.step, needed, lambda: moments(inside, work)),
        Side(
            "adamfused after torch's clip",
            clip_then(after.step),
            needed,
            lambda: moments(after, work),
        ),
        Side("torch's passes", clip_then(theirs.step), needed, lambda: moments(theirs, work)),
    ]


def copied(work: Work) -> list[Side]:
    """AdamW and a bfloat16 copy of the parameters."""
    ours, theirs = ([p.detach().bfloat16() for p in work.params] for _ in range(2))
    call, adamw = adamfused.AdamW(work.params, lr=LR, copy_to=ours), torch_adamw(work)
    source = [p.detach() for p in work.params]

    def passes() -> None:
        adamw.step()
        torch._foreach_copy_(theirs, source)

    needed = ADAMW + COPY
    return [
        Side(
            "adamfused, one call", call.step, needed, lambda: moments(call, work) | {"copies": ours}
        ),
        Side("torch's passes", passes, needed, lambda: moments(adamw, work) | {"copies": theirs}),
    ]


def pieces(work: Work) -> list[Side]:
    """Each pass alone."""
    plain = adamfused.AdamW(work.params, lr=LR)
    averaging = adamfused.AdamW(work.params, lr=LR, ema_decay=DECAY)
    adamw, theirs, (_, average) = torch_adamw(work), scaler(work), torch_average(work)
    grads = [grad(p) for p in work.params]

    def norm() -> Tensor:
        return get_total_norm(grads, foreach=True)

    def clip() -> None:
        clip_grad_norm_(work.params, work.max_norm, foreach=True)

    def unscale() -> None:
        theirs.unscale_(adamw)
        theirs.update()

    ours = plain.compute_grad_norm
    return [
        Side("adamfused norm", ours, NORM, lambda: {"norm": [ours()]}),
        Side("adamfused AdamW", plain.step, ADAMW, lambda: moments(plain, work)),
        Side(
            "adamfused AdamW, EMA", averaging.step, ADAMW + EMA, lambda: averages(averaging, work)
        ),
        Side("torch norm", norm, NORM, lambda: {"norm": [norm()]}),
        Side("torch clip_grad_norm_", clip, NORM + REWRITE),
        Side("torch unscale_", unscale, REWRITE),
        Side("torch AdamW", adamw.step, ADAMW, lambda: moments(adamw, work)),
        Side("torch AveragedModel", average, READ + EMA),
    ]


# ---- measuring -----------------------------------------------------------------------------------


def check(sides: Sequence[Side], work: Work) -> None:
    """Makes the first steps of every side and compares what they made: how fast a wrong step is says nothing.

    Raises:
        AssertionError: if two sides disagree by more than rounding, naming them and what differs.
    """
    first: dict[str, tuple[str, list[Tensor]]] = {}
    for side in sides:
        work.warm_up(side.step)
        for what, found in side.result().items():
            if what not in first:
                first[what] = side.name, [t.clone() for t in found]
            other, expected = first[what]
            rtol, atol = TOLERANCES[what]
            for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                where = f"{what}[{i}] of {side.name!r}, expected what {other!r} makes: "
                assert_close(a, b, rtol=rtol, atol=atol, msg=where.__add__)


def measure(sides: Sequence[Side], work: Work, case: Case, budget: float) -> Report:
    """Times the sides in turn, each after its gradients came back and other data went through the caches."""
    check(sides, work)
    load = round(machine.others_running(), 2)
    copy = Copy(CPU)
    taken = take_turns([side.step for side in sides], work.backward, copy, budget, CPU)
    rows: list[Row] = []
    turns: list[list[Turn]] = []
    for side, its in zip(sides, taken, strict=True):
        if isinstance(its, BaseException):
            raise its
        # What came first was the gradients; the copy was the yardstick.
        turns.append([turn._replace(copy=turn.yardstick) for turn in its])
        kept = [t for what, ts in side.result().items() if what != "parameters" for t in ts]
        row = Row(
            *(side.name, case.name, len(case.shapes), case.numel),
            step_bytes=side.bytes * case.numel,
            state_bytes=sum(t.nbytes for t in kept),
        )
        rows.append(row.timed(turns[-1], turns[0], copy.bytes))
    return report_of(rows, "float32", copy.bytes, load)


def table(title: str, report: Report) -> Table:
    """A line a side."""
    columns = [
        Column("side", left=True),
        Column("time", "us"),
        Column("ratio", "to the first"),
        Column("needs", "B/number"),
        Column("takes", "B/number"),
    ]
    lines = []
    for row in report.rows:
        assert row.share
        needs = row.step_bytes // row.numel
        takes = f"{needs / row.share.mid:.1f}"
        lines.append([row.optimizer, time(row.time), ratio(row.ratio), str(needs), takes])
    return Table(title, columns, lines, "takes: what the copy moves in that time.")


def times(name: str, slow: Row, fast: Row, target: float) -> Line:
    """How many times as long one side takes as another."""
    slow_times, fast_times = ([turn.cold for turn in row.turns] for row in (slow, fast))
    found = Interval.of_ratios(slow_times, fast_times)
    return Line(f"{name}, times torch's", found.mid, ">=", target, "x", around(found, fast))


def of_bytes(name: str, row: Row, target: float) -> Line:
    """The time over what its bytes take at the bandwidth of the copy."""
    assert row.share
    found = Interval(1.0, 1.0, 1.0) / row.share
    return Line(
        f"{name}, over the time of its bytes", found.mid, "<=", target, "x", around(found, row)
    )


def parts(cases: Sequence[Case], budget: float) -> Iterator[Part]:
    """Everything on every case, each part shown as a table too."""

    def measured(make: Callable[[Work], list[Side]], scale: float = 1.0) -> Report:
        gc.collect()  # what the last part had
        work = Work.of(case, scale)
        report = measure(make(work), work, case, budget)
        print()
        show(table(f"{case.name}: {make.__doc__}", report))
        return report

    for case in cases:
        report = measured(whole, SCALE)
        one_call, by_scaler, theirs = report.rows
        name = f"Whole step, {case.name}"
        lines = [
            times(name, theirs, one_call, 2),
            times(f"{name}, by GradScaler", theirs, by_scaler, 2),
            of_bytes(name, one_call, 1.15),
        ]
        yield name, lines, report

        report = measured(clipped)
        one_call, _, theirs = report.rows
        name = f"Clip and AdamW, {case.name}"
        yield name, [times(name, theirs, one_call, 1.3)], report

        report = measured(copied)
        name = f"AdamW and copy, {case.name}"
        yield name, [of_bytes(name, report.rows[0], 1.1)], report

        yield f"Pieces, {case.name}", [], measured(pieces)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("Measure the step that does everything in one pass.")
    parser.set_defaults(json=RESULT)
    parser.add_argument("--threads", metavar="N", type=int, help="instead of torch's default")
    parser.add_argument(
        "--elements",
        metavar="N",
        type=int,
        default=LARGE,
        help="of the one large tensor (32,000,000)",
    )
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    large = Case(millions(args.elements), ((args.elements,),))
    return judge(parts([large, Case("GPT-2 small", tuple(gpt2()))], seconds(args)), args)


if __name__ == "__main__":
    sys.exit(main())
