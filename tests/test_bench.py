"""``python -m adamfused bench``: what it counts, what it refuses, what it writes."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from browser import Browser
from torch import Tensor

from adamfused import bench as command
from adamfused.bench import Case, Interval, Report, Row, bench, compare, contender, measure, page
from adamfused.bench.case import parse_cases
from adamfused.bench.contender import FEATURES, launched, parameters, prepare
from adamfused.bench.picture import pictures, poster
from adamfused.bench.table import remarks, tables
from adamfused.bench.turns import ROUNDS, Copy, Turn, cache_bytes, take_turns
from adamfused.report import optional
from adamfused.spec import Spec, Unsupported

CPU = torch.device("cpu")
OURS, TORCHS = "adamfused:AdamW", "torch.optim:AdamW[fused=True]"
NO_CLOSURE = "torch.optim:LBFGS"
LARGE = str(
    cache_bytes(CPU) // 6 + 1
)  # 12 bytes an element are more than twice what the caches hold

MINE = """
import torch

class Mine(torch.optim.ASGD):
    '''An optimizer of a rule that nobody knows.'''

class Wrong(torch.optim.AdamW):
    '''Takes steps that are too long by 5 %.'''
    def __init__(self, params, lr=1e-3, **kwargs):
        super().__init__(params, lr=1.05 * lr, **kwargs)

class Late(torch.optim.SGD):
    '''Fails in its tenth step.'''
    steps = 0
    def step(self, closure=None):
        self.steps += 1
        if self.steps == 10:
            raise ArithmeticError("ten is too many")

class Leaving(torch.optim.SGD):
    '''Ends the process in its tenth step.'''
    steps = 0
    def step(self, closure=None):
        self.steps += 1
        if self.steps == 10:
            raise SystemExit("left")

class NeverThere(torch.optim.AdamW):
    def __init__(self, params, lr=1e-3):
        raise SystemExit(3)

class Broken(torch.optim.SGD):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data.fill_(float("nan"))

class Quantised(torch.optim.SGD):
    '''Keeps a byte an element, and a table that all parameters share.'''
    def step(self, closure=None):
        table = torch.zeros(256)
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"codes": torch.zeros(p.shape, dtype=torch.uint8), "table": table}

class Clipping(torch.optim.SGD):
    def __init__(self, params, lr=1e-3, max_grad_norm=None):
        super().__init__(params, lr=lr)
        self.max_grad_norm = max_grad_norm
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(MINE)
    return str(path)


@pytest.fixture(scope="module")
def report(mine: str) -> Report:
    """Four optimizers, one of which cannot be timed, on a step that caches hold and one that they do not."""
    names = [OURS, TORCHS, NO_CLOSURE, f"{mine}:Mine"]
    return bench(names, ["1e4", "100x16", LARGE], seconds=0.1)


# ---- cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, numel, tensors",
    [
        ("gpt2", 124_439_808, 148),
        ("bert-base", 109_482_240, 199),
        ("resnet50", 25_557_032, 161),
        ("llama-1b", 1_235_814_400, 146),
    ],
)
def test_models_have_the_published_sizes(model: str, numel: int, tensors: int) -> None:
    case = Case.parse(model)
    assert (case.numel, len(case.shapes)) == (numel, tensors)


def test_cases_are_read() -> None:
    names = [case.name for case in parse_cases("1e3..1e5, 123,10x16,resnet50")]
    assert names == ["1e3", "1e4", "1e5", "123", "10x16", "resnet50"]
    assert Case.parse("10x16").shapes == ((16,),) * 10


@pytest.mark.parametrize("text", ["", "x16", "0", "1.5", "nan", "inf", "gpt9", "1e3..5", "1e9x1"])
def test_what_is_no_case_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Case.parse(text)


@pytest.mark.parametrize("text", ["1e3..1e2", "1e3..5"])
def test_what_is_no_sweep_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no sweep; expected powers of ten, the smaller first"):
        list(parse_cases(text))


# ---- what is counted -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, dtype, moved, kept",
    [
        # parameter twice, gradient once, two moments twice; a step count of 4 bytes is kept
        (OURS, torch.float32, 28, 8),
        (TORCHS, torch.float32, 28, 8),
        (OURS, torch.bfloat16, 22, 8),  # its moments are float32
        (TORCHS, torch.bfloat16, 14, 4),
        ("torch.optim:SGD", torch.float32, 12, 0),
        ("torch.optim:SGD[momentum=0.9]", torch.float32, 20, 4),
    ],
)
def test_bytes_are_counted_from_the_dtypes(
    spec: str, dtype: torch.dtype, moved: int, kept: int
) -> None:
    made = prepare(Spec.parse(spec), parameters(Case.parse("2x1000"), dtype, CPU), ())
    assert made.step_bytes == 2000 * moved
    assert made.state_bytes == 2000 * kept + (2 * 4 if "Adam" in spec else 0)


def test_launches_are_what_ran_on_the_gpu() -> None:
    """Compared by value: torch makes a new object of the device's type at every look."""
    kinds = torch.autograd.DeviceType
    host, gpu = (
        SimpleNamespace(count=2, device_type=kinds(kind.value)) for kind in (kinds.CPU, kinds.CUDA)
    )
    assert launched([host, gpu, gpu]) == 4


@pytest.mark.parametrize("launches", [True, False])
def test_launches_are_counted_when_all_is_timed(monkeypatch, launches) -> None:
    """A profiler that has counted slows down what comes later. Without a GPU, by what is called when."""
    said: list[str] = []

    def timed(case: Case, specs: Any, *rest: Any) -> list[Row]:
        said.extend(f"time {case.name}" for _ in specs)
        return [Row(s.name, case.name, 1, 1, "no" if s.name == NO_CLOSURE else "") for s in specs]

    def made(spec: Spec, params: Any, features: Any) -> Any:
        if spec.name == TORCHS and len(params) == 3:
            raise Unsupported("not again")
        return SimpleNamespace(step=f"{spec.name} of {len(params)}")

    def count(step: str) -> int:
        said.append(f"count {step}")
        return len(step)

    monkeypatch.setattr(measure, "_device", torch.device)
    monkeypatch.setattr(measure, "_parity", lambda *_: "")
    monkeypatch.setattr(measure, "_measure", timed)
    monkeypatch.setattr(measure.turns, "Copy", lambda device: SimpleNamespace(bytes=1))
    monkeypatch.setattr(contender, "parameters", lambda case, *_: case.shapes)
    monkeypatch.setattr(contender, "prepare", made)
    monkeypatch.setattr(contender, "launches", count)
    optimizers = [OURS, TORCHS, NO_CLOSURE]
    found = bench(optimizers, ["2x16", "3x16"], device="cuda", launches=launches)
    of_two, of_three = f"{OURS} of 2", f"{OURS} of 3"
    counted = [f"count {of_two}", f"count {TORCHS} of 2", f"count {of_three}"]
    assert said == 3 * ["time 2x16"] + 3 * ["time 3x16"] + (counted if launches else [])
    counts = [len(of_two), len(f"{TORCHS} of 2"), None, len(of_three), None, None]
    assert [row.launches for row in found.rows] == (counts if launches else 6 * [None])


def test_scales_of_blocks_are_moved_too() -> None:
    spec = Spec.parse("adamfused:AdamW[state_dtype='int8']")
    made = prepare(spec, parameters(Case.parse("2x8192"), torch.float32, CPU), ())
    scales = 2 * 16384 // 128 * 4
    assert made.step_bytes == 16384 * (3 * 4 + 2 * 2) + 2 * scales
    assert made.state_bytes == 16384 * 2 + scales + 2 * 4


def test_small_dtypes_and_shared_tables_are_counted_as_they_are(mine: str) -> None:
    made = prepare(
        Spec.parse(f"{mine}:Quantised"), parameters(Case.parse("2x1000"), torch.float32, CPU), ()
    )
    assert made.step_bytes == 2000 * (3 * 4 + 2 * 1)
    assert made.state_bytes == 2000 + 4 * 256


class Halves(Tensor):
    """A tensor that is a wrapper around two smaller ones, as quantised states are."""

    high: Tensor
    low: Tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["high", "low"], None


def test_a_wrapper_is_counted_by_what_it_holds(mine: str) -> None:
    params = parameters(Case.parse("1e3"), torch.float32, CPU)
    optimizer = torch.optim.SGD(params)
    wrapper = torch.zeros(1000).as_subclass(Halves)
    wrapper.high, wrapper.low = torch.zeros(1000, dtype=torch.uint8), torch.zeros(4)
    optimizer.state[params[0]] = {"moment": wrapper}
    made = prepare(Spec("wrapped", lambda params, lr: optimizer), params, ())
    assert made.state_bytes == 1000 + 4 * 4


# ---- turns ---------------------------------------------------------------------------------------


def test_calls_take_turns_after_a_copy_and_the_first_place_goes_round() -> None:
    said: list[str] = []
    calls = [lambda: said.append("a"), lambda: said.append("b"), lambda: said.append("c")]
    turns = take_turns(calls, lambda: said.append("-"), None, 0.0, CPU)
    assert [len(its) for its in turns if isinstance(its, list)] == [ROUNDS[0]] * 3
    assert "".join(said[-24:]) in "-a-b-c-b-c-a-c-a-b" * 3


def test_steps_back_to_back_and_a_yardstick_are_timed_where_asked_for() -> None:
    said: list[str] = []
    turns, *_ = take_turns(
        [lambda: said.append("a")],
        lambda: said.append("-"),
        lambda: said.append("y"),
        0.0,
        CPU,
        warm=True,
    )
    assert isinstance(turns, list)
    assert "-ya" + 50 * "a" in "".join(said)
    assert all(turn.warm is not None and turn.warm < turn.cold + 1e-3 for turn in turns)


def test_a_copy_reads_and_writes_more_than_the_caches_hold() -> None:
    copy = Copy(CPU)
    assert copy.bytes >= 2 * 2**27
    before = copy.tensor.clone()
    copy()
    assert torch.equal(copy.tensor, -before)


# ---- reports -------------------------------------------------------------------------------------


def test_every_optimizer_has_a_row_on_every_case(report: Report) -> None:
    assert len(report.rows) == 4 * 3
    for case in ("1e4", "100x16", LARGE):
        first = report.row(OURS, case)
        assert first.ratio == Interval(1.0, 1.0, 1.0)
        for row in (first, report.row(TORCHS, case)):
            assert row.problem == "" and row.checked
            assert row.time is not None and row.share is not None and row.standing is not None
            assert 0 < row.time.low <= row.time.mid <= row.time.high < 1
            assert len(row.turns) >= ROUNDS[0]
            # The share is that of the medians, but for how the pairs lie: within a factor of 2 on any machine.
            share = row.step_bytes / row.time.mid / report.bandwidth
            assert share / 2 < row.share.mid < share * 2
    assert report.row(OURS, "1e4").warm is not None
    assert report.row(OURS, LARGE).warm is None


def test_a_rule_that_is_not_known_is_timed_but_not_checked(report: Report) -> None:
    row = next(row for row in report.rows if row.optimizer.endswith(":Mine"))
    assert row.time is not None and not row.checked
    assert any("Unchecked" in text for text in remarks(report))


def test_what_cannot_be_timed_says_so_and_the_others_go_on(report: Report, mine: str) -> None:
    row = report.row(NO_CLOSURE, "1e4")
    assert row.problem.startswith("NOT SUPPORTED: TypeError: ") and "closure" in row.problem
    assert row.time is None and row.turns == ()
    late = bench([f"{mine}:Late", f"{mine}:Broken", OURS], ["1e3"], seconds=0.1)
    assert [row.problem for row in late.rows] == [
        "NOT SUPPORTED: ArithmeticError: ten is too many",
        "NOT SUPPORTED: parameters are not finite after 3 steps with gradients of 1e-3",
        "",
    ]
    assert late.rows[2].ratio is None  # there is nothing that it could be a ratio to
    alone = f"No ratios on 1e3: they are to the first, {mine}:Late, which has no time there."
    assert alone in remarks(late) and not any("No ratios" in text for text in remarks(report))


def test_what_exits_is_not_supported_and_the_others_go_on(mine: str) -> None:
    names = [OURS, f"{mine}:Leaving", Spec.of(f"{mine}:NeverThere", family="AdamW")]
    left = bench(names, ["1e3"], seconds=0.1)
    assert [row.problem for row in left.rows] == [
        "",
        "NOT SUPPORTED: SystemExit: left",
        "NOT SUPPORTED: SystemExit: 3",
    ]


def test_a_case_that_memory_cannot_hold_is_not_supported_and_the_others_go_on() -> None:
    large, small = bench([OURS], ["1e15", "1e3"], seconds=0.1).rows
    assert large.problem.startswith(
        "NOT SUPPORTED: parameters and gradients take 8,000,000.0 GB, and"
    )
    assert small.problem == ""


def test_a_wrong_optimizer_is_invalid_and_a_right_one_is_not(mine: str) -> None:
    wrong, right = bench(
        [Spec.of(f"{mine}:Wrong", family="AdamW"), TORCHS], ["1e3"], seconds=0.1
    ).rows
    assert wrong.problem.startswith("INVALID: ") and wrong.time is not None
    assert right.problem == ""


def test_the_same_optimizer_twice_has_two_names() -> None:
    rows = bench([OURS, OURS], ["1e3"], seconds=0.1).rows
    assert [row.optimizer for row in rows] == [OURS, f"{OURS} (2)"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"optimizers": []}, "optimizers: got none, expected at least one"),
        (
            {"optimizers": [OURS], "features": ["clap"]},
            "features: got 'clap', expected some of clip",
        ),
        ({"optimizers": [OURS], "cases": ["many"]}, "'many' is no size"),
        ({"optimizers": [OURS], "cases": []}, "cases: got none, expected at least one"),
        ({"optimizers": [OURS], "cases": [1000]}, "cases: got int 1000, expected a Case or a text"),
        ({"optimizers": [OURS], "dtype": "float8_e4m3fn"}, "float16; got 'float8_e4m3fn'"),
        ({"optimizers": [OURS], "device": "gpu"}, "device: got 'gpu', expected cpu, cuda or"),
        ({"optimizers": [OURS], "device": "meta"}, "device: got 'meta', expected cpu, cuda or"),
        ({"optimizers": [OURS], "device": "cuda:99"}, "device: got cuda:99, but torch"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(**arguments)


def test_texts_are_taken_for_lists_and_dtypes() -> None:
    made = bench(f"{OURS},{TORCHS}", "1e2..1e3", dtype="bfloat16", seconds=0.01)
    assert [(row.optimizer, row.case) for row in made.rows] == [
        (name, case) for case in ("1e2", "1e3") for name in (OURS, TORCHS)
    ]
    assert made.dtype == "bfloat16"


def test_json_comes_back_as_it_was_and_holds_no_nan(report: Report) -> None:
    text = report.to_json()
    assert Report.from_json(text) == dataclasses.replace(report, rows=list(report.rows))
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    lying = dataclasses.replace(
        report, rows=[dataclasses.replace(report.rows[0], host=float("nan"))]
    )
    with pytest.raises(ValueError):
        lying.to_json()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": []}', '{"rows": [{}]}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="this is no report of adamfused bench"):
        Report.from_json(text)


def test_csv_has_a_line_a_row(report: Report) -> None:
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [line["optimizer"] for line in lines] == [row.optimizer for row in report.rows]
    assert float(lines[0]["time_mid"]) == report.rows[0].time.mid  # type: ignore[union-attr]
    assert lines[2]["time_mid"] == "" and lines[2]["problem"].startswith("NOT SUPPORTED")


def test_tables_say_what_there_is(report: Report) -> None:
    cold, warm = tables(report)
    at = [column.title for column in cold.columns].index("verdict")
    assert [cold.rows[0][at], cold.rows[2][at]] == ["the first", "NOT SUPPORTED"]
    assert cold.rows[1][at] in ("faster", "same", "slower", "unclear")
    assert {row[1] for row in warm.rows} == {"1e4", "100x16"}
    problem = f"On 1e4, 100x16, {LARGE}, {NO_CLOSURE} is NOT SUPPORTED: TypeError"
    assert sum(text.startswith(problem) for text in remarks(report)) == 1


@pytest.mark.parametrize("factor, word", [(2.0, "slower"), (0.5, "faster"), (1.0, "same")])
def test_on_a_busy_machine_no_verdict_says_slower_or_faster(
    steady: Report, factor: float, word: str
) -> None:
    first, second = steady.rows
    turns = [t._replace(cold=factor * t.cold) for t in second.turns]
    other = second.timed(turns, first.turns, steady.copy_bytes)
    quiet = dataclasses.replace(steady, rows=[first, other])
    busy = dataclasses.replace(quiet, busy=True)
    shown = [tables(report)[0].rows[1] for report in (quiet, busy)]
    assert word in shown[0]
    assert ("same" if word == "same" else "unclear") in shown[1]
    assert shown[0][3] == shown[1][3]  # the ratio and its interval stay


@pytest.mark.skipif(optional("matplotlib") is None, reason="needs matplotlib")
def test_pictures_show_every_optimizer(report: Report) -> None:
    assert len(pictures(report)) == 2  # a single case of many tensors is no curve
    for drawn in pictures(report):
        labels = [text.get_text() for text in drawn.figure.axes[0].get_legend().get_texts()]
        assert labels[:2] == [OURS, TORCHS] and NO_CLOSURE not in labels
    assert len(poster(report).axes) == 2
    assert len(pictures(dataclasses.replace(report, rows=report.rows[:1]))) == 1
    nothing = dataclasses.replace(report, rows=report.rows[2:3])
    assert pictures(nothing) == [] and poster(nothing) is None


def test_the_page_has_machine_tables_and_command(report: Report) -> None:
    text = page(report)
    for part in (
        report.facts["cpu"],
        "One step on cpu",
        "Steps back to back",
        "NOT SUPPORTED",
        "python -m adamfused",
    ):
        assert part in text, part


@pytest.mark.parametrize("width, dark", [(1280, False), (400, True)])
def test_the_page_in_a_browser(
    report: Report, browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    path = tmp_path / "bench.html"
    path.write_text(page(report), encoding="utf-8")
    view = browser.view(path, width, dark=dark)
    assert not view.errors and not view.requests and not view.sideways
    assert min(text["contrast"] for text in view.texts) >= 4.5


# ---- features ------------------------------------------------------------------------------------


def features_seen(monkeypatch: pytest.MonkeyPatch, spec: str) -> tuple[list[float], Any]:
    """The limits that clip_grad_norm_ was called with around a step of ``spec``, and its own."""
    limits: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(params: Any, limit: float, **kwargs: Any) -> Tensor:
        limits.append(limit)
        return clip(params, limit, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    made: list[Any] = []
    parsed = Spec.parse(spec)

    def make(params: Any, **kwargs: Any) -> Any:
        made.append(parsed.make_with(params, **kwargs))
        return made[0]

    make.__signature__ = __import__("inspect").signature(parsed.make_with)  # type: ignore[attr-defined]
    prepare(Spec(spec, make), parameters(Case.parse("1e3"), torch.float32, CPU), ["clip"])
    return limits, getattr(made[0], "max_grad_norm", None)


def test_a_feature_is_an_argument_where_there_is_one_else_a_pass_around(
    monkeypatch: pytest.MonkeyPatch, mine: str
) -> None:
    limit = FEATURES["clip"].value
    assert features_seen(monkeypatch, f"{mine}:Clipping") == ([], limit)
    assert features_seen(monkeypatch, f"{mine}:Mine") == ([limit] * 3, None)


@pytest.mark.parametrize("features", [["clip"], ["ema"], ["scaler"], ["clip", "ema", "scaler"]])
@pytest.mark.parametrize("spec", [OURS, TORCHS])
def test_features_leave_steps_and_gradients_as_they_are(spec: str, features: list[str]) -> None:
    plain, around = (parameters(Case.parse("2x100"), torch.float32, CPU) for _ in range(2))
    prepare(Spec.parse(spec), plain, [])
    prepare(Spec.parse(spec), around, features)
    for p, q in zip(plain, around, strict=True):
        assert torch.equal(p, q) and torch.equal(p.grad, q.grad)  # type: ignore[arg-type]


def test_a_feature_that_cannot_be_had_is_not_supported() -> None:
    params = parameters(Case.parse("1e3"), torch.float16, CPU)
    with pytest.raises(Unsupported, match="FP16 gradients"):
        prepare(Spec.parse(TORCHS), params, ["clip", "scaler"])


# ---- comparisons ---------------------------------------------------------------------------------


def scaled(report: Report, factor: float) -> Report:
    """The report with every step as much slower, and no copy."""

    def row(row: Any) -> Any:
        if not row.turns:
            return row
        turns = [t._replace(cold=t.cold * factor) for t in row.turns]
        return row.timed(turns, turns, report.copy_bytes)

    return dataclasses.replace(report, rows=[row(r) for r in report.rows])


@pytest.fixture(scope="module")
def steady() -> Report:
    """A report of times that do not vary."""
    rows = [command.Row(name, "1e7", 1, 10**7, step_bytes=28 * 10**7) for name in (OURS, TORCHS)]
    turns = [Turn(0.012, 0.012, 0.010 + 1e-6 * i, None) for i in range(21)]
    timed = [row.timed(turns, turns, 2**28) for row in rows]
    return Report({"cpu": "some"}, "cpu", "float32", [], 2**28, timed)


def verdicts(old: Report, new: Report) -> list[str]:
    return [change.verdict for change in compare(old, new, 0.05).changes]


def test_a_row_slower_than_allowed_fails_and_others_do_not(steady: Report) -> None:
    assert verdicts(steady, steady) == ["PASS", "PASS"]
    assert verdicts(steady, scaled(steady, 1.04)) == ["PASS", "PASS"]
    assert verdicts(steady, scaled(steady, 1.06)) == ["FAIL: slower by more than 5%"] * 2
    assert verdicts(steady, scaled(steady, 0.9)) == ["PASS: faster"] * 2


def test_rows_that_vanished_or_are_new_or_became_invalid_are_named(steady: Report) -> None:
    first, second = steady.rows
    one = dataclasses.replace(steady, rows=[first])
    assert verdicts(steady, one) == ["PASS", "vanished: the new report does not have it"]
    assert verdicts(one, steady) == ["PASS", "new"]
    invalid = dataclasses.replace(second, problem="INVALID: wrong")
    broken = dataclasses.replace(steady, rows=[first, invalid])
    assert verdicts(steady, broken) == ["PASS", "FAIL: INVALID: wrong"]
    assert verdicts(broken, broken) == ["PASS", "INVALID: wrong"]  # it was before


def test_another_machine_is_warned_of(steady: Report) -> None:
    assert compare(steady, steady, 0.05).warnings == []
    other = dataclasses.replace(steady, facts={"cpu": "other"})
    assert compare(steady, other, 0.05).warnings == [
        "another machine or software: cpu was some and is other"
    ]


def test_reports_of_different_things_are_refused(steady: Report) -> None:
    with pytest.raises(
        ValueError, match="dtype was 'float32' and is 'bfloat16'; measure both alike"
    ):
        compare(steady, dataclasses.replace(steady, dtype="bfloat16"), 0.05)
    with pytest.raises(ValueError, match="no optimizer and case is in both"):
        compare(steady, dataclasses.replace(steady, rows=[]), 0.05)


# ---- the command line ----------------------------------------------------------------------------


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Path]:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "html")}
    outputs = [text for kind, path in files.items() for text in (f"--{kind}", path)]
    assert run("--sizes", "1e4", "--seconds", 0.1, "--plot", tmp_path / "out.png", *outputs) == 0
    assert OURS in capsys.readouterr().out
    yield tmp_path


def test_files_are_written_and_a_slow_down_is_exit_1(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = Report.from_json((written / "out.json").read_text())
    assert (written / "out.csv").read_text() == old.to_csv()
    assert "<html" in (written / "out.html").read_text()
    if optional("matplotlib"):
        assert (written / "out.png").read_bytes().startswith(b"\x89PNG")
    # Against what was measured a moment ago nothing is twice as slow; against a tenth of its times everything is.
    again = ("--sizes", "1e4", "--seconds", 0.1, "--compare", written / "out.json")
    assert run(*again, "--max-regression", "99%") == 0
    (written / "out.json").write_text(scaled(old, 0.1).to_json())
    assert run(*again, "--max-regression", "99%") == 1
    assert "FAIL: slower by more than 99%" in capsys.readouterr().out


def test_a_family_is_for_those_whose_name_does_not_tell(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = f"{mine}:Mine,adamfused:RMSprop"
    path = tmp_path / "out.json"
    arguments = ("--optimizers", names, "--sizes", "1e3", "--seconds", 0.01, "--json", path)
    assert run(*arguments, "--family", "AdamW") == 0
    wrong, right = Report.from_json(path.read_text()).rows
    assert wrong.problem.startswith("INVALID") and right.problem == "" and right.checked
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(f"On 1e3, {mine}:Mine is INVALID: ") for line in lines) == 1
    assert run(*arguments) == 0
    assert [row.problem for row in Report.from_json(path.read_text()).rows] == ["", ""]


def test_nothing_to_measure_is_exit_2_after_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    only = ("--sizes", "1e3", "--seconds", 0.01)
    assert run("--optimizers", NO_CLOSURE, *only) == 2
    assert "NOT SUPPORTED" in capsys.readouterr().out
    assert run("--optimizers", f"{NO_CLOSURE},{OURS}", *only) == 0


def test_what_is_not_written_in_the_end_is_exit_2_after_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = ("--csv", "/dev/full")  # opens, but takes nothing
    assert run("--sizes", "1e3", "--seconds", 0.01, *full) == 2
    said = capsys.readouterr()
    assert OURS in said.out and "error: not all could be written: " in said.err


def test_a_file_to_be_written_is_not_touched_before(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.csv"
    old.write_text("before")
    assert run("--sizes", "many", "--json", old, "--csv", new) == 2
    assert old.read_text() == "before" and not new.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--threads", "many"], "--threads: got 'many', expected a whole number from 1 to 32768"),
        (["--threads", "0"], "--threads: got '0', expected a whole number from 1 to 32768"),
        (["--threads", "32769"], "--threads: got '32769', expected a whole number from 1 to 32768"),
        (["--seconds", "nan"], "--seconds: got 'nan', expected a number of seconds above 0"),
        (["--max-regression", "100%"], "--max-regression: got '100', expected 0% to 99%"),
        (["--max-regression", "much"], "--max-regression: got 'much', expected 0% to 99%"),
    ],
)
def test_a_wrong_number_is_refused_in_words(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(*arguments)
    assert f"argument {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sizes", "many"], "'many' is no size"),
        (["--sizes", ""], "cases: got none, expected at least one, such as '1e7'"),
        (["--max-regression", "5%"], "--max-regression compares with an old report; give it with"),
        (["--optimizers", "nowhere:Nothing"], "nowhere cannot be imported"),
        (["--dtype", "int32"], "dtype must be float32, float64, bfloat16 or float16; got 'int32'"),
        (["--plot", "out.gif"], "--plot out.gif: expected a name that ends in .png"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json: there is no folder /nowhere"),
        (["--json", "."], "--json .: it cannot be written: Is a directory"),
        (["--csv", "/proc/out.csv"], "--csv /proc/out.csv: it cannot be written: "),
        (["--compare", __file__], f"--compare {__file__}: this is no report of adamfused bench"),
        (["--sizes", "1e3..1e2"], "'1e3..1e2' is no sweep"),
    ],
)
def test_what_cannot_be_done_is_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
