"""Windows: where they may lie, how often they do, and what every slot then holds and predicts."""

import itertools

import pytest
import torch

from decoding.training.packed import Packing
from rpt import ResampleConfig, WindowPermuter
from rpt.permutation import _before_window

CONFIGS = [(2, "rotate"), (2, "uniform"), (3, "rotate"), (3, "uniform"), (3, "rotate_mixed")]
OFFSETS = {
    (2, "rotate"): {-1, 2},
    (2, "uniform"): {-1, 2},
    (3, "rotate"): {-2, 2, 3},
    (3, "uniform"): {-2, -1, 2, 3},
    (3, "rotate_mixed"): {-2, -1, 2, 3},
}


def packed(lengths: list[int], rows: int = 1) -> Packing:
    return Packing.from_document_ids(torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).expand(rows, -1))


def permute(config: ResampleConfig, packing: Packing, loss_mask=None, seed: int = 0):
    loss_mask = torch.ones_like(packing.is_padding) if loss_mask is None else loss_mask
    return WindowPermuter(config)(packing, loss_mask, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("window", "perm"), CONFIGS)
@pytest.mark.parametrize("prev_target", ["follow", "ntp"])
def test_order_targets_and_offsets(window, perm, prev_target):
    config = ResampleConfig(window, 1.0, 0.9 / (window + 1), perm, prev_target=prev_target)
    packing = packed([3, 40, 1, 25], rows=20)
    order = permute(config, packing)
    index = packing.index
    assert torch.equal(order.sigma.sort(dim=1).values, index)
    moved = order.sigma != index
    assert moved.any() and not (moved & (packing.position == 0)).any()
    assert torch.equal(packing.start.gather(1, order.sigma), packing.start)  # nothing leaves its document
    assert (order.offset == order.tau - order.sigma).all() and (order.offset[~order.has_target] == 1).all()
    assert torch.equal(order.has_target, index + 1 < packing.end)
    seen = set(order.offset.unique().tolist()) - {1}
    assert seen <= OFFSETS[window, perm] and any(offset < 0 for offset in seen)
    following = order.sigma.roll(-1, 1)
    for row, slot in order.has_target.nonzero().tolist():
        plain = prev_target == "ntp" and not moved[row, slot] and moved[row, slot + 1]
        # Under "ntp" only the row before a window keeps the plain text's next token.
        if plain and order.sigma[row, : slot + 1].max() == slot:
            assert order.tau[row, slot] == slot + 1 and order.offset[row, slot] == 1
        else:
            assert order.tau[row, slot] == following[row, slot]
    if prev_target == "follow" and perm != "rotate_mixed":
        assert seen == OFFSETS[window, perm]


def test_the_example_of_two():
    """slot i-1 .. i+2 hold x_{i-1}, x_{i+1}, x_i, x_{i+2} with offsets +2, -1, +2, +1."""
    order = permute(ResampleConfig(2, 1.0, 1 / 3), packed([7]))
    start = int((order.sigma != torch.arange(7)).nonzero()[0, 1])
    assert order.sigma[0, start - 1 : start + 2].tolist() == [start - 1, start + 1, start]
    assert order.offset[0, start - 1 : start + 2].tolist() == [2, -1, 2]


def test_windows_keep_an_untouched_token_between_them():
    order = permute(ResampleConfig(2, 1.0, 1 / 3), packed([200]))
    starts = (order.offset[0] == -1).nonzero().flatten()
    assert len(starts) > 50 and starts.diff().min() == 3  # the largest share packs them as closely as may be


@pytest.mark.parametrize(("window", "perm"), CONFIGS)
def test_shares_are_those_asked_for(window, perm):
    """Within 3 standard errors; windows renew after w + 1 places, which shrinks the variance below binomial."""
    config = ResampleConfig(window, 0.4, 0.05, perm)
    rows, length = 400, 600
    packing = packed([length], rows)
    order = permute(config, packing)
    moved = order.sigma != packing.index
    permuted = moved.any(1)
    share = permuted.float().mean().item()
    assert abs(share - 0.4) < 3 * (0.4 * 0.6 / rows) ** 0.5
    middle = slice(50, 550)
    starts = _before_window(order.sigma, packing)[permuted][:, middle].float()
    assert abs(starts.mean().item() - 0.05) < 3 * (0.05 * 0.95 / starts.numel()) ** 0.5


@pytest.mark.parametrize("shares", [(0.0, 0.1), (1.0, 0.0)])
def test_no_share_is_the_plain_batch(shares):
    order = permute(ResampleConfig(2, *shares), packed([50, 30]))
    assert torch.equal(order.sigma, torch.arange(80)[None]) and (order.offset == 1).all()


def test_only_wanted_tokens_move():
    packing = packed([60], rows=50)
    loss_mask = torch.zeros(50, 60, dtype=torch.bool)
    loss_mask[:, 20:40] = True
    moved = permute(ResampleConfig(3, 1.0, 0.25), packing, loss_mask).sigma != packing.index
    assert moved[:, 20:40].any() and not moved[:, :20].any() and not moved[:, 40:].any()


def test_uniform_draws_every_other_order_equally():
    generator = torch.Generator().manual_seed(0)
    permuter = WindowPermuter(ResampleConfig(3, perm="uniform"))
    orders = [tuple(permuter._order(generator)) for _ in range(2000)]
    assert set(orders) == set(itertools.permutations(range(3))) - {(0, 1, 2)}
    assert max(abs(orders.count(order) - 400) for order in set(orders)) < 4 * (2000 * 0.2 * 0.8) ** 0.5


def test_rows_and_seeds():
    a, b, c = (permute(ResampleConfig(2, 0.5, 0.1), packed([99], 9), seed=seed).sigma for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 1}, "window must be a whole number of at least 2, got 1"),
        ({"window_share": 0.5}, r"window_share must be a number in \[0, 0.333333\], got 0.5"),
        ({"sequence_share": 2}, "sequence_share"),
        ({"perm": "swap"}, "perm must be one of 'rotate'"),
        ({"code_at": "output"}, "code_at"),
        ({"rope_index": "sigma"}, "rope_index"),
        ({"prev_target": "next"}, "prev_target"),
    ],
)
def test_impossible_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        ResampleConfig(**values)
