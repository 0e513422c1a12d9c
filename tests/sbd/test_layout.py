"""The training layout: two intervals per row, the grid of blocks, packing, and equality with decoding."""

import itertools

import pytest
import torch

from decoding import Engine
from decoding.forward.attention import run_trunk
from decoding.forward.rows import RowList
from decoding.training.blocks import BlockGrid, set_block_visibility
from decoding.training.packed import Packing
from sbd import SetBlockObjective
from tests.conftest import MASK

WINDOWED = ["llama", "llama-3.1", "qwen2-window", "qwen3", "mistral-window"]


def mask_of(document_ids: torch.Tensor, size: int, copies: int = 1, loss_mask=None, phase: str = "document"):
    """(visibility [R, R] of the whole layout, grid)"""
    packing = Packing.from_document_ids(document_ids)
    grid = BlockGrid.from_packing(packing, ~packing.is_padding if loss_mask is None else loss_mask, size, phase)
    rows = document_ids.shape[1] * (1 + copies)
    return set_block_visibility(packing, [grid] * copies).as_bool(rows)[0, 0], grid


def clauses(length: int, size: int) -> torch.Tensor:
    """Figure 7 of the paper: query q may attend key j if one of three clauses holds."""
    seen = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for q, j in itertools.product(range(2 * length), repeat=2):
        clean = q < length and j < length and j <= q
        own = q >= length and j >= length and (q - length) // size == (j - length) // size
        past = q >= length and j < length and j // size < (q - length) // size
        seen[q, j] = clean or own or past
    return seen


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 12, 13, 17])
def test_two_intervals_equal_the_three_clauses(length):
    for size in range(1, length + 3):
        seen, _ = mask_of(torch.zeros(1, length, dtype=torch.long), size)
        assert torch.equal(seen, clauses(length, size))


@pytest.mark.parametrize("lengths", [(5, 8), (1, 6, 3), (7, 1, 1, 4)])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
def test_packed_documents_see_only_themselves(lengths, size):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    total = sum(lengths)
    seen, _ = mask_of(ids, size)
    expected = torch.zeros_like(seen)
    start = 0
    for length in lengths:
        part = clauses(length, size)
        for (a, rows), (b, columns) in itertools.product(enumerate((0, total)), repeat=2):
            expected[rows + start : rows + start + length, columns + start : columns + start + length] = part[
                a * length : (a + 1) * length, b * length : (b + 1) * length
            ]
        start += length
    assert torch.equal(seen, expected)


def test_padding_sees_only_itself_in_every_copy():
    ids = torch.tensor([[0, 0, 0, -1, -1]])
    seen, _ = mask_of(ids, 2, copies=2)
    for copy in range(3):
        for place in (3, 4):
            row = seen[5 * copy + place]
            assert row.nonzero().flatten().tolist() == [5 * copy + place]
            assert seen[:, 5 * copy + place].nonzero().flatten().tolist() == [5 * copy + place]


def test_a_second_masked_copy_sees_what_the_first_sees_in_its_place():
    ids = torch.tensor([[0] * 7 + [1] * 4])
    one, _ = mask_of(ids, 3)
    two, _ = mask_of(ids, 3, copies=2)
    assert torch.equal(two[:22, :22], one) and not two[:22, 22:].any()
    assert torch.equal(two[22:, :11], one[11:, :11])
    assert torch.equal(two[22:, 22:], one[11:, 11:]) and not two[22:, 11:22].any()


def test_blocks_of_the_document_grid():
    _, grid = mask_of(torch.tensor([[0] * 5 + [1] * 4 + [-1]]), 3)
    assert grid.start.tolist() == [[0, 0, 0, 3, 3, 5, 5, 5, 8, 9]]
    assert grid.end.tolist() == [[3, 3, 3, 5, 5, 8, 8, 8, 9, 10]]


def test_blocks_of_the_response_grid_start_anew_at_each_turn():
    ids = torch.tensor([[0] * 8 + [1] * 4])
    loss_mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1]]).bool()
    _, grid = mask_of(ids, 2, loss_mask=loss_mask, phase="response")
    assert grid.start.tolist() == [[0, 0, 2, 2, 4, 5, 6, 6, 8, 9, 10, 10]]
    assert grid.end.tolist() == [[2, 2, 4, 4, 5, 6, 8, 8, 9, 10, 12, 12]]


def test_random_phase_is_uniform_and_keeps_to_documents():
    torch.manual_seed(0)
    shifts = []
    for _ in range(600):
        _, grid = mask_of(torch.tensor([[0] * 9 + [1] * 6]), 4, phase="random")
        start, end = grid.start[0], grid.end[0]
        shift = int(end[0]) % 4  # the first block has `shift` tokens, or four where nothing is shifted
        shifts.append(shift)
        for i in range(15):
            s, e = (0, 9) if i < 9 else (9, 15)
            origin = s + shift - (4 if shift else 0)
            assert start[i] == max(s, origin + (i - origin) // 4 * 4)
            assert end[i] == min(e, origin + (i - origin) // 4 * 4 + 4)
    counts = torch.tensor(shifts).bincount(minlength=4)
    assert counts.sum() == 600 and (counts - 150).abs().max() < 45


def recorded(monkeypatch, objective, model, batch) -> list:
    """What the objective hands to the trunk in one call and what it gets: [(tokens, positions, visibility, hidden)]."""
    calls = []
    monkeypatch.setattr("decoding.training.copies._gains_by_two_forwards", lambda model: False)

    def record(model, tokens, positions, visibility, *arguments):
        hidden = run_trunk(model, tokens, positions, visibility, *arguments)
        calls.append((tokens, positions, visibility, hidden))
        return hidden

    with monkeypatch.context() as patch:
        patch.setattr("decoding.training.copies.run_trunk", record)
        objective(model, batch)
    return calls


def batch_of(*lengths: int, padding: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens = torch.randint(3, MASK, (len(ids),), generator=generator)
    tail = torch.full((padding,), -1)
    return {"input_ids": torch.cat([tokens, tail.clamp_min(0)])[None], "document_ids": torch.cat([ids, tail])[None]}


@pytest.mark.parametrize("family", WINDOWED)
def test_clean_rows_are_the_causal_model(shared_model, monkeypatch, family):
    model, batch = shared_model(family, torch.float64), batch_of(23, 14, padding=3)
    ((_, _, _, hidden),) = recorded(monkeypatch, SetBlockObjective(block_sizes=(4,)), model, batch)
    tokens = batch["input_ids"]
    with torch.no_grad():
        causal = torch.cat([model.model(input_ids=t).last_hidden_state for t in (tokens[:, :23], tokens[:, 23:37])], 1)
    assert (hidden[:, :37] - causal).abs().max() < 1e-10
    assert hidden.isfinite().all()


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("phase", ["document", "random", "response"])
def test_training_forward_equals_cached_decode_forward(shared_model, monkeypatch, family, phase):
    """The same partly masked block gives the same hidden states in the training layout and behind a cache."""
    torch.manual_seed(1)
    model, batch, length, grids = shared_model(family, torch.float64), batch_of(27), 27, []
    batch["loss_mask"] = (torch.arange(length) >= 5)[None]

    def draw_masks(self, blocks):
        grids.append(blocks)
        return torch.rand(1, length) < 0.6

    monkeypatch.setattr(SetBlockObjective, "draw_masks", draw_masks)
    objective = SetBlockObjective(block_sizes=(6,), phase=phase)
    ((tokens, positions, _, hidden),) = recorded(monkeypatch, objective, model, batch)
    (grid,) = grids
    assert 0 < tokens[:, length:].eq(MASK).sum() < 22
    assert positions[0].tolist() == [*range(length), *range(length)]
    masked_half = tokens[0, length:].tolist()
    text = batch["input_ids"][0].tolist()
    engine, cached, blocks = Engine(model), 0, 0
    cache = engine.new_cache(1)
    for start, end in sorted({(int(s), int(e)) for s, e in zip(grid.start[0], grid.end[0], strict=True)}):
        rows = RowList()
        rows.add_causal(text[cached:start], cached)
        block = rows.add_block(masked_half[start:end], start, start)
        decoded = engine.step([rows], cache).hidden([(0, block)])
        assert (decoded - hidden[0, length + start : length + end]).abs().max() < 1e-10
        cached, blocks = start, blocks + 1
    assert blocks >= 5


@pytest.mark.parametrize("family", WINDOWED)
def test_a_masked_row_never_sees_its_own_block_clean_or_anything_later(shared_model, monkeypatch, family):
    model, batch, length, k = shared_model(family, torch.float64), batch_of(18, padding=2), 20, 4
    torch.manual_seed(3)
    ((tokens, positions, visibility, hidden),) = recorded(
        monkeypatch, SetBlockObjective(block_sizes=(k,)), model, batch
    )
    for start in range(0, 18, k):
        changed = tokens.clone()
        changed[0, start:18] = (changed[0, start:18] + 7) % 90 + 3  # the clean half, from this block on
        with torch.no_grad():
            other = run_trunk(model, changed, positions, visibility, 2 * length)
        before = slice(length, length + min(start + k, 18))
        assert torch.equal(other[0, before], hidden[0, before])
        later = slice(length + start + k, length + 18)
        assert (other[0, later] - hidden[0, later]).abs().sum() > 1 or start + k >= 18
        noisy = tokens.clone()
        noisy[0, length + start] = (noisy[0, length + start] + 7) % 90 + 3  # one token of the masked half
        with torch.no_grad():
            other = run_trunk(model, noisy, positions, visibility, 2 * length)
        end = min(start + k, 18)
        differs = (other[0] - hidden[0]).abs().amax(-1) > 0
        assert differs.nonzero().flatten().tolist() == list(range(length + start, length + end))


@pytest.mark.parametrize("family", WINDOWED)
def test_packed_rows_are_those_of_separate_documents(shared_model, monkeypatch, family):
    """Documents of 13, 1 and 18 tokens under a window of 8, the same masks in both."""
    model, lengths = shared_model(family, torch.float64), (13, 1, 18)
    batch = batch_of(*lengths, padding=2)
    total = sum(lengths) + 2
    masks = torch.rand(1, total, generator=torch.Generator().manual_seed(0)) < 0.5
    objective = SetBlockObjective(block_sizes=(5,))
    monkeypatch.setattr(SetBlockObjective, "draw_masks", lambda self, blocks: masks[:, : blocks.start.shape[1]])
    ((_, _, _, packed),) = recorded(monkeypatch, objective, model, batch)
    packed_loss, _ = objective(model, batch)
    start, losses, labels = 0, 0.0, 0
    for length in lengths:
        part = slice(start, start + length)
        own = masks[:, part]
        monkeypatch.setattr(SetBlockObjective, "draw_masks", lambda self, blocks, own=own: own)
        alone = {"input_ids": batch["input_ids"][:, part], "document_ids": torch.zeros(1, length, dtype=torch.long)}
        ((_, _, _, hidden),) = recorded(monkeypatch, objective, model, alone)
        count = length - 1 + int(own.sum())
        losses, labels = losses + objective(model, alone)[0] * count, labels + count
        assert (hidden[0, :length] - packed[0, part]).abs().max() < 1e-10
        assert (hidden[0, length:] - packed[0, total + start : total + start + length]).abs().max() < 1e-10
        start += length
    torch.testing.assert_close(packed_loss, losses / labels)
