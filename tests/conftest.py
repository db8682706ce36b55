"""What every test gets without asking for it."""

import os
import subprocess
from collections.abc import Iterator

import browser as chromium
import pytest
import torch
from cuda_library import Kernels, build

from adamfused import backend


def _settings() -> dict[str, object]:
    """Everything of torch that holds for the whole process (or thread) and that a test might leave changed."""
    return {
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "torch.tensor(1e-40) * 1 > 0 (denormals)": bool(torch.tensor(1e-40) * 1 > 0),
        "torch.distributed.is_initialized()": torch.distributed.is_initialized(),
    }


@pytest.fixture(autouse=True)
def leaves_torch_as_it_found_it() -> Iterator[None]:
    """A test that leaves a setting of torch changed fails itself, not the next one that happens to need it."""
    before = _settings()
    yield
    after = _settings()
    torch.set_grad_enabled(True)
    assert after == before


@pytest.fixture(
    params=[
        pytest.param("native", marks=pytest.mark.native),
        pytest.param("reference", marks=pytest.mark.reference),
    ]
)
def path(request: pytest.FixtureRequest) -> str:
    """The `backend` of an optimizer: each of the two that a test is to hold for."""
    if request.param == "native" and backend.native() is None:
        pytest.skip("the extension is not loaded")
    return str(request.param)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The CUDA kernels, compiled for the CPU."""
    return Kernels(build(tmp_path_factory.mktemp("all"), "all", "-O1"))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    """A headless Chromium. Where there is none: skipped, but in CI installed."""
    if chromium.find() is None and "CI" in os.environ:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", "chromium"], check=True)
    if chromium.find() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with chromium.Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser
