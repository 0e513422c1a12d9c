"""Random numbers: one stream for each sequence, whatever is drawn together."""

import pytest
import torch

from decoding.sampling import draw
from dfm import draws as drawing
from dfm.draws import Draws

WHERE = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])


def test_numbers_drawn_at_once_are_those_drawn_one_by_one():
    together, alone = Draws.seeded(3, 4, 5), [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    for _ in range(3):
        values = together.uniform(WHERE)
        assert (values[~WHERE] == 0).all()
        for row, generator in enumerate(alone):
            expected = [
                torch.rand(1, generator=generator, dtype=torch.float64).item() for _ in range(int(WHERE[row].sum()))
            ]
            assert values[row][WHERE[row]].tolist() == expected


@pytest.mark.parametrize("numbers", [1, 14, 2**21])
def test_tokens_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch, numbers):
    """Of distributions of 7 tokens: one, two, or all of them together."""
    monkeypatch.setattr(drawing, "NUMBERS_AT_ONCE", numbers)
    distributions = torch.rand(3, 3, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    tokens = Draws.seeded(3, 4, 5).categorical(distributions, WHERE)
    for row, seed in enumerate((3, 4, 5)):
        generator = torch.Generator().manual_seed(seed)
        expected = [draw(distribution[None], [generator]).item() for distribution in distributions[row][WHERE[row]]]
        assert tokens[row][WHERE[row]].tolist() == expected
    assert (tokens[~WHERE] == 0).all()


def test_nothing_asked_is_nothing_drawn():
    draws, nothing = Draws.seeded(3, 4, 5), torch.zeros_like(WHERE)
    assert not draws.pick(nothing).any() and not draws.happens(torch.ones(3), nothing).any()
    assert (draws.rows(torch.zeros(0, 7), nothing) == 0).all()
    assert torch.equal(draws.uniform(WHERE), Draws.seeded(3, 4, 5).uniform(WHERE))
