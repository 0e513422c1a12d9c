"""Packing: examples with a prompt stay whole wherever they fit, and those that do not are told."""

import random
from collections import Counter

import numpy as np
import pytest

from finetune import finetune
from finetune.packing import OPEN_ROWS, PackedDataset, StreamedRows, pack


def example(prompt: int, completion: int, token: int = 5) -> dict:
    return {"input_ids": [token] * (prompt + completion), "loss_mask": [False] * prompt + [True] * completion}


def examples(count: int, longest: int, seed: int = 0) -> list[dict]:
    """Of random lengths, each made of a token of its own."""
    draw = random.Random(seed)
    lengths = [draw.randint(2, longest) for _ in range(count)]
    return [example(prompt := draw.randint(1, n - 1), n - prompt, i + 10) for i, n in enumerate(lengths)]


def pieces(rows) -> list[tuple[list[int], list[bool]]]:
    """Tokens and targets of each document in each row, without padding."""
    found = []
    for tokens, documents, targets in rows:
        for number in dict.fromkeys(documents[documents >= 0].tolist()):
            here = documents == number
            found.append((tokens[here].tolist(), targets[here].tolist()))
    return found


@pytest.mark.parametrize(("count", "longest", "length"), [(1, 3, 8), (40, 16, 16), (500, 9, 16), (3000, 40, 64)])
def test_examples_stay_whole(count, longest, length):
    given = examples(count, longest)
    rows = list(pack(given, length))
    assert sorted(pieces(rows)) == sorted((document["input_ids"], document["loss_mask"]) for document in given)
    assert all(len(column) == length for row in rows for column in row)
    for tokens, documents, targets in rows:
        padding = documents < 0
        assert not tokens[padding].any() and not targets[padding].any()
        assert not np.diff(padding.astype(int)).min() < 0, "padding is at the end"
    room = sum(len(document["input_ids"]) for document in given) / (length * len(rows))
    assert count < OPEN_ROWS or room > 0.95, "best fit leaves little of a row free"


def test_an_example_goes_where_it_leaves_the_least_free():
    lengths = (10, 12, 4, 6, 4)
    rows = list(pack([example(1, n - 1, n) for n in lengths], 16))
    assert [Counter(tokens[tokens > 0].tolist()) for tokens, _, _ in rows] == [{12: 12, 4: 4}, {10: 10, 6: 6}, {4: 4}]


def test_plain_texts_and_examples_fill_rows_of_their_own():
    """Plain text is cut at the end of a row, and no example for its sake."""
    texts = [{"input_ids": [7] * 11, "loss_mask": [True] * 11} for _ in range(8)]
    mixed = [document for pair in zip(texts, examples(8, 16), strict=True) for document in pair]
    rows = list(pack(mixed, 16))
    assert sorted(p for p in pieces(rows) if p[0][0] != 7) == sorted(
        (d["input_ids"], d["loss_mask"]) for d in examples(8, 16)
    )
    assert sum(row[0].tolist().count(7) for row in rows) == 8 * 11 // 16 * 16
    assert all((tokens == 7).all() for tokens, _, _ in rows if (tokens == 7).any())


def test_examples_longer_than_a_row_are_cut_and_told():
    given = [example(2, 5), example(3, 14), example(20, 20), *examples(5, 16)]
    with pytest.warns(
        UserWarning, match="data: 2 of 8 documents have a prompt and are longer than sequence_length 16.*cut"
    ):
        rows = PackedDataset(given, 16)
    assert rows.num_tokens <= sum(len(document["input_ids"]) for document in given)
    with pytest.warns(UserWarning, match="held_out 'texts': 1 of 1"):
        PackedDataset([example(3, 14)], 16, "held_out 'texts'")
    with pytest.warns(UserWarning, match="data: 1 of 2 documents"):
        list(StreamedRows(given, 16))


@pytest.mark.filterwarnings("error")
def test_nothing_is_told_where_nothing_is_cut():
    rows = PackedDataset([example(2, 14), *examples(20, 16), {"input_ids": [5] * 100, "loss_mask": [True] * 100}], 16)
    assert len(rows) > 6


@pytest.mark.parametrize("objective", ["ntp", "sbd", "rpt", "dfm", "sbd+rpt"])
def test_every_objective_trains_on_padded_rows(recipe, tmp_path, objective):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f'{{"prompt": "{c} is", "completion": " {c * 3}"}}\n' for c in "abcdefghijkl"))
    report = finetune(recipe(objective=objective, data=[str(path)], held_out=[str(path)], sequence_length=25))
    assert report.train_tokens == 12 * 9 and report.steps == 4
    assert all(np.isfinite(entry["loss"]) for entry in report.log)
    (loss,) = report.held_out_next_token_loss_nats.values()
    assert 0 < loss < 10
