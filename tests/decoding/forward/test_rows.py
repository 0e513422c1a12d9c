"""Rows of one forward: causal text, blocks, and padding to a rectangle."""

import torch

from decoding.forward.rows import RowList, Rows

CPU = torch.device("cpu")


def rows_of(*parts) -> RowList:
    """``("causal", start, count)`` and ``("block", position, slot, count)`` in turn; tokens count from 10."""
    rows = RowList()
    for kind, *where, count in parts:
        tokens = range(10, 10 + count)
        if kind == "causal":
            rows.add_causal(tokens, *where)
        else:
            rows.add_block(tokens, *where)
    return rows


def seen(rows: Rows) -> list[list[list[int]]]:
    """For every sequence and row the slots it may see."""
    visible = rows.visibility.as_bool(rows.num_slots)[:, 0]
    return [[row.nonzero().flatten().tolist() for row in sequence] for sequence in visible]


def test_causal_rows_see_everything_up_to_themselves():
    rows = Rows.pack([rows_of(("causal", 4, 3))], CPU)
    assert rows.positions.tolist() == [[4, 5, 6]]
    assert seen(rows) == [[[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6]]]
    assert rows.is_block.tolist() == [[False] * 3]
    assert rows.num_slots == 7


def test_block_rows_see_the_past_and_each_other():
    rows = Rows.pack([rows_of(("causal", 3, 2), ("block", 5, 5, 3))], CPU)
    assert rows.positions.tolist() == [[3, 4, 5, 6, 7]]
    everything = list(range(8))
    assert seen(rows) == [[[0, 1, 2, 3], [0, 1, 2, 3, 4], everything, everything, everything]]
    assert rows.is_block.tolist() == [[False, False, True, True, True]]


def test_a_block_in_slots_of_its_own_is_blind_to_what_lies_between():
    rows = Rows.pack([rows_of(("causal", 2, 2), ("block", 3, 4, 2), ("block", 4, 6, 2))], CPU)
    assert seen(rows)[0][2:] == [[0, 1, 2, 4, 5]] * 2 + [[0, 1, 2, 3, 6, 7]] * 2
    assert rows.positions.tolist()[0][2:] == [3, 4, 4, 5]
    assert rows.num_slots == 8


def test_padding_sees_only_itself_in_a_slot_behind_all_others():
    rows = Rows.pack([rows_of(("causal", 0, 2)), rows_of(("causal", 5, 1), ("block", 6, 6, 3)), rows_of()], CPU)
    assert rows.counts == (2, 4, 0)
    assert rows.num_slots == 10  # slots 0 .. 8 and one of scratch
    scratch = 9
    assert [slots[count:] for slots, count in zip(rows.slots.tolist(), rows.counts, strict=True)] == [
        [scratch] * 2,
        [],
        [scratch] * 4,
    ]
    for sequence, count in zip(seen(rows), rows.counts, strict=True):
        assert all(slots == [scratch] for slots in sequence[count:])
        assert all(scratch not in slots for slots in sequence[:count])
    assert not rows.is_block[0].any() and not rows.is_block[2].any()


def test_every_row_sees_something():
    rows = Rows.pack([rows_of(("causal", 0, 1)), rows_of(("block", 0, 0, 5))], CPU)
    assert rows.visibility.as_bool(rows.num_slots).any(-1).all()


def test_window_counts_back_from_positions():
    rows = Rows.pack([rows_of(("causal", 4, 2), ("block", 6, 6, 2))], CPU)
    visible = rows.visibility.within_window(3).as_bool(rows.num_slots)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in visible] == [[2, 3, 4], [3, 4, 5], [4, 5, 6, 7], [5, 6, 7]]


def test_one_sequence_in_consecutive_slots_is_written_as_a_slice():
    assert Rows.pack([rows_of(("causal", 3, 2), ("block", 5, 5, 2))], CPU).slots == slice(3, 7)
    assert isinstance(Rows.pack([rows_of(("causal", 3, 2), ("block", 4, 9, 2))], CPU).slots, torch.Tensor)
    assert isinstance(Rows.pack([rows_of(("causal", 3, 2)), rows_of(("causal", 3, 2))], CPU).slots, torch.Tensor)
