"""Noise levels: zero to begin with, saved with the model, and told to block rows alone."""

import torch
from transformers import AutoModelForCausalLM

from decoding import Engine
from decoding.forward.noise_level import (
    GIVEN,
    LEVELS,
    NONE,
    ROWS,
    add_noise_level_rows,
    level_features,
    noise_level_ids,
    noise_levels,
    with_noise_level,
)
from decoding.forward.rows import RowList
from tests.conftest import VOCAB, build


def logits(model, levels=None) -> torch.Tensor:
    """Of two causal rows and a block of three."""
    rows = RowList()
    rows.add_causal([3, 4], 0)
    rows.add_block([5, 6, 7], 2, 2, levels)
    engine = Engine(model)
    return engine.step([rows], engine.new_cache(1)).logits([(0, range(5))])[:, :VOCAB]


def test_untrained_levels_change_nothing():
    model = build()
    plain = logits(model, [0, 500, GIVEN])
    add_noise_level_rows(model)
    add_noise_level_rows(model)
    assert model.get_input_embeddings().num_embeddings == VOCAB + ROWS
    assert noise_level_ids(model) == list(range(VOCAB, VOCAB + ROWS))
    assert torch.equal(logits(model, [0, 500, GIVEN]), plain) and torch.equal(logits(model), plain)


def test_a_level_reaches_its_block_row_and_no_causal_row():
    model = build()
    add_noise_level_rows(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB:] = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(0))
    plain = logits(model)
    for levels in ([0] * 3, [500] * 3, [LEVELS] * 3, [GIVEN] * 3):
        told = logits(model, levels)
        assert torch.equal(told[:2], plain[:2])
        assert (told[2:] - plain[2:]).abs().amax(-1).min() > 0.1
    assert (logits(model, [0] * 3) - logits(model, [900] * 3))[2:].abs().amax(-1).min() > 0.1


def test_levels_are_saved_and_loaded_with_the_model(tmp_path):
    model = build()
    add_noise_level_rows(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB:] = 0.5
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens, levels = torch.tensor([[3, 4]]), torch.tensor([[0, NONE]])
    assert torch.equal(with_noise_level(loaded, tokens, levels), with_noise_level(model, tokens, levels))
    added = with_noise_level(loaded, tokens, levels) - loaded.get_input_embeddings()(tokens)
    assert torch.allclose(added[0, 0], torch.full((64,), 0.5 * (ROWS - 1))) and (added[0, 1] == 0).all()


def test_features():
    levels = noise_levels(torch.tensor([0.0, 0.5]), torch.tensor([[False, True], [False, True]]))
    assert levels.tolist() == [[0, GIVEN], [500, GIVEN]]
    features = level_features(levels)
    assert features[0, 0].tolist() == [1.0] * (ROWS - 1) + [0.0]
    assert features[0, 1].tolist() == features[1, 1].tolist() == [0.0] * (ROWS - 1) + [1.0]
    assert torch.allclose(features[1, 0, :4], torch.tensor([1.0, 0.0, -1.0, 0.0]), atol=1e-6)
    assert (level_features(torch.tensor([[NONE]])) == 0).all()
