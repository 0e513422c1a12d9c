"""Rows of a step: what the scheduler plans is what the worker reads, and every row lands where it belongs."""

import random

import numpy as np
import pytest

from serving.canvas import Canvas, Progress, split_canvas
from serving.layout import SlotTable, plan_step, rectangle, virtual_requests
from serving.options import options_from_spec

SPECS = (
    "ntp",
    "sbd-lossless:block_size=4",
    "sbd-lossless:block_size=2",
    "sbd:block_size=5",
    "sbd:block_size=5,anchor=true",
)


@pytest.mark.parametrize("spec", SPECS)
def test_the_worker_reads_every_plan_of_the_scheduler(spec):
    """Through texts that accept at random, with every amount of room and every distance to the context's end."""
    options, draw = options_from_spec(spec), random.Random(0)
    for room in range(1, 12):
        for reach in range(1, 12):
            progress, left = Progress(options), room
            for _ in range(8):
                canvas = progress.plan(left, reach)
                assert canvas.size <= min(options.widest, reach)
                lossless = np.array([options.kind == "sbd-lossless"])
                drafts, masks = split_canvas(np.array([canvas.size]), lossless, np.array([options.block_size]))
                assert (drafts[0], masks[0]) == (canvas.drafts, canvas.masks)
                if options.kind == "sbd":
                    emitted = (
                        draw.choice([0, canvas.masks]) if options.commit == "block" else draw.randint(0, canvas.masks)
                    )
                else:
                    emitted = draw.randint(1, canvas.drafts + 1)
                progress.advance(canvas, emitted)
                left = max(1, left - emitted)


def test_drafts_are_held_only_where_their_masks_stood_right():
    progress = Progress(options_from_spec("sbd-lossless:block_size=4"))
    assert progress.plan(99, 99) == Canvas(0, 4)
    progress.advance(Canvas(0, 4), 1)
    assert progress.plan(99, 99) == Canvas(3, 4)
    progress.advance(Canvas(3, 4), 2)
    assert progress.plan(99, 99) == Canvas(0, 4), "two of three drafts failed"
    progress.advance(Canvas(0, 4), 1)
    assert progress.plan(3, 99) == Canvas(2, 0), "nothing can follow these drafts and one token"
    progress.restart()
    assert progress.plan(99, 99) == Canvas(0, 4)


def test_layout_of_a_mixed_step():
    """A chunk of a prompt; its end; drafts and masks; masks; a finished block with masks; the same, anchored."""
    table = SlotTable.empty(8)
    table.is_lossless[[2, 3]] = True
    table.is_set_block[[4, 5, 6]] = True
    table.is_anchored[6] = True
    table.block_size[2:7] = 3
    slots = np.array([0, 1, 2, 3, 4, 5, 6])
    lengths = np.array([5, 2, 1 + 2 + 3, 1 + 3, 3, 3 + 3, 3 + 3])
    canvas = np.array([0, 0, 5, 3, 3, 3, 3])
    ends = np.array([False, True, True, True, True, True, True])
    layout = plan_step(table, slots, lengths, canvas, ends)
    assert layout.pending.tolist() == [5, 2, 1, 1, 0, 3, 3]
    assert layout.drafts.tolist() == [0, 0, 2, 0, 0, 0, 0]
    assert layout.masks.tolist() == [0, 0, 3, 3, 3, 3, 3]
    assert layout.is_verified.tolist() == [False, True, True, True, False, False, False]
    assert layout.is_set_block.tolist() == [False] * 4 + [True] * 3
    assert layout.has_anchor.tolist() == [False] * 6 + [True]
    starts = np.cumsum(lengths) - lengths
    wanted = [
        [],
        [starts[1] + 1],
        [*(starts[2] + np.arange(3)), starts[2] + 4, starts[2] + 5],  # text, two drafts, all masks but the first
        [starts[3], starts[3] + 2, starts[3] + 3],
        [*(starts[4] + np.arange(3))],
        [*(starts[5] + 3 + np.arange(3))],
        [*(starts[6] + 2 + np.arange(4))],  # the row before the block, and the block
    ]
    assert layout.logit_rows.tolist() == [int(row) for rows in wanted for row in rows]
    assert layout.logit_requests.tolist() == [i for i, rows in enumerate(wanted) for _ in rows]
    assert layout.logit_places.tolist()[1:4] == [0, 1, 2]

    virtual = virtual_requests(layout, np.array([10, 20, 30, 40, 50, 60, 70]))
    assert virtual.requests.tolist() == [0, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6]
    assert virtual.query_lens.tolist() == [5, 2, 3, 3, 1, 3, 3, 3, 3, 3, 3]
    assert virtual.seq_lens.tolist() == [15, 22, 33, 36, 41, 44, 53, 63, 66, 73, 76]
    assert virtual.is_causal.tolist() == [True, True, True, False, True, False, False, True, False, True, False]
    assert virtual.query_starts[-1] == lengths.sum()


def test_rectangles_repeat_a_rows_last():
    assert rectangle(np.array([2, 9]), np.array([0, 2])).tolist() == [[2, 2], [9, 10]]
