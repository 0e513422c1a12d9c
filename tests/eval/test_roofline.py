"""The roofline: the published slowdowns from the right shapes, and bounds that behave as bounds."""

import pytest
import torch
from transformers import AutoConfig

from eval.bench.engine import weight_bytes
from eval.bench.roofline import DEVICES, DeviceFigures, ModelFigures, estimate_decoding, forward_seconds
from eval.bench.shapes import SHAPES, random_model

# FP8 weights and cache; FFN in FP8, as in arXiv 2509.04185.
PAPER = DeviceFigures(3.35 * 1024**4, 1978e12)


def figures(shape: str) -> ModelFigures:
    return ModelFigures.from_config(AutoConfig.for_model(**SHAPES[shape]))


@pytest.mark.parametrize("shape", ["smollm2-135m", "qwen3-0.6b", "llama-3.1-8b"])
def test_weights_are_those_that_a_forward_reads(shape):
    model = random_model(AutoConfig.for_model(**SHAPES[shape]), torch.bfloat16, torch.device("meta"))
    counted = figures(shape)
    assert 2 * (counted.trunk_weights + counted.head_weights) == pytest.approx(weight_bytes(model), rel=1e-3)


def test_one_row_reads_all_weights_once():
    model, device = figures("llama-3.1-8b"), DEVICES["h200"]
    assert forward_seconds(model, device, 1, 1, 1) == pytest.approx(15.01e9 / 4.8e12, rel=0.01)
    assert forward_seconds(model, device, 1, 1, 1, weight_bytes=1) == pytest.approx(7.5e9 / 4.8e12, rel=0.01)


@pytest.mark.parametrize(("batch_size", "slowdown"), [(1, 1.006), (4, 1.023), (8, 1.045)])
def test_sixteen_rows_slow_down_as_little_as_corrected_shapes_say(batch_size, slowdown):
    model = figures("llama-3.1-8b")
    one, many = (
        forward_seconds(model, PAPER, batch_size, 1024, rows, weight_bytes=1, cache_bytes=1) for rows in (1, 16)
    )
    # What is moved besides, activations, makes the rest of those slowdowns.
    assert 1 <= many / one <= slowdown + 0.005


def test_more_is_never_faster():
    model, device = figures("qwen3-8b"), DEVICES["h100"]
    for wider in ((2, 1024, 8), (1, 8192, 8), (1, 1024, 512)):
        assert forward_seconds(model, device, *wider) > forward_seconds(model, device, 1, 1024, 8)


def test_each_batch_has_one_best_and_large_batches_leave_less():
    rows = list(estimate_decoding(figures("llama-3.1-8b"), DEVICES["h200"], [1, 64], [1024], [4, 16], 3.0))
    assert [row["decoder"] for row in rows if row["best"]] and all(row["speed_up"] > 0 for row in rows)
    gained = {row["batch_size"]: row["speed_up"] for row in rows if row["best"]}
    assert 2.9 < gained[1] <= 3.01 and gained[64] < gained[1]
    ntp = [row["tokens_per_second"] for row in rows if row["decoder"] == "ntp"]
    assert ntp[0] == pytest.approx(317, rel=0.02)
