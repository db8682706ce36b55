"""The benchmark of the step in one pass: its sides do the same work, and its rows are what they say."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from adamfused.bench import Case, Report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
one_pass = pytest.importorskip("one_pass", reason="needs the checkout")

CASE = Case("two tensors", ((3, 50), (7,)))


@pytest.fixture(scope="module")
def measured() -> list[Any]:
    """The parts of a tiny case."""
    return list(one_pass.parts([CASE], 0.1))


def test_all_that_is_promised_is_measured(measured, tmp_path, capsys) -> None:
    args = argparse.Namespace(json=tmp_path / "result.json", no_fail=True)
    one_pass.judge(iter(measured), args)
    said = capsys.readouterr().out
    for name in (
        "Whole step, two tensors, times torch's",
        "Whole step, two tensors, by GradScaler, times torch's",
        "Whole step, two tensors, over the time of its bytes",
        "Clip and AdamW, two tensors, times torch's",
        "AdamW and copy, two tensors, over the time of its bytes",
    ):
        assert name in said
    found = json.loads(args.json.read_text())
    assert len(found["targets"]) == 5
    for name, _, report in measured:
        again = Report.from_json(json.dumps(found["reports"][name]))
        assert [row.turns for row in again.rows] == [row.turns for row in report.rows]


def test_lines_are_medians_of_the_times_of_the_same_round(measured) -> None:
    _, (of_call, of_scaler, of_bytes), report = measured[0]
    call, scaler, theirs = ([turn.cold for turn in row.turns] for row in report.rows)
    assert len(call) >= 21
    assert of_call.value == median(b / a for a, b in zip(call, theirs, strict=True))
    assert of_scaler.value == median(b / a for a, b in zip(scaler, theirs, strict=True))
    copies = [turn.copy for turn in report.rows[0].turns]
    needed = 40 * CASE.numel / report.copy_bytes  # norm 4, AdamW 28, average 8
    over = sorted(time / (needed * copy) for time, copy in zip(call, copies, strict=True))
    # It is the median of shares turned over: of an even number of rounds, between the same two times.
    middle = over[(len(over) - 1) // 2], over[len(over) // 2]
    assert middle[0] * (1 - 1e-9) <= of_bytes.value <= middle[1] * (1 + 1e-9)


def test_rows_say_what_the_work_needs_and_what_is_kept(measured) -> None:
    needs = [{row.step_bytes / CASE.numel for row in report.rows} for *_, report in measured]
    assert needs[:3] == [{40}, {32}, {30}]
    kept = [{row.state_bytes / CASE.numel for row in report.rows} for *_, report in measured]
    assert kept[:3] == [{12}, {8}, {10}]


def gradients_norm(work: Any) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in work.params]))


def test_gradients_are_the_same_in_every_round() -> None:
    """torch unscales and clips in place: a step of gradients that it had before would be that of ever smaller ones."""
    work = one_pass.Work.of(CASE, one_pass.SCALE)
    theirs = one_pass.torch_whole(work)
    seen: list[float] = []

    def step() -> None:
        seen.append(gradients_norm(work))
        theirs.step()

    one_pass.measure([replace(theirs, step=step)], work, CASE, 0.1)
    assert len(seen) > 21
    assert len(set(seen)) == 1
    step()
    # Not given back, it is clipped already; torch divides by the norm plus 1e-6.
    assert seen[-1] == pytest.approx(work.max_norm, rel=1e-3)
    assert seen[-1] < seen[0] / one_pass.SCALE


def no_clip(work: Any) -> Any:
    return one_pass.torch_whole(replace(work, max_norm=1e9))


def no_unscale(work: Any) -> Any:
    return one_pass.torch_whole(replace(work, scale=1.0, max_norm=1e9))


def a_weight_off_by_a_hundredth_of_a_step(work: Any) -> Any:
    side = one_pass.torch_whole(work)

    def step() -> None:
        side.step()
        work.params[0].data[0, 0] += 0.01 * one_pass.LR

    return replace(side, step=step)


def no_average(work: Any) -> Any:
    side = one_pass.torch_whole(work)
    weights = [p.detach() for p in work.params]
    return replace(side, result=lambda: {**side.result(), "averages": weights})


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (no_clip, "moments"),
        (no_unscale, "moments"),
        (a_weight_off_by_a_hundredth_of_a_step, "parameters"),
        (no_average, "averages"),
    ],
)
def test_a_side_that_does_other_work_is_not_timed(wrong: Callable[[Any], Any], what: str) -> None:
    work = one_pass.Work.of(CASE, one_pass.SCALE)
    right = one_pass.torch_whole
    one_pass.check([*one_pass.whole(work), right(work)], work)
    with pytest.raises(AssertionError, match=rf"^{what}\[0\] of \"torch's passes\""):
        one_pass.check([right(work), wrong(work)], work)
