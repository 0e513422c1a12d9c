"""Visibility: two intervals of keys per row, in the form that each attention takes."""

import itertools

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from decoding.forward.attention import attention_masks, run_trunk
from decoding.forward.rows import RowList, Rows
from decoding.forward.visibility import Visibility


def random_visibility(generator: torch.Generator, batch: int, rows: int, slots: int) -> Visibility:
    draws = [torch.randint(0, slots + 1, (batch, rows), generator=generator) for _ in range(4)]
    return Visibility(*draws, anchor=torch.randint(0, slots, (batch, rows), generator=generator))


def literal(visibility: Visibility, slots: int) -> torch.Tensor:
    batch, rows = visibility.prefix_end.shape
    seen = torch.zeros(batch, 1, rows, slots, dtype=torch.bool)
    for b, r, j in itertools.product(range(batch), range(rows), range(slots)):
        prefix = visibility.prefix_start[b, r] <= j < visibility.prefix_end[b, r]
        own = visibility.own_start[b, r] <= j < visibility.own_end[b, r]
        seen[b, 0, r, j] = bool(prefix or own)
    return seen


def test_bool_mask_is_the_union_of_two_intervals():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        visibility = random_visibility(generator, batch=2, rows=5, slots=9)
        assert torch.equal(visibility.as_bool(9), literal(visibility, 9))


def test_causal_is_the_lower_triangle_from_the_start():
    slots = torch.arange(6)[None]
    assert torch.equal(Visibility.causal(slots).as_bool(6)[0, 0], torch.ones(6, 6).tril().bool())
    later = Visibility.causal(slots, start=torch.tensor([[0, 0, 2, 2, 2, 5]])).as_bool(6)[0, 0]
    expected = torch.block_diag(*(torch.ones(n, n).tril() for n in (2, 3, 1))).bool()
    assert torch.equal(later, expected)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_window_keeps_the_last_positions_and_the_own_interval(window):
    prefix_end, own = 6, (6, 10)
    rows = torch.arange(6, 10)[None]
    fill = torch.full_like
    visibility = Visibility(fill(rows, 0), fill(rows, prefix_end), fill(rows, own[0]), fill(rows, own[1]), anchor=rows)
    seen = visibility.within_window(window).as_bool(10)[0, 0]
    for r, position in enumerate(range(6, 10)):
        for j in range(10):
            in_window = j < prefix_end and position - j < window
            assert bool(seen[r, j]) == (in_window or own[0] <= j < own[1])


def test_no_window_changes_nothing():
    visibility = random_visibility(torch.Generator().manual_seed(1), 1, 4, 7)
    assert visibility.within_window(None) is visibility


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_float_mask_is_added_to_the_scores(dtype):
    visibility = random_visibility(torch.Generator().manual_seed(2), 2, 4, 7)
    added = visibility.as_float(7, dtype)
    assert added.dtype == dtype
    assert torch.equal(added == 0, visibility.as_bool(7))
    assert torch.equal(added == torch.finfo(dtype).min, ~visibility.as_bool(7))


def test_flex_mask_is_the_same_function():
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        visibility = random_visibility(generator, batch=2, rows=6, slots=11)
        block_mask = visibility.as_block_mask(11)
        seen = create_mask(block_mask.mask_mod, 2, 1, 6, 11, device="cpu")
        assert torch.equal(seen, visibility.as_bool(11))


def test_flex_mask_skips_tiles_that_nobody_sees():
    slots = torch.arange(384)[None]
    tiles = Visibility.causal(slots, start=torch.tensor([[0] * 128 + [128] * 128 + [256] * 128])).as_block_mask(384)
    assert tiles.to_dense()[0, 0].tolist() == torch.eye(3).int().tolist()


def packed_rows() -> Rows:
    """Causal rows and a block in two sequences of different length: 9 + 4 rows and 5 + 3 rows."""
    lists = []
    for prompt, block in ((9, 4), (5, 3)):
        rows = RowList()
        rows.add_causal(range(3, 3 + prompt), 0)
        rows.add_block([96] * block, prompt, prompt)
        lists.append(rows)
    return Rows.pack(lists, torch.device("cpu"))


# num_slots is what a cache would hold; without one the rows are the keys, so each row is put in its own slot.
def hidden_without_cache(model) -> torch.Tensor:
    """Rows of `packed_rows`, ordered by slot, padding at its scratch slot dropped."""
    rows = packed_rows()
    keep = 8  # the rows that both sequences have, each in the slot of its index
    visibility = rows.visibility.of_rows(slice(keep))
    with torch.no_grad():
        return run_trunk(model, rows.tokens[:, :keep], rows.positions[:, :keep], visibility, keep)


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3", "mistral-window"])
def test_eager_equals_sdpa(fresh_model, family):
    hidden = {}
    for form in ("sdpa", "eager"):
        model = fresh_model(family, torch.float64)
        model.set_attn_implementation(form)
        hidden[form] = hidden_without_cache(model)
    # eager takes its softmax in float32 whatever the dtype
    assert (hidden["sdpa"] - hidden["eager"]).abs().max() < 1e-5
    assert hidden["sdpa"].isfinite().all()


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "mistral-window"])
def test_flex_is_handed_the_mask_that_sdpa_gets(fresh_model, family):
    model = fresh_model(family)
    visibility = packed_rows().visibility
    masks = {}
    for form in ("sdpa", "flex_attention"):
        model.set_attn_implementation(form)
        mask = attention_masks(model, visibility, 14)
        masks[form] = mask if isinstance(mask, dict) else {"every layer": mask}
    assert masks["sdpa"].keys() == masks["flex_attention"].keys()
    for kind, block_mask in masks["flex_attention"].items():
        seen = create_mask(block_mask.mask_mod, 2, 1, 13, 14, device="cpu")
        assert torch.equal(seen, masks["sdpa"][kind])


def test_unmaskable_attention_is_refused_by_name(fresh_model):
    model = fresh_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'.*'sdpa'"):
        attention_masks(model, packed_rows().visibility, 14)


@pytest.mark.slow
def test_flex_kernel_equals_sdpa(fresh_model):
    hidden = {}
    for form in ("sdpa", "flex_attention"):
        model = fresh_model("llama")
        model.set_attn_implementation(form)
        hidden[form] = hidden_without_cache(model)
    assert (hidden["sdpa"] - hidden["flex_attention"]).abs().max() < 1e-3
