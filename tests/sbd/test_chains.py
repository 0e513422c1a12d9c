"""Acceptance along a block: weights and expected lengths, against loops over blocks."""

import pytest
import torch

from decoding.training.blocks import BlockGrid
from decoding.training.packed import Packing
from sbd.chains import Chains, dpace_weights, expected_tau, exponential_weights

IDS = torch.tensor([[0] * 11 + [1] * 6 + [-1] * 2, [0] * 19])


@pytest.fixture(params=["document", "random"])
def blocks(request):
    torch.manual_seed(3)
    packing = Packing.from_document_ids(IDS)
    return BlockGrid.from_packing(packing, ~packing.is_padding, 4, request.param)


@pytest.fixture
def alpha():
    return torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def each_block(blocks):
    """(row, start, end) of every block."""
    for row in range(len(IDS)):
        for start in sorted(set(blocks.start[row].tolist())):
            yield row, start, int(blocks.end[row, start])


def test_values_go_to_blocks_and_back(blocks, alpha):
    chains = Chains(blocks)
    assert torch.equal(chains.back(chains.of(alpha)), alpha)
    assert chains.inside.sum() == alpha.numel()


def test_weights_of_dpace(blocks, alpha):
    found = dpace_weights(blocks, alpha)
    for row, start, end in each_block(blocks):
        survives = [(float(a) + 1) / 2 for a in alpha[row, start + 1 : end]]
        assert found[row, start] == 0
        for j in range(len(survives)):
            expected = sum(torch.tensor(survives[: m + 1]).prod() for m in range(j, len(survives)))
            assert found[row, start + 1 + j] == pytest.approx(float(expected), rel=1e-5)


def test_exponential_weights(blocks):
    found = exponential_weights(blocks, 4.0)
    for row, start, end in each_block(blocks):
        assert found[row, start] == 0
        for j in range(1, end - start):
            assert found[row, start + j] == pytest.approx(torch.tensor(-(j - 1) / 4.0).exp().item())


def test_expected_tau_is_over_whole_blocks(blocks, alpha):
    drafted = torch.ones(IDS.shape, dtype=torch.bool)
    drafted[0, 5] = False
    total, count = expected_tau(blocks, alpha, drafted)
    taus = []
    for row, start, end in each_block(blocks):
        if end - start == 4 and drafted[row, start + 1 : end].all():
            a = alpha[row, start + 1 : end].tolist()
            taus.append(1 + a[0] + a[0] * a[1] + a[0] * a[1] * a[2])
    assert int(count) == len(taus) > 0
    assert float(total) == pytest.approx(sum(taus))
