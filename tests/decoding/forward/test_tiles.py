"""Attention by tiles: the numbers of sdpa, without the keys that no row of a tile may see."""

import pytest
import torch

from decoding.forward import tiles
from decoding.forward.tiles import tiled_attention
from sbd import SetBlockObjective


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 4)


def random_attention(rows: int, keys: int):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, generator=generator) for n in (rows, keys, keys))
    mask = torch.rand(2, 1, rows, keys, generator=generator) < 0.2
    mask[..., 0] = True  # a row that sees nothing has no distribution
    return query, key, value, mask


@pytest.mark.parametrize("rows", [3, 4, 11])
def test_tiles_compute_what_sdpa_computes(rows):
    query, key, value, mask = random_attention(rows, 13)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
    module = torch.nn.Module()
    torch.testing.assert_close(tiled_attention(module, query, key, value, mask)[0], expected)


def test_keys_that_no_row_of_a_tile_sees_are_not_read():
    query, key, value, mask = random_attention(8, 13)
    mask[..., 4:, 7] = False
    mask[..., :4, 7] = True
    value[:, :, 7] = torch.nan
    output = tiled_attention(torch.nn.Module(), query, key, value, mask)[0]
    assert output[:, :4].isnan().all() and output[:, 4:].isfinite().all()


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3"])
def test_training_by_tiles_has_the_losses_and_gradients_of_sdpa(fresh_model, family):
    batch = {
        "input_ids": torch.randint(0, 20, (2, 22), generator=torch.Generator().manual_seed(1)),
        "document_ids": torch.tensor([[0] * 9 + [1] * 13, [2] * 18 + [-1] * 4]),
    }
    found = []
    for form in ("sdpa", tiles.NAME):
        # In float64, since float32 sums in another order differ by up to 5e-6 here, by the instructions of the CPU.
        model = fresh_model(family, torch.float64, attn_implementation=form).requires_grad_(True)
        torch.manual_seed(3)
        loss, _ = SetBlockObjective(block_sizes=(4,), mask_token_id=21)(model, batch)
        loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    (loss, gradients), (other_loss, other_gradients) = found
    torch.testing.assert_close(loss, other_loss)
    # Norms round to float32 inside the model, so one value on an edge may still move by 1e-8.
    torch.testing.assert_close(gradients, other_gradients, rtol=1e-5, atol=1e-7)
