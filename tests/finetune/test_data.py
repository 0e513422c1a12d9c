"""Data: every format to the same rows, and only what is to be learned is learned."""

import json
import random

import pytest
import torch
from datasets import Dataset

from finetune.data import Source, load_documents, read_texts, stream_documents
from finetune.packing import PackedDataset, StreamedRows, pack
from tests.finetune.conftest import TEXTS

CHAT = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{{ '<eos>' if m['role'] == 'assistant' else '' }}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
# Turns before the last are shortened, as templates do that hide earlier thoughts.
HIDING = CHAT.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else 'x' }}")


@pytest.fixture
def write(tmp_path):
    def records(*values: dict, name: str = "data.jsonl") -> Source:
        path = tmp_path / name
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return Source(str(path))

    return records


def learned(document, tokenizer) -> str:
    pairs = zip(document["input_ids"], document["loss_mask"], strict=True)
    return tokenizer.decode([token for token, wanted in pairs if wanted])


@pytest.fixture
def chat(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT, raising=False)
    return tokenizer


def test_plain_text_is_learned_whole_and_ends_with_eos(write, tokenizer):
    (document,) = load_documents([write({"text": "a b c"})], tokenizer)
    assert document["input_ids"] == [*tokenizer("a b c")["input_ids"], tokenizer.eos_token_id]
    assert all(document["loss_mask"])


def test_all_files_give_the_same_documents(write, tokenizer, tmp_path):
    text = TEXTS[0]
    lines = load_documents([write({"text": text})], tokenizer)[:]
    (tmp_path / "one.txt").write_text(text)
    assert load_documents([Source(str(tmp_path / "one.txt"))], tokenizer)[:] == lines
    Dataset.from_dict({"text": [text]}).to_parquet(str(tmp_path / "one.parquet"))
    assert load_documents([Source(str(tmp_path / "one.parquet"))], tokenizer)[:] == lines


def test_texts_alone_can_be_read(write):
    first, second = write({"text": "a", "other": 1}, {"text": "b"}), write({"text": "c"}, name="more.jsonl")
    assert read_texts([first.path, second.path]) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="none.jsonl' has no column 'text'"):
        read_texts([write({"prompt": "a"}, name="none.jsonl").path])


def test_only_the_completion_is_learned(write, tokenizer):
    (document,) = load_documents([write({"prompt": "the cat", "completion": " ate"})], tokenizer)
    assert learned(document, tokenizer) == " ate<eos>"
    assert tokenizer.decode(document["input_ids"]) == "the cat ate<eos>"


def test_only_turns_of_the_assistant_are_learned(write, chat):
    turns = [("user", "q1"), ("assistant", "r1"), ("user", "q2"), ("assistant", "r2"), ("user", "q3")]
    messages = [{"role": role, "content": text} for role, text in turns]
    (document,) = load_documents([write({"messages": messages})], chat)
    assert learned(document, chat) == "r1<eos>r2<eos>"
    # Whatever is no piece of the vocabulary becomes <pad>, so compare tokens with the template's text.
    whole = chat.apply_chat_template(messages[:4], tokenize=False)
    assert document["input_ids"] == chat(whole, add_special_tokens=False)["input_ids"]


def test_a_template_that_rewrites_earlier_turns_gives_a_document_for_each(write, chat, monkeypatch):
    monkeypatch.setattr(chat, "chat_template", HIDING)
    turns = [("user", "q"), ("assistant", "long"), ("user", "p"), ("assistant", "r")]
    messages = [{"role": role, "content": text} for role, text in turns]
    documents = load_documents([write({"messages": messages})], chat)
    assert [learned(document, chat) for document in documents] == ["long<eos>", "r<eos>"]
    assert "x" in chat.decode(documents[1]["input_ids"]) and "long" not in chat.decode(documents[1]["input_ids"])


def test_order_depends_on_the_seed_alone(write, tokenizer):
    source = write(*({"text": text} for text in TEXTS))
    orders = [load_documents([source], tokenizer, seed)["input_ids"] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    shuffled = list(range(len(TEXTS)))
    random.Random(1).shuffle(shuffled)
    kept = load_documents([source], tokenizer)["input_ids"]
    assert orders[0] == [kept[i] for i in shuffled]


def test_weights_repeat_and_thin_out(write, tokenizer):
    many = write(*({"text": f"{i} a"} for i in range(40)), name="many.jsonl")
    few = write(*({"text": f"{i} b"} for i in range(10)), name="few.jsonl")
    sources = [Source(many.path, weight=0.5), Source(few.path, weight=2.5)]
    texts = [tokenizer.decode(ids) for ids in load_documents(sources, tokenizer, seed=0)["input_ids"]]
    assert sum("a" in text for text in texts) == 20 and sum("b" in text for text in texts) == 25
    assert len({text for text in texts if "a" in text}) == 20


def test_streams_are_the_same_each_time_and_mixed_by_weight(write, tokenizer):
    sources = [
        Source(write(*({"text": "aaaa"} for _ in range(300)), name="a.jsonl").path, weight=3.0),
        Source(write(*({"text": "bbbb"} for _ in range(300)), name="b.jsonl").path),
    ]
    rows = [[item["input_ids"] for item in StreamedRows(stream_documents(sources, tokenizer, 0), 32)] for _ in "ab"]
    assert all(map(torch.equal, *rows)) and len(rows[0]) > 30
    first = torch.cat(rows[0][:30])
    a, b = ((first == tokenizer(letter)["input_ids"][0]).sum() for letter in "ab")
    assert 2 < a / b < 4.5


def test_rows_are_cut_from_whole_documents():
    documents = [{"input_ids": [5] * 5, "loss_mask": [True] * 5}, {"input_ids": [6] * 9, "loss_mask": [False] * 9}] * 2
    rows = PackedDataset(documents, 4)
    first, second = rows[0], rows[1]
    assert first["input_ids"].dtype == torch.int64 and first["document_ids"].tolist() == [0] * 4
    assert second["input_ids"].tolist() == [5, 6, 6, 6] and second["document_ids"].tolist() == [0, 1, 1, 1]
    assert second["loss_mask"].tolist() == [True, False, False, False]
    # Of 28 tokens in 7 rows three rows hold prompts only: tokens 8..11, 20..23 and 24..27.
    assert len(rows) == 4
    assert len(list(pack(documents * 2000, 4))) == 4 * 2000  # over the border between chunks


def test_mistakes_are_named(write, tokenizer, tmp_path):
    def refuse(source, match):
        with pytest.raises(ValueError, match=match):
            load_documents([source], tokenizer)

    refuse(Source(str(tmp_path / "none.jsonl")), "none.jsonl' does not exist")
    refuse(write({"text": "a"}, {"txt": "b"}, name="bad.jsonl"), "record 2 of .*bad.jsonl' has no 'text'")
    refuse(write({"txt": "b"}, name="other.jsonl"), "needs a column 'text'.*it has 'txt'")
    refuse(write({"messages": [{"role": "user", "content": "a"}]}, name="chat.jsonl"), "chat template")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    refuse(Source(str(tmp_path / "broken.jsonl")), "broken.jsonl' cannot be read")
    (tmp_path / "table.csv").write_text("text\na\n")
    refuse(Source(str(tmp_path / "table.csv")), "must end in one of .jsonl")
    with pytest.raises(ValueError, match="weight.*got -1"):
        Source("a.jsonl", weight=-1)
    with pytest.raises(ValueError, match="sequence_length 32"):
        PackedDataset([{"input_ids": [3] * 40, "loss_mask": [False] * 40}], 32)
