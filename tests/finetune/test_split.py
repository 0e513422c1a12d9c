"""No held-out text is trained on, however sources are weighted, repeated, copied and named."""

import json
import string
from itertools import islice

import pytest
from datasets import Dataset

from finetune.data import load_documents
from finetune.packing import PackedDataset
from finetune.recipe import Recipe
from finetune.sources import Source
from finetune.split import hold_out, read_data

LENGTH = 16
# Every text is one character over and over, so that each piece of it tells which it is; with EOS it fills a row.
TEXTS = [letter * (LENGTH - 1) for letter in string.ascii_letters[:40]]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """``recipe(*sources, **keys)``, in a folder with texts.jsonl and other files of the same texts."""
    monkeypatch.chdir(tmp_path)
    records = {
        "texts": [{"text": text} for text in TEXTS],
        "twice": [{"text": text} for text in TEXTS * 2],
        "half": [{"text": text} for text in TEXTS[:20]],
        "spaced": [{"text": f" {text[:-2]}\n"} if i % 2 else {"text": text} for i, text in enumerate(TEXTS)],
        "pairs": [{"prompt": text[:4], "completion": text[4:]} for text in TEXTS],
        "cut": [{"text": text, "complete": False} for text in TEXTS],
        "first": [{"text": text} for text in TEXTS[:10]],
    }
    for name, lines in records.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Dataset.from_list(records["texts"]).to_parquet(str(tmp_path / "texts.parquet"))
    (tmp_path / "texts.json").write_text(json.dumps(records["texts"]))

    def make(*sources, **keys) -> Recipe:
        given = {"output": "out", "model": "m", "objective": "ntp", "sequence_length": LENGTH, "data": sources}
        return Recipe.from_dict(given | keys)

    return make


def texts(rows, tokenizer) -> set[str]:
    """The characters of which the texts in ``rows`` are made."""
    return set(
        tokenizer.decode([token for row in rows for token in row["input_ids"].tolist()], skip_special_tokens=True)
    )


LAYOUTS = {
    "weight 1": ["texts.jsonl"],
    "weight 2": [{"path": "texts.jsonl", "weight": 2}],
    "weight 3": [{"path": "texts.jsonl", "weight": 3}],
    "weight 2.5": [{"path": "texts.jsonl", "weight": 2.5}],
    "named twice": ["texts.jsonl", "texts.jsonl"],
    "named twice in two ways": ["texts.jsonl", "./texts.jsonl"],
    "with and without eos": ["texts.jsonl", {"path": "texts.jsonl", "eos": False}],
    "twice in one file": ["twice.jsonl"],
    "a part in another file": ["texts.jsonl", {"path": "half.jsonl", "weight": 1.5}],
    "in files of three kinds": ["texts.jsonl", "texts.parquet", "texts.json"],
    "as prompts with completions": ["texts.jsonl", "pairs.jsonl"],
    "cut off": ["texts.jsonl", "cut.jsonl"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_held_out_share_is_not_trained_on(recipe, tokenizer, layout, seed):
    train, held_out = read_data(recipe(*LAYOUTS[layout], held_out=0.2), tokenizer, seed)
    trained, kept = texts(train, tokenizer), texts(held_out["held_out"], tokenizer)
    assert not trained & kept
    assert len(kept) == 8 and len(trained | kept) == 40  # an incomplete last row would lose one
    assert len(train) >= 32 * (len(LAYOUTS[layout]) if layout.startswith("named") else 1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["first.jsonl", "half.jsonl"])
@pytest.mark.parametrize("layout", ["weight 2.5", "named twice in two ways", "in files of three kinds", "cut off"])
@pytest.mark.filterwarnings("ignore:.*documents of data are in held_out")
def test_a_held_out_file_is_not_trained_on(recipe, tokenizer, streaming, name, layout):
    given = {"streaming": streaming, "training": {"max_steps": 5} if streaming else {}}
    chosen = recipe(*LAYOUTS[layout], name, held_out=(name,), **given)
    train, held_out = read_data(chosen, tokenizer, 0)
    kept = texts(held_out[name.partition(".")[0]], tokenizer)
    assert kept == set(string.ascii_letters[: len(kept)]) and len(kept) == (10 if name == "first.jsonl" else 20)
    assert texts(islice(train, 200), tokenizer) == set(string.ascii_letters[len(kept) : 40])


def test_what_is_left_out_is_said(recipe, tokenizer):
    with pytest.warns(UserWarning, match="20 of 80 documents of data are in held_out, too, and are not trained on"):
        read_data(recipe("texts.jsonl", "texts.json", held_out=("first.jsonl",)), tokenizer, 0)
    with pytest.warns(UserWarning, match="held_out: these are the sources of data"):
        train, held_out = read_data(recipe("texts.jsonl", held_out=("./texts.jsonl",)), tokenizer, 0)
    assert len(train) == len(held_out["texts"]) == 40


def test_nothing_left_to_train_on_is_named(recipe, tokenizer, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "only this"}\n' * 3)
    for sources in (["one.jsonl"], [{"path": "one.jsonl", "weight": 4}]):
        with pytest.raises(
            ValueError, match="held_out: a share of 0.2 leaves nothing .* number of different texts .* is 1;"
        ):
            read_data(recipe(*sources, held_out=0.2), tokenizer, 0)
    with pytest.raises(ValueError, match="held_out: all documents of data are held out"):
        read_data(recipe("half.jsonl", held_out=("texts.json",)), tokenizer, 0)
    streamed = recipe("half.jsonl", held_out=("texts.json",), streaming=True, training={"max_steps": 5})
    with pytest.raises(ValueError, match="held_out: all documents of data are held out"):
        next(iter(read_data(streamed, tokenizer, 0)[0]))


def test_a_few_short_texts_make_a_row(recipe, tokenizer, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "ab"}\n{"text": "cd"}\n')
    train, held_out = read_data(recipe("short.jsonl", held_out=0.3), tokenizer, 0)
    assert len(train) == len(held_out["held_out"]) == 1
    assert (train[0]["document_ids"] < 0).tolist() == [False] * 3 + [True] * 13 and train.num_tokens == 3


def test_the_documents_of_a_record_stay_together(tokenizer, tmp_path, monkeypatch):
    """A template that shows earlier turns otherwise makes several documents of one conversation."""
    template = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else 'x' }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template, raising=False)
    roles = ("user", "assistant", "user", "assistant")
    path = tmp_path / "chats.jsonl"
    with path.open("w") as file:
        for letter in string.ascii_letters[:20]:
            messages = [{"role": role, "content": letter * (i + 2)} for i, role in enumerate(roles)]
            file.write(json.dumps({"messages": messages}) + "\n")
    documents = load_documents([Source(str(path), weight=2)], tokenizer, seed=0)
    assert len(documents) == 80
    train, held = hold_out(documents, 0.25)
    letters = [{tokenizer.decode(ids)[0] for ids in part["input_ids"]} for part in (train, held)]
    assert not letters[0] & letters[1] and list(map(len, letters)) == [15, 5] and (len(train), len(held)) == (60, 10)


@pytest.mark.filterwarnings("ignore:.*documents of data are in held_out")
def test_held_out_files_of_one_name_are_reported_apart(recipe, tokenizer, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/half.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[20:25]))
    _, held_out = read_data(
        recipe("texts.jsonl", held_out=("first.jsonl", "half.jsonl", "other/half.jsonl")), tokenizer, 0
    )
    assert {name: len(rows) for name, rows in held_out.items()} == {"first": 10, "half": 20, "half_2": 5}


def test_too_little_to_learn_is_told_of_the_part_that_lacks_it(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    silent = json.dumps({"prompt": "a", "completion": ""}) + "\n"
    (tmp_path / "own.jsonl").write_text('{"text": "ab"}\n')
    (tmp_path / "silent.jsonl").write_text(silent * 3)
    held_out = {"path": "silent.jsonl", "eos": False}
    for data, kept, name in ((held_out, (), "data"), ("own.jsonl", (held_out,), "held_out 'silent'")):
        values = {"output": "out", "data": (data,), "held_out": kept, "objective": "ntp", "model": "m"}
        chosen = Recipe.from_dict(values | {"sequence_length": 8})
        with pytest.raises(ValueError, match=f"^{name} holds no token to learn, in rows of sequence_length 8"):
            read_data(chosen, tokenizer, 0)
    with pytest.raises(ValueError, match="^data holds no token to learn"):
        PackedDataset([], 8)
