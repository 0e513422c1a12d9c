"""Tiny models with an offset code that says something."""

import pytest
import torch

from rpt import ResampleConfig, attach_offset_code
from tests.conftest import build


@pytest.fixture(scope="session")
def resample_model():
    """``resample_model(family, dtype, **config)``: a tiny random model with a random offset code, free to be changed."""

    def make(family: str = "llama", dtype=torch.float32, **config):
        model = build(family, dtype)
        code = attach_offset_code(model, ResampleConfig(**config)).requires_grad_(False)
        code.table.copy_(torch.randn(code.table.shape, generator=torch.Generator().manual_seed(7)) / code.GAIN)
        return model

    return make
