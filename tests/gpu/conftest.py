"""What must hold on an NVIDIA GPU, and is skipped elsewhere: ``pytest tests/gpu``, under a minute on an H100.

The models and prompts of all tests, moved to the GPU.
"""

import functools

import pytest
import torch

from tests.conftest import build


@pytest.fixture(scope="session", autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.set_float32_matmul_precision("highest")  # no TF32, whose ten bits would make ties of what is none


@pytest.fixture(scope="session")
def gpu_model():
    """``gpu_model(family, dtype, ...)``: a model that is built once and must not be changed."""
    return functools.cache(lambda *arguments, **overrides: build(*arguments, **overrides).to("cuda"))


@pytest.fixture
def gpu_prompts(prompts):
    """``gpu_prompts(7, 12)``: random prompts of these lengths, as arguments of generate."""
    return lambda *lengths: {name: tensor.to("cuda") for name, tensor in prompts(*lengths).items()}


def pytest_terminal_summary(terminalreporter):
    """What tests found out beside passing or failing."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                terminalreporter.write_line(f"{name}: {value}")
