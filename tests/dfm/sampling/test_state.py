"""The state of texts in the making."""

import torch

from dfm.draws import Draws
from dfm.paths.sources import UniformSource
from dfm.sampling.state import FlowState


def test_rows_are_taken_out_and_put_together():
    frozen = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])
    whole = FlowState.start(torch.arange(9).view(3, 3), frozen, UniformSource(50), Draws.seeded(0, 1, 2))
    whole.t = torch.tensor([0.1, 0.2, 0.3])
    parts = [whole.at([2]), whole.at([1, 0])]
    again = FlowState.concatenate(parts).at([2, 1, 0])
    for name, value in vars(whole).items():
        assert torch.equal(getattr(again, name), value)
    parts[0].write(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool))
    parts[1].done |= True
    assert whole.done.tolist() == [False, False, True]  # they share nothing
