"""A clean copy and corrupted ones: what each row is, in one forward and in two."""

import pytest
import torch

from decoding.forward.adapter import GatedAdapter
from decoding.forward.noise_level import NONE, add_noise_level_rows
from decoding.training import copies
from decoding.training.blocks import BlockGrid
from decoding.training.copies import _gains_by_two_forwards, run_copies
from decoding.training.packed import Packing
from tests.conftest import MASK

LENGTH = 22
PACKING = Packing.from_document_ids(torch.tensor([[0] * 13 + [1] * 6 + [-1] * 3, [0] * LENGTH]))
BLOCKS = BlockGrid.from_packing(PACKING, ~PACKING.is_padding, 4)
TOKENS = torch.randint(3, MASK, (2, LENGTH), generator=torch.Generator().manual_seed(0))
NOISY = [TOKENS.masked_fill(TOKENS % 3 == rest, MASK) for rest in (0, 1)]


@pytest.fixture
def forwards(monkeypatch):
    """``forwards(two)`` chooses one forward or two; returns the list of the rows that each has from then on."""
    trunk = copies.run_trunk

    def choose(two: bool) -> list[int]:
        rows = []

        def run_trunk(model, tokens, *arguments):
            rows.append(tokens.shape[1])
            return trunk(model, tokens, *arguments)

        monkeypatch.setattr(copies, "_gains_by_two_forwards", lambda model: two)
        monkeypatch.setattr(copies, "run_trunk", run_trunk)
        return rows

    return choose


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("levelled", [False, True])
def test_two_forwards_are_one(fresh_model, forwards, family, levelled):
    """Also for models that are told a noise level and for those with an adapter on their block rows."""
    model, levels = fresh_model(family, torch.float64), None
    if levelled:
        add_noise_level_rows(model)
        model.get_input_embeddings().weight[-9:].normal_(generator=torch.Generator().manual_seed(1))
        levels = torch.randint(0, 1000, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    else:
        adapter = GatedAdapter(model, 2, 4).to(torch.float64)
        adapter.attach(model)
        adapter.mask_token_id = MASK
        for parameter in adapter.parameters():
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    found = []
    for two in (True, False):
        rows = forwards(two)
        found.append(run_copies(model, TOKENS, NOISY, PACKING, [BLOCKS, BLOCKS], levels=levels))
        assert rows == ([LENGTH, 2 * LENGTH] if two else [3 * LENGTH])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)
    plain = run_copies(fresh_model(family, torch.float64), TOKENS, NOISY, PACKING, [BLOCKS, BLOCKS])
    assert torch.equal(plain[0], found[1][0])  # the clean copy meets neither level nor adapter
    assert all((ours - other).abs().max() > 1e-3 for ours, other in zip(found[1][1:], plain[1:], strict=True))


def test_levels_of_none_change_nothing(fresh_model, forwards):
    model = fresh_model("llama")
    add_noise_level_rows(model)
    model.get_input_embeddings().weight[-9:] = 1.0
    forwards(False)
    without = run_copies(model, TOKENS, NOISY[:1], PACKING, [BLOCKS])
    levels = torch.full_like(TOKENS, NONE)
    for ours, reference in zip(
        run_copies(model, TOKENS, NOISY[:1], PACKING, [BLOCKS], levels=levels), without, strict=True
    ):
        assert torch.equal(ours, reference)


def test_a_frozen_clean_copy_has_no_gradient(fresh_model, forwards):
    model = fresh_model("llama").requires_grad_(True)
    rows = forwards(False)
    clean, noisy = run_copies(model, TOKENS, NOISY[:1], PACKING, [BLOCKS], frozen_clean=True)
    assert rows == [LENGTH, LENGTH] and not clean.requires_grad and noisy.requires_grad
    free = run_copies(model, TOKENS, NOISY[:1], PACKING, [BLOCKS])
    torch.testing.assert_close(noisy, free[1], rtol=1e-5, atol=1e-5)


def test_two_forwards_only_where_they_gain(fresh_model):
    model = fresh_model("llama")
    assert _gains_by_two_forwards(model)
    model.train().gradient_checkpointing_enable()
    assert not _gains_by_two_forwards(model)
    model.gradient_checkpointing_disable()
    model.get_decoder().compile()
    assert not _gains_by_two_forwards(model)
    flex = fresh_model("llama", attn_implementation="flex_attention")
    assert not _gains_by_two_forwards(flex)
