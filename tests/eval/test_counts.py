import pytest
import torch

from decoding import DecodeOutput
from eval.counts import count, total


def output(**changes) -> DecodeOutput:
    values = {
        "sequences": torch.zeros(2, 9, dtype=torch.long),
        "forwards": torch.tensor([2, 4]),
        "tokens_per_forward": torch.tensor([3.0, 1.0]),
        "prefill_forwards": 1,
        "new_tokens": torch.tensor([6, 4]),
    }
    return DecodeOutput(**{**values, **changes})


def test_each_sequence_has_its_own_costs():
    first, second = count(output(), seconds=1.0)
    assert first == {
        "tokens": 6,
        "forwards": 2,
        "tokens_per_forward": 3.0,
        "prefill_forwards": 1,
        "seconds": 0.5,
        "batch_size": 2,
    }
    assert (second["tokens"], second["forwards"], second["tokens_per_forward"]) == (4, 4, 1.0)


def test_totals_weigh_by_tokens():
    result = total(count(output(), seconds=2.0))
    assert result["tokens_per_forward"] == pytest.approx(10 / 6)
    assert result["tokens_per_second"] == pytest.approx(5.0)
    assert "acceptance_lengths" not in result


def test_acceptance_lengths_are_counted():
    samples = count(output(acceptance_lengths=([3, 1], [0, 0, 1])), seconds=1.0)
    assert samples[1]["acceptance_lengths"] == [0, 0, 1]
    result = total(samples)
    assert result["acceptance_lengths"] == [2, 2, 0, 1]
    assert result["mean_acceptance_length"] == pytest.approx(1.0)


def test_nothing_costs_nothing():
    assert total([])["tokens_per_forward"] == 0.0 and total([])["tokens_per_second"] == 0.0
