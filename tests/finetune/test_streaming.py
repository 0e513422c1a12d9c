"""Streams: another order in every epoch, decided by the seed, and a stopped run finds its place again."""

import json

import pytest
from datasets import Dataset

from finetune import finetune
from finetune.data import stream_documents
from finetune.packing import EndlessRows, StreamedRows
from finetune.sources import Source
from finetune.trainer import ObjectiveTrainer
from tests.finetune.conftest import TEXTS

LETTERS = "abcdefghijklmnopqrst"


@pytest.fixture
def sources(tmp_path):
    """``sources(kind)``: one file of twenty texts, or two of them, or a table."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": c}) + "\n" for c in LETTERS))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": c.upper()}) + "\n" for c in LETTERS[:5]))
    Dataset.from_dict({"text": list(LETTERS)}).to_parquet(str(tmp_path / "a.parquet"))
    kinds = {"one": ["a.jsonl"], "table": ["a.parquet"], "two": ["a.jsonl", "b.jsonl"]}
    return lambda kind: [Source(str(tmp_path / name)) for name in kinds[kind]]


def said(documents, tokenizer) -> str:
    return "".join(tokenizer.decode(document["input_ids"], skip_special_tokens=True) for document in documents)


@pytest.mark.parametrize("kind", ["one", "table", "two"])
def test_every_epoch_has_an_order_of_its_own(sources, tokenizer, kind):
    stream, epochs = stream_documents(sources(kind), tokenizer, 3), []
    for epoch in range(4):
        stream.set_epoch(epoch)
        epochs.append(said(stream, tokenizer))
        assert said(stream, tokenizer) == epochs[-1], "each epoch is the same each time"
    orders = ["".join(c for c in epoch if c in LETTERS) for epoch in epochs]
    assert len(set(orders)) == 4 and all(set(order) == set(LETTERS) for order in orders)
    if kind != "two":
        assert all(len(order) == 20 for order in orders)
    again, other = (stream_documents(sources(kind), tokenizer, seed) for seed in (3, 4))
    again.set_epoch(2)
    other.set_epoch(2)
    assert said(again, tokenizer) == epochs[2] != said(other, tokenizer)


def test_a_source_that_starts_again_within_an_epoch_is_shuffled_again(sources, tokenizer):
    epoch = said(stream_documents(sources("two"), tokenizer, 0), tokenizer)
    short = "".join(c for c in epoch if c.isupper())
    rounds = [short[i : i + 5] for i in range(0, len(short) - 4, 5)]
    assert len(rounds) > 2 and all(set(one) == set("ABCDE") for one in rounds) and len(set(rounds)) > 1


def test_rows_follow_without_an_end(sources, tokenizer):
    rows = StreamedRows(stream_documents(sources("one"), tokenizer, 0), 4)  # two texts and their ends
    endless = iter(EndlessRows(rows))
    epochs = [said([next(endless) for _ in range(10)], tokenizer) for _ in range(3)]
    assert all(set(epoch) == set(LETTERS) for epoch in epochs) and len(set(epochs)) == 3
    assert said([next(endless) for _ in range(3)], tokenizer)  # the fourth
    for epoch, expected in enumerate(epochs):
        rows.set_epoch(epoch)
        assert said(rows, tokenizer) == expected


def test_a_stream_without_anything_to_learn_is_named(tokenizer, tmp_path):
    (tmp_path / "silent.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    stream = stream_documents([Source(str(tmp_path / "silent.jsonl"), eos=False)], tokenizer, 0)
    with pytest.raises(ValueError, match="data holds no token to learn"):
        next(iter(EndlessRows(StreamedRows(stream, 4))))


@pytest.fixture
def batches(recipe, monkeypatch):
    """``batches(name, stop=None, **training)``: the tokens of every micro-batch that a streamed run trains on."""
    original = ObjectiveTrainer.training_step

    class Killed(Exception):
        pass

    def run(output: str, stop: int | None = None, **training) -> list:
        seen = []

        def step(self, model, inputs, *arguments):
            if self.state.global_step == stop:
                raise Killed
            seen.append(inputs["input_ids"].tolist())
            return original(self, model, inputs, *arguments)

        monkeypatch.setattr(ObjectiveTrainer, "training_step", step)
        given = {"max_steps": 30, "save_steps": 7, "logging_steps": 30, **training}
        chosen = recipe(output=output, objective="ntp", streaming=True, sequence_length=64, training=given)
        if stop is None:
            finetune(chosen)
        else:
            with pytest.raises(Killed):
                finetune(chosen)
        return seen

    return run


EPOCH = sum(len(text) + 1 for text in TEXTS) // (2 * 64)  # batches, all of whose rows are full


def test_no_batch_comes_again_with_the_next_epoch(batches):
    """The texts are few, but their order is not."""
    seen = batches("whole")
    assert len(seen) == 30 > 2 * EPOCH
    assert len({json.dumps(batch) for batch in seen}) == 30


@pytest.mark.parametrize(("accumulation", "stop"), [(1, EPOCH + 4), (1, 2 * EPOCH + 4), (2, EPOCH + 4)])
def test_a_killed_stream_goes_on_where_it_was(batches, accumulation, stop):
    """Also behind its first epoch, from the last checkpoint on."""
    whole = batches("whole", gradient_accumulation_steps=accumulation)
    first = batches("killed", stop=stop, gradient_accumulation_steps=accumulation)
    assert first == whole[: stop * accumulation]
    saved = stop // 7 * 7 * accumulation
    assert batches("killed", gradient_accumulation_steps=accumulation) == whole[saved:]


def test_the_seed_of_the_data_decides(batches):
    first, same, other = (batches(f"run{i}", max_steps=5, data_seed=seed) for i, seed in enumerate((1, 1, 2)))
    assert first == same != other
