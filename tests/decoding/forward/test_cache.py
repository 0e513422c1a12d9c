"""SlotCache: keys and values go where we say and are forgotten by moving a length."""

import random

import pytest
import torch

from decoding import Engine
from decoding.forward.cache import GROWTH, SlotCache
from decoding.forward.rows import RowList

HEADS, WIDTH = 2, 3


def states(batch: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, rows, WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def write(cache: SlotCache, slots, num_slots: int, seed: int = 0):
    batch = len(cache.tokens)
    rows = slots.shape[1] if isinstance(slots, torch.Tensor) else slots.stop - slots.start
    keys, values = states(batch, rows, seed)
    cache.plan(slots, num_slots)
    seen = cache.update(keys, values, 0)
    return keys, values, seen


def test_slice_and_index_write_the_same():
    one, other = SlotCache(1), SlotCache(1)
    keys, values, seen = write(one, slice(2, 6), 8)
    _, _, seen_by_index = write(other, torch.tensor([[2, 3, 4, 5]]), 8)
    assert torch.equal(seen[0], seen_by_index[0]) and torch.equal(seen[1], seen_by_index[1])
    assert torch.equal(seen[0][:, :, 2:6], keys) and torch.equal(seen[1][:, :, 2:6], values)
    assert seen[0].shape == (1, HEADS, 8, WIDTH)


def test_each_sequence_has_its_own_slots():
    cache = SlotCache(1, batch_size=2)
    keys, values, seen = write(cache, torch.tensor([[4, 1], [0, 3]]), 5)
    assert torch.equal(seen[0][0, :, [4, 1]], keys[0]) and torch.equal(seen[0][1, :, [0, 3]], keys[1])
    assert torch.equal(seen[1][0, :, [4, 1]], values[0]) and torch.equal(seen[1][1, :, [0, 3]], values[1])


def test_growth_keeps_what_was_written():
    cache = SlotCache(1)
    keys, values, _ = write(cache, slice(0, 5), 5)
    assert cache.layers[0].keys.shape[2] == GROWTH
    _, _, seen = write(cache, slice(GROWTH + 1, GROWTH + 2), GROWTH + 2, seed=1)
    assert cache.layers[0].keys.shape[2] == 2 * GROWTH
    assert torch.equal(seen[0][:, :, :5], keys) and torch.equal(seen[1][:, :, :5], values)
    assert seen[0][:, :, 5 : GROWTH + 1].eq(0).all()


def test_what_attention_sees_is_a_view():
    cache = SlotCache(1)
    _, _, (keys, values) = write(cache, slice(0, 4), 4)
    assert keys.data_ptr() == cache.layers[0].keys.data_ptr()
    assert values.data_ptr() == cache.layers[0].values.data_ptr()


@pytest.mark.parametrize("order", [[2, 0], [1, 1, 0], [0, 1, 2]])
def test_reorder_moves_keys_values_and_tokens(order):
    cache = SlotCache(2, batch_size=3)
    cache.tokens = [[5], [6, 7], [8, 9, 10]]
    keys, values = states(3, 4)
    cache.plan(slice(0, 4), 4)
    cache.update(keys, values, 0)  # the second layer has not run yet
    cache.reorder_cache(torch.tensor(order))
    assert cache.tokens == [[[5], [6, 7], [8, 9, 10]][i] for i in order]
    assert cache.lengths == [[1, 2, 3][i] for i in order]
    assert torch.equal(cache.layers[0].keys[:, :, :4], keys[order])
    assert torch.equal(cache.layers[0].values[:, :, :4], values[order])
    assert not cache.layers[1].is_initialized
    cache.tokens[0].append(1)
    assert order != [1, 1, 0] or cache.tokens[1] == [6, 7]


@pytest.mark.parametrize(
    ("held", "new", "shared"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2, 3], [9, 2, 3], 0),
        ([], [1], 0),
        ([1, 2], [], 0),
        ([4, 5], [4, 5], 2),
    ],
)
def test_rewind_keeps_the_common_start(held, new, shared):
    cache = SlotCache(1)
    cache.tokens[0] = list(held)
    assert cache.rewind(0, new) == shared
    assert cache.tokens == [held[:shared]]
    assert cache.lengths == [shared] and cache.get_seq_length() == shared


@pytest.mark.parametrize("family", ["llama", "llama-3.1", "qwen2-window", "qwen3", "mistral-window"])
def test_any_cut_into_forwards_equals_one_prefill(shared_model, cache_error, family):
    """Ragged sequences, run in pieces of random length with blocks and padding in between."""
    model = shared_model(family, torch.float64)
    rng = random.Random(0)
    texts = [[rng.randrange(3, 96) for _ in range(length)] for length in (23, 11, 17)]
    engine = Engine(model)
    cache = engine.new_cache(len(texts))
    cached = [0, 0, 0]
    while any(n < len(text) for n, text in zip(cached, texts, strict=True)):
        lists = []
        for b, text in enumerate(texts):
            rows, count = RowList(), min(rng.randrange(0, 6), len(text) - cached[b])
            rows.add_causal(text[cached[b] : cached[b] + count], cached[b])
            cached[b] += count
            rows.add_block([96] * rng.randrange(0, 4), cached[b], cached[b])  # dead slots, overwritten later
            lists.append(rows)
        if max(map(len, lists)) > 0:
            engine.step(lists, cache)
    for b, text in enumerate(texts):
        assert cache_error(model, cache, b, text) < 1e-10


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3", "mistral-window"])
def test_cached_rows_have_the_logits_of_an_uncached_forward(shared_model, family):
    model = shared_model(family, torch.float64)
    text = list(range(5, 30))
    engine = Engine(model)
    cache = engine.new_cache(1)
    logits = []
    for start, end in ((0, 9), (9, 10), (10, 25)):
        rows = RowList()
        causal = rows.add_causal(text[start:end], start)
        logits.append(model.lm_head(engine.step([rows], cache).hidden([(0, causal)])))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    assert (torch.cat(logits) - expected).abs().max() < 1e-10
    assert expected.std() > 1
