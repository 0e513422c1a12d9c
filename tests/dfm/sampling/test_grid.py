"""Grids of times."""

import pytest
import torch

from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import CosineScheduler
from dfm.paths.sources import MaskSource
from dfm.samplers.kernels import ExactX1
from dfm.sampling.grid import time_grid
from tests.dfm.toys import times


@pytest.mark.parametrize("grid", [(0.0,), (0.0, 0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)])
def test_grids_are_checked(grid):
    with pytest.raises(ValueError, match="grid must be two or more rising times"):
        ExactX1(MixturePath(MaskSource(6, 2), CosineScheduler()), grid)


def test_time_grid_may_be_even_in_kappa():
    grid = time_grid(5, even_in=CosineScheduler())
    assert torch.allclose(CosineScheduler().kappa(times(*grid)), times(0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
